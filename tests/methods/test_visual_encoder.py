"""``VisualEncoder``: frozen features, and a cache that never lies."""

import json
import os
import shutil
import warnings
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import VISION, build, clip, image_inputs
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel, ViTConfig, ViTModel

from fast_prompt import VisualEncoder
from fast_prompt.models.visual.fingerprint import _described, _sums


def vision_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return ViTModel(ViTConfig(**VISION, hidden_dropout_prob=0.5)).train()


def clip_vision() -> nn.Module:
    torch.manual_seed(0)
    return CLIPVisionModel(CLIPVisionConfig(**VISION))


def siglip_vision() -> nn.Module:
    torch.manual_seed(0)
    return SiglipVisionModel(SiglipVisionConfig(**VISION, hidden_act="gelu_pytorch_tanh"))


def images() -> Tensor:
    return image_inputs()["pixel_values"]


def count(model: nn.Module) -> list[int]:
    """The batch sizes that reach ``model`` from now on."""
    sizes: list[int] = []
    model.register_forward_pre_hook(lambda _, __, kwargs: sizes.append(len(kwargs["pixel_values"])), with_kwargs=True)
    return sizes


@pytest.mark.parametrize("make", [vision_model, clip_vision])
def test_the_last_blocks_output_before_any_norm(make):
    model = make()
    encoder = VisualEncoder(model)
    features = encoder(images())
    layers = model.layers if hasattr(model, "layers") else model.encoder.layers
    outputs = []
    layers[-1].register_forward_hook(lambda _, __, output: outputs.append(output))
    last = model(images()).last_hidden_state
    assert torch.equal(features, outputs[0])
    assert features.shape == (2, 17, encoder.width)
    assert torch.equal(VisualEncoder(model, hidden_state=None)(images()), last)
    assert torch.equal(features, last) == (make is clip_vision)
    earlier = VisualEncoder(model, hidden_state=1)(images())
    assert torch.equal(earlier, model(images(), output_hidden_states=True).hidden_states[1])


def test_it_is_frozen_and_always_in_eval_mode():
    encoder = VisualEncoder(vision_model())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    nn.Sequential(encoder).train()
    assert not any(module.training for module in encoder.modules())
    features = encoder(images().requires_grad_())
    assert not features.requires_grad
    nn.Linear(encoder.width, 1)(features).sum().backward()
    assert torch.equal(encoder.double()(images()), encoder(images().float()))


def test_the_cache_answers_in_the_models_place(tmp_path):
    model = vision_model()
    expected = VisualEncoder(model)(images())
    sizes = count(model)
    encoder = VisualEncoder(model, cache_dir=tmp_path)
    assert torch.equal(encoder(images()), expected)
    assert torch.equal(encoder(images().flip(0)), expected.flip(0))
    third = torch.randn(1, 3, 16, 16)
    mixed = encoder(torch.cat([images()[:1], third, third]))
    assert sizes == [2, 1]
    assert torch.equal(mixed[0], expected[0])
    assert torch.equal(mixed[1], mixed[2])
    assert torch.equal(VisualEncoder(model, cache_dir=tmp_path)(images()), expected)
    assert sizes == [2, 1]
    assert len(list(tmp_path.rglob("*"))) == 1 + 3


def test_other_weights_settings_or_images_have_other_files(tmp_path):
    model = vision_model()
    encoder = VisualEncoder(model, cache_dir=tmp_path)
    names = {encoder.cache_path(images()[0]), encoder.cache_path(images()[1])}
    names.add(VisualEncoder(model, hidden_state=1, cache_dir=tmp_path).cache_path(images()[0]))
    names.add(VisualEncoder(vision_model(1), cache_dir=tmp_path).cache_path(images()[0]))
    with torch.no_grad():
        model.layernorm.weight[0] += 1e-3
    names.add(encoder.cache_path(images()[0]))
    encoder.double()
    names.add(encoder.cache_path(images()[0]))
    model.config.layer_norm_eps = 1e-3
    names.add(VisualEncoder(model, cache_dir=tmp_path).cache_path(images()[0]))
    assert len(names) == 7


def relu(values: Tensor) -> Tensor:
    return values.relu()


def moved(weight: Tensor, change) -> None:
    """As optimizers' and others' edits of ``.data`` are: no version counter sees it."""
    before = weight._version
    weight.data.copy_(change(weight.data.clone()))
    assert weight._version == before


CHANGES = {
    "a weight": lambda model: moved(model.layers[1].mlp.fc1.weight, lambda value: value * 1.01),
    "a bias": lambda model: moved(model.layers[0].mlp.fc2.bias, lambda value: value + 1),
    "the activation": lambda model: setattr(model.layers[0].mlp, "activation_fn", nn.ReLU()),
    "the activation's function": lambda model: setattr(model.layers[0].mlp.activation_fn, "act", relu),
    "a lambda": lambda model: setattr(model.layers[0].mlp.activation_fn, "act", lambda values: values * 2),
    "a number": lambda model: setattr(model.layers[0].attention, "scaling", 0.5),
    "a forward": lambda model: setattr(model.layers[1].mlp, "forward", relu),
    "the order of blocks": lambda model: setattr(model, "layers", model.layers[::-1]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_no_change_of_the_model_is_answered_from_before_it(change, tmp_path):
    model = vision_model()
    encoder = VisualEncoder(model, cache_dir=tmp_path)
    before = encoder(images())
    CHANGES[change](model)
    expected = VisualEncoder(model)(images())
    assert not torch.equal(expected, before)
    assert torch.equal(encoder(images()), expected)
    assert torch.equal(encoder(images()), expected)


def test_two_functions_without_a_name_are_two(tmp_path):
    encoder = VisualEncoder(vision_model(), cache_dir=tmp_path)
    activation = encoder.model.layers[0].mlp.activation_fn
    names = set()
    for function in (lambda values: values * 2, lambda values: values * 3, lambda values: values + 2):
        activation.act = function
        names.add(encoder.fingerprint())
    assert len(names) == 3


def test_a_buffer_that_is_never_saved_counts(tmp_path):
    model = clip_vision()
    encoder = VisualEncoder(model, cache_dir=tmp_path)
    before = encoder.fingerprint()
    moved(model.embeddings.position_ids, lambda value: value.flip(-1))
    assert encoder.fingerprint() != before


def swapped(values: Tensor, first: int, second: int) -> None:
    values[[first, second]] = values[[second, first]]


EDITS = {
    "the last bit": lambda weight: weight.view(torch.int32).add_(torch.eye(*weight.shape, dtype=torch.int32)),
    "one sign": lambda weight: weight[3, 4].neg_(),
    "all signs": lambda weight: weight.neg_(),
    "two values": lambda weight: swapped(weight.view(-1), 3, 5000),
    "two values of a row": lambda weight: swapped(weight[0], 3, 4),
    "rows": lambda weight: weight.copy_(weight.flip(0)),
    "columns": lambda weight: weight.copy_(weight.flip(1)),
    "rows and columns": lambda weight: weight.copy_(weight.flip(0, 1)),
    "the transposed": lambda weight: weight.copy_(weight.T.clone()),
    "a shift": lambda weight: weight.copy_(weight.view(-1).roll(1024).view_as(weight)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_sums_of_a_large_weight_tell_every_kind_of_edit(dtype):
    torch.manual_seed(0)
    weight = torch.randn(90, 90)
    sums = {"untouched": _sums("weight", weight.to(dtype))}
    for name, edit in EDITS.items():
        if name != "the last bit" or dtype is torch.float32:
            edited = weight.clone()
            edit(edited)
            sums[name] = _sums("weight", edited.to(dtype))
    assert len({tuple(each.tolist()) for each in sums.values()}) == len(sums)


@pytest.mark.parametrize("make", [vision_model, clip_vision, siglip_vision])
def test_no_address_in_memory_is_part_of_a_name(make):
    words = [_described(module) for module in make().modules()]
    assert "Linear" in json.dumps(words)
    assert "0x" not in json.dumps(words)


def test_features_of_autocast_are_kept_apart(tmp_path):
    model = vision_model()
    encoder, plain = (
        VisualEncoder(model, hidden_state=None, cache_dir=tmp_path),
        VisualEncoder(model, hidden_state=None),
    )
    contexts = [
        nullcontext,
        lambda: torch.autocast("cpu", torch.bfloat16),
        lambda: torch.autocast("cpu", torch.float16),
    ]
    expected = []
    for context in contexts:
        with context():
            expected.append(plain(images()))
            assert torch.equal(encoder(images()), expected[-1])
    assert not torch.equal(expected[0], expected[1].to(expected[0].dtype))
    sizes = count(model)
    for context, features in zip(contexts, expected, strict=True):
        with context():
            found = encoder(images())
        assert found.dtype == features.dtype
        assert torch.equal(found, features)
    assert sizes == []


def test_weights_without_data_are_refused(tmp_path):
    model = vision_model()
    model.pooler.to("meta")
    with pytest.raises(ValueError, match=r"model: pooler\.dense\.weight has no data \(it is on the meta device\)"):
        VisualEncoder(model, cache_dir=tmp_path)(images())


def test_features_that_are_not_finite_are_not_kept(tmp_path):
    model = vision_model()
    with torch.no_grad():
        model.layernorm.weight[0] = torch.nan
    encoder = VisualEncoder(model, hidden_state=None, cache_dir=tmp_path)
    for _ in range(2):
        with pytest.warns(UserWarning, match="not finite are not kept"):
            assert encoder(images()).isnan().any()
    assert not list(tmp_path.rglob("*.safetensors"))


def with_features(change):
    """A file whose features are others, though all else in it is as it was."""

    def damage(path: Path, _: Path) -> None:
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        save_file({"features": change(load_file(path)["features"])}, path, metadata)

    return damage


def in_the_place(make):
    def damage(path: Path, _: Path) -> None:
        path.unlink()
        make(path)

    return damage


WRONG_FILES = {
    "shape": with_features(lambda features: features[:3].contiguous()),
    "dtype": with_features(lambda features: features.long()),
    "NaN": with_features(lambda features: features * torch.nan),
    "values": with_features(lambda features: features + 1),
    "foreign": lambda path, _: save_file(load_file(path), path),
    "another image's": lambda path, other: shutil.copy(other, path),
    "directory": in_the_place(Path.mkdir),
    "pipe": in_the_place(os.mkfifo),
}


@pytest.mark.parametrize("kind", WRONG_FILES)
def test_a_wrong_file_is_never_handed_out(kind, tmp_path):
    encoder = VisualEncoder(vision_model(), cache_dir=tmp_path)
    expected = encoder(images())
    path, other = (encoder.cache_path(image) for image in images())
    WRONG_FILES[kind](path, other)
    with pytest.warns(UserWarning, match=f"{path.name}: features are computed anew: "):
        torch.testing.assert_close(encoder(images()), expected, rtol=1e-4, atol=1e-5)
    if kind not in ("directory", "pipe"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            encoder(images())


@pytest.mark.parametrize("damage", ["cut", "empty", "pickle", "other"])
def test_a_broken_file_is_written_anew_and_never_unpickled(damage, tmp_path, monkeypatch):
    model = vision_model()
    encoder = VisualEncoder(model, cache_dir=tmp_path)
    expected = encoder(images())
    path = encoder.cache_path(images()[0])
    whole = path.read_bytes()
    if damage == "pickle":
        torch.save({"features": torch.ones(3)}, path)
    else:
        path.write_bytes({"cut": whole[:-10], "empty": b"", "other": whole.replace(b"features", b"creature")}[damage])

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("unpickled")

    monkeypatch.setattr("pickle.Unpickler", refuse)
    monkeypatch.setattr("torch.load", refuse)
    sizes = count(model)
    with pytest.warns(UserWarning, match="features are computed anew"):
        torch.testing.assert_close(encoder(images()), expected, rtol=1e-4, atol=1e-5)
    assert sizes == [1]
    again = encoder(images())
    assert sizes == [1]
    torch.testing.assert_close(again, expected, rtol=1e-4, atol=1e-5)


def test_a_write_that_dies_leaves_nothing_behind(tmp_path, monkeypatch):
    encoder = VisualEncoder(vision_model(), cache_dir=tmp_path)

    def die(_: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", die)
    with pytest.raises(OSError, match="disk full"):
        encoder(images())
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_wrong_arguments_are_named():
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got str"):
        VisualEncoder("vit")
    for model in (build("bert")[0], clip()[0], nn.Linear(2, 2)):
        with pytest.raises(ValueError, match=r"model: expected a vision model .*model.vision_model"):
            VisualEncoder(model)
    for value in (1.5, True, "last"):
        with pytest.raises(ValueError, match="hidden_state: expected a whole number or None"):
            VisualEncoder(vision_model(), hidden_state=value)
    for value in (images()[0], images()[:0], [1.0]):
        with pytest.raises(ValueError, match=r"pixel_values: expected shape \[B, C, H, W\], got"):
            VisualEncoder(vision_model())(value)
