"""Adapters by name: coming, going, in use or at rest."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from fast_prompt.tuning.adapted import AdaptedModel
from fast_prompt.tuning.adapters import SAVED, SAVED_PARAMETERS, SavedModules, SiteAdapters, check_adapter_name
from fast_prompt.tuning.classes import replace_forward, restore_forward
from fast_prompt.tuning.combination import as_config
from fast_prompt.tuning.config import MethodConfig
from fast_prompt.tuning.idle_blocks import check_skips
from fast_prompt.tuning.overlap import check_apart_from
from fast_prompt.tuning.parameters import SavedParameters
from fast_prompt.tuning.state import Draft

# Makes a new adapter for a model; a saved one's values may be in it.
Build = Callable[[nn.Module, MethodConfig], Draft]


class SwitchableModel(AdaptedModel):
    """A model whose adapters can be added, deleted, exchanged and disabled."""

    def add_adapter(self, adapter_name: str, config: MethodConfig | Sequence[MethodConfig]) -> None:
        """Add a new adapter beside the others, without using it yet (``set_adapter`` does).

        Args:
            adapter_name: letters, digits, ``_`` and ``-``.
            config: a method's settings, or a list of several methods'.

        Raises:
            ValueError: the name is taken, or the config does not fit the model, which is then unchanged.
            RuntimeError: the model is folded.
        """
        self._refuse_while_folded("add an adapter")
        self._attach(adapter_name, self._new_draft(adapter_name, as_config(config)))

    def set_adapter(self, adapter_name: str) -> None:
        """Use the adapter ``adapter_name`` and let it train; the others rest, frozen.

        Raises:
            ValueError: there is no such adapter.
            RuntimeError: the model is folded.
        """
        self._refuse_while_folded("switch adapters")
        self._check_known(adapter_name)
        self._refuse_while_offloaded()
        self._fast_prompt.active = adapter_name
        for name in self._fast_prompt.configs:
            for part in self._parts(name).values():
                part.requires_grad_(name == adapter_name)
        self._use_active()

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter and its parameters.

        Raises:
            ValueError: there is no such adapter, or it is the one in use.
            RuntimeError: the model is folded.
        """
        self._refuse_while_folded("delete an adapter")
        self._check_known(adapter_name)
        if adapter_name == self._fast_prompt.active:
            raise ValueError(f"adapter_name: {adapter_name!r} is in use; set another adapter first, or revert()")
        self._detach(adapter_name)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """A context in which the model computes what it did before any adapter, its own heads included.

        Raises:
            RuntimeError: the model is folded, or compacted.
        """
        self._refuse_while_folded("disable the adapter")
        self._refuse_if_compacted("disable_adapter")
        with self._disabled():
            yield

    def disable_adapters(self) -> None:
        """As ``disable_adapter``, until ``enable_adapters``; under this name ``transformers`` has it.

        Raises:
            RuntimeError: the model is folded, or compacted.
        """
        self._refuse_while_folded("disable the adapters")
        self._refuse_if_compacted("disable_adapters")
        self._enable(False)

    def enable_adapters(self) -> None:
        """Undo ``disable_adapters``; nothing happens where adapters are enabled.

        Raises:
            RuntimeError: the model is folded.
        """
        self._refuse_while_folded("enable the adapters")
        self._enable(True)

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *others: Any, **options: Any) -> Any:
        """The input embeddings, where nothing is to change.

        Raises:
            RuntimeError: another size is asked for; ``transformers`` would change the base, which ``revert()`` gives
                back as it was, and not the adapters' copies at rest.
        """
        model: Any = self
        embeddings = model.get_input_embeddings()
        if others or options or new_num_tokens not in (None, len(embeddings.weight)):
            raise RuntimeError(
                f"resize_token_embeddings: the model has adapters ({', '.join(self.adapter_configs)}), made for "
                f"{len(embeddings.weight)} tokens; resize before you adapt it, or after revert()"
            )
        return embeddings

    def _enable(self, enabled: bool) -> None:
        self._refuse_while_offloaded()
        self._fast_prompt.enabled = enabled
        self._use_active()

    @contextmanager
    def _disabled(self) -> Iterator[None]:
        """As ``disable_adapter``, for work that runs nothing."""
        enabled = self._fast_prompt.enabled
        self._enable(False)
        try:
            yield
        finally:
            self._enable(enabled)

    def _attach(self, name: str, draft: Draft) -> None:
        """Put a checked draft into the model, frozen and not in use."""
        state = self._fast_prompt
        replaced = set(state.forwards())
        for site, module in draft.sites:
            host = self.get_submodule(site.host)
            if not hasattr(host, site.child):
                setattr(host, site.child, SiteAdapters(host))
            for path, forward in site.forwards:
                if (path, forward) not in replaced:
                    replace_forward(self.get_submodule(path), forward, site.inmost)
                    replaced.add((path, forward))
            module.train(host.training).requires_grad_(False)
            self._adapters(site)[name] = module
        if draft.saved and not hasattr(self, SAVED):
            setattr(self, SAVED, SavedModules().train(self.training))
        for path, module in draft.saved.items():
            self._saved().add(name, path, module.requires_grad_(False))
        if draft.parameters and not hasattr(self, SAVED_PARAMETERS):
            setattr(self, SAVED_PARAMETERS, SavedParameters().train(self.training))
        for path, parameter in draft.parameters.items():
            parameter.requires_grad_(False)
            self._saved_parameters().add(name, self, path, parameter)
        state.configs[name] = draft.config
        state.sites[name] = [site for site, _ in draft.sites]

    def _detach(self, name: str) -> None:
        """Remove an adapter that is not in use, and what it leaves empty."""
        state = self._fast_prompt
        needed = state.forwards()
        for site in state.sites.pop(name):
            del self._adapters(site)[name]
            if not self._adapters(site):
                delattr(self.get_submodule(site.host), site.child)
            for path, forward in site.forwards:
                needed[path, forward] -= 1
                if not needed[path, forward]:
                    restore_forward(self.get_submodule(path), forward)
        if hasattr(self, SAVED):
            self._saved().remove(name)
        if hasattr(self, SAVED_PARAMETERS):
            self._saved_parameters().remove(name)
        del state.configs[name]

    def _use_active(self) -> None:
        """Let sites and modules in place follow the state."""
        state = self._fast_prompt
        active = state.active if state.enabled else None
        for site in {(site.host, site.child): site for sites in state.sites.values() for site in sites}.values():
            self._adapters(site).activate(active)
        # The model's own are whole again before others come: one adapter's module may hold another's parameter.
        kept = [getattr(self, child) for child in (SAVED, SAVED_PARAMETERS) if hasattr(self, child)]
        for each in reversed(kept):
            each.place(self, None)
        for each in kept:
            each.place(self, active)

    def _new_draft(self, name: str, config: MethodConfig, build: Build = Draft.build) -> Draft:
        """A draft for a name that is free; built while the model's own modules are in place, for copies of those."""
        check_adapter_name(name)
        if name in self._fast_prompt.configs:
            raise ValueError(f"adapter_name: {name!r} exists already")
        check_skips(config, self, self._fast_prompt.dropped)
        with self._disabled():
            draft = build(self, config)
        state = self._fast_prompt
        copies = {name: self._saved().of(self, name) for name in state.configs} if hasattr(self, SAVED) else {}
        saved_by = {path: name for name, theirs in copies.items() for path in theirs}
        check_apart_from([site for site, _ in draft.sites], list(draft.saved), state.sites, saved_by)
        return draft
