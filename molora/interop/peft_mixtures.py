"""Several named mixtures on one model, one of them in force: what PEFT and transformers switch by name."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.integrations import is_deepspeed_zero3_enabled

from molora.adapter_state import saved_tensors
from molora.checkpoint import check_tensors
from molora.convert import convert
from molora.errors import AdapterError, CheckpointError, ConfigError
from molora.install import HEAD, build, install
from molora.interop.peft_config import PREFIX, MixtureConfig
from molora.load import wrappers_for
from molora.model import MixtureModel, adopt
from molora.parking import Parked, park, unpark
from molora.tensor_file import write_tensors

__all__ = ["PLACE", "NamedMixtures"]

PLACE = "named_mixtures"  # attribute of the base model; delete_adapter of PEFT skips paths that contain "molora_"


class NamedMixtures(nn.Module, BaseTunerLayer):  # type: ignore[misc] # PEFT has no types
    """The named mixtures of one base model, as its child: the only tuner layer there, which switches the whole model.

    The mixture in force is on the model as :func:`molora.convert` puts it; the others are parked here.
    """

    adapter_layer_names = ("parked",)

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.parked = nn.ModuleDict()
        self.trainable: dict[str, frozenset[str]] = {}
        self.frozen: dict[str, dict[str, Tensor]] = {}
        self.awaited: dict[str, str] = {}  # digests of weights that a loader has yet to bring, by name
        self._active_adapter: list[str] = []
        self._holder = (model,)  # a tuple: no child of its child
        model._modules.setdefault(HEAD, None)
        model.add_module(PLACE, self)
        self._hook = model.register_forward_pre_hook(self._before_forward)

    @property
    def model(self) -> nn.Module:
        """The base model, with the mixture in force on it."""
        return self._holder[0]

    def names(self) -> list[str]:
        """All mixtures, sorted."""
        return sorted(self.trainable)

    # Adding and taking away

    def add(self, name: str, config: MixtureConfig) -> None:
        """Make a mixture under a new name; it is put in force only where none is. All of it or nothing.

        Raises:
            ConfigError, TargetError, AdapterError: the model and its other mixtures are then as before.
        """
        self._check(name)
        copied = next((n for n, c in self._configs().items() if c is config and n in self.trainable), None)
        weights = {} if copied is None else {n: t.detach().clone() for n, t in self.tensors(copied).items()}
        with self._bare() as model:
            if copied is not None and config.mixture is not None:
                _put(model, build(model, config.mixture.config, config.mixture.sites))
            elif config.described is not None:
                _put(model, wrappers_for(config.described, model))
            else:
                convert(cast(Any, model), config.config, seed=config.seed)
            made = park(model)
            if any(t.is_meta for t in made.parameters()) and not any(t.is_meta for t in model.parameters()):
                raise ConfigError(
                    "low_cpu_mem_usage=True: a mixture is built beside the model and takes little; leave it out"
                )
        config.mixture, self.parked[name] = made.mixture, made
        tensors = self.tensors(name)
        self.trainable[name] = frozenset(n for n, t in tensors.items() if t.requires_grad)
        if copied is not None:
            _copy(tensors, weights)
        elif config.described is not None:
            self.awaited[name] = config.described.sha256
        if is_deepspeed_zero3_enabled():  # PEFT's checkpoints get trainable parameters only, and these are cut then
            self.frozen[name] = {n: t.detach().cpu().clone() for n, t in tensors.items() if not t.requires_grad}
        if not self._active_adapter:
            self.set_adapter(name, inference_mode=bool(config.inference_mode))
        else:
            self.set_requires_grad(name, False)

    def _check(self, name: str) -> None:
        parts = {part for path, _ in self.model.named_modules() for part in path.split(".")}
        if not name or "." in name or name in parts or hasattr(nn.ModuleDict, name):
            raise ConfigError(
                f"adapter name: got {name!r}, expected a name without dots that is no part of a module's path: PEFT "
                "tells adapters apart by such parts"
            )
        others = [type(m).__name__ for m in self.model.modules() if isinstance(m, BaseTunerLayer) and m is not self]
        if others:
            raise ConfigError(
                f"the model carries another PEFT method ({others[0]}): two in one model would feed on each other's "
                "outputs; unload() the other one first"
            )
        if isinstance(self.model, MixtureModel) and not self._active_adapter:
            raise ConfigError("the model carries a mixture that convert() or load() put there; call unload() first")

    def _configs(self) -> dict[str, MixtureConfig]:
        return getattr(self.model, "peft_config", None) or {}

    @contextlib.contextmanager
    def _bare(self) -> Iterator[nn.Module]:
        """The base model alone; afterwards all that was there is there again."""
        model = self.model
        here = park(model) if self._active_adapter else None
        del model._modules[PLACE]
        try:
            yield model
        finally:
            if isinstance(model, MixtureModel):
                park(model)
            model.add_module(PLACE, self)
            if here is not None:
                unpark(model, here)

    def delete_adapter(self, adapter_name: str) -> None:
        """Drop a mixture; if it was in force, the first of the others is, or the base as it was."""
        if adapter_name in self._active_adapter:
            others = [n for n in self.names() if n != adapter_name]
            if others:
                warnings.warn(f"{adapter_name} was in force and is deleted; now it is {others[0]}", stacklevel=2)
            self.set_adapter(others[:1])
        for table in (self.parked, self.trainable, self.frozen, self.awaited):
            if adapter_name in table:
                del table[adapter_name]

    def clear(self, merge: bool = False) -> None:
        """Drop all mixtures, and this: the base model as it was before the first, or with the only expert merged."""
        if merge:
            cast(Any, self.model).merge_and_unload()
        elif self._active_adapter:
            self.set_adapter([])
        self._hook.remove()
        for place in (PLACE, HEAD):
            self.model._modules.pop(place, None)

    # Switching

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Put one mixture in force, trainable unless ``inference_mode``; the one before is parked and frozen.

        Raises:
            ConfigError: for an unknown name, or several: their experts have routers of their own, so they do not add.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        if len(names) > 1 or any(n not in self.trainable for n in names):
            raise ConfigError(f"set_adapter: got {names}, expected one of {self.names()}: mixtures switch, never add")
        if names != self._active_adapter:
            for name in self._active_adapter:
                self.set_requires_grad(name, False)
                self.parked[name] = park(self.model)
            self._active_adapter = []
            for name in names:
                unpark(self.model, cast(Parked, self.parked.pop(name)))
            self._active_adapter = names
        for name in names:
            cast(Any, self.model)._molora.owner.off = self._disable_adapters
            self.set_requires_grad(name, not inference_mode)

    def enable_adapters(self, enabled: bool) -> None:
        """Switch the mixture in force off and on, in all threads; off, the model computes what the base does."""
        self._disable_adapters = not enabled
        if self._active_adapter:
            cast(Any, self.model)._molora.owner.off = not enabled

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Freeze mixtures, or make those parts trainable that the recipe trains."""
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            for n, t in self.tensors(name).items():
                if isinstance(t, nn.Parameter):
                    t.requires_grad_(requires_grad and n in self.trainable[name])

    def requires_grad_(self, requires_grad: bool = True) -> NamedMixtures:
        """The same for all of them: transformers means the adapters when it freezes a tuner layer."""
        self.set_requires_grad(self.names(), requires_grad)
        return self

    def _get_available_adapters(self) -> set[str]:
        return set(self.trainable)

    # Weights

    def keys(self, name: str) -> dict[str, str]:
        """Canonical names of a mixture's tensors, to their keys in the base model's state dict."""
        parked = self.parked[name] if name in self.parked else None  # noqa: SIM401 a ModuleDict has no get
        place = "" if parked is None else f"{PLACE}.parked.{name}."
        own = {key: place + key for key in (self.model if parked is None else parked).state_dict(keep_vars=True)}
        return saved_tensors(self.model if parked is None else parked, own)

    def tensors(self, name: str, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """A mixture's tensors by canonical name: the model's own, or out of ``state``, a state dict of the model."""
        if state is None:
            state = self.model.state_dict(keep_vars=True)
        found = {n: state.get(key, state.get(PREFIX + key)) for n, key in self.keys(name).items()}
        return {n: self.frozen.get(name, {}).get(n) if t is None else t for n, t in found.items()}  # type: ignore[misc]

    def to_save(self, name: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What an adapter folder gets, under PEFT's names.

        Raises:
            CheckpointError: where a tensor is missing, of another shape (in pieces, as ZeRO-3 leaves it) or not finite.
        """
        tensors = {n: t.detach() for n, t in self.tensors(name, state).items() if t is not None}
        mixture = cast(MixtureConfig, self._configs()[name]).mixture
        assert mixture is not None
        check_tensors(f"adapter {name!r}", mixture.config, mixture.sites, tensors)
        _digest(tensors)
        return {PREFIX + n: t for n, t in tensors.items()}

    def to_load(self, name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Loaded ``tensors`` under the keys of the model's state dict, when they are whole.

        Raises:
            AdapterError: for missing, unknown or misshapen tensors, or others than the config's digest is of.
        """
        given = {n.removeprefix(PREFIX): t for n, t in tensors.items()}
        mixture = cast(MixtureConfig, self._configs()[name]).mixture
        assert mixture is not None
        try:
            check_tensors(f"adapter {name!r}", mixture.config, mixture.sites, given)
        except CheckpointError as e:
            raise AdapterError(str(e)) from e
        self._arrived(name, given)
        return {key: given[n] for n, key in self.keys(name).items()}

    def _arrived(self, name: str, tensors: dict[str, Tensor]) -> None:
        wanted = self.awaited.get(name)
        if wanted is not None and _digest(tensors) != wanted:
            raise AdapterError(
                f"adapter {name!r}: its weights are not those that its config was saved with; fetch or save it again"
            )
        self.awaited.pop(name, None)

    def _before_forward(self, *_: Any) -> None:
        """transformers' loader fills parameters by itself, without asking: look once whether it did."""
        for name in self._active_adapter:
            if name in self.awaited:
                self._arrived(name, self.tensors(name))


def _put(model: nn.Module, built: Any) -> None:
    adopt(model, install(model, built))


def _copy(tensors: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for n, t in tensors.items():
            t.copy_(values[n])


class _Nowhere(io.RawIOBase):
    def write(self, data: Any) -> int:
        return len(data)


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """sha256 of the weights file with these tensors."""
    return write_tensors(cast(Any, _Nowhere()), {PREFIX + n: t.detach() for n, t in tensors.items()})
