"""Training speed on one GPU: oslo beside TRL, TRL with Liger's kernels, and Unsloth, on the same documents."""
