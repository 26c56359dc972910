"""Adapters of one model keep apart: none adapts what lies within a module that another trains a copy of."""

from collections.abc import Mapping, Sequence

from fast_prompt.tuning.adapters import is_within
from fast_prompt.tuning.site import Site


def check_apart_from(
    sites: Sequence[Site], saved: Sequence[str], others: Mapping[str, Sequence[Site]], saved_by: Mapping[str, str]
) -> None:
    """Raise a ValueError unless a new adapter can be beside the others.

    Args:
        sites: where it adapts.
        saved: paths of the modules that it trains in full.
        others: the sites of the others, by name.
        saved_by: for each path of a module that another trains in full, that one's name.
    """
    adapted = {path: name for name, theirs in others.items() for site in theirs for path, _ in site.forwards}
    for path in saved:
        clash = next((each for each in adapted if is_within(each, [path])), None)
        if clash is not None:
            raise ValueError(
                f"modules_to_save: {path!r} holds {clash!r}, which the adapter {adapted[clash]!r} adapts; a copy "
                "would hold that adapter too"
            )
    for path in dict.fromkeys(path for site in sites for path, _ in site.forwards):
        clash = next((each for each in saved_by if is_within(path, [each])), None)
        if clash is not None:
            raise ValueError(
                f"config: {path!r} would be adapted, which lies within {clash!r}: the adapter {saved_by[clash]!r} has "
                "a copy of that in its place"
            )
