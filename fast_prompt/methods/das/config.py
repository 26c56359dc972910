"""DAS, dynamic architecture skipping (arXiv 2309.01479): adapters in the place of blocks that a task does not need."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from fast_prompt.models.blocks import Block, BlockSite, find_blocks, resolve
from fast_prompt.models.skip import BlockSkip
from fast_prompt.nn import SkipAdapter, checks
from fast_prompt.nn.offload import read
from fast_prompt.nn.skip_adapter import check_experts, check_options
from fast_prompt.tuning.combination import CombinedConfig
from fast_prompt.tuning.config import MethodConfig
from fast_prompt.tuning.model import FastPromptModel
from fast_prompt.tuning.placement import placement
from fast_prompt.tuning.site import Site

# The norm of adapters whose architecture does not settle it.
NORM = "layer"


@dataclass(kw_only=True)
class DASConfig(MethodConfig):
    """Settings of DAS: some blocks of a frozen model are skipped, an adapter each in their place.

    The blocks that are kept get parallel adapters beside their sublayers. Known are the blocks of BERT, RoBERTa, ViLT,
    ViT, CLIP (both towers) and LLaMA, and METER's fusion layers. An adapter is a ``fast_prompt.nn.SkipAdapter``.

    Attributes:
        skipped: the blocks to skip, by path or by number among all blocks of the model. None for a search: every
            candidate then has the adapters of both forms, and ``set_skipped`` says which run.
        num_skipped: k, how many a search skips; the number of those that ``skipped`` names where it names any.
        candidates: the blocks that may be skipped, by path or number; all when None.
        width: of a kept block's adapters. The paper: 96; for LLaMA 64.
        skip_width: of a skipped block's adapter. The paper: 192 for ViLT, 288 for METER, 256 for LLaMA.
        norm: ``"layer"`` (the default) or ``"rms"`` before the down projection, ``"layer_after"`` the up projection, or
            ``"none"``. LLaMA's adapters read what its own norms give, so it must be None there; a skipped block's norm
            lives on in its adapter, and trains.
        activation: ``"relu"``, ``"silu"`` or ``"gelu"``.
        dropout: probability in [0, 1) that a hidden element is dropped in training.
        scale: what an adapter's result is multiplied by before it is added.
        learn_scale: whether each adapter's scale trains.
        init: ``"normal"``, weights from N(0, 0.02); or ``"lora"``, with which adapters start as nothing.
        num_experts: E; above 0 a skipped block's adapter mixes that many up projections, weighted by its first real
            token (the router form of LLaMA: 2 experts in 2 groups). Rows that hold several sequences are refused.
        num_groups: of the experts' up projections.
        temperature: of the experts' softmax.
        modules_to_save: names (or their endings) of modules to train and save in full, such as ``["classifier"]``.

    Raises:
        ValueError: a setting is out of range; the message names it.
    """

    method: ClassVar[str] = "DAS"
    cost: ClassVar[str | None] = "fast_prompt.methods.das.cost"
    search: ClassVar[str | None] = "fast_prompt.search.das:DASSearch"

    skipped: Sequence[str | int] | None = None
    num_skipped: int = 4
    candidates: Sequence[str | int] | None = None
    width: int = 96
    skip_width: int = 192
    norm: str | None = None
    activation: str = "relu"
    dropout: float = 0.0
    scale: float = 1.0
    learn_scale: bool = False
    init: str = "normal"
    num_experts: int = 0
    num_groups: int = 1
    temperature: float = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("skipped", "candidates"):
            if getattr(self, name) is not None:
                setattr(self, name, _check_blocks(name, getattr(self, name)))
        for name in ("num_skipped", "width", "skip_width"):
            checks.check_count(name, getattr(self, name))
        if self.skipped is not None:
            self.num_skipped = len(self.skipped)
        norm = NORM if self.norm is None else self.norm
        check_options(norm, self.activation, self.dropout, self.scale, self.learn_scale, self.init, self.temperature)
        check_experts(self.num_experts, self.num_groups)

    def candidates_of(self, model: nn.Module) -> list[str]:
        """Paths of the blocks of ``model`` that may be skipped, in its order: the arms of a search.

        Raises:
            ValueError: its blocks are unknown, a name fits none, or there are too few to skip that many.
        """
        return [block.path for block in self._candidates(find_blocks(model))]

    def idle_modules(self, model: nn.Module) -> list[str]:
        """Paths of the blocks that are skipped for good; none in a search."""
        return [block.path for block in self._skipped(find_blocks(model))]

    def find_sites(self, model: nn.Module) -> list[BlockSite]:
        """The places of the skipped blocks' adapters and of the kept ones'.

        Raises:
            ValueError: its blocks are unknown, or the settings do not fit them.
        """
        blocks = find_blocks(model)
        candidates, skipped = self._candidates(blocks), self._skipped(blocks)
        self._check_forms(blocks)
        sites: list[BlockSite] = []
        for block in blocks:
            if block in (skipped or candidates):
                sites.append(block.skip_site(model))
            if block not in skipped:
                sites += block.kept_sites(model)
        return sites

    def build(self, model: nn.Module, site: Site) -> SkipAdapter:
        """A new adapter where the block computes; float32, or float64 in a float64 model."""
        assert isinstance(site, BlockSite)
        place = site.place
        settings: dict[str, Any] = {
            "norm": place.norm or self.norm or NORM,
            "residual": place.residual,
            "eps": _eps(model),
            **placement(model, site.block.path),
        }
        settings |= {name: getattr(self, name) for name in ("activation", "dropout", "scale", "learn_scale", "init")}
        if not site.skips:
            return SkipAdapter(site.width, self.width, **settings)
        settings |= {name: getattr(self, name) for name in ("num_experts", "num_groups", "temperature")}
        if self.num_experts and place.residual == "normed":
            settings["residual"] = "input"
        adapter = BlockSkip(site.width, self.skip_width, site.block.number, **settings)
        adapter.skips = self.skipped is not None
        if place.norm is not None:
            _copy_norm(model, site.block, adapter)
        return adapter

    def _candidates(self, blocks: Sequence[Block]) -> list[Block]:
        chosen = list(blocks) if self.candidates is None else resolve(blocks, self.candidates, "candidates")
        if self.num_skipped >= len(chosen):
            field = "num_skipped" if self.skipped is None else "skipped"
            raise ValueError(f"{field}: expected fewer than the {len(chosen)} candidates, got {self.num_skipped}")
        return chosen

    def _skipped(self, blocks: Sequence[Block]) -> list[Block]:
        if self.skipped is None:
            return []
        chosen, candidates = resolve(blocks, self.skipped, "skipped"), self._candidates(blocks)
        outside = [block.path for block in chosen if block not in candidates]
        if outside:
            raise ValueError(f"skipped: expected candidates, got {', '.join(outside)}")
        return chosen

    def _check_forms(self, blocks: Sequence[Block]) -> None:
        settled = next((block for block in blocks if block.kind.skip.norm is not None), None)
        if settled is not None and self.norm is not None:
            raise ValueError(
                f"norm: expected None for {settled.architecture.name}, whose adapters have its own "
                f"({settled.kind.skip.norm}), got {self.norm!r}"
            )


def set_skipped(model: nn.Module, blocks: Sequence[str]) -> None:
    """Skip these candidates from now on, and no others; the adapter in use must be one for a search.

    Cheap: it flips a flag a candidate, so each training step may take other blocks.

    Args:
        model: adapted with a ``DASConfig`` whose ``skipped`` is None, alone or in a combination.
        blocks: paths, of those that ``DASConfig.candidates_of`` gives; none to keep all.

    Raises:
        TypeError: the model is not adapted.
        ValueError: the adapter in use has no candidates, or its blocks are fixed; or a path is no candidate's.
    """
    skips = _skips(model)
    unknown = [path for path in blocks if path not in skips]
    if unknown:
        raise ValueError(f"blocks: expected candidates ({', '.join(skips)}), got {unknown[0]!r}")
    for path, adapter in skips.items():
        adapter.skips = path in blocks


def skipped_now(model: nn.Module) -> list[str]:
    """Paths of the blocks that the adapter in use skips right now, in the model's order; errors as ``set_skipped``."""
    return [path for path, adapter in _skips(model).items() if adapter.skips]


def _skips(model: nn.Module) -> dict[str, BlockSkip]:
    """The adapters that take a candidate's place, by the block's path, in the model's order."""
    if not isinstance(model, FastPromptModel):
        raise TypeError(f"model: expected one adapted with a DASConfig, got {type(model).__name__}")
    name, state = model.active_adapter, model._fast_prompt
    config = state.configs[name]
    parts = config.configs if isinstance(config, CombinedConfig) else [config]
    das = next((part for part in parts if isinstance(part, DASConfig)), None)
    if das is None:
        raise ValueError(f"blocks: the adapter {name!r} is of {config.method} and skips none")
    if das.skipped is not None:
        dropped = "; compact() has dropped their weights" if state.dropped else ""
        raise ValueError(
            f"blocks: the adapter {name!r} skips a fixed set of blocks, and has what it needs for no other "
            f"({', '.join(das.idle_modules(model))}{dropped}); only one made with skipped=None can change"
        )
    sites = [site for site in state.sites[name] if isinstance(site, BlockSite) and site.skips]
    return {site.block.path: getattr(model.get_submodule(site.host), site.child)[name] for site in sites}


def _check_blocks(field: str, value: object) -> list[str | int]:
    """The list of paths and numbers that ``value`` is; ValueError names the ``field`` otherwise."""
    if not isinstance(value, (list, tuple)) or not value or not all(type(each) in (str, int) for each in value):
        raise ValueError(f"{field}: expected a list of at least one block, by path or number, got {value!r}")
    return list(value)


def _eps(model: nn.Module) -> float:
    """The eps of the model's RMSNorms, or LayerNorm's usual one."""
    found = (getattr(module, "variance_epsilon", None) for module in model.modules())
    return next((eps for eps in found if eps is not None), 1e-5)


@torch.no_grad()
def _copy_norm(model: nn.Module, block: Block, adapter: BlockSkip) -> None:
    """Let the adapter's norm start as the block's, where that has weights."""
    (weight,) = read(model.get_submodule(f"{block.path}.{block.kind.norm}"), "weight")
    own = adapter.tensors().norm_weight
    if weight is not None and not weight.is_meta and own is not None:
        own.copy_(weight)
