"""``get_fast_prompt_model``, and the methods that an adapted model has beside its own.

The model is not wrapped. Its class becomes a subclass of itself, of the same name, that adds ``FastPromptModel``'s
methods; so whatever inspects a model (``Trainer`` reads the forward's signature, ``transformers`` finds its output
recorders by the class's name) sees what it saw before. ``revert()`` gives the class back.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from fast_prompt.tuning.adapters import SAVED, SAVED_PARAMETERS, check_adapter_name
from fast_prompt.tuning.classes import base_class, look_alike
from fast_prompt.tuning.combination import as_config
from fast_prompt.tuning.compacting import CompactableModel
from fast_prompt.tuning.config import MethodConfig
from fast_prompt.tuning.folding import FoldableModel
from fast_prompt.tuning.loading import open_loader
from fast_prompt.tuning.saving import SavableModel
from fast_prompt.tuning.state import AdapterState, Draft
from fast_prompt.tuning.switching import Build

# ``transformers``' own sign that adapters sit in a frozen model: it then trains quantized bases, and lets gradients
# into the first block when gradient checkpointing is reentrant (which otherwise would cut every adapter off).
HAS_ADAPTERS = "_hf_peft_config_loaded"


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


class FastPromptModel(SavableModel, FoldableModel, CompactableModel):
    """The methods that ``get_fast_prompt_model`` adds to a model; not made by calling it.

    Attributes:
        adapter_configs: each adapter's config, by the adapter's name.
        active_adapter: name of the adapter in use (while adapters are not disabled).
        active_adapters: the same name in a list, as PEFT has it; it may be called, as ``transformers`` has it.
        targeted_module_names: paths of the attention modules that the active adapter adapts.
        is_folded: whether ``fold()`` is in effect.
    """

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
