"""Adapters to files, and from files into a model."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fast_prompt.nn.offload import with_values
from fast_prompt.tuning.classes import base_class
from fast_prompt.tuning.config import MethodConfig
from fast_prompt.tuning.loading import open_loader
from fast_prompt.tuning.state import (
    check_finite,
    check_fit,
    check_kinds,
    copy_into,
    describe_base,
    tensors_in,
    tensors_of,
)
from fast_prompt.tuning.storage import save_adapter
from fast_prompt.tuning.switching import SwitchableModel

# ``Trainer`` saves into directories of this name, and takes up training again only from files of that one.
TRAINER_CHECKPOINT = re.compile(r"checkpoint-\d+")
TRAINER_WEIGHTS_NAME = "model.safetensors"


class SavableModel(SwitchableModel):
    """A model whose adapters can be saved and loaded."""

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

    def _gathered(self, name: str, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """An adapter's tensors out of a whole model's state, named as in its file."""
        own = {id(value): key for key, value in self.state_dict(keep_vars=True).items()}
        parts = self._parts(name).items()
        gathered = {
            key: state_dict[own[id(value)]] for prefix, part in parts for key, value in tensors_in(prefix, part)
        }
        return with_values(self, gathered)


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
