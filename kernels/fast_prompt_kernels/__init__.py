"""Triton kernels, one file an op. Its modules import triton, so `fast_prompt.backends.triton` imports them late."""
