"""``fast-prompt cost``: counts against sums written down here, the papers' figures, and what the command prints."""

import copy
import functools
import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_meter import tiny_config as tiny_meter_config
from tiny_models import build
from transformers import BertConfig, CLIPConfig, LlamaConfig, RobertaConfig, T5Config, ViltConfig

from fast_prompt import APTConfig, cost, get_fast_prompt_model
from fast_prompt.backends import BACKENDS
from fast_prompt.cli import main
from fast_prompt.cost.counting import count_macs, count_parameters
from fast_prompt.cost.prompts import FORMS, prompt_keys, prompt_queries
from fast_prompt.methods.das.spread import spread
from fast_prompt.models.meter import MeterForVisualQuestionAnswering
from fast_prompt.tolerances import TOLERANCES, relative_error

KEYS, QUERIES, TOKENS = FORMS
ROW_KEYS = ["model", "method", "settings", "macs", "added_macs", "params", "trainable_params"]

# Sizes of the tiny models: tokens n, width d, feed-forward f, blocks L, all that the sums below need.
N, D, F, L = 7, 32, 48, 3
SIZES = {
    "hidden_size": D,
    "num_hidden_layers": L,
    "num_attention_heads": 4,
    "intermediate_size": F,
    "vocab_size": 50,
    "max_position_embeddings": 256,
}
VISION = {**SIZES, "image_size": 16, "patch_size": 4}
CONFIGS = {
    "bert": BertConfig(**SIZES),
    "roberta": RobertaConfig(**SIZES),
    "vilt": ViltConfig(**SIZES, image_size=16, patch_size=4, num_labels=5),
    "clip": CLIPConfig(text_config=SIZES, vision_config=VISION, projection_dim=12),
    "llama": LlamaConfig(**SIZES, num_key_value_heads=2),
    "meter": tiny_meter_config(),
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Where the config of each tiny model lies."""
    root = tmp_path_factory.mktemp("models")
    for name, config in CONFIGS.items():
        config.save_pretrained(root / name)
    return root


@pytest.fixture(scope="module")
def rows(directory):
    """Counts methods in a tiny model, each once; rows by method, and by form where it has some."""

    @functools.cache
    def rows(name, *methods, text_length=N, image_size=None, batch=1, **settings):
        subject = cost.find_subject(str(directory / name), text_length=text_length, image_size=image_size, batch=batch)
        counted = cost.count(subject, methods, cost.Settings(**{"prompts": 3, "num_skipped": 2, **settings}))
        return {row.settings.get("form", row.method): row for row in counted}

    return rows


# Multiply-adds by hand


def attention(n, m, d):
    """Queries of n rows over m keys and values, projections included."""
    return 2 * n * d * d + 2 * m * d * d + 2 * n * m * d


def block(n, d=D, f=F):
    return attention(n, n, d) + 2 * n * d * f


def conv(patches, patch, d):
    return patches * 3 * patch * patch * d


def tower(n, patches, patch, d, f, layers):
    return conv(patches, patch, d) + layers * block(n, d, f)


def llama_block(n):
    """Half as many key and value heads as queries'; a gated feed-forward."""
    return 2 * n * D * D + 2 * n * D * D // 2 + 2 * n * n * D + 3 * n * D * F


def meter_fusion(n, m, d=32, f=48):
    """Attention, attention to the other stream, feed-forward."""
    return attention(n, n, d) + attention(n, m, d) + 2 * n * d * f


METER_TEXT = 2 * (attention(N, N, 24) + 2 * N * 24 * 40) + N * 24 * 32
METER_IMAGE = tower(17, 16, 8, 40, 56, 3) + 17 * 40 * 32
METER_HEADS = 2 * 32 * 32 + 64 * 64 + 64 * 7
BASES = {
    "bert": L * block(N) + D * D,
    "roberta": L * block(N) + D * D,
    "vilt": tower(N + 17, 16, 4, D, F, L) + D * D + D * 2 * D + 2 * D * 5,
    "clip": tower(17, 16, 4, D, F, L) + L * block(N) + 2 * D * 12 + 12,
    "llama": L * llama_block(N) + N * D * 50,
    "meter": METER_TEXT + METER_IMAGE + 2 * (meter_fusion(N, 17) + meter_fusion(17, N)) + METER_HEADS,
}

# Some releases of transformers compute the angles, half a head's width of them, by a matrix product.
ROTARY = {"llama": N * 4}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_model_alone(rows, name):
    row = rows(name, "full")["full"]
    assert row.macs - BASES[name] in (0, ROTARY.get(name, 0))
    assert (row.added_macs, row.base_macs, row.share) == (0, row.macs, 0.0)
    assert row.params == row.trainable_params > 0


# Rows that each attention's queries have, and its keys, cross-attentions' marked, and the blocks' rows.
STREAMS = {
    "bert": [(N, False)] * L,
    "vilt": [(N + 17, False)] * L,
    "clip": [(N, False)] * L + [(17, False)] * L,
    "llama": [(N, False)] * L,
    "meter": [(N, False), (N, True), (17, False), (17, True)] * 2,
}
KEY_WIDTH = {"llama": D // 2}


@pytest.mark.parametrize("name", STREAMS)
def test_apt_diffuses_prompts_into_every_attention(rows, name):
    row = rows(name, "apt")["apt"]
    p, r = 3, 4
    assert row.added_macs == sum(2 * n * p * D + 2 * p * r * D for n, _ in STREAMS[name])
    assert row.trainable_params == len(STREAMS[name]) * (p * D + 2 * r * D + 1)
    assert row.params == rows(name, "full")["full"].params + row.trainable_params


@pytest.mark.parametrize("name", STREAMS)
def test_deep_prompts_by_what_a_prompt_takes_part_in(rows, name):
    found = rows(name, "deep_prompts")
    p, key = 3, KEY_WIDTH.get(name, D)
    seen = [2 * p * D * key + 2 * n * p * D for n, _ in STREAMS[name]]
    asking = [0 if cross else 2 * p * D * D + 2 * p * (n + p) * D for n, cross in STREAMS[name]]
    assert found[KEYS].added_macs == sum(seen)
    assert found[QUERIES].added_macs == sum(seen) + sum(asking)
    assert found[KEYS].trainable_params == found[QUERIES].trainable_params == len(STREAMS[name]) * p * D


def test_deep_prompts_as_tokens_of_whole_blocks(rows):
    p = 3
    assert rows("bert", "deep_prompts")[TOKENS].added_macs == L * (block(N + p) - block(N))
    assert rows("vilt", "deep_prompts")[TOKENS].added_macs == L * (block(N + 17 + p) - block(N + 17))
    assert rows("llama", "deep_prompts")[TOKENS].added_macs == L * (llama_block(N + p) - llama_block(N))
    longer = meter_fusion(N + p, 17 + p) + meter_fusion(17 + p, N + p)
    assert rows("meter", "deep_prompts")[TOKENS].added_macs == 2 * (longer - meter_fusion(N, 17) - meter_fusion(17, N))
    assert rows("meter", "deep_prompts")[TOKENS].trainable_params == 4 * p * D


def test_adapters_stand_after_every_sublayer(rows):
    w = 5
    assert rows("bert", "adapters", width=w)["adapters"].added_macs == L * 2 * 2 * N * D * w
    assert rows("llama", "adapters", width=w)["adapters"].added_macs == L * 2 * 2 * N * D * w
    assert rows("clip", "adapters", width=w)["adapters"].added_macs == L * 2 * 2 * (N + 17) * D * w
    row = rows("meter", "adapters", width=w)["adapters"]
    assert row.added_macs == 2 * 3 * 2 * (N + 17) * D * w
    assert row.trainable_params == 4 * 3 * (2 * D * w + w + D)


def test_lora_updates_queries_and_values_as_peft_does(rows):
    row = rows("meter", "lora", rank=2)["lora"]
    memory = {(N, False): N, (N, True): 17, (17, False): 17, (17, True): N}
    assert row.added_macs == sum(2 * D * 2 * (n + memory[n, cross]) for n, cross in STREAMS["meter"])
    model, inputs = build("bert")
    base = count_macs(model, **inputs)
    real = get_peft_model(copy.deepcopy(model), LoraConfig(r=8, target_modules=["query", "value"]))
    assert count_macs(real, **inputs) - base == 2 * 2 * 2 * 7 * 32 * 8
    assert count_parameters(real)[1] == 2 * 2 * 2 * 32 * 8
    ours = rows("bert", "lora", rank=8)["lora"]
    assert (ours.added_macs, ours.trainable_params) == (L * 2 * 2 * N * D * 8, L * 2 * 2 * D * 8)


def test_das_leaves_out_the_blocks_it_skips(rows):
    w, skip = 5, 7
    adapters = (L - 2) * 2 * 2 * N * D * w + 2 * 2 * N * D * skip
    for name in ("bert", "roberta"):
        row = rows(name, "das", width=w, skip_width=skip)["das"]
        assert row.added_macs == adapters - 2 * block(N)
        assert row.params < rows(name, "full")["full"].params
        assert row.share < 0
    both = meter_fusion(N, 17) + meter_fusion(17, N)
    kept, skipped = 3 * 2 * (N + 17) * D * w, 2 * (N + 17) * D * skip
    assert rows("meter", "das", width=w, skip_width=skip)["das"].added_macs == kept + skipped - both
    assert rows("llama", "das", width=w, skip_width=skip)["das"].added_macs == adapters - 2 * llama_block(N)


def test_what_is_skipped_is_spread_over_the_stacks():
    paths = [f"{stack}.{index}" for stack in ("text", "image") for index in range(3)]
    assert spread(paths, 1) == ["image.2"]
    assert spread(paths, 3) == ["image.2", "text.2", "image.1"]
    assert spread(paths[:4], 4) == ["image.0", "text.2", "text.1", "text.0"]


def test_dvp_stands_beside_all_visual_tokens(rows):
    tokens, width = 11, 20
    found = rows("bert", "dvp", visual_tokens=tokens, visual_width=width, layer=2)
    assert found["visual_tokens"].macs == L * block(N + tokens) + D * D + tokens * width * D
    assert found["visual_tokens"].trainable_params == width * D + D
    absorbed = D * D + 2 * D * width + 2 * 4 * tokens * width + D * D  # query; keys, values; tokens by head; output
    longer = (L - 2) * (block(N + 1) - block(N))
    assert found["dvp"].added_macs == absorbed + longer
    assert found["dvp"].trainable_params == 2 * (D * D + D) + 2 * (width * D + D) + 2 * D
    as_wide = rows("bert", "dvp", visual_tokens=tokens, visual_width=D)
    assert as_wide["visual_tokens"].trainable_params == 0


def test_what_is_computed_once_is_shared_by_the_batch(rows):
    alone, batch = (rows("bert", "apt", batch=size)["apt"] for size in (1, 2))
    offset = L * 2 * 3 * 4 * D
    assert alone.added_macs - batch.added_macs == offset // 2
    assert batch.settings["batch"] == 2


def test_an_image_size_and_a_text_length_of_ones_own(rows):
    row = rows("vilt", "full", text_length=5, image_size=24)["full"]
    assert row.macs == tower(5 + 37, 36, 4, D, F, L) + D * D + D * 2 * D + 2 * D * 5
    assert row.settings == {"image_size": 24, "text_length": 5, "batch": 1}


def test_what_is_counted_is_what_a_real_model_runs(rows):
    """Tensors without memory change no count."""
    config = tiny_meter_config()
    model = MeterForVisualQuestionAnswering(config).eval()
    inputs = {"input_ids": torch.ones(1, N, dtype=torch.long), "pixel_values": torch.zeros(1, 3, 32, 32)}
    assert count_macs(model, **inputs) == BASES["meter"]
    adapted = get_fast_prompt_model(model, APTConfig(num_prompts=3))
    row = rows("meter", "apt")["apt"]
    assert (count_macs(adapted, **inputs), *count_parameters(adapted)) == (row.macs, row.params, row.trainable_params)


def test_what_is_built_here_changes_no_count(rows, monkeypatch):
    before = dict(BACKENDS)
    for name in before:
        if name != "reference":
            monkeypatch.setattr(BACKENDS[name], "unavailable", lambda: "not built")
    for method in ("apt", "dvp", "das"):
        assert rows.__wrapped__("bert", method)[method] == rows("bert", method)[method]
    assert before == BACKENDS


@pytest.mark.parametrize("name", ["bert", "vit", "meter"])
@torch.no_grad()
def test_own_queries_change_nothing_for_the_tokens(name):
    """The two forms of an attention are one function of the model's own rows, where no mask hides any."""
    if name == "meter":
        inputs = {"input_ids": torch.full((2, N), 5), "pixel_values": torch.rand(2, 3, 32, 32).double()}
        model = MeterForVisualQuestionAnswering(tiny_meter_config()).eval()
    else:
        model, inputs = build(name)
        inputs = {key: value.double() if key == "pixel_values" else value for key, value in inputs.items()}
        inputs.pop("attention_mask", None)
    outputs = []
    for put_into in (prompt_keys, prompt_queries):
        prompted = copy.deepcopy(model).double()
        put_into(prompted, 3, None)
        generator = torch.Generator().manual_seed(0)
        for key, parameter in prompted.named_parameters():
            if key.endswith("prompts"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        outputs.append(prompted(**inputs)[0])
    assert relative_error(*outputs) <= TOLERANCES[torch.float64]
    assert relative_error(outputs[0], model.double()(**inputs)[0]) > TOLERANCES[torch.float64]


# The papers' figures, at full size


@pytest.mark.gate
@pytest.mark.parametrize("text_length", [40, 50])
def test_das_on_meter_saves_what_the_paper_says(text_length):
    subject = cost.find_subject("meter", text_length=text_length)
    (row,) = cost.count(subject, ["das"], cost.Settings(num_skipped=4))
    assert row.settings["image_size"] == 384
    assert (row.settings["width"], row.settings["skip_width"]) == (96, 288)
    assert abs(100 * row.share - -12.0) <= 0.2
    assert abs(100 * row.share - -11.97) <= 0.2
    (sentence,) = cost.comparisons(subject, [row])
    assert sentence.startswith(f"das, 4 blocks skipped: {row.share:+.2%}") and "-11.97 %" in sentence


@pytest.mark.gate
def test_apt_against_deep_prompts_on_meter():
    """Each convention by hand; the paper's figure lies nearest to that of prompts with their own queries."""
    subject = cost.find_subject("meter")
    rows = cost.count(subject, ["apt", "deep_prompts"], cost.Settings(prompts=200))
    added = {row.settings.get("form", row.method): row.added_macs for row in rows}
    n, m, d, p = 40, 577, 768, 200
    assert added["apt"] == 24 * (2 * p * d * (n + m) // 2 + 2 * p * 4 * d)
    assert added[KEYS] == 6 * (4 * 2 * p * d * d + 4 * (n + m) * p * d)
    asking = sum(2 * p * d * d + 2 * p * (rows + p) * d for rows in (n, m))
    assert added[QUERIES] == added[KEYS] + 6 * asking
    savings = {form: 100 * (added["apt"] / added[form] - 1) for form in FORMS}
    assert min(savings, key=lambda form: abs(savings[form] - -82.30)) == QUERIES
    sentences = cost.comparisons(subject, rows)
    assert len(sentences) == 3
    for form, sentence in zip(FORMS, sentences, strict=True):
        assert form in sentence and f"{savings[form]:+.2f}%" in sentence and "-82.30 %" in sentence


@pytest.mark.gate
def test_dvp_against_all_visual_tokens_on_bert():
    subject = cost.find_subject("bert")
    rows = cost.count(subject, ["dvp"], cost.Settings())
    text, both = (12 * (12 * n * 768**2 + 2 * n * n * 768) + 768**2 for n in (16, 16 + 197))
    assert rows[0].base_macs == text and rows[0].macs == both
    (sentence,) = cost.comparisons(subject, rows)
    assert f"{rows[1].macs / both - 1:+.2%} MACs in the language model (the paper: -80 % on VQA2.0)" in sentence
    assert rows[1].macs < 0.2 * both


# The command


def run_json(capsys, *argv):
    code = main(["cost", *argv, "--json"])
    captured = capsys.readouterr()
    return code, json.loads(captured.out), captured.err


def test_json(capsys, directory):
    code, payload, _ = run_json(capsys, "--model", str(directory / "bert"), "--text-length", "7", "--num-skipped", "2")
    assert code == 0 and list(payload) == ["rows"]
    assert all(list(row) == ROW_KEYS for row in payload["rows"])
    methods = [row["method"] for row in payload["rows"]]
    assert methods == ["full", *["deep_prompts"] * 3, "lora", "adapters", "apt", "das", "visual_tokens", "dvp"]
    assert all(row["model"] == str(directory / "bert") for row in payload["rows"])
    assert {row["macs"] - row["added_macs"] for row in payload["rows"]} == {BASES["bert"]}


def test_a_model_that_takes_images_is_counted_without_dvp(directory):
    assert cost.methods_for(cost.find_subject(str(directory / "bert"))) == list(cost.counted_methods())
    fitting = cost.methods_for(cost.find_subject(str(directory / "vilt")))
    assert set(cost.counted_methods()) - set(fitting) == {"dvp"}


@pytest.mark.gate
def test_for_people_with_a_chart(capsys, directory, tmp_path):
    chart = tmp_path / "cost.png"
    argv = ["--model", str(directory / "meter"), "--method", "full", "das", "deep_prompts"]
    argv += ["--text-length", "7", "--num-skipped", "2"]
    assert main(["cost", *argv, "--chart", str(chart)]) == 0
    captured = capsys.readouterr()
    assert chart.read_bytes().startswith(b"\x89PNG") and str(chart) in captured.err
    for words in ("text length 7", "num skipped 2", "das, 2 blocks skipped", *FORMS):
        assert words in captured.out


@pytest.mark.parametrize("name", ["absent/cost.png", "cost.nonsense"])
def test_a_chart_that_cannot_be_written(capsys, directory, tmp_path, name):
    argv = ["--model", str(directory / "bert"), "--text-length", "7", "--method", "full", "dvp"]
    assert main(["cost", *argv, "--chart", str(tmp_path / name)]) == 1
    assert f"cannot write {tmp_path / name}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ((), "--model"),
        (("--model", "nonsense"), "expected meter, bert, roberta, vilt, clip, llama or a directory"),
        (("--model", "{}/empty"), "there is no config.json in"),
        (("--model", "{}/broken"), "broken/config.json is no config"),
        (("--model", "{}/t5"), "got 't5'"),
        (("--model", "{}/bert", "--method", "nonsense"), "'nonsense'"),
        (("--model", "{}/bert", "--text-length", "257"), "text_length: expected a whole number from 1 to 256, got 257"),
        (("--model", "{}/roberta", "--text-length", "255"), "text_length: expected a whole number from 1 to 254"),
        (("--model", "{}/bert", "--text-length", "many"), "--text-length"),
        (("--model", "{}/bert", "--image-size", "32"), "image_size:"),
        (("--model", "{}/vilt", "--image-size", "30", "--text-length", "7"), "multiple of the patch size 4, got 30"),
        (("--model", "{}/bert", "--batch", "0"), "batch: expected a whole number of at least 1, got 0"),
        (("--model", "{}/bert", "--rank", "0"), "rank:"),
        (("--model", "{}/bert", "--method", "apt", "--prompts", "2000"), "num_prompts:"),
        (("--model", "{}/bert", "--method", "das", "--num-skipped", "3"), "num_skipped"),
        (("--model", "{}/bert", "--method", "dvp", "--layer", "3"), "layer:"),
        (("--model", "{}/bert", "--method", "dvp", "--visual-tokens", "250"), "visual_tokens + text_length"),
        (("--model", "{}/vilt", "--method", "dvp", "--text-length", "7"), "method dvp:"),
    ],
)
def test_wrong_arguments_give_one_line_that_names_them(capsys, directory, argv, expected):
    (directory / "empty").mkdir(exist_ok=True)
    (directory / "broken").mkdir(exist_ok=True)
    (directory / "broken" / "config.json").write_text("{")
    T5Config().save_pretrained(directory / "t5")
    with pytest.raises(SystemExit) as stopped:
        main(["cost", *(part.format(directory) for part in argv)])
    captured = capsys.readouterr()
    assert (stopped.value.code, captured.out) == (2, "")
    assert captured.err.count("\n") == 1 and expected in captured.err


def test_help_has_examples(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["cost", "--help"])
    assert stopped.value.code == 0
    assert "fast-prompt cost --model meter" in capsys.readouterr().out
