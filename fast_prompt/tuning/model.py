"""``get_fast_prompt_model``, and the methods that an adapted model has beside its own.

The model is not wrapped. Its class becomes a subclass of itself, of the same name, that adds ``FastPromptModel``'s
methods; so whatever inspects a model (``Trainer`` reads the forward's signature, ``transformers`` finds its output
recorders by the class's name) sees what it saw before. ``revert()`` gives the class back.
"""

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from torch import Tensor, nn

from fast_prompt.nn.offload import with_values
from fast_prompt.tuning.adapters import (
    FOLDED_CHILD,
    SAVED,
    SAVED_PARAMETERS,
    SavedModules,
    SiteAdapters,
    check_adapter_name,
)
from fast_prompt.tuning.classes import base_class, look_alike, replace_forward, restore_forward
from fast_prompt.tuning.combination import as_config
from fast_prompt.tuning.compaction import check_skips, drop_weights, idle_in_all
from fast_prompt.tuning.config import MethodConfig
from fast_prompt.tuning.loading import open_loader
from fast_prompt.tuning.overlap import check_apart_from
from fast_prompt.tuning.parameters import SavedParameters
from fast_prompt.tuning.site import Site
from fast_prompt.tuning.state import (
    AdapterState,
    Draft,
    Parts,
    check_finite,
    check_fit,
    check_kinds,
    copy_into,
    describe_base,
    listing,
    tensors_in,
    tensors_of,
)
from fast_prompt.tuning.storage import save_adapter

# ``transformers``' own sign that adapters sit in a frozen model: it then trains quantized bases, and lets gradients
# into the first block when gradient checkpointing is reentrant (which otherwise would cut every adapter off).
HAS_ADAPTERS = "_hf_peft_config_loaded"

# ``Trainer`` saves into directories of this name, and takes up training again only from files of that one.
TRAINER_CHECKPOINT = re.compile(r"checkpoint-\d+")
TRAINER_WEIGHTS_NAME = "model.safetensors"

# Makes a new adapter for a model; a saved one's values may be in it.
Build = Callable[[nn.Module, MethodConfig], Draft]


def get_fast_prompt_model(
    model: nn.Module, config: MethodConfig | Sequence[MethodConfig], adapter_name: str = "default"
) -> Any:
    """Put a new adapter into ``model``, in place, and freeze everything else.

    What trains afterwards is the adapter's own parameters, the modules that ``config.modules_to_save`` names and what
    the method trains of the base, each a copy of its own, float32 where the base is of half precision. Unlike a fresh
    head in ``transformers``, nothing trains that is not asked for.

    Args:
        model: a ``transformers`` model, or any module whose attentions ``config.target_modules`` names.
        config: a method's settings, such as ``fast_prompt.APTConfig()``, or a list of several methods' that make one
            adapter together.
        adapter_name: letters, digits, ``_`` and ``-``.

    Returns:
        ``model`` itself, which now has the methods of ``FastPromptModel``; ``revert()`` undoes everything.

    Raises:
        TypeError: ``model`` or ``config`` is something else.
        ValueError: the model has adapters already, or the config does not fit it. The model is then unchanged.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    return _adapt(model, _draft(model, as_config(config), adapter_name), adapter_name)


def _draft(model: nn.Module, config: MethodConfig, adapter_name: str, build: Build = Draft.build) -> Draft:
    if isinstance(model, FastPromptModel):
        raise ValueError(f"model: it has adapters already ({', '.join(model.adapter_configs)}); use add_adapter")
    check_adapter_name(adapter_name)
    return build(model, config)


def _adapt(model: nn.Module, draft: Draft, adapter_name: str) -> Any:
    """Make ``model`` a FastPromptModel whose first and active adapter is ``draft``."""
    state = AdapterState(
        requires_grad={name: parameter.requires_grad for name, parameter in model.named_parameters()},
        training={name: module.training for name, module in model.named_modules()},
        active=adapter_name,
    )
    model.__class__ = look_alike((FastPromptModel, type(model)))
    assert isinstance(model, FastPromptModel)
    model._fast_prompt = state
    if hasattr(model, HAS_ADAPTERS) and HAS_ADAPTERS not in model.__dict__:
        setattr(model, HAS_ADAPTERS, True)
        state.own_attributes.append(HAS_ADAPTERS)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    _let_gradients_in(model, state)
    model._attach(adapter_name, draft)
    model.set_adapter(adapter_name)
    return model


def _let_gradients_in(model: Any, state: AdapterState) -> None:
    """What ``transformers`` does to a model with adapters whose checkpointing is switched on, where it was on before.

    Reentrant checkpointing cuts off every block whose input wants no gradient.
    """
    checkpoints = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    has_hooks = bool(getattr(model, "_require_grads_hooks", None))
    if checkpoints and not has_hooks and hasattr(model, "enable_input_require_grads"):
        before = set(model.__dict__)
        model.enable_input_require_grads()
        state.lets_gradients_in = True
        state.own_attributes += sorted(set(model.__dict__) - before)


class ActiveAdapters(list[str]):
    """Names of adapters: an attribute in PEFT, a method's result in ``transformers``."""

    def __call__(self) -> list[str]:
        """The same names."""
        return list(self)


class FastPromptModel(nn.Module):
    """The methods that ``get_fast_prompt_model`` adds to a model; not made by calling it.

    Attributes:
        adapter_configs: each adapter's config, by the adapter's name.
        active_adapter: name of the adapter in use (while adapters are not disabled).
        active_adapters: the same name in a list, as PEFT has it; it may be called, as ``transformers`` has it.
        targeted_module_names: paths of the attention modules that the active adapter adapts.
        is_folded: whether ``fold()`` is in effect.
    """

    _fast_prompt: AdapterState

    @property
    def adapter_configs(self) -> dict[str, MethodConfig]:
        """Each adapter's config, by the adapter's name."""
        return self._fast_prompt.configs

    @property
    def active_adapter(self) -> str:
        """Name of the adapter in use."""
        return self._fast_prompt.active

    @property
    def active_adapters(self) -> "ActiveAdapters":
        """Name of the adapter in use, in a list; none while adapters are disabled."""
        return ActiveAdapters([self._fast_prompt.active] if self._fast_prompt.enabled else [])

    @property
    def targeted_module_names(self) -> list[str]:
        """Paths of the modules that the active adapter adapts."""
        return list(dict.fromkeys(site.name for site in self._fast_prompt.sites[self._fast_prompt.active]))

    @property
    def is_folded(self) -> bool:
        """Whether ``fold()`` is in effect."""
        return bool(self._fast_prompt.folded)

    # Adapters by name

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

    def revert(self) -> nn.Module:
        """Take every adapter out and give the model back as it was, bit for bit: class, weights, flags, modes.

        Returns:
            the model itself, no longer a FastPromptModel.

        Raises:
            RuntimeError: the model is compacted.
        """
        self._refuse_if_compacted("revert")
        self._refuse_while_offloaded()
        self.unfold()
        state = self._fast_prompt
        state.enabled = False
        self._use_active()
        for name in list(state.configs):
            self._detach(name)
        if state.lets_gradients_in:
            model: Any = self
            model.disable_input_require_grads()
        for attribute in (SAVED, SAVED_PARAMETERS, *state.own_attributes, "_fast_prompt"):
            if hasattr(self, attribute):
                delattr(self, attribute)
        self.__class__ = base_class(self)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(state.requires_grad.get(name, parameter.requires_grad))
        for name, module in self.named_modules():
            module.training = state.training.get(name, module.training)
        return self

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

    # Counting

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Number of elements of the parameters that train, and of all parameters."""
        counts = [(parameter.numel(), parameter.requires_grad) for parameter in self.parameters()]
        return sum(number for number, trains in counts if trains), sum(number for number, _ in counts)

    def print_trainable_parameters(self) -> None:
        """Print how many parameters train, how many there are, and the share, in PEFT's words."""
        trainable, total = self.get_nb_trainable_parameters()
        share = 100 * trainable / max(total, 1)
        print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {share:.4f}")

    # Saving and loading

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        selected_adapters: list[str] | None = None,
        **others: Any,
    ) -> None:
        """Save adapters, each as ``adapter_config.json`` and ``adapter_model.safetensors``.

        An adapter that was there is replaced in one step: whatever kills a save, and whoever else saves or loads at the
        same time, finds the old one or the new one. (The weights file holds the config too; a config file that is not
        of the same save is not used.)

        The adapter in use goes into ``save_directory`` itself, any other into a subdirectory of its name. An adapter's
        file holds its whole trainable state, modules_to_save included, and nothing of the base. In a directory named
        as ``Trainer`` names its checkpoints, ``model.safetensors`` is a link to the file (a copy where there are no
        links), the only name from which ``Trainer`` resumes.

        Args:
            save_directory: made if missing.
            is_main_process: nothing is written when False.
            state_dict: the model's state, where it must be gathered first; the model's own by default.
            selected_adapters: names of the adapters to save; all by default. The one in use, or else the first, goes
                into ``save_directory`` itself.
            others: arguments of ``transformers`` and PEFT, with the values that ask for nothing more
                (``push_to_hub=False``).

        Raises:
            ValueError: there is no such adapter, or one of ``others`` asks for what is not done here.
        """
        _refuse_wishes(others)
        names = list(self._fast_prompt.configs) if selected_adapters is None else list(selected_adapters)
        for name in names:
            self._check_known(name)
        if not is_main_process or not names:
            return
        root, directory = (self.active_adapter if self.active_adapter in names else names[0]), Path(save_directory)
        second_name = TRAINER_WEIGHTS_NAME if TRAINER_CHECKPOINT.fullmatch(directory.name) else None
        for name in names:
            target = directory if name == root else directory / name
            values = self._fast_prompt.configs[name].to_dict() | describe_base(
                base_class(self), getattr(self, "config", None)
            )
            tensors = self.get_adapter_state_dict(name) if state_dict is None else self._gathered(name, state_dict)
            save_adapter(target, values, tensors, second_name if name == root else None)

    @staticmethod
    def from_pretrained(
        model: nn.Module,
        directory: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        allow_nonfinite: bool = False,
    ) -> Any:
        """Put an adapter saved by ``save_pretrained`` into a fresh base model, in place, and use it.

        Args:
            model: the base that the adapter was made for, with its own weights loaded.
            directory: what was given to ``save_pretrained``.
            adapter_name: letters, digits, ``_`` and ``-``.
            is_trainable: whether it shall train on; frozen by default, as in PEFT.
            allow_nonfinite: whether to take an adapter that holds NaN or infinity.

        Returns:
            ``model`` itself, with the methods of ``FastPromptModel``.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a file is broken or foreign, does not fit the model, or holds values of another kind of dtype,
                NaN or infinity. The model is then unchanged.
        """
        with open_loader(Path(directory), allow_nonfinite) as loader:
            draft = _draft(model, loader.config, adapter_name, loader.build)
        adapted = _adapt(model, draft, adapter_name)
        if not is_trainable:
            adapted.requires_grad_(False)
        return adapted

    def get_adapter_state_dict(self, adapter_name: str | None = None) -> dict[str, Tensor]:
        """The tensors of an adapter, by default of the one in use, named as in its file; the very ones that train.

        Those that accelerate keeps elsewhere come from there.

        Raises:
            ValueError: there is no such adapter, or it is on the meta device and has no values.
        """
        name = self.active_adapter if adapter_name is None else adapter_name
        self._check_known(name)
        return with_values(self, tensors_of(self._parts(name)))

    def load_adapter(
        self,
        directory: str | os.PathLike[str],
        adapter_name: str,
        is_trainable: bool | None = None,
        allow_nonfinite: bool = False,
    ) -> None:
        """Load a saved adapter as ``adapter_name``: a new one, or new values for one that has the same settings.

        Args:
            directory: what was given to ``save_pretrained``.
            adapter_name: a new one rests, frozen, until ``set_adapter``; the values of one that is there are replaced
                in place, so that an optimizer goes on with them.
            is_trainable: of the adapter in use: whether it trains from now on; as it was when None. Of another,
                ``set_adapter`` decides, and True is refused.
            allow_nonfinite: whether to take an adapter that holds NaN or infinity.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: as ``from_pretrained``; or ``is_trainable`` is True for an adapter that is not in use. The model
                is then unchanged.
            RuntimeError: the model is folded.
        """
        self._refuse_while_folded("load an adapter")
        is_active = adapter_name == self.active_adapter
        if is_trainable and not is_active:
            raise ValueError(
                f"is_trainable: {adapter_name!r} would not be in use; load it, then set_adapter({adapter_name!r})"
            )
        with open_loader(Path(directory), allow_nonfinite) as loader:
            if adapter_name in self._fast_prompt.configs:
                _check_same(self._fast_prompt.configs[adapter_name], loader.config, adapter_name, Path(directory))
                loader.fill(self._parts(adapter_name))
            else:
                self._attach(adapter_name, self._new_draft(adapter_name, loader.config, loader.build))
        if is_active and is_trainable is not None:
            for part in self._parts(adapter_name).values():
                part.requires_grad_(is_trainable)

    def load_state_dict(self, state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = False) -> Any:
        """As ``nn.Module.load_state_dict``; the contents of an adapter's file go to the adapter in use.

        The latter is what ``Trainer`` does with its checkpoints.

        Raises:
            ValueError: an adapter's contents do not fit, are of another kind of dtype, or hold NaN or infinity; or
                ``assign`` is True for them.
            RuntimeError: the model is folded.
        """
        self._refuse_while_folded("load weights")
        parts = self._parts(self.active_adapter)
        own = tensors_of(parts)
        if state_dict.keys() != own.keys():
            return super().load_state_dict(state_dict, strict=strict, assign=assign)
        if assign:
            raise ValueError("assign: expected False for an adapter's contents, whose values are copied into place")
        check_fit(parts, dict(state_dict), "state_dict", base_class(self).__name__)
        check_kinds(own, state_dict, "state_dict")
        check_finite(own, state_dict, "state_dict")
        copy_into(parts, dict(state_dict))
        return nn.Module().load_state_dict({})

    # Folding

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

    # Compacting

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

    # Within

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

    def _parts(self, name: str) -> Parts:
        """Everything of an adapter, under the prefix of its tensors' names in a file."""
        parts: dict[str, nn.Module | nn.Parameter] = {
            site.prefix: self._adapters(site)[name] for site in self._fast_prompt.sites[name]
        }
        if hasattr(self, SAVED):
            parts |= self._saved().of(self, name)
        if hasattr(self, SAVED_PARAMETERS):
            parts |= self._saved_parameters().of(self, name)
        return parts

    def _gathered(self, name: str, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """An adapter's tensors out of a whole model's state, named as in its file."""
        own = {id(value): key for key, value in self.state_dict(keep_vars=True).items()}
        parts = self._parts(name).items()
        gathered = {
            key: state_dict[own[id(value)]] for prefix, part in parts for key, value in tensors_in(prefix, part)
        }
        return with_values(self, gathered)

    def _adapters(self, site: Site) -> SiteAdapters:
        adapters = getattr(self.get_submodule(site.host), site.child)
        assert isinstance(adapters, SiteAdapters)
        return adapters

    def _saved(self) -> SavedModules:
        saved = getattr(self, SAVED)
        assert isinstance(saved, SavedModules)
        return saved

    def _saved_parameters(self) -> SavedParameters:
        saved = getattr(self, SAVED_PARAMETERS)
        assert isinstance(saved, SavedParameters)
        return saved

    def _check_known(self, name: str) -> None:
        if name not in self._fast_prompt.configs:
            raise ValueError(f"adapter_name: expected one of {', '.join(self._fast_prompt.configs)}, got {name!r}")

    def _refuse_while_folded(self, action: str) -> None:
        if self.is_folded:
            raise RuntimeError(f"the model is folded, for inference only: call unfold() before you {action}")

    def _refuse_while_offloaded(self) -> None:
        """No parameter of the base is swapped that accelerate would put back at the next call."""
        if hasattr(self, SAVED_PARAMETERS) and self._saved_parameters().is_offloaded(self):
            raise RuntimeError(
                "accelerate keeps parameters of the base that an adapter trains elsewhere, and would put the wrong "
                "ones back: take its hooks off (accelerate.hooks.remove_hook_from_submodules), then offload again"
            )

    def _refuse_if_compacted(self, action: str) -> None:
        dropped = self._fast_prompt.dropped
        if dropped:
            raise RuntimeError(
                f"{action}: compact() has dropped the weights of {', '.join(dropped)}, which the model would need "
                "without its adapter; load the model anew"
            )


# Arguments of other libraries' save_pretrained, with the values that ask for nothing but what is done.
NO_WISHES: dict[str, tuple[Any, ...]] = {
    "push_to_hub": (False, None),
    "safe_serialization": (True, None),
    "save_embedding_layers": ("auto", False),
    "save_peft_format": (True,),
    "token": (None,),
    "variant": (None,),
}


def _refuse_wishes(others: Mapping[str, Any]) -> None:
    for name, value in others.items():
        if name not in NO_WISHES or not any(value is each or value == each for each in NO_WISHES[name]):
            raise ValueError(
                f"save_pretrained: {name}={value!r} is not supported: it writes an adapter's config and weights, as "
                "safetensors, into a directory"
            )


def _check_same(here: MethodConfig, there: MethodConfig, name: str, directory: Path) -> None:
    ours, theirs = here.to_dict(), there.to_dict()
    different = [
        f"{key} {ours.get(key)!r} here, {theirs[key]!r} there" for key in theirs if ours.get(key) != theirs[key]
    ]
    if different:
        raise ValueError(
            f"adapter_name: {name!r} exists with other settings than those in {directory} ({'; '.join(different)}); "
            "load it under another name"
        )
