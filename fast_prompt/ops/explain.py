"""``fast_prompt.explain``: which backend would run a call, and why the others would not."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fast_prompt.backends import BackendError, choose, describe, forced, refusals
from fast_prompt.ops.declaration import OPS


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
    if name not in OPS:
        raise ValueError(f"op: expected one of {', '.join(OPS)}, got {name!r}")
    declared = OPS[name]
    call = declared.call(declared.arguments_of(*args, **kwargs))
    try:
        chosen = choose(declared, call, forced())
    except BackendError:
        chosen = None
    return Explanation(name, chosen, refusals(declared, call))
