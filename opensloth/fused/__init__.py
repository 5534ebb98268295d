"""The fast path: decoder models of the Llama kind, forward and backward by hand, few and large kernels."""
