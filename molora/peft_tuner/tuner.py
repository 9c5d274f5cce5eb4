"""molora as a PEFT tuner: ``get_peft_model``, the four loaders and TRL's ``peft_config=`` over the core's own layers.

Importing this file writes molora into PEFT's tables. PEFT is the extra ``peft``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NoReturn, cast

import peft
from peft import mapping
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from molora.adapter.names import PREFIX
from molora.errors import ConfigError
from molora.peft_tuner.named import NamedMixtures
from molora.peft_tuner.names import PLACE
from molora.peft_tuner.settings import MixtureConfig, MixtureType
from molora.peft_tuner.weights import to_load, to_save

__all__ = ["MixtureTuner"]

if not hasattr(BaseTuner, "_remap_adapter_state_dict_for_load"):
    raise ImportError(f"molora works with PEFT from 0.21 on, this is {peft.__version__}: pip install -U peft")


class MixtureTuner(BaseTuner):
    """PEFT's wrapper around a model with named mixtures; :class:`NamedMixtures` does the work."""

    prefix = "@"  # in no key: loaders would insert the adapter's name after it
    tuner_layer_cls = NamedMixtures
    target_module_mapping: dict[str, Any] = {}

    # Putting mixtures on and taking them off

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add the mixture of ``adapter_name``'s config, as :func:`molora.convert` or :func:`molora.load` makes it."""
        fresh = getattr(model, PLACE, None) is None
        mixtures = NamedMixtures(model) if fresh else getattr(model, PLACE)
        try:
            mixtures.add(adapter_name, cast(MixtureConfig, self.peft_config[adapter_name]))
        except BaseException:
            if fresh:
                mixtures.clear()
            raise

    def _create_and_replace(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise AssertionError("PEFT replaces module by module; a mixture goes on whole, in inject_adapter")

    def _post_injection_hook(self, model: nn.Module, config: Any, adapter_name: str) -> None:
        # The first of a model, or one that transformers' loader adds, which then fills what is in force.
        getattr(model, PLACE).set_adapter(adapter_name, inference_mode=bool(config.inference_mode))

    def unload(self) -> nn.Module:
        """The base model, as it was; all mixtures are dropped."""
        return self._clear(merge=False)

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Add the only expert of the mixture in force into the base weights; the others are dropped.

        Raises:
            ConfigError: for a mixture: its weights depend on the token.
        """
        return self._clear(merge=True)

    def _clear(self, merge: bool) -> nn.Module:
        model: nn.Module = self.model
        mixtures = getattr(model, PLACE, None)
        if mixtures is not None:
            mixtures.clear(merge)
            del model.peft_config
        return model

    def add_expert(self, **options: Any) -> None:
        """:meth:`molora.model.MixtureModel.add_expert` of the mixture in force."""
        self._reshape("add_expert", **options)

    def prune_experts(self, experts: Any) -> None:
        """:meth:`molora.model.MixtureModel.prune_experts` of the mixture in force."""
        self._reshape("prune_experts", experts)

    def _reshape(self, method: str, *args: Any, **options: Any) -> None:
        getattr(self.model, method)(*args, **options)
        mixtures = _mixtures(self.model)
        mixtures.remember(mixtures.active_adapters[0])

    # What cannot be

    @contextlib.contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:
            raise ConfigError(
                "adapter_names: rows of one batch cannot have mixtures of their own: one is in force at a time; run a "
                "batch for each, with set_adapter(name) before it"
            )
        yield

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: the weights of experts depend on the token."""
        raise ConfigError(
            "add_weighted_adapter: mixtures have routers of their own, so no sum of their parameters computes the sum "
            "of their outputs; give the LoRA folders to one recipe that takes adapters={name: folder}"
        )

    def merge_adapter(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: see :meth:`merge_and_unload`, for one expert."""
        raise ConfigError(
            "merge_adapter: a mixture's weights depend on the token, so no fixed weight gives the same outputs; one "
            "expert alone merges by merge_and_unload()"
        )

    unmerge_adapter = merge_adapter

    # What PEFT asks the class when it saves and loads

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Nothing: experts and routers are float32 from the start."""

    @classmethod
    def _get_adapter_state_dict(
        cls, model: Any, config: Any, adapter_name: str, state_dict: dict[str, Tensor], unwanted_adapter_names: Any
    ) -> dict[str, Tensor]:
        mixtures = _mixtures(model)
        return to_save(adapter_name, mixtures.mixture(adapter_name), mixtures.tensors(adapter_name, state_dict))

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return key

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: Any, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        mixtures, prefix = _mixtures(model), PREFIX if isinstance(model, peft.PeftModel) else ""
        tensors = to_load(adapter_name, mixtures.mixture(adapter_name), state_dict)
        mixtures.arrived(adapter_name, tensors)
        return {prefix + key: tensors[n] for n, key in mixtures.keys(adapter_name).items()}


def _mixtures(model: Any) -> NamedMixtures:
    base = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    found: NamedMixtures = getattr(base, PLACE)
    return found


_tables: Any = mapping  # their keys are an enumeration that is PEFT's own; register_peft_method takes no other names
_tables.PEFT_TYPE_TO_CONFIG_MAPPING[MixtureType.MOLORA] = MixtureConfig
_tables.PEFT_TYPE_TO_TUNER_MAPPING[MixtureType.MOLORA] = MixtureTuner
_tables.PEFT_TYPE_TO_PREFIX_MAPPING[MixtureType.MOLORA] = MixtureTuner.prefix
