"""Accelerate's mixed precision, which keeps a forward on the model itself: before adapting, after it, and undone."""

import pytest
import torch
from tiny_models import adapt, assert_same, build_language_model, snapshot, stir
from torch import Tensor, nn

from fast_prompt.methods import APTConfig, DASConfig, DVPConfig
from fast_prompt.tuning import get_fast_prompt_model

accelerate = pytest.importorskip("accelerate")

VISUAL = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(3))
APT = APTConfig(num_prompts=2, modules_to_save=["pooler"])
DVP = DVPConfig(layer=1, visual_width=16)

# By what they adapt: those of the second kind replace the forward of the model itself.
WITHIN = {"APT": APT, "DAS": DASConfig(skipped=[1], width=4, skip_width=4)}
ITSELF = {
    "DVP": DVP,
    "DVP and a head": DVPConfig(layer=1, visual_width=16, num_answers=3, adapter_width=4),
    "DVP and APT": [DVP, APT],
}
CONFIGS = WITHIN | ITSELF


def base() -> nn.Module:
    return build_language_model("bert")[0]


INPUTS = build_language_model("bert")[1]


@pytest.fixture
def accelerator():
    """Bfloat16; it is one for the whole process, which is given back without."""
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    yield accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


@torch.no_grad()
def output(model: nn.Module, *, visual: Tensor | None = None) -> Tensor:
    return model(**INPUTS, **({} if visual is None else {"visual_embeds": visual}))[0]


def visual_for(name: str) -> Tensor | None:
    return VISUAL if "DVP" in name else None


def assert_mixed(found: Tensor, expected: Tensor) -> None:
    """Equal but for bfloat16, and not just equal: it was computed in that."""
    assert not torch.equal(found, expected)
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_prepared_model_is_unwrapped_as_it_was_adapted(accelerator, name, keep):
    model = adapt(base(), CONFIGS[name])
    expected = output(model, visual=visual_for(name))
    prepared = accelerator.prepare(model)
    assert_mixed(output(prepared, visual=visual_for(name)), expected)
    unwrapped = accelerator.unwrap_model(prepared, keep_fp32_wrapper=keep)
    found = output(unwrapped, visual=visual_for(name))
    if keep:
        assert_mixed(found, expected)
    else:
        assert torch.equal(found, expected)
        unwrapped.add_adapter("second", DASConfig(skipped=[2], width=4, skip_width=4))
        unwrapped.set_adapter("second")
        assert not torch.equal(output(unwrapped), expected)


@pytest.mark.parametrize("order", ["revert", "unwrap and revert", "revert and unwrap"])
@pytest.mark.parametrize("name", CONFIGS)
def test_revert_of_a_prepared_model_gives_the_base(accelerator, name, order):
    model = base()
    plain, base_class = output(model), type(model)
    prepared = accelerator.prepare(adapt(model, CONFIGS[name]))
    output(prepared, visual=visual_for(name))
    for step in order.split(" and "):
        if step == "revert":
            prepared.revert()
        else:
            accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    assert type(model) is base_class
    if "unwrap" in order:
        assert torch.equal(output(model), plain)
    else:
        assert_mixed(output(model), plain)
    again = adapt(model, CONFIGS[name])
    if name in ITSELF:
        assert not torch.equal(output(again, visual=VISUAL), output(again, visual=2 * VISUAL))


@pytest.mark.parametrize("name", WITHIN)
def test_what_lies_within_is_adapted_after_preparing(accelerator, name):
    model = base()
    expected = output(adapt(base(), CONFIGS[name]))
    prepared = accelerator.prepare(model)
    adapt(prepared, CONFIGS[name])
    assert_mixed(output(prepared), expected)
    assert_mixed(output(prepared.revert()), output(base()))


@pytest.mark.parametrize("first", [None, *WITHIN])
@pytest.mark.parametrize("name", ITSELF)
def test_a_prepared_model_itself_is_not_adapted_unseen(accelerator, name, first):
    """The forward that accelerate keeps would go on without a look at the image."""
    model = base() if first is None else adapt(base(), CONFIGS[first])
    prepared = accelerator.prepare(model)
    before = snapshot(prepared)
    with pytest.raises(ValueError, match="already replaced by something else"):
        if first is None:
            get_fast_prompt_model(prepared, CONFIGS[name])
        else:
            prepared.add_adapter("second", CONFIGS[name])
    assert_same(before, snapshot(prepared))


@pytest.mark.parametrize(("first", "name"), [("DVP", name) for name in CONFIGS] + [("DVP and APT", "DVP and a head")])
def test_adapters_come_later_where_accelerate_keeps_a_forward_of_ours(accelerator, first, name):
    prepared = accelerator.prepare(adapt(base(), CONFIGS[first]))
    torch.manual_seed(2)
    prepared.add_adapter("second", CONFIGS[name])
    prepared.set_adapter("second")
    stir(prepared)
    expected = adapt(base(), CONFIGS[first])
    torch.manual_seed(2)
    expected.add_adapter("second", CONFIGS[name])
    expected.set_adapter("second")
    stir(expected)
    assert_mixed(output(prepared, visual=visual_for(name)), output(expected, visual=visual_for(name)))
    prepared.set_adapter("default")
    prepared.delete_adapter("second")
    assert not torch.equal(output(prepared, visual=VISUAL), output(prepared, visual=2 * VISUAL))


@pytest.mark.parametrize("name", CONFIGS)
def test_hooks_that_were_taken_off_leave_a_forward_that_follows(name):
    """Accelerate then leaves the class's forward of that day on every instance."""
    expected = output(adapt(base(), CONFIGS[name]), visual=visual_for(name))
    model = base()
    for module in list(model.modules()):
        accelerate.hooks.add_hook_to_module(module, accelerate.hooks.ModelHook())
    accelerate.hooks.remove_hook_from_submodules(model)
    adapt(model, CONFIGS[name])
    assert torch.equal(output(model, visual=visual_for(name)), expected)
    for module in list(model.modules()):
        accelerate.hooks.add_hook_to_module(module, accelerate.hooks.ModelHook())
    accelerate.hooks.remove_hook_from_submodules(model)
    assert torch.equal(output(model, visual=visual_for(name)), expected)
    assert torch.equal(output(model.revert()), output(base()))
