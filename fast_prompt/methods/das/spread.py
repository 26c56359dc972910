"""Blocks to skip where none were searched for."""

from itertools import chain, zip_longest


def spread(candidates: list[str], number: int) -> list[str]:
    """`number` of the candidates, evenly out of the model's stacks, of each the last."""
    stacks: dict[str, list[str]] = {}
    for path in candidates:
        stacks.setdefault(path.rpartition(".")[0], []).append(path)
    turns = zip_longest(*(reversed(stack) for stack in reversed(stacks.values())))
    return [path for path in chain.from_iterable(turns) if path is not None][:number]
