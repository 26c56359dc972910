"""Adapters merged with the frozen weights around them, for inference."""

from typing import Self

from fast_prompt.tuning.adapters import FOLDED_CHILD
from fast_prompt.tuning.classes import replace_forward, restore_forward
from fast_prompt.tuning.state import listing
from fast_prompt.tuning.switching import SwitchableModel


class FoldableModel(SwitchableModel):
    """A model whose adapter in use can be merged with the frozen weights."""

    def train(self, mode: bool = True) -> Self:
        """As ``nn.Module.train``; RuntimeError when the model is folded and ``mode`` is True."""
        if mode:
            self._refuse_while_folded("train")
        return super().train(mode)

    def fold(self) -> Self:
        """Merge the adapter in use with the frozen weights around it, for inference; ``unfold()`` undoes it exactly.

        The prompts' scores become more columns of the query, key and value projections, and the diffusion more
        rows of the output projection. The frozen weights stay in memory, untouched.

        Returns:
            the model itself.

        Raises:
            RuntimeError: the model is in training mode, its adapters are disabled, or weights are not there.
            ValueError: an attention cannot be folded exactly (the message says which and why), or the adapter holds
                NaN or infinity. Nothing has changed then.
        """
        if self.is_folded:
            return self
        if any(module.training for module in self.modules()):
            raise RuntimeError("fold: folding is for inference; call model.eval() first")
        if any(parameter.is_meta for parameter in self.parameters()):
            raise RuntimeError(
                "fold: weights are on the meta device, as accelerate's offloading leaves them; bring them"
            )
        state = self._fast_prompt
        if not state.enabled:
            raise RuntimeError("fold: the adapters are disabled here")
        config, name = state.configs[state.active], state.active
        broken = [key for key, value in self.get_adapter_state_dict().items() if not value.isfinite().all()]
        if broken:
            raise ValueError(f"fold: the adapter {name!r} holds NaN or infinity: {listing(broken)}")
        drafts = [(site, config.fold(self, site, self._adapters(site)[name])) for site in state.sites[name]]
        merged = [(site, folded) for site, folded in drafts if folded is not None]
        if not merged:
            raise ValueError(f"fold: {config.method} has nothing that merges with the weights around it")
        for site, folded in merged:
            self._adapters(site).activate(None)
            for path, forward in folded.forwards.items():
                module = self.get_submodule(path)
                setattr(module, FOLDED_CHILD, folded.module)
                replace_forward(module, forward)
                state.folded[path] = forward
        return self

    def unfold(self) -> Self:
        """Undo ``fold()``; nothing happens when the model is not folded."""
        state = self._fast_prompt
        for path, forward in state.folded.items():
            module = self.get_submodule(path)
            delattr(module, FOLDED_CHILD)
            restore_forward(module, forward)
        if state.folded:
            state.folded = {}
            self._use_active()
        return self
