"""Triton kernels. Nothing here is imported on a machine that does not run them: `operations` chooses."""
