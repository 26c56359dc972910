"""The frozen image encoder whose hidden states are the visual tokens, and their cache on disk."""

import warnings
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from fast_prompt.models.visual.fingerprint import fingerprint
from fast_prompt.tuning.sealed import digest, read_sealed, write_sealed

# The one tensor of a cache file.
FEATURES = "features"


class VisualEncoder(nn.Module):
    """A frozen vision model of ``transformers`` that turns images into visual tokens.

    It is always in eval mode, and no gradient passes through it.

    Args:
        model: takes ``pixel_values`` and returns hidden states, such as ``CLIPVisionModel`` or ``ViTModel``. Its
            parameters are frozen.
        hidden_state: which of its hidden states, as an index of ``output.hidden_states``: -1 is the last block's
            output, before any norm that follows (what the paper takes of CLIP). None stands for
            ``output.last_hidden_state``, which in ViT is normed.
        cache_dir: where features are kept, one safetensors file an image, under a name that depends on all that decides
            them (see ``fingerprint``); nowhere when None. A file that is not whole, or not what was written, is
            computed and written anew with a warning; none is ever unpickled. Each call reads the weights, which large
            batches share.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: ``model`` does not take images first, or ``hidden_state`` is no whole number.
    """

    def __init__(self, model: nn.Module, *, hidden_state: int | None = -1, cache_dir: str | Path | None = None) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        if getattr(model, "main_input_name", None) != "pixel_values":
            raise ValueError(
                f"model: expected a vision model of transformers (it takes pixel_values), got {type(model).__name__}; "
                "of a model for images and text take the vision part (`model.vision_model`)"
            )
        if hidden_state is not None and (isinstance(hidden_state, bool) or not isinstance(hidden_state, int)):
            raise ValueError(f"hidden_state: expected a whole number or None, got {hidden_state!r}")
        self.model = model.requires_grad_(False)
        self.hidden_state = hidden_state
        self.cache_dir = None if cache_dir is None else Path(cache_dir)
        self.eval()

    @property
    def width(self) -> int:
        """d_v, the width of the visual tokens."""
        config: Any = self.model.config
        return int(config.hidden_size)

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode, whatever ``mode`` says."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, pixel_values: Tensor) -> Tensor:
        """Encode images.

        Args:
            pixel_values: [B, C, H, W], as the model's image processor gives them; moved to the model's device and
                dtype.

        Returns:
            [B, Nv, d_v], on the model's device, in its dtype (or in autocast's, where that decides): what
            ``visual_embeds`` takes.

        Raises:
            ValueError: ``pixel_values`` is of another rank, or empty.
        """
        if not isinstance(pixel_values, Tensor) or pixel_values.dim() != 4 or not len(pixel_values):
            got = list(pixel_values.shape) if isinstance(pixel_values, Tensor) else type(pixel_values).__name__
            raise ValueError(f"pixel_values: expected shape [B, C, H, W], got {got}")
        parameter = next(self.model.parameters())
        pixel_values = pixel_values.to(parameter.device, parameter.dtype)
        if self.cache_dir is None:
            return self._encode(pixel_values)
        fingerprint = self.fingerprint()
        paths = [self._path(fingerprint, image) for image in pixel_values]
        found = {path: _read(path) for path in paths}
        missing = {path: image for path, image in zip(paths, pixel_values, strict=True) if found[path] is None}
        if missing:
            encoded = self._encode(torch.stack(list(missing.values())))
            for path, features in zip(missing, encoded, strict=True):
                _keep(path, features)
                found[path] = features
        return torch.stack([found[path].to(pixel_values.device) for path in paths])  # type: ignore[union-attr]

    def _encode(self, pixel_values: Tensor) -> Tensor:
        if self.hidden_state is None:
            return self.model(pixel_values=pixel_values).last_hidden_state
        return self.model(pixel_values=pixel_values, output_hidden_states=True).hidden_states[self.hidden_state]

    def cache_path(self, image: Tensor) -> Path:
        """Where the features of ``image`` [C, H, W], in the model's dtype, are kept, as things are."""
        return self._path(self.fingerprint(), image)

    def fingerprint(self) -> str:
        """A hash of all that decides the features but the image; it reads the weights at each call.

        Of the model's weights, config, classes, activations and plain attributes, of ``hidden_state``, and of the
        dtype of autocast where that is on.
        """
        device = next(self.model.parameters()).device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        return fingerprint(self.model, self.hidden_state, autocast)

    def _path(self, fingerprint: str, image: Tensor) -> Path:
        assert self.cache_dir is not None
        return self.cache_dir / fingerprint / f"{digest(image).hex()}.safetensors"


def _read(path: Path) -> Tensor | None:
    """The features that `_keep` wrote for this place; None where there are none, with a warning about what else is."""
    try:
        tensors, facts = read_sealed(path)
        if facts != _facts(path) or tensors.keys() != {FEATURES}:
            raise ValueError(f"it is another image's or another model's: {facts}, {', '.join(tensors)}")
        return tensors[FEATURES]
    except FileNotFoundError:
        return None
    except ValueError as error:
        warnings.warn(f"{path}: features are computed anew: {error}", stacklevel=3)
        return None


def _keep(path: Path, features: Tensor) -> None:
    """Write the features, unless they are not finite, or something that is no file is in their place."""
    if not features.isfinite().all():
        warnings.warn(f"{path}: features that are not finite are not kept", stacklevel=3)
    elif path.is_file() or not path.exists():
        write_sealed(path, {FEATURES: features}, _facts(path))


def _facts(path: Path) -> dict[str, str]:
    """What a file says of itself, so that it is not taken for another that it was copied over."""
    return {"model": path.parent.name, "image": path.stem}
