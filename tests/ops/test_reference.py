"""Proof tier 1: the definitions against float64, finite differences and published vectors."""

import pytest
import torch

from fast_prompt import reference
from fast_prompt.reference.philox import dropout_mask, dropout_threshold, philox


def random_arguments(n=5, d=6, p=4, dtype=torch.float64, requires_grad=False, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype).requires_grad_(requires_grad)

    return draw(2, n, d), draw(2, n, d), draw(p, d), draw(p, d), draw()


def test_philox_gives_the_published_words():
    # Random123's known answers for counters 0 and key 0; and a plain-integer run of the ten rounds for the rest.
    assert philox(torch.tensor(0), torch.tensor([0])).tolist() == [0x6627E8D5]

    def plain(seed, index):
        counter = [index & 0xFFFFFFFF, index >> 32, 0, 0]
        key = [seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF]
        for _ in range(10):
            first, second = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
            counter = [
                (second >> 32) ^ counter[1] ^ key[0],
                second & 0xFFFFFFFF,
                (first >> 32) ^ counter[3] ^ key[1],
                first & 0xFFFFFFFF,
            ]
            key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
        return counter[0]

    indices = [0, 1, 12345, 2**32 - 1, 2**32, 2**40 + 7]
    for seed in (0, 1, -1, 2**62 + 99, -(2**63)):
        assert philox(torch.tensor(seed), torch.tensor(indices)).tolist() == [plain(seed, i) for i in indices]


def test_dropout_drops_the_asked_share_and_depends_on_the_seed():
    device = torch.device("cpu")
    kept = dropout_mask(torch.tensor(3), 1000, 200, 0.3, device)
    assert abs(kept.double().mean().item() - 0.7) < 0.005
    assert not torch.equal(kept, dropout_mask(torch.tensor(4), 1000, 200, 0.3, device))
    assert torch.equal(kept[:10], dropout_mask(torch.tensor(3), 10, 200, 0.3, device))
    assert dropout_threshold(0.5) == 2**31


@pytest.mark.parametrize("activation", ["relu", "softmax"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_gradcheck_with_row_weight_none(activation, dropout_p):
    arguments = random_arguments(requires_grad=True)

    def run(*tensors):
        return reference.prompt_diffusion(
            *tensors, activation=activation, row_weight="none", dropout_p=dropout_p, seed=7
        )

    assert torch.autograd.gradcheck(run, arguments)


@pytest.mark.parametrize("activation", ["relu", "softmax"])
def test_row_maximum_is_a_constant_for_the_gradient(activation):
    arguments = random_arguments(requires_grad=True)
    hidden, source, prompts, keys, log_scale = arguments
    scores = source @ keys.T
    weight = (scores.relu() if activation == "relu" else scores.softmax(-1)).amax(-1, keepdim=True).detach()

    def with_constant_weight(hidden, source, prompts, keys, log_scale):
        scores = source @ keys.T
        diffusion = scores.relu() if activation == "relu" else scores.softmax(-1)
        return log_scale.exp() * (hidden + weight * (diffusion @ prompts))

    assert torch.autograd.gradcheck(with_constant_weight, arguments)
    expected = torch.autograd.grad(with_constant_weight(*arguments).square().sum(), arguments)
    output = reference.prompt_diffusion(*arguments, activation=activation)
    torch.testing.assert_close(output, with_constant_weight(*arguments))
    for actual, wanted in zip(torch.autograd.grad(output.square().sum(), arguments), expected, strict=True):
        torch.testing.assert_close(actual, wanted)


def test_the_papers_formula_by_hand():
    hidden = torch.tensor([[10.0, 20.0]])
    source = torch.tensor([[1.0, 2.0]])
    prompts = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    keys = torch.tensor([[1.0, 1.0], [-1.0, 0.0], [0.0, 1.0]])  # scores 3, -1, 2
    output = reference.prompt_diffusion(hidden, source, prompts, keys, torch.tensor(0.0))
    # w = 3, E = 3·(1,0) + 2·(1,1) = (5,2)
    assert output.tolist() == [[25.0, 26.0]]
    doubled = reference.prompt_diffusion(hidden, source, prompts, keys, torch.tensor(2.0).log())
    torch.testing.assert_close(doubled, 2 * output)


def test_half_activations_are_computed_in_float32():
    wide = random_arguments(n=9, d=64, p=16)
    for dtype in (torch.bfloat16, torch.float16):
        rounded = [tensor.to(dtype) for tensor in wide]
        with torch.autocast("cpu", dtype=torch.bfloat16):  # must not reach inside the definition
            actual = reference.prompt_diffusion(*rounded)
        expected = reference.prompt_diffusion(*(tensor.double() for tensor in rounded))
        assert actual.dtype == dtype
        torch.testing.assert_close(actual, expected.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-3)
