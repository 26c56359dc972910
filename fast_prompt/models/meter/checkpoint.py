"""The published METER checkpoint, read into our modules."""

import pickle
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from fast_prompt.models.meter.config import MeterConfig
from fast_prompt.models.meter.model import MeterForVisualQuestionAnswering
from fast_prompt.tuning.files import read_tensors
from fast_prompt.tuning.state import check_finite, check_kinds, listing, mismatch

BLOCKS = r"vit_model\.visual\.transformer\.resblocks\."
BLOCK = BLOCKS + r"(\d+)\."
OUR_BLOCK = r"meter.vision_model.encoder.layers.\1."

# Published names, and ours; what ``\1`` and ``\2`` stand for stays as it is. The first pattern to fit the whole counts.
RENAMED = {
    r"vit_model\.visual\.conv1\.weight": r"meter.vision_model.embeddings.patch_embedding.weight",
    r"vit_model\.visual\.class_embedding": r"meter.vision_model.embeddings.class_embedding",
    r"vit_model\.visual\.positional_embedding": r"meter.vision_model.embeddings.position_embedding.weight",
    r"vit_model\.visual\.ln_pre\.(.+)": r"meter.vision_model.pre_layrnorm.\1",
    r"vit_model\.visual\.ln_post\.(.+)": r"meter.vision_model.post_layernorm.\1",
    BLOCK + r"ln_([12])\.(.+)": OUR_BLOCK + r"layer_norm\2.\3",
    BLOCK + r"attn\.out_proj\.(.+)": OUR_BLOCK + r"self_attn.out_proj.\2",
    BLOCK + r"mlp\.c_fc\.(.+)": OUR_BLOCK + r"mlp.fc1.\2",
    BLOCK + r"mlp\.c_proj\.(.+)": OUR_BLOCK + r"mlp.fc2.\2",
    r"token4classifier": r"meter.classifier_token",
    r"(text_transformer\.(?:embeddings|encoder)\..+)": r"meter.\1",
    r"((?:cross_modal_(?:text|image)_(?:transform|layers|pooler)|token_type_embeddings)\..+)": r"meter.\1",
    r"(vqa_classifier\..+)": r"\1",
}

# One tensor there, three here, from the top down.
SPLIT = {BLOCK + r"attn\.in_proj_(weight|bias)": [OUR_BLOCK + rf"self_attn.{part}_proj.\2" for part in "qkv"]}

# What a checkpoint may hold besides: heads of other tasks, what is left of CLIP's text tower, constants.
UNUSED = (
    r"(?:mlm_score|itm_score|nlvr2_classifier|snli_classifier|rank_output)\..+",
    r"vit_model\.(?:positional_embedding|token_embedding\.weight|ln_final\.(?:weight|bias)|visual\.proj)",
    r"text_transformer\.(?:pooler\..+|embeddings\.(?:position_ids|token_type_ids))",
)

POSITIONS = "meter.vision_model.embeddings.position_embedding.weight"
HEAD = "vqa_classifier."


def load_published(path: str | Path, config: MeterConfig | None = None) -> MeterForVisualQuestionAnswering:
    """METER with the weights of a published checkpoint.

    The position embedding is interpolated to ``config``'s image size. A head that the checkpoint does not hold (one
    that is pretrained, and not fine-tuned on VQA) stays fresh, with a warning; anything else must be there.

    Args:
        path: the checkpoint, a pickle with a ``state_dict`` (read with ``weights_only=True``, so that no code in it can
            run), or a safetensors file of the same names.
        config: the model's settings; the defaults when None.

    Returns:
        The model, float32, in eval mode.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is none of the two, its names or shapes do not fit ``config``, or its values are of another
            kind of dtype, NaN or infinity; the message names them.
    """
    path, config = Path(path), MeterConfig() if config is None else config
    tensors = translate(_read(path), config, str(path))
    model = MeterForVisualQuestionAnswering(config)
    own = model.state_dict()
    if POSITIONS in tensors:
        tensors[POSITIONS] = interpolate_positions(tensors[POSITIONS], len(own[POSITIONS]))
    fresh = [] if any(map(_is_head, tensors)) else list(filter(_is_head, own))
    _check_fit(tensors, {name: value for name, value in own.items() if name not in fresh}, str(path))
    if fresh:
        warnings.warn(f"{path}: has no head for VQA; it is fresh and must be trained: {listing(fresh)}", stacklevel=2)
    with torch.no_grad():
        for name, value in tensors.items():
            own[name].copy_(value)
    return model.eval()


def _is_head(name: str) -> bool:
    return name.startswith(HEAD)


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if path.suffix == ".safetensors":
        return read_tensors(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"{path}: torch.load(weights_only=True) cannot read it ({str(error).splitlines()[0]}); if it holds more "
            "than tensors, save its state_dict alone where you trust it"
        ) from error
    state = content.get("state_dict") if isinstance(content, dict) else None
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path}: expected a dictionary with tensors by name under 'state_dict'")
    return dict(state)


def translate(
    published: Mapping[str, Tensor], config: MeterConfig, origin: str = "the checkpoint"
) -> dict[str, Tensor]:
    """Tensors by our names, of tensors by the published ones.

    Args:
        published: the checkpoint's ``state_dict``.
        config: tells which of CLIP's blocks is dropped, the one after the last.
        origin: names the checkpoint in an error.

    Raises:
        ValueError: there are names that METER's checkpoints do not have.
    """
    unused = (*UNUSED, rf"{BLOCKS}{config.vision_config.num_hidden_layers}\..+")
    used = {name: our_names(name) for name in published if not any(re.fullmatch(each, name) for each in unused)}
    if unknown := [name for name, ours in used.items() if not ours]:
        raise ValueError(f"{origin}: not METER's: {listing(unknown)}")
    return {
        our_name: part
        for name, ours in used.items()
        for our_name, part in zip(ours, _split(published[name], len(ours)), strict=True)
    }


def _split(tensor: Tensor, number: int) -> Sequence[Tensor]:
    return [tensor] if number == 1 else torch.atleast_1d(tensor).tensor_split(number)


def our_names(published: str) -> list[str]:
    """Ours for a published name: one, three where the tensor is split in three, none for one that is not METER's."""
    for pattern, targets in (SPLIT | {pattern: [target] for pattern, target in RENAMED.items()}).items():
        if match := re.fullmatch(pattern, published):
            return [match.expand(target) for target in targets]
    return []


def interpolate_positions(positions: Tensor, number: int) -> Tensor:
    """The position embedding [1 + g², d] of a square grid and CLS, for another such grid: [number, d]; bicubic.

    Raises:
        ValueError: the embedding is not that of a square grid.
    """
    if positions.dim() != 2 or round((len(positions) - 1) ** 0.5) ** 2 + 1 != len(positions):
        shape = list(positions.shape)
        raise ValueError(f"positional_embedding: expected [1 + a square number, width], got {shape}")
    if len(positions) == number:
        return positions
    before, after = (round((count - 1) ** 0.5) for count in (len(positions), number))
    grid = positions[1:].reshape(1, before, before, -1).permute(0, 3, 1, 2).float()
    grid = torch.nn.functional.interpolate(grid, size=(after, after), mode="bicubic")
    return torch.cat([positions[:1], grid.permute(0, 2, 3, 1).flatten(0, 2).to(positions.dtype)])


def _check_fit(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], origin: str) -> None:
    problem = mismatch(tensors, expected, "the config's model")
    if problem:
        raise ValueError(f"{origin}: does not fit; {problem}")
    check_kinds(expected, tensors, origin)
    check_finite(expected, tensors, origin)
