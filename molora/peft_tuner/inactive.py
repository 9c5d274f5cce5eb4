"""Take a mixture off its model and put it on again as it was: how one model carries several, one of them in force.

A parked mixture keeps its wrappers without the modules they wrap. The model computes, is saved and is unloaded with the
one in force exactly as if there were no other.
"""

from __future__ import annotations

from typing import Any, cast

from torch import nn

from molora.errors import ConfigError
from molora.forward.recompute import unbind
from molora.layers.mixture import HEAD, Mixture
from molora.layers.wrapper import Wrapper
from molora.model import MixtureModel, adopt
from molora.surgery.build import Built
from molora.surgery.install import install, uninstall, wrappers_of

__all__ = ["Parked", "park", "unpark"]


class Parked(nn.Module):
    """A mixture that is not on its model: its wrappers, without what they wrap, and its model-wide router."""

    def __init__(self, mixture: Mixture, wrappers: list[nn.Module], head: nn.Module | None) -> None:
        super().__init__()
        self.mixture = mixture
        self.wrappers = nn.ModuleList(wrappers)
        self.add_module(HEAD, head)


def park(model: nn.Module) -> Parked:
    """Take the mixture in force off ``model``, which is its base again, but for an empty place of the router's name.

    Raises:
        ConfigError: for a model that carries none.
    """
    if not isinstance(model, MixtureModel):
        raise ConfigError(f"park: got a plain {type(model).__name__}, expected a model that carries a mixture")
    plain, mixture = cast(nn.Module, model), model._molora
    found = list(dict.fromkeys(wrappers_of(plain).values()))
    wrappers = sorted(found, key=lambda m: m.around)  # what is inside of a block goes in before it
    unbind(plain)
    uninstall(plain, mixture, keep_head=True)
    head = plain._modules.get(HEAD)
    if HEAD in plain._modules:
        plain._modules[HEAD] = None  # not removed: whoever goes through the model's children now may go on
    plain.__class__ = mixture.base_class
    del model._molora
    for wrapper in wrappers:
        wrapper.wrap(None)
    return Parked(mixture, list(wrappers), head)


def unpark(model: nn.Module, parked: Parked) -> None:
    """Put a parked mixture on ``model`` again; nothing else may be in force there. If it fails, all is as before."""
    modules: dict[str, Wrapper] = {}
    for wrapper in cast(Any, parked.wrappers):
        modules[wrapper.place] = wrapper
        wrapper.wrap(model.get_submodule(wrapper.place))
    mixture, head = parked.mixture, cast(Any, parked._modules[HEAD])
    built = Built(mixture.config, mixture.sites, mixture.owner, modules, head)
    try:
        mixture.trainable = install(model, built, again=True).trainable
        adopt(model, mixture)
    except BaseException:
        model._modules.setdefault(HEAD, None)
        for wrapper in modules.values():
            wrapper.wrap(None)
        raise
