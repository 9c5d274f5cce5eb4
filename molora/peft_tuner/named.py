"""Several named mixtures on one model, one of them in force: what PEFT and transformers switch by name."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from molora.adapter.names import PREFIX
from molora.convert import convert
from molora.errors import AdapterError, ConfigError
from molora.layers.mixture import HEAD, Mixture
from molora.model import MixtureModel, adopt
from molora.peft_tuner.inactive import Parked, park, unpark
from molora.peft_tuner.names import PLACE, UNLOAD, check_base, check_name
from molora.peft_tuner.settings import MixtureConfig
from molora.peft_tuner.weights import digest, keys_of, trained
from molora.surgery.build import Built, build
from molora.surgery.fill import wrappers_for
from molora.surgery.install import install
from molora.surgery.ready_made import on_cpu

__all__ = ["NamedMixtures"]


class NamedMixtures(nn.Module, BaseTunerLayer):
    """The named mixtures of one base model, as its child: the only tuner layer there, which switches the whole model.

    The one in force is on the model as :func:`molora.convert` puts it; the others are parked here. Not for threads.
    """

    adapter_layer_names = ("parked",)

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.parked = nn.ModuleDict()
        self.frozen: dict[str, dict[str, Tensor]] = {}  # by name of the mixture, what it does not train
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

    @on_cpu()
    def add(self, name: str, config: MixtureConfig) -> None:
        """Make a mixture under a new name; it is put in force only where none is. All of it or nothing.

        Raises:
            ConfigError, TargetError, AdapterError: the model and its other mixtures are then as before.
        """
        check_base(self.model, bool(self._active_adapter))
        check_name(self.model, name)
        copied = next((n for n, c in self._configs().items() if c is config and n in self.frozen), None)
        values = {} if copied is None else self.tensors(copied)
        weights = {n: t.detach().clone() for n, t in values.items() if t is not None}
        with self._bare() as model:
            if copied is not None and config.mixture is not None:
                _put(model, build(model, config.mixture.config, config.mixture.sites))
            elif config.described is not None:
                _put(model, wrappers_for(config.described, model))
            else:
                convert(cast(Any, model), config.config, seed=config.seed)
            made = park(model)
        config.mixture, self.parked[name] = made.mixture, made
        if copied is not None:
            for n, t in self.tensors(name).items():
                cast(Tensor, t).data.copy_(weights[n])
        elif config.described is not None:
            self.awaited[name] = config.described.sha256
        self.remember(name)
        if not self._active_adapter:
            self.set_adapter(name, inference_mode=bool(config.inference_mode))
        else:
            self.set_requires_grad(name, False)

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
            others = [n for n in sorted(self.frozen) if n != adapter_name]
            if others:
                warnings.warn(f"{adapter_name} was in force and is deleted; now it is {others[0]}", stacklevel=2)
            self.set_adapter(others[:1])
        for table in (self.parked, self.frozen, self.awaited):
            if adapter_name in table:
                del table[adapter_name]

    def clear(self, merge: bool = False) -> None:
        """Drop all mixtures, and this: the base model as it was before the first, or with the only expert merged."""
        if merge:
            cast(Any, self.model).merge_and_unload()
        elif self._active_adapter and isinstance(self.model, MixtureModel):  # its own unload() may have been called
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
        if len(names) > 1 or any(n not in self.frozen for n in names):
            raise ConfigError(
                f"set_adapter: got {names}, expected one of {sorted(self.frozen)}: mixtures switch, never add"
            )
        before = self._active_adapter
        if names != before:
            flags = [(p, p.requires_grad) for p in self.model.parameters()]
            for name in before:
                self.parked[name] = park(self.model)
                self.parked[name].requires_grad_(False)
            try:
                self._unpark(names)
            except BaseException:
                self._unpark(before)
                for p, flag in flags:
                    p.requires_grad_(flag)
                raise
        for name in names:
            cast(Any, self.model)._molora.owner.off = self._disable_adapters
            self.set_requires_grad(name, not inference_mode)

    def _unpark(self, names: list[str]) -> None:
        self._active_adapter = []
        for name in names:
            parked = cast(Parked, self.parked.pop(name))  # first, or what it wraps would be found here, too
            try:
                unpark(self.model, parked)
            except BaseException:
                self.parked[name] = parked
                raise
        self._active_adapter = names

    def enable_adapters(self, enabled: bool) -> None:
        """Switch the mixture in force off and on, in all threads; off, the model computes what the base does."""
        self._disable_adapters = not enabled
        if self._active_adapter:
            cast(Any, self.model)._molora.owner.off = not enabled

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Freeze mixtures, or make those parts trainable that the recipe trains."""
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            tensors = self.tensors(name)
            learned = trained(self.mixture(name), tensors) if requires_grad else set()
            for n, t in tensors.items():
                if isinstance(t, nn.Parameter):
                    t.requires_grad_(n in learned)

    def requires_grad_(self, requires_grad: bool = True) -> NamedMixtures:
        """The same for all of them: transformers means the adapters when it freezes a tuner layer."""
        self.set_requires_grad(sorted(self.frozen), requires_grad)
        return self

    def _get_available_adapters(self) -> set[str]:
        return set(self.frozen)

    # Weights

    def _apply(self, fn: Any, recurse: bool = True) -> NamedMixtures:
        """Casts and moves as any module, after the base's own: what was held on to is now what was made of it."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, kept in self.frozen.items():
            own = self.tensors(name)
            for n, t in kept.items():
                now = own[n]
                if now is not None and now.shape == t.shape:  # not what an engine left of it in this process
                    kept[n] = now.detach()
        return self

    def mixture(self, name: str) -> Mixture:
        """What a mixture is: its config and sites."""
        return cast(Mixture, self.parked[name].mixture if name in self.parked else cast(Any, self.model)._molora)

    def keys(self, name: str) -> dict[str, str]:
        """Canonical names of a mixture's tensors, to their keys in the base model's state dict."""
        if name in self.parked:
            return keys_of(self.parked[name], f"{PLACE}.parked.{name}.")
        return keys_of(self.model, "")

    def tensors(self, name: str, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor | None]:
        """A mixture's tensors by canonical name: the model's own, or out of ``state``, a state dict of the model."""
        if state is None:
            state = self.model.state_dict(keep_vars=True)
        found = {n: state.get(key, state.get(PREFIX + key)) for n, key in self.keys(name).items()}
        return {n: self.frozen.get(name, {}).get(n) if t is None else t for n, t in found.items()}

    def remember(self, name: str) -> None:
        """Keep hold of what is frozen: under ZeRO-3 a checkpoint is given trainable parameters only."""
        tensors = self.tensors(name)
        learned = trained(self.mixture(name), tensors)
        self.frozen[name] = {n: t.detach() for n, t in tensors.items() if t is not None and n not in learned}

    def arrived(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Check that weights are those that the config, which came first, was saved with.

        Raises:
            AdapterError: for others.
        """
        wanted = self.awaited.get(name)
        if wanted is not None and digest(tensors) != wanted:
            raise AdapterError(
                f"adapter {name!r}: its weights are not those that its config was saved with; load both from one "
                "folder with PeftModel.from_pretrained or load_adapter, or fetch or save it again"
            )
        self.awaited.pop(name, None)

    def _before_forward(self, *_: Any) -> None:
        """transformers' loader fills parameters by itself, without asking: look once whether it did."""
        foreign = [n for n, c in self._configs().items() if not isinstance(c, MixtureConfig)]
        if foreign:
            raise ConfigError(f"adapters {foreign}: another PEFT method was put on this mixture's own layers; {UNLOAD}")
        for name in self._active_adapter:
            if name in self.awaited:
                self.arrived(name, {n: t for n, t in self.tensors(name).items() if t is not None})
                self.remember(name)


def _put(model: nn.Module, built: Built) -> None:
    adopt(model, install(model, built))
