"""Attention modules: where they are in a model, and whose forward is replaced to add to their output projection.

X is what the queries are projected from, H the output projection before dropout and residual. Attention modules come
in two forms. Most take X as their first argument and return H, alone or first in a tuple: what they return is
replaced. BERT's family gives ``output(O, X)`` the heads' output and X, and projects, drops out and normalises there:
that module's forward is replaced, since H never leaves it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fast_prompt.models.architectures import ARCHITECTURES
from fast_prompt.models.architectures.forwards import attention_forward, normed_output_forward, output_forward
from fast_prompt.models.contract import check_forwards, refuse
from fast_prompt.models.pattern import matching
from fast_prompt.models.proof import Trial, Verdict, prove
from fast_prompt.tuning.classes import base_class
from fast_prompt.tuning.site import CHILD, Site


@dataclass(frozen=True)
class Projections:
    """Paths, within an attention module, of the linear layers around its heads.

    Attributes:
        query: reads X; also holds keys and values where ``memory`` is empty.
        memory: the keys' and values' projections.
        output: gives H.
    """

    query: str
    memory: tuple[str, ...]
    output: str


@dataclass(frozen=True, kw_only=True)
class AttentionSite(Site):
    """One attention module to adapt; ``width`` is that of X and H.

    Attributes:
        projections: the linear layers, or None where they are not found (the site then cannot be folded).
        unproven: why it is not known that the projections read X and give H; empty where it is.
        is_cross: whether keys and values are projected from another sequence than the queries.
    """

    projections: Projections | None
    unproven: str
    is_cross: bool


# Classes of transformers that are adapted without being named.
PROVEN = tuple(sorted(name for architecture in ARCHITECTURES for name in architecture.attentions))

LAYOUTS = (
    Projections("q_proj", ("k_proj", "v_proj"), "o_proj"),
    Projections("q_proj", ("k_proj", "v_proj"), "out_proj"),
    Projections("self.query", ("self.key", "self.value"), "output.dense"),
    Projections("attention.query", ("attention.key", "attention.value"), "output.dense"),
    Projections("q", ("k", "v"), "o"),
    Projections("query", ("key", "value"), "out_proj"),
    Projections("q_lin", ("k_lin", "v_lin"), "out_lin"),
    Projections("to_q", ("to_k", "to_v"), "to_out.0"),
    Projections("qkv", (), "proj"),
    Projections("c_attn", (), "c_proj"),
    Projections("query_key_value", (), "dense"),
)

# The output projection's name where the others are not modules, as in nn.MultiheadAttention.
OUTPUTS = ("out_proj", "o_proj", "proj", "dense")

# An ``output`` module is known by its children's names.
OUTPUT_FORWARDS: dict[frozenset[str], Callable[..., Tensor]] = {
    frozenset({"dense", "dropout"}): output_forward,
    frozenset({"dense", "dropout", "LayerNorm"}): normed_output_forward,
}


def find_attention_sites(model: nn.Module, target_modules: list[str] | str | None = None) -> list[AttentionSite]:
    """The attention modules of ``model`` to adapt, in the model's order.

    Args:
        model: any module; without ``target_modules``, one built of the attentions in ``PROVEN``; of a model whose
            blocks join two encoders, only theirs are taken.
        target_modules: names of attention modules or their endings, or one regular expression for whole names.

    Raises:
        ValueError: the architecture is not known, a name fits nothing, or a module named is no attention (the message
            lists the attention-like modules found); a class that is known by name is not what it was; or the regular
            expression is not done in time.
    """
    if target_modules is None:
        names = _known(model)
        if not names:
            raise ValueError(
                f"{type(model).__name__}: none of its attentions is known ({', '.join(PROVEN)} are); "
                f"name them in target_modules. {_attention_like(model)}"
            )
    else:
        names = _match(model, target_modules)
    verdicts: dict[Any, Verdict] = {}  # one trial call for each kind of attention
    return [_site(model, name, verdicts) for name in names]


def _known(model: nn.Module) -> list[str]:
    """The attentions whose class is known; of a model whose blocks join two encoders, those in such blocks."""
    kinds = {name: type(module).__name__ for name, module in model.named_modules()}
    attentions = [name for name, kind in kinds.items() if kind in PROVEN]
    joining = [name for name in attentions if kinds[name.rpartition(".")[0]] in _JOINING_BLOCKS]
    return joining or attentions


# Blocks in which the streams of two encoders meet: where a model has them, its encoders are left as they are.
_JOINING_BLOCKS = {name for each in ARCHITECTURES if each.joins_towers and each.blocks for name in each.blocks.classes}


def _match(model: nn.Module, target_modules: list[str] | str) -> list[str]:
    names = [name for name, _ in model.named_modules() if name]
    if isinstance(target_modules, str):
        matched = matching("target_modules", target_modules, names)
        unmatched = [] if matched else [target_modules]
    else:
        endings = [(target, f".{target}") for target in target_modules]
        matched = [name for name in names if any(name == whole or name.endswith(end) for whole, end in endings)]
        unmatched = [w for w, end in endings if not any(name == w or name.endswith(end) for name in names)]
    if unmatched:
        missing = ", ".join(unmatched)
        raise ValueError(
            f"target_modules: {type(model).__name__} has no module named {missing}. {_attention_like(model)}"
        )
    # ViLT's attention holds a module that is itself called "attention": the outermost is meant.
    return [name for name in matched if not any(name.startswith(f"{other}.") for other in matched)]


def _attention_like(model: nn.Module) -> str:
    """A sentence that lists the modules with the linear layers of an attention, by class."""
    found: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        if _projections(module) is not None or isinstance(module, nn.MultiheadAttention):
            found.setdefault(type(module).__name__, []).append(name)
    if not found:
        return "No attention-like module was found."
    listed = (
        f"{len(names)} {class_name} ({names[0]}{', …' if names[1:] else ''})" for class_name, names in found.items()
    )
    return f"Attention-like modules found: {'; '.join(listed)}."


def _site(model: nn.Module, name: str, verdicts: dict[Any, Verdict]) -> AttentionSite:
    attention = model.get_submodule(name)
    projections = _projections(attention)
    output = projections.output if projections else next((o for o in OUTPUTS if _width(_child(attention, o))), None)
    if output is None:
        children = ", ".join(child for child, _ in attention.named_children()) or "none"
        raise ValueError(
            f"target_modules: {name!r} ({type(attention).__name__}) is no attention: no output projection among its "
            f"children ({children}). {_attention_like(model)}"
        )
    host, forward = _host(attention)
    path = f"{name}.{host}" if host else name
    check_forwards(model, [name], replaced=False)
    check_forwards(model, [path])
    is_cross = bool(getattr(attention, "is_cross_attention", False))
    kind = (base_class(attention), projections, is_cross)
    if kind not in verdicts:
        verdicts[kind] = _verdict(attention, projections, host, forward, is_cross)
    unproven = _unproven(name, attention, verdicts[kind])
    if not host and projections is not None and not unproven and _is_known(attention):
        forward = attention_forward(projections.output)
    return AttentionSite(
        name=name,
        host=path,
        forward=forward,
        width=_width(_child(attention, output)),
        projections=projections,
        unproven=unproven,
        is_cross=is_cross,
    )


def _is_known(attention: nn.Module) -> bool:
    """Whether its class is one of transformers or of ours, which keep H nowhere; another's may, to look at it later."""
    return base_class(attention).__module__.partition(".")[0] in ("transformers", "fast_prompt")


def _verdict(
    attention: nn.Module,
    projections: Projections | None,
    host: str,
    forward: Callable[..., Any],
    is_cross: bool,
) -> Verdict:
    """What a trial call shows of an attention."""
    if projections is None:
        return Verdict(None, "its projections are not linear layers of a known layout")
    part = attention.get_submodule
    memory = tuple(map(part, projections.memory))
    within = part(host) if host else None
    return prove(Trial(attention, part(projections.query), memory, part(projections.output), within, forward, is_cross))


def _unproven(name: str, attention: nn.Module, verdict: Verdict) -> str:
    """Why X and H are not known to be where they should; a class known by name may differ only if it is told to."""
    kind = base_class(attention).__name__
    if verdict.holds or (verdict.holds is None and kind in PROVEN):
        return ""
    if kind in PROVEN:
        refuse(f"{name}: {kind} is not what it was: {verdict.reason}")
    return verdict.reason


def _host(attention: nn.Module) -> tuple[str, Callable[..., Any]]:
    """The child whose forward is replaced ("" for the attention itself), and its replacement."""
    output = _child(attention, "output")
    children = frozenset(name for name in getattr(output, "_modules", ()) if not name.startswith(CHILD))
    if children in OUTPUT_FORWARDS:
        return "output", OUTPUT_FORWARDS[children]
    return "", attention_forward("")


def _projections(attention: nn.Module) -> Projections | None:
    """The first layout of which the module has every linear layer."""
    for layout in LAYOUTS:
        if all(_width(_child(attention, path)) for path in (layout.query, *layout.memory, layout.output)):
            return layout
    return None


def _child(module: nn.Module, path: str) -> nn.Module | None:
    for name in path.split("."):
        child = module._modules.get(name)
        if child is None:
            return None
        module = child
    return module


def _width(linear: nn.Module | None) -> int:
    """Output width of a linear layer (GPT-2's ``Conv1D`` calls it ``nf``), 0 for anything else."""
    width = getattr(linear, "out_features", None) or getattr(linear, "nf", None)
    return width if isinstance(width, int) else 0
