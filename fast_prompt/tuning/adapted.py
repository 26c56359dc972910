"""What an adapted model knows of itself: which adapters there are, and what each consists of."""

from torch import Tensor, nn

from fast_prompt.nn.offload import with_values
from fast_prompt.tuning.adapters import SAVED, SAVED_PARAMETERS, SavedModules, SiteAdapters
from fast_prompt.tuning.config import MethodConfig
from fast_prompt.tuning.parameters import SavedParameters
from fast_prompt.tuning.site import Site
from fast_prompt.tuning.state import AdapterState, Parts, tensors_of


class ActiveAdapters(list[str]):
    """Names of adapters: an attribute in PEFT, a method's result in ``transformers``."""

    def __call__(self) -> list[str]:
        """The same names."""
        return list(self)


class AdaptedModel(nn.Module):
    """A model with adapters, as far as nothing about them changes.

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

    def get_adapter_state_dict(self, adapter_name: str | None = None) -> dict[str, Tensor]:
        """The tensors of an adapter, by default of the one in use, named as in its file; the very ones that train.

        Those that accelerate keeps elsewhere come from there.

        Raises:
            ValueError: there is no such adapter, or it is on the meta device and has no values.
        """
        name = self.active_adapter if adapter_name is None else adapter_name
        self._check_known(name)
        return with_values(self, tensors_of(self._parts(name)))

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Number of elements of the parameters that train, and of all parameters."""
        counts = [(parameter.numel(), parameter.requires_grad) for parameter in self.parameters()]
        return sum(number for number, trains in counts if trains), sum(number for number, _ in counts)

    def print_trainable_parameters(self) -> None:
        """Print how many parameters train, how many there are, and the share, in PEFT's words."""
        trainable, total = self.get_nb_trainable_parameters()
        share = 100 * trainable / max(total, 1)
        print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {share:.4f}")

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
