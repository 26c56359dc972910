"""Skipping blocks of a whole model: METER with random weights, untouched and with k fusion layers' adapters in place.

The skipped layers' weights are dropped, so that the saving of memory can be read off as well. What the speed-up ought
to be is what `fast-prompt cost --model meter --method das` says of the multiply-adds.
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fast_prompt.bench.contender import Contender, backends_for, forced
from fast_prompt.methods import DASConfig
from fast_prompt.methods.das.spread import spread
from fast_prompt.parity import Problem
from fast_prompt.tuning import get_fast_prompt_model

SHAPE_KEYS = ("B", "image", "text", "k")
LARGEST = {"text": 512, "k": 11}
DEFAULT_SHAPES = ({"B": 1, "image": 384, "text": 40, "k": 4},)
PASSES = ("fwd",)
PARAMETERS = ()

WIDTH, SKIP_WIDTH = 96, 288  # the paper's, for METER
D, PATCH, VISION_LAYERS, TEXT_LAYERS, FUSION_LAYERS = 768, 16, 11, 12, 6
SEED = 0

Shape = dict[str, int]


def problem(shape: Shape, dtype: torch.dtype, device: torch.device) -> Problem:
    """Random pixels [B, 3, S, S]; the text is each model's own."""
    pixels = torch.randn(shape["B"], 3, shape["image"], shape["image"], generator=torch.Generator().manual_seed(SEED))
    return Problem({"pixel_values": pixels.to(device, dtype)}, torch.empty(0))


def products(shape: Shape) -> list[tuple[int, int, int]]:
    """(m, k, n) of a block's largest matrix products: the two of the image's MLP."""
    rows = shape["B"] * _visual_tokens(shape)
    return [(rows, D, 4 * D), (rows, 4 * D, D)]


def flops(shape: Shape, backward: bool) -> int:
    """FLOPs of the skipping model: encoders, fusion layers that are left, adapters; with the products of attention."""
    text, visual, skipped = shape["text"], _visual_tokens(shape), shape["k"] // 2
    encoders = VISION_LAYERS * _block(visual, visual) + TEXT_LAYERS * _block(text, text)
    kept = FUSION_LAYERS - skipped
    fusion = kept * (_fusion(visual, text) + _fusion(text, visual))
    adapters = 4 * D * (visual + text) * (3 * WIDTH * kept + SKIP_WIDTH * skipped)
    return shape["B"] * (encoders + fusion + adapters)


def _block(rows: int, keys: int) -> int:
    """FLOPs of one transformer block."""
    return rows * (24 * D**2 + 4 * keys * D)


def _fusion(rows: int, others: int) -> int:
    """FLOPs of one stream's fusion layer: self-attention, attention to the other stream, MLP."""
    return _block(rows, rows) + 4 * D * (rows * (D + others) + others * D)


def traffic(shape: Shape, dtype: torch.dtype, backward: bool) -> int:
    """Bytes of the weights, which each pass reads."""
    weights = sum(parameter.numel() for parameter in build(shape, torch.float32, torch.device("meta")).parameters())
    return dtype.itemsize * weights


def contenders(shape: Shape, dtype: torch.dtype, device: torch.device, backward: bool) -> list[Contender]:
    """The untouched model, and the compacted one that skips on every backend."""
    definitions = {
        make: _function(make(shape, torch.float32, device).to(dtype).double(), shape) for make in (build, skipping)
    }
    found = [Contender("untouched", "baseline", _function(build(shape, dtype, device), shape), definitions[build])]
    sizes = {"width": D, "adapter_width": SKIP_WIDTH, "num_adapters": 1, "num_experts": 0}
    for backend in backends_for("skip_adapter", device, dtype, **sizes):
        function = forced(_function(skipping(shape, dtype, device), shape), backend)
        found.append(Contender(f"{backend}_skipping", "ours", function, definitions[skipping]))
    return found


def build(shape: Shape, dtype: torch.dtype, device: torch.device) -> Any:
    """METER in evaluation, the same random weights each time."""
    meter = importlib.import_module("fast_prompt.models.meter")  # transformers is an extra, and slow to import
    config = meter.MeterConfig(vision_config={"image_size": shape["image"]})
    torch.manual_seed(SEED)
    with device if device.type == "meta" else torch.device("cpu"):
        model = meter.MeterForVisualQuestionAnswering(config).eval()
    return model.to(device, dtype)


def skipping(shape: Shape, dtype: torch.dtype, device: torch.device) -> Any:
    """The same, half of its k skipped layers of each stream."""
    model = build(shape, dtype, device)
    searched = DASConfig(num_skipped=shape["k"], width=WIDTH, skip_width=SKIP_WIDTH)
    skipped = spread(searched.candidates_of(model), shape["k"])
    torch.manual_seed(SEED)
    return get_fast_prompt_model(model, DASConfig(skipped=skipped, width=WIDTH, skip_width=SKIP_WIDTH)).compact()


def _function(model: nn.Module, shape: Shape) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(SEED)
    words = torch.randint(5, 50000, (shape["B"], shape["text"]), generator=generator)
    words = words.to(next(model.parameters()).device)  # now, and not in what is timed

    def run(pixel_values: Tensor) -> Tensor:
        return model(input_ids=words, pixel_values=pixel_values).logits

    return run


def _visual_tokens(shape: Shape) -> int:
    return (shape["image"] // PATCH) ** 2 + 1
