"""The one tolerance table: what `fast-prompt parity` and the tests allow a backend, by dtype.

An error is ``max|a - b| / max|b|`` against the float64 reference on the same, already rounded, inputs.
float32 leaves room for sums over 1e5 terms; the half types round every stored value once (2**-9 and
2**-12 of it), and what is multiplied once more where it is multiplied in half precision: both types by
tensor cores, bfloat16 by AVX-512's instructions, which take anything below 2**-126 for 0. Elsewhere all
arithmetic is float32. A result beyond its dtype is infinite.

These hold at ordinary numbers. What a softmax of large scores, ReLU at its edge or the norm of nearly equal
numbers makes of a rounding error is larger; tests/ops/test_properties.py measures by it.
"""

import torch
from torch import Tensor

TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """``max|actual - expected| / max|expected|`` in float64.

    Infinity where one is finite and the other is not; equal non-finite values count as equal. For empty
    tensors, or where both are zero, the error is 0.
    """
    if actual.shape != expected.shape:
        raise ValueError(f"actual: expected shape {tuple(expected.shape)}, got {tuple(actual.shape)}")
    if expected.numel() == 0:
        return 0.0
    b = expected.detach().double()
    a = actual.detach().to(b.device).double()
    finite = b.isfinite()
    if not torch.equal(a[~finite].nan_to_num(1.0), b[~finite].nan_to_num(1.0)) or not a[finite].isfinite().all():
        return float("inf")
    difference = (a - b)[finite].abs()
    if difference.numel() == 0 or difference.max() == 0:
        return 0.0
    scale = b[finite].abs().max()
    return float(difference.max() / scale) if scale > 0 else float("inf")
