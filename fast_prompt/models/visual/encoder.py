"""The frozen image encoder whose hidden states are the visual tokens, and their cache on disk."""

import hashlib
import json
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from fast_prompt.tuning.files import read_tensors, tensor_bytes, write_atomically

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
        cache_dir: where features are kept, one safetensors file an image, under a name that depends on the model's
            weights and config, on ``hidden_state`` and on the image; nowhere when None. A file that is broken is
            written anew; none is ever unpickled.

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
        self._fingerprint: tuple[list[tuple[int, int]], str] | None = None
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
            [B, Nv, d_v], on the model's device, in its dtype: what ``visual_embeds`` takes.

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
        paths = [self.cache_path(image) for image in pixel_values]
        found = {path: _read(path) for path in paths}
        missing = {path: image for path, image in zip(paths, pixel_values, strict=True) if found[path] is None}
        if missing:
            encoded = self._encode(torch.stack(list(missing.values())))
            for path, features in zip(missing, encoded, strict=True):
                write_atomically({path: tensor_bytes({FEATURES: features})})
                found[path] = features
        return torch.stack([found[path].to(pixel_values.device) for path in paths])  # type: ignore[union-attr]

    def _encode(self, pixel_values: Tensor) -> Tensor:
        if self.hidden_state is None:
            return self.model(pixel_values=pixel_values).last_hidden_state
        return self.model(pixel_values=pixel_values, output_hidden_states=True).hidden_states[self.hidden_state]

    def cache_path(self, image: Tensor) -> Path:
        """Where the features of ``image`` [C, H, W], in the model's dtype, are kept."""
        assert self.cache_dir is not None
        digest = hashlib.sha256()
        _update(digest, "image", image)
        return self.cache_dir / self.fingerprint() / f"{digest.hexdigest()}.safetensors"

    def fingerprint(self) -> str:
        """A hash of the model's class, config and weights and of ``hidden_state``; new when weights change."""
        state = self.model.state_dict(keep_vars=True)
        versions = [(value.data_ptr(), value._version) for value in state.values()]
        if self._fingerprint is None or self._fingerprint[0] != versions:
            digest = hashlib.sha256()
            config: Any = self.model.config
            settings = [type(self.model).__name__, config.to_dict(), self.hidden_state]
            digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
            for name, value in state.items():
                _update(digest, name, value)
            self._fingerprint = (versions, digest.hexdigest())
        return self._fingerprint[1]


def _update(digest: Any, name: str, value: Tensor) -> None:
    digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
    digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def _read(path: Path) -> Tensor | None:
    """The features in a cache file; None where it is missing or broken."""
    try:
        return read_tensors(path).get(FEATURES)
    except (FileNotFoundError, ValueError):
        return None
