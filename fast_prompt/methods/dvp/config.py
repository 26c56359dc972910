"""DVP, dynamic visual prompting (arXiv 2306.00409): an image becomes a few prompts inside a language model."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from fast_prompt.models.contract import check_forwards, check_model_forward
from fast_prompt.models.visual.forward import visual_forward
from fast_prompt.models.visual.head import HEAD_CHILD, AnswerHead, answer_forward
from fast_prompt.models.visual.prompter import POOLINGS, VisualPrompter
from fast_prompt.models.visual.target import Target, find_target
from fast_prompt.nn import PromptCompressor, checks
from fast_prompt.nn.adapter import BottleneckAdapter
from fast_prompt.tuning.config import MethodConfig
from fast_prompt.tuning.placement import placement
from fast_prompt.tuning.site import CHILD, Site


def no_parameters(model: nn.Module) -> list[str]:
    """Nothing of the base trains."""
    return []


def norm_parameters(model: nn.Module) -> list[str]:
    """Names of the parameters of every LayerNorm or RMSNorm of the base."""
    norms = [path for path, module in model.named_modules() if type(module).__name__.endswith("Norm")]
    return [name for name in all_parameters(model) if name.rpartition(".")[0] in norms]


def all_parameters(model: nn.Module) -> list[str]:
    """Names of every floating-point parameter of the base."""
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.is_floating_point() and not any(part.startswith(CHILD) for part in name.split("."))
    ]


TRAIN_BASE: dict[str, Callable[[nn.Module], list[str]]] = {
    "none": no_parameters,
    "norms": norm_parameters,
    "full": all_parameters,
}


@dataclass(kw_only=True)
class DVPConfig(MethodConfig):
    """Settings of DVP: prompts compressed from ``visual_embeds`` enter a language model before block ``layer``.

    They enter BERT's and RoBERTa's encoder, T5's decoder, and LLaMA; then block K and the later ones run on the prompts
    and the text. The model's forward takes ``visual_embeds`` [B, Nv, visual_width] and ``visual_attention_mask``
    [B, Nv] (1 = real token) besides its own arguments, and ``visual_query_mask``, which says what part of the text is
    the question: see ``fast_prompt.models.visual.forward.visual_forward``. In ``generate`` that is the text given to
    it, however it is run through; a key-value cache that is gone on from keeps the prompts it was filled with.

    Attributes:
        layer: K, the block before which the prompts enter, from 0.
        visual_width: d_v, the width of the visual tokens; the model's width when None.
        num_prompts: m. Each of more than one asks with the pooled query plus an offset of its own, from N(0, 0.02).
        query: what asks for the prompts: the question's ``"first"`` or ``"last"`` real token, or their ``"mean"``, at
            block K's input, for T5 at its encoder's output; ``"auto"`` is the first for BERT, the mean for T5, the
            last for LLaMA.
        answer_token_id: ask with the text at this token's first place instead, in samples that have it. Where the
            answers to be learnt follow in the text, LLaMA needs it in every sample, or ``visual_query_mask``, lest the
            prompts tell them.
        num_heads: h of the cross-attention; the model's when None.
        inner_width: the width of its heads together; the model's when None.
        dropout: probability in [0, 1) that one of its weights is dropped in training.
        type_embedding: whether text and prompts get a learned vector each; by default BERT's and T5's do, and LLaMA's
            do not.
        type_embedding_std: the standard deviation that they are drawn with. The paper's 1 drowns the hidden states of a
            small model, which are smaller: a frozen MiniLM learns far faster from 0.02.
        adapter_width: width of the bottleneck adapters on every sublayer's output; none when None.
        train_base: what trains of the language model, as copies that this adapter owns: ``"none"``, its ``"norms"`` or
            all of it, ``"full"``.
        num_answers: the answers that a new head chooses from, on a model that has no head; no new head when None.
        modules_to_save: names (or their endings) of modules to train and save in full, such as ``["classifier"]``.

    Raises:
        ValueError: a setting is out of range; the message names it.
    """

    method: ClassVar[str] = "DVP"
    cost: ClassVar[str | None] = "fast_prompt.methods.dvp.cost"
    search: ClassVar[str | None] = "fast_prompt.search.dvp:DVPSearch"

    layer: int
    visual_width: int | None = None
    num_prompts: int = 1
    query: str = "auto"
    answer_token_id: int | None = None
    num_heads: int | None = None
    inner_width: int | None = None
    dropout: float = 0.1
    type_embedding: bool | None = None
    type_embedding_std: float = 1.0
    adapter_width: int | None = None
    train_base: str = "norms"
    num_answers: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.check_index("layer", self.layer)
        if self.answer_token_id is not None:
            checks.check_index("answer_token_id", self.answer_token_id)
        checks.check_count("num_prompts", self.num_prompts)
        for name in ("visual_width", "num_heads", "inner_width", "adapter_width", "num_answers"):
            if getattr(self, name) is not None:
                checks.check_count(name, getattr(self, name))
        checks.check_choice("query", self.query, ("auto", *POOLINGS))
        checks.check_choice("train_base", self.train_base, TRAIN_BASE)
        checks.check_probability("dropout", self.dropout)
        if self.type_embedding is not None:
            checks.check_bool("type_embedding", self.type_embedding)
        checks.check_not_negative("type_embedding_std", self.type_embedding_std)

    def find_sites(self, model: nn.Module) -> list[Site]:
        """The model itself, for prompts and head, and every sublayer that gets an adapter.

        Raises:
            ValueError: the architecture is unknown, or not as it was; it has no such block, or a head already; widths
                do not divide; or another tool has replaced a forward.
        """
        target = find_target(model)
        self._check(model, target)
        self._check_forwards(model, target)
        visual, width = target.visual, target.width
        patches = dict.fromkeys(target.blocks, visual.block_forward)
        if target.encoder is not None and visual.drop_visual is not None:
            patches[target.encoder] = visual.drop_visual
        sites = [Site(name=target.stack, host="", forward=visual_forward, width=width, patches=patches)]
        if self.num_answers is not None:
            sites.append(Site(name="", host="", forward=answer_forward, width=width, child=HEAD_CHILD))
        if self.adapter_width is not None:
            sites += [Site(name=path, host=path, forward=visual.adapt, width=width) for path in target.adapted]
        return sites

    def _check_forwards(self, model: nn.Module, target: Target) -> None:
        """What visual prompts pass through is as it was, and nothing else stands before it."""
        encoder = [] if target.encoder is None else [target.encoder]
        check_forwards(model, [target.stack], replaced=False)
        check_forwards(model, ["", *target.blocks, *encoder])
        if self.adapter_width is not None:
            check_forwards(model, target.adapted)
        check_model_forward(model)

    def _check(self, model: nn.Module, target: Target) -> None:
        if self.layer >= len(target.blocks):
            raise ValueError(f"layer: expected one of the {len(target.blocks)} blocks from 0, got {self.layer}")
        num_heads, inner_width = self.num_heads or target.num_heads, self.inner_width or target.width
        if inner_width % num_heads:
            raise ValueError(f"num_heads: expected a divisor of the inner width {inner_width}, got {num_heads}")
        if self.num_answers is not None and type(model).__name__ not in target.visual.backbones:
            backbones = " or ".join(target.visual.backbones)
            raise ValueError(f"num_answers: expected a model without a head ({backbones}), got {type(model).__name__}")

    def build(self, model: nn.Module, site: Site) -> nn.Module:
        """What belongs at ``site``, where that computes; float32, or float64 in a float64 model."""
        target = find_target(model)
        place = placement(model, site.host or target.blocks[self.layer])
        if site.forward is visual_forward:
            return self._prompter(target, place)
        if site.forward is answer_forward:
            assert self.num_answers is not None
            return AnswerHead(site.width, self.num_answers, target.architecture.name, **place)
        assert self.adapter_width is not None
        return BottleneckAdapter(site.width, self.adapter_width, **place)

    def _prompter(self, target: Target, place: dict[str, Any]) -> VisualPrompter:
        compressor = PromptCompressor(
            target.width,
            self.num_heads or target.num_heads,
            self.visual_width or target.width,
            inner_dim=self.inner_width or target.width,
            dropout=self.dropout,
            **place,
        )
        visual = target.visual
        return VisualPrompter(
            compressor,
            num_prompts=self.num_prompts,
            pooling=visual.pooling if self.query == "auto" else self.query,
            type_embedding=visual.type_embedding if self.type_embedding is None else self.type_embedding,
            type_embedding_std=self.type_embedding_std,
            family=target.architecture.name,
            stack=target.stack,
            layer=self.layer,
            num_blocks=len(target.blocks),
            answer_token_id=self.answer_token_id,
        )

    def trained_parameters(self, model: nn.Module) -> list[str]:
        """What ``train_base`` says."""
        return TRAIN_BASE[self.train_base](model)
