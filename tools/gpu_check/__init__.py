"""Everything to be known of the kernels on a GPU, in one command: ``make gpu-check``.

For a checkout on a bare CUDA machine, with torch, triton, nvcc and ninja, and no network: nothing is installed. Each
step of ``steps.steps`` runs in a process and a time limit of its own, so that none stops another; the record is
rewritten after each. ``page`` makes docs/gpu.md of the records.
"""
