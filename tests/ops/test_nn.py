"""``fast_prompt.nn``: what the modules compute and refuse."""

import subprocess
import sys

import pytest
import torch

from fast_prompt import reference
from fast_prompt.nn import PromptDiffusion


def test_initial_values_are_the_papers():
    torch.manual_seed(0)
    module = PromptDiffusion(64, 300, rank=8)
    assert module.prompts.shape == (300, 64)
    assert module.prompts.std().item() == pytest.approx(0.02, rel=0.05)
    assert module.key_down.shape == (8, 64)
    assert module.key_down.std().item() == pytest.approx(1, rel=0.1)
    assert module.key_up.shape == (64, 8)
    assert not module.key_up.any()
    assert module.log_scale.shape == ()
    assert module.log_scale == 0
    assert torch.equal(module.keys(), module.prompts)


@pytest.mark.parametrize("activation", ["relu", "softmax"])
@pytest.mark.parametrize("row_weight", ["max", "none"])
def test_forward_and_gradients_are_the_references(activation, row_weight):
    torch.manual_seed(0)
    module = PromptDiffusion(8, 5, rank=2, activation=activation, row_weight=row_weight, dtype=torch.float64)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    inputs = [torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    output = module(*inputs)
    keys = module.prompts + module.prompts @ module.key_down.T @ module.key_up.T
    expected = reference.prompt_diffusion(
        *inputs, module.prompts, keys, module.log_scale, activation=activation, row_weight=row_weight
    )
    torch.testing.assert_close(output, expected)
    upstream = torch.randn_like(output)
    leaves = [*inputs, *module.parameters()]
    for got, want in zip(
        torch.autograd.grad(output, leaves, upstream), torch.autograd.grad(expected, leaves, upstream), strict=True
    ):
        torch.testing.assert_close(got, want)


def test_dropout_acts_in_training_only_and_follows_torchs_seed():
    torch.manual_seed(0)
    module = PromptDiffusion(8, 16, dropout=0.5)
    torch.nn.init.normal_(module.prompts)
    hidden, source = torch.randn(2, 4, 8), torch.randn(2, 4, 8)

    def draw(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return module(hidden, source)

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    trained = draw(1)
    module.eval()
    assert torch.equal(draw(1), draw(2))
    assert not torch.equal(draw(1), trained)


def test_autocast_keeps_float32_weights_and_their_gradients():
    torch.manual_seed(0)
    module = PromptDiffusion(16, 6)
    source = torch.randn(2, 3, 16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert module.keys().dtype == torch.float32
        output = module(torch.randn(2, 3, 16), source)
    assert output.dtype == torch.bfloat16
    output.sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in module.parameters())
    assert source.grad.dtype == torch.float32


def test_scale_that_is_not_learned_never_trains():
    module = PromptDiffusion(8, 4, learn_scale=False)
    assert not module.log_scale.requires_grad
    module.requires_grad_(False).requires_grad_(True)
    assert module.prompts.requires_grad
    assert not module.log_scale.requires_grad
    assert PromptDiffusion(8, 4).log_scale.requires_grad


BAD_SETTINGS = {
    "dim": [0, -1, 2.0, True],
    "num_prompts": [0, -3, 1025, 4.0, True, float("nan"), None],
    "rank": [0, 1.5, False],
    "activation": ["gelu", None, 3],
    "row_weight": ["mean", ["max"]],
    "dropout": [1.0, -0.1, float("nan"), True, "0.1"],
    "learn_scale": [1, None],
}


@pytest.mark.parametrize(("field", "value"), [(f, v) for f, values in BAD_SETTINGS.items() for v in values])
def test_bad_settings_are_named(field, value):
    with pytest.raises(ValueError, match=f"^{field}: expected .*got "):
        PromptDiffusion(**{"dim": 8, "num_prompts": 4, field: value})


def test_modules_and_config_need_no_transformers():
    code = (
        "import sys; sys.modules['transformers'] = None; sys.modules['peft'] = None\n"
        "from fast_prompt.nn import PromptDiffusion; from fast_prompt.methods import APTConfig; import torch\n"
        "PromptDiffusion(8, 4)(torch.randn(1, 2, 8), torch.randn(1, 2, 8)); APTConfig(num_prompts=3)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
