"""DAS: what a model with skipped and kept blocks computes, against the formulas by hand; which settings fit it."""

import dataclasses

import eager_das
import pytest
import torch
from cases import SKIPPING, base, stir
from cases import das as config
from tiny_models import assert_same, run, snapshot
from torch import Tensor, nn
from transformers import DynamicCache, LlamaForCausalLM, StaticCache

from fast_prompt import DASConfig, get_fast_prompt_model, set_skipped, skipped_now
from fast_prompt.models.blocks import find_blocks
from fast_prompt.tolerances import TOLERANCES, relative_error


def adapted(name: str, settings: DASConfig) -> tuple[nn.Module, dict]:
    model, inputs = base(name)
    torch.manual_seed(1)
    get_fast_prompt_model(model, settings)
    stir(model)
    return model, inputs


def outputs(name: str, model: nn.Module, inputs: dict) -> list[Tensor]:
    """What the eager forward of the same name gives."""
    torch.manual_seed(0)
    if name == "clip":
        output = model(**inputs)
        return [output.text_model_output.last_hidden_state, output.vision_model_output.last_hidden_state]
    if name == "llama":
        return [model(inputs["input_ids"]).last_hidden_state]
    if name == "meter":
        output = model.meter(**inputs)
        return [output.last_hidden_state, output.image_hidden_state]
    return [model(**inputs)[0]]


def by_hand(name: str, model: nn.Module, inputs: dict, skipped: set[int]) -> list[Tensor]:
    if name == "llama":
        return [eager_das.llama(model, inputs["input_ids"], skipped)]
    if name == "meter":
        model = model.meter
        text = model._text_features(inputs["input_ids"], inputs["attention_mask"])
        image = model._image_features(inputs["pixel_values"])
        return list(eager_das.meter(model, text, image, inputs["attention_mask"], skipped))
    result = getattr(eager_das, {"bert_decoder": "bert", "roberta": "bert"}.get(name, name))(model, inputs, skipped)
    return list(result) if name == "clip" else [result]


def real_rows(name: str, inputs: dict, value: Tensor) -> Tensor:
    """CLIP's text: the padding sees otherwise than by hand, and nobody sees it."""
    mask = inputs.get("attention_mask")
    return value[mask.bool()] if name == "clip" and mask is not None and value.shape[1] == mask.shape[1] else value


@torch.no_grad()
@pytest.mark.parametrize("skipped", [{0}, {1}])
@pytest.mark.parametrize("name", SKIPPING)
def test_a_model_is_the_formulas_by_hand(name, skipped):
    model, inputs = adapted(name, config(*skipped))
    for output, expected in zip(outputs(name, model, inputs), by_hand(name, model, inputs, skipped), strict=True):
        got, want = real_rows(name, inputs, output), real_rows(name, inputs, expected)
        assert relative_error(got, want) < TOLERANCES[torch.float32]


@torch.no_grad()
@pytest.mark.parametrize("name", SKIPPING)
def test_a_search_flips_between_the_forms(name):
    """All candidates have the adapters of both forms; the skipped ones' are those of a fixed set with equal weights."""
    model, inputs = adapted(name, config())
    blocks = model.adapter_configs["default"].candidates_of(model)
    assert skipped_now(model) == []
    for skipped in ({1}, set(), {0}):
        set_skipped(model, [blocks[index] for index in skipped])
        assert skipped_now(model) == [blocks[index] for index in skipped]
        for output, expected in zip(outputs(name, model, inputs), by_hand(name, model, inputs, skipped), strict=True):
            got, want = real_rows(name, inputs, output), real_rows(name, inputs, expected)
            assert relative_error(got, want) < TOLERANCES[torch.float32]
    with model.disable_adapter():
        torch.testing.assert_close(outputs(name, model, inputs), outputs(name, *base(name)), rtol=0, atol=0)
    assert skipped_now(model) == [blocks[0]]


BLOCKS = {
    "vit": [f"vit.layers.{i}" for i in range(2)],
    "bert": [f"encoder.layer.{i}" for i in range(2)],
    "clip": [f"{tower}_model.encoder.layers.{i}" for tower in ("text", "vision") for i in range(2)],
    "vilt": [f"encoder.layer.{i}" for i in range(2)],
    "llama": [f"layers.{i}" for i in range(3)],
    "meter": [f"meter.cross_modal_{stream}_layers.{i}" for stream in ("text", "image") for i in range(2)],
}


@pytest.mark.parametrize("name", BLOCKS)
def test_the_blocks_are_found_in_order(name):
    model, _ = base(name)
    assert config().candidates_of(model) == BLOCKS[name]
    assert {block.width for block in find_blocks(model)} == {32}
    assert config(candidates=[1, BLOCKS[name][0]]).num_skipped == 1
    half = BLOCKS[name][-2:]
    assert config(candidates=half[::-1]).candidates_of(model) == half


def test_only_candidates_can_be_skipped_and_all_others_are_kept():
    model, _ = adapted("llama", config(candidates=[0, 2]))
    names = {name for name, _ in model.named_parameters()}
    for layer, candidate in ((0, True), (1, False), (2, True)):
        assert (f"layers.{layer}.fast_prompt_skip.default.down_proj.weight" in names) == candidate
        assert f"layers.{layer}.input_layernorm.fast_prompt_after.default.down_proj.weight" in names
    with pytest.raises(ValueError, match=r"blocks: expected candidates \(layers.0, layers.2\), got 'layers.1'"):
        set_skipped(model, ["layers.1"])
    fixed, _ = adapted("llama", config(2))
    names = {name for name, _ in fixed.named_parameters()}
    assert not any("layers.2.input_layernorm.fast_prompt" in name or "layers.0.fast_prompt" in name for name in names)


def test_defaults_are_the_papers():
    settings = DASConfig()
    assert (settings.num_skipped, settings.width, settings.skip_width, settings.skipped) == (4, 96, 192, None)
    assert (settings.norm, settings.activation, settings.dropout, settings.scale) == (None, "relu", 0.0, 1.0)
    assert DASConfig(skipped=[1, 5]).num_skipped == 2
    assert dataclasses.replace(settings, skipped=["a", "b", "c"]).num_skipped == 3


BAD_FIELDS = {
    "skipped": [[], "encoder.layer.0", [1.5], [True], 3],
    "num_skipped": [0, -1, True, 2.0],
    "candidates": [[], {"a": 1}],
    "width": [0],
    "skip_width": [None],
    "norm": ["batch"],
    "activation": ["softmax"],
    "dropout": [1.0],
    "scale": [float("nan")],
    "learn_scale": ["yes"],
    "init": ["xavier"],
    "num_experts": [-1],
    "num_groups": [0, 2],
    "temperature": [0.0],
}


@pytest.mark.parametrize(("field", "value"), [(f, v) for f, values in BAD_FIELDS.items() for v in values])
def test_bad_settings_are_named(field, value):
    with pytest.raises(ValueError, match=f"^{field}: expected .*got "):
        DASConfig(**{field: value})


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("vit", config(num_skipped=2), "num_skipped: expected fewer than the 2 candidates, got 2"),
        ("vit", config(0, 1), "skipped: expected fewer than the 2 candidates, got 2"),
        ("llama", config(num_skipped=2, candidates=[0, 1]), "num_skipped: expected fewer than the 2 candidates, got 2"),
        ("vit", config(2), r"skipped: expected blocks, by number from 0 to 1 or by path \(vit.layers.0 to .* got 2"),
        ("vit", config("vit.embeddings"), "skipped: expected blocks, .* got 'vit.embeddings'"),
        ("llama", config(1, "layers.1"), "skipped: expected different blocks, got .1, 'layers.1'."),
        ("vit", config(candidates=["vit.layernorm"]), "candidates: expected blocks, .* got 'vit.layernorm'"),
        ("llama", config(0, candidates=[1, 2]), "skipped: expected candidates, got layers.0"),
        ("llama", config(0, norm="layer"), r"norm: expected None for LLaMA.* got 'layer'"),
        ("t5", config(), "T5Model: none of its blocks is known to be skippable; known: METER .*LLaMA"),
        ("bert", config(num_experts=2, num_groups=4, skip_width=6), "num_groups: expected a divisor of 32 and of 6"),
    ],
)
def test_a_config_that_does_not_fit_changes_nothing(name, settings, message):
    model, _ = base(name)
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        get_fast_prompt_model(model, settings)
    assert_same(before, snapshot(model))


@torch.no_grad()
@pytest.mark.parametrize("name", ["vilt", "bert", "vit", "llama"])
def test_hidden_states_and_attentions_are_still_recorded(name):
    model, inputs = adapted(name, config(0))
    model.set_attn_implementation("eager")
    output = model(**inputs, output_hidden_states=True, output_attentions=True)
    block = model.get_submodule(find_blocks(model)[0].path)
    before, after = output.hidden_states[:2]
    torch.testing.assert_close(after, block.fast_prompt_skip["default"](before))
    kept = [weights for weights in output.attentions if weights is not None]
    assert [weights.shape[:2] for weights in kept] == [(2, 2)] * (len(find_blocks(model)) - 1)


# LLaMA with a key-value cache


def generator(*skipped: int, **settings) -> LlamaForCausalLM:
    model, _ = adapted("llama_generator", config(*skipped, **settings))
    return model


ROUTER = {"num_experts": 2, "num_groups": 2, "skip_width": 8}
CACHES = {
    "dynamic": lambda model: DynamicCache(config=model.config),
    "static": lambda model: StaticCache(config=model.config, max_cache_len=16),
}


@torch.no_grad()
@pytest.mark.parametrize("settings", [{}, ROUTER])
@pytest.mark.parametrize("skipped", [{0}, {2}, {0, 1}])
@pytest.mark.parametrize("cache", CACHES)
def test_a_cache_gives_what_whole_sequences_give(cache, skipped, settings):
    model = generator(*skipped, **settings)
    ids = torch.randint(2, 49, (2, 9), generator=torch.Generator().manual_seed(2))
    expected = model.lm_head(eager_das.llama(model.model, ids, skipped, experts=bool(settings)))
    past = CACHES[cache](model)
    parts = [model(part, past_key_values=past, use_cache=True).logits for part in ids.split([5, 1, 3], 1)]
    assert relative_error(torch.cat(parts, 1), expected) < TOLERANCES[torch.float32]
    assert [int(past.get_seq_length(layer)) for layer in range(3)] == [9, 9, 9]


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("settings", [{}, ROUTER])
def test_generate_is_the_same_with_and_without_cache(settings, beams):
    model = generator(0, **settings)
    ids = torch.randint(2, 49, (2, 4), generator=torch.Generator().manual_seed(3))
    results = [
        model.generate(ids, max_new_tokens=6, use_cache=use_cache, num_beams=beams, do_sample=False, eos_token_id=None)
        for use_cache in (True, False)
    ]
    assert torch.equal(*results)
    if beams == 1:
        for length in range(4, 10):
            logits = model.lm_head(
                eager_das.llama(model.model, results[0][:, :length], {0}, experts=bool(settings))[:, -1]
            )
            assert torch.equal(logits.argmax(-1), results[0][:, length])


@pytest.mark.parametrize("more", [{}, {"use_cache": False}, {"prefill_chunk_size": 2}], ids=str)
@pytest.mark.parametrize("settings", [{}, ROUTER])
def test_left_padding_generates_what_no_padding_does(settings, more):
    model = generator(0, **settings)
    ids = torch.randint(2, 49, (1, 4), generator=torch.Generator().manual_seed(3))
    padded = torch.cat([torch.full((1, 3), 1), ids], 1)
    mask = (torch.arange(7) >= 3).long()[None]
    plain = model.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=None)
    output = model.generate(padded, attention_mask=mask, max_new_tokens=5, do_sample=False, eos_token_id=None, **more)
    assert torch.equal(output[:, 7:], plain[:, 4:])


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", [name for name in SKIPPING if name != "vit"])
def test_the_router_reads_the_first_real_token(name, attention):
    model, inputs = adapted(name, config(0, **ROUTER))
    model.set_attn_implementation(attention)
    block = model.get_submodule(find_blocks(model)[0].path)
    adapter, read, came = block.fast_prompt_skip["default"], [], []
    adapter.expert_gate.register_forward_pre_hook(lambda _, args: read.append(args[0]))
    block.register_forward_pre_hook(
        lambda _, args, kwargs: came.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    length = inputs["attention_mask"].shape[1]
    for padding in ([0, 0], [2, 0], [length - 1, 1]):
        mask = (torch.arange(length) >= torch.tensor(padding)[:, None]).long()
        for each in (mask, mask.flip(-1)):
            read.clear()
            came.clear()
            inputs["attention_mask"] = each
            run(model, inputs) if name != "meter" else model(**inputs)
            first = torch.tensor(padding) if each is mask else torch.zeros(2, dtype=torch.long)
            assert torch.equal(read[0], adapter.norm(came[0][torch.arange(2), first]))


def test_sequences_that_share_a_row_are_refused_where_experts_are_mixed():
    ids = torch.randint(2, 49, (1, 7), generator=torch.Generator().manual_seed(3))
    packed = {"input_ids": ids, "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3]]), "use_cache": False}
    generator(0)(**packed)
    with pytest.raises(ValueError, match="attention_mask: expected one sequence in each row .*num_experts"):
        generator(0, **ROUTER)(**packed)


def test_llamas_skip_starts_with_the_blocks_own_norm():
    model, _ = base("llama")
    nn.init.normal_(model.layers[1].input_layernorm.weight)
    weight = model.layers[1].input_layernorm.weight.clone()
    get_fast_prompt_model(model, config(1))
    assert torch.equal(model.layers[1].fast_prompt_skip["default"].norm.weight, weight)


def test_a_bert_decoder_counts_its_tokens_too():
    model, inputs = adapted("bert_decoder", config(0))
    memory, ids = inputs["encoder_hidden_states"], inputs["input_ids"]
    whole = model(input_ids=ids, encoder_hidden_states=memory)[0]
    past, parts = None, []
    for part in ids.split([3, 4], 1):
        output = model(input_ids=part, encoder_hidden_states=memory, past_key_values=past, use_cache=True)
        past = output.past_key_values
        parts.append(output[0])
    assert relative_error(torch.cat(parts, 1), whole) < TOLERANCES[torch.float32]
    assert past.get_seq_length() == 7


def test_a_run_of_one_family_leaves_the_rest_of_meter_alone():
    model, _ = adapted("meter", config(0, 3))
    assert not any(
        "fast_prompt" in name
        for part in ("text_transformer", "vision_model")
        for name, _ in model.meter.get_submodule(part).named_modules()
    )


def test_skipped_blocks_do_not_run():
    for name in SKIPPING:
        model, inputs = adapted(name, config(1))
        block = model.get_submodule(find_blocks(model)[1].path)
        ran = [module for path, module in block.named_modules() if path and "fast_prompt" not in path]
        for module in ran:
            module.register_forward_hook(lambda *_, name=name: pytest.fail(f"{name}: a part of a skipped block ran"))
        run(model, inputs) if name != "meter" else model(**inputs)
