"""The benchmark of ``prompt_compress``: its baselines compute the op, and its counts are right."""

import pytest
import torch

from fast_prompt import parity, reference
from fast_prompt.bench import prompt_compress as bench
from fast_prompt.tolerances import TOLERANCES

CPU = torch.device("cpu")
SHAPE = {"B": 2, "m": 3, "n": 19, "d": 32, "h": 4}


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_eager_baseline_computes_the_op(dtype, backward):
    """A baseline that computes something else would make any speed-up a lie."""
    problem = bench.problem(SHAPE, dtype, CPU)
    expected = parity.evaluate(reference.prompt_compress, problem.double(), backward)
    forms = bench.EAGER | {f"{name} in float32": bench.in_float32(form) for name, form in bench.EAGER.items()}
    for name, form in forms.items():
        errors = parity.compare(parity.evaluate(form, problem, backward), expected)
        assert max(errors.values()) <= TOLERANCES[dtype], (name, errors)


def test_the_tokens_are_frozen():
    problem = bench.problem(SHAPE, torch.float32, CPU)
    assert set(problem.trained) == {"query", "key_weight", "value_weight", "value_bias"}
    assert set(bench.PARAMETERS) <= set(problem.tensors)


def test_flops_and_traffic():
    batch, queries, tokens, width, heads = SHAPE.values()
    with_weights = 2 * batch * queries * width * width
    with_tokens = 2 * batch * heads * queries * tokens * width
    assert bench.flops(SHAPE, backward=False) == 2 * with_weights + 2 * with_tokens
    assert bench.flops(SHAPE, backward=True) == 6 * with_weights + 4 * with_tokens
    visual, query, weights = batch * tokens * width, batch * queries * width, 2 * width * width
    forward = visual + 2 * query + weights
    assert bench.traffic(SHAPE, torch.bfloat16, backward=False) == 2 * forward
    assert bench.traffic(SHAPE, torch.bfloat16, backward=True) == 2 * (2 * forward + query + weights)


def test_products_are_those_of_the_op():
    """A head's queries through its weights, once a head and twice; a sample's products with its tokens."""
    (m, k, n), *of_samples = bench.products(SHAPE)
    folds = 2 * SHAPE["h"] * 2 * m * k * n
    assert folds + SHAPE["B"] * sum(2 * m * k * n for m, k, n in of_samples) == bench.flops(SHAPE, backward=False)
