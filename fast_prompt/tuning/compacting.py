"""Models that have lost the weights that no adapter needs."""

from typing import Self

from fast_prompt.tuning.idle_blocks import drop_weights, idle_in_all
from fast_prompt.tuning.switching import SwitchableModel


class CompactableModel(SwitchableModel):
    """A model that can drop the blocks that every adapter skips."""

    def compact(self) -> Self:
        """Drop the weights of the blocks that every adapter skips, from memory and from the model's state; for good.

        What adapters of such blocks hold stays, so saving, loading, switching and training go on. Adapters that come
        later must skip those blocks too; ``revert()`` and ``disable_adapter()`` are refused from now on.

        Returns:
            the model itself.

        Raises:
            RuntimeError: the model is folded, or its adapters are disabled.
            ValueError: no block is skipped by every adapter; the message says what each skips.
        """
        self._refuse_while_folded("compact it")
        state = self._fast_prompt
        if not state.enabled:
            raise RuntimeError("compact: the adapters are disabled here")
        for path in idle_in_all(self, state.configs):
            if path not in state.dropped:
                drop_weights(self.get_submodule(path))
                state.dropped.append(path)
        return self
