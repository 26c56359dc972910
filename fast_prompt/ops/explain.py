"""``fast_prompt.explain``: which backend would run a call, and why the others would not."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fast_prompt.backends import BackendError, Call, choose, describe, refusals
from fast_prompt.ops.prompt_compress import call_facts as prompt_compress_facts
from fast_prompt.ops.prompt_diffusion import call_facts as prompt_diffusion_facts
from fast_prompt.ops.skip_adapter import call_facts as skip_adapter_facts

CALL_FACTS: dict[str, Callable[..., Call]] = {
    "prompt_diffusion": prompt_diffusion_facts,
    "prompt_compress": prompt_compress_facts,
    "skip_adapter": skip_adapter_facts,
}


@dataclass(frozen=True)
class Explanation:
    """The answer of ``explain``; ``print`` it for a table.

    Attributes:
        op: the op's name.
        chosen: the backend that would run the call, or None if a forced one cannot take it.
        reasons: for each backend, why it cannot take the call, or None.
    """

    op: str
    chosen: str | None
    reasons: dict[str, str | None]

    def __str__(self) -> str:
        chosen = self.chosen or "nothing: the forced backend cannot take it"
        return f"{self.op} runs on {chosen}\n{describe(self.reasons)}"


def explain(op: str | Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Which backend would run ``op(*args, **kwargs)``, and why each of the others would not.

    Args:
        op: the op's name, or the function of ``fast_prompt.ops`` itself.
        args: the op's arguments, as in a real call.
        kwargs: the op's options.
    """
    name = op if isinstance(op, str) else op.__name__
    if name not in CALL_FACTS:
        raise ValueError(f"op: expected one of {', '.join(CALL_FACTS)}, got {name!r}")
    call = CALL_FACTS[name](*args, **kwargs)
    try:
        chosen = choose(name, call)
    except BackendError:
        chosen = None
    return Explanation(name, chosen, refusals(name, call))
