"""``fold`` and ``unfold``: the same output, two wide products, and everything given back."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiny_models import MODELS, WIDTH, assert_same, build, run, snapshot, stir
from torch import nn

from fast_prompt.methods import APTConfig
from fast_prompt.nn import FoldedPromptDiffusion, PromptDiffusion
from fast_prompt.tolerances import TOLERANCES
from fast_prompt.tuning import FastPromptModel, get_fast_prompt_model


def adapted(name: str, **settings) -> tuple[nn.Module, dict]:
    model, inputs = build(name)
    get_fast_prompt_model(model, APTConfig(**{"num_prompts": 5} | settings))
    stir(model)
    return model, inputs


def error(value: torch.Tensor, expected: torch.Tensor) -> float:
    return ((value - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("activation", ["relu", "softmax"])
@pytest.mark.parametrize("row_weight", ["max", "none"])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_folded_is_unfolded(name, activation, row_weight):
    model, inputs = adapted(name, activation=activation, row_weight=row_weight)
    before, expected = snapshot(model), run(model, inputs)
    assert model.fold() is model
    assert model.is_folded
    assert model.fold() is model
    assert error(run(model, inputs), expected) < TOLERANCES[torch.float32]
    assert model.unfold() is model
    assert_same(before, snapshot(model))
    assert torch.equal(run(model, inputs), expected)
    assert model.unfold() is model


def folded_modules(model: nn.Module) -> list[FoldedPromptDiffusion]:
    return [module for module in model.modules() if isinstance(module, FoldedPromptDiffusion)]


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_two_products_do_all_the_work_of_an_attentions_projections(name):
    """Routing: the op does not run while folded, nor any product for keys and values that read the queries' input."""
    model, inputs = adapted(name)
    calls = []
    for module in model.modules():
        if isinstance(module, PromptDiffusion):
            module.register_forward_hook(lambda *_: calls.append("op"))
    model.fold()
    folded = folded_modules(model)
    assert len(folded) == len(model.targeted_module_names)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run(model, inputs)
    assert calls == []
    # Self-attention takes two products, cross-attention two more; the other linear layers run once each.
    products = sum(2 if len(module.widths) == 4 else 4 for module in folded)
    others = sum(isinstance(module, nn.Linear) for module in model.modules()) - 4 * len(folded)
    assert sum(event.name == "aten::linear" for event in profile.events()) == products + others
    model.unfold()
    run(model, inputs)
    assert len(calls) == len(folded)


@torch.no_grad()
def test_an_interrupted_pass_leaves_nothing_behind():
    """Slices of a pass that failed between the products never answer in the next."""
    model, inputs = adapted("vit")
    expected = run(model, inputs)
    model.fold()
    attention = model.vit.layers[0].attention
    source = torch.randn(2, 5, WIDTH)
    attention.q_proj(source)
    source.mul_(2)
    own = nn.functional.linear(source, attention.k_proj.weight, attention.k_proj.bias)
    attention.q_proj(source)
    torch.testing.assert_close(attention.k_proj(source), own)
    torch.testing.assert_close(attention.k_proj(source.clone()), own)
    assert error(run(model, inputs), expected) < TOLERANCES[torch.float32]
    call = folded_modules(model)[0]._call()
    assert call.source is None
    assert call.slices == ()


@torch.no_grad()
def test_eight_threads_share_a_folded_model():
    """Each has its own answer, bit for bit, also from a copy that was made in the middle of a call."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model, _ = adapted("vit")
        model.fold()
        images = [torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(seed)) for seed in range(64)]
        right = [model(pixel_values=image).logits for image in images]
        model.vit.layers[0].attention.q_proj(torch.randn(2, 5, WIDTH))
        for shared in (model, copy.deepcopy(model)):
            with ThreadPoolExecutor(8) as pool:
                answers = list(pool.map(lambda image, shared=shared: shared(pixel_values=image).logits, images * 4))
            assert all(torch.equal(*pair) for pair in zip(answers, right * 4, strict=True))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@torch.no_grad()
def test_every_attention_implementation_stays_the_users(implementation):
    model, inputs = adapted("bert")
    model.set_attn_implementation(implementation)
    expected = run(model, inputs)
    model.fold()
    assert error(run(model, inputs), expected) < TOLERANCES[torch.float32]


@pytest.mark.parametrize("name", ["vit", "bert", "vilt"])
@torch.no_grad()
def test_attention_maps_are_still_given(name):
    model, inputs = adapted(name)
    if name != "vilt":
        model.set_attn_implementation("eager")
    torch.manual_seed(0)
    expected = model(**inputs, output_attentions=True)
    model.fold()
    torch.manual_seed(0)
    output = model(**inputs, output_attentions=True)
    assert error(output[0], expected[0]) < TOLERANCES[torch.float32]
    for folded, unfolded in zip(output.attentions, expected.attentions, strict=True):
        torch.testing.assert_close(folded, unfolded)


@pytest.mark.parametrize("name", ["vit", "bert", "vilt"])
@torch.no_grad()
def test_folding_under_autocast_and_in_half(name):
    model, inputs = adapted(name)
    expected = run(model, inputs)
    model.fold()
    with torch.autocast("cpu", torch.bfloat16):
        assert error(run(model, inputs).float(), expected) < 0.1
    model.unfold().to(torch.bfloat16)
    half = {key: value.to(torch.bfloat16) if value.is_floating_point() else value for key, value in inputs.items()}
    unfolded = run(model, half).float()
    model.fold()
    assert error(run(model, half).float(), unfolded) < 0.1


@torch.no_grad()
def test_one_attention_in_bfloat16_is_within_the_tolerance():
    torch.manual_seed(0)
    linears = [nn.Linear(64, 64).to(torch.bfloat16) for _ in range(4)]
    adapter = PromptDiffusion(64, 20)
    nn.init.normal_(adapter.prompts, std=0.1)
    nn.init.normal_(adapter.key_up, std=0.1)
    folded = FoldedPromptDiffusion(adapter, linears[0], linears[1:3], linears[3])
    source, heads = (torch.randn(2, 9, 64).to(torch.bfloat16) for _ in range(2))
    folded.project_query(source)
    output = folded.project_output(heads).double()
    linear = linears[3].double()
    expected = adapter.double()(linear(heads.double()), source.double())
    assert error(output, expected) < TOLERANCES[torch.bfloat16]


def test_training_while_folded_is_refused():
    model, inputs = adapted("vit")
    model.fold()
    with pytest.raises(RuntimeError, match=r"call unfold\(\) before you train"):
        model.train()
    assert not model.training
    model.vit.layers[0].train()
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"call unfold\(\) to train"):
        run(model, inputs)
    model.eval()
    inputs["pixel_values"].requires_grad_()
    with pytest.raises(RuntimeError, match=r"run under torch.no_grad\(\)"):
        run(model, inputs)
    with torch.no_grad():
        run(model, inputs)
    model.unfold().train()
    run(model, inputs).sum().backward()


def test_a_model_in_training_mode_is_not_folded():
    model, _ = adapted("vit")
    with pytest.raises(RuntimeError, match=r"call model.eval\(\) first"):
        model.train().fold()
    assert not model.is_folded
    model.eval()
    with model.disable_adapter(), pytest.raises(RuntimeError, match="disabled"):
        model.fold()


def test_adapters_stay_as_they_are_while_folded(tmp_path):
    model, _ = adapted("vit")
    model.add_adapter("second", APTConfig(num_prompts=2))
    model.save_pretrained(tmp_path / "before")
    state = model.state_dict()
    model.fold()
    for attempt in (
        lambda: model.set_adapter("second"),
        lambda: model.add_adapter("third", APTConfig()),
        lambda: model.delete_adapter("second"),
        lambda: model.load_adapter(tmp_path / "before", "default"),
        lambda: model.load_state_dict(state),
        lambda: model.disable_adapter().__enter__(),
    ):
        with pytest.raises(RuntimeError, match=r"the model is folded.*call unfold\(\)"):
            attempt()
    assert list(model.state_dict()) == list(state)
    model.save_pretrained(tmp_path / "folded")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "folded" / name).read_bytes()


def test_projections_that_are_not_plain_are_refused_and_nothing_changes():
    class Scaled(nn.Linear):
        def forward(self, source: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(source)

    model, _ = adapted("vit")
    model.vit.layers[1].attention.v_proj = Scaled(WIDTH, WIDTH)
    model.eval()
    before = snapshot(model)
    with pytest.raises(ValueError, match="layers.1.attention.v_proj: cannot fold Scaled, only a plain nn.Linear"):
        model.fold()
    assert not model.is_folded
    assert_same(before, snapshot(model))


@torch.no_grad()
def test_folding_again_takes_the_new_weights(tmp_path):
    model, inputs = adapted("vit")
    model.fold()
    first = run(model, inputs)
    model.unfold()
    for name, parameter in model.named_parameters():
        if name.endswith("prompts"):
            parameter.mul_(2)
    expected = run(model, inputs)
    model.fold()
    assert error(run(model, inputs), expected) < TOLERANCES[torch.float32]
    assert not torch.allclose(run(model, inputs), first)
    model.save_pretrained(tmp_path)
    loaded = FastPromptModel.from_pretrained(build("vit")[0], tmp_path).fold()
    assert torch.equal(run(loaded, inputs), run(model, inputs))


@pytest.mark.parametrize("folded", [False, True])
@torch.no_grad()
def test_decoding_with_a_cache_is_decoding_at_once(folded):
    """The step by step keys and values come from the same wide product, the cross-attention's from the cache."""
    model, inputs = adapted("bert_decoder")
    inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
    expected = run(model, inputs)
    model = model.fold() if folded else model
    first = {**inputs, "input_ids": inputs["input_ids"][:, :6], "attention_mask": inputs["attention_mask"][:, :6]}
    output = model(**first, use_cache=True)
    assert error(output[0], expected[:, :6]) < TOLERANCES[torch.float32]
    last = {**inputs, "input_ids": inputs["input_ids"][:, 6:]}
    output = model(**last, past_key_values=output.past_key_values, use_cache=True)
    assert error(output[0], expected[:, 6:]) < TOLERANCES[torch.float32]
