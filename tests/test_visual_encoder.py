"""``VisualEncoder``: frozen features, and a cache that never lies."""

import pytest
import torch
from tiny_models import VISION, build, clip, image_inputs
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, ViTConfig, ViTModel

from fast_prompt import VisualEncoder


def vision_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return ViTModel(ViTConfig(**VISION, hidden_dropout_prob=0.5)).train()


def clip_vision() -> nn.Module:
    torch.manual_seed(0)
    return CLIPVisionModel(CLIPVisionConfig(**VISION))


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
