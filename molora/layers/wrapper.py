"""What a module says of itself that stands in the place of one of the base's and holds it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from molora.layers.mixture import Owner
from molora.layers.routed import RoutedModule

__all__ = ["Wrapper"]


class Wrapper(nn.Module):
    """A module of the mixture in the place of a module of the base. Class attributes are its duties:

    ``inner``: name of the child that is the base's own. ``saved``: names of the children that an adapter folder keeps.
    ``around``: what it wraps may hold other wrappers, so it goes in after them and comes off before them.
    """

    inner = "base_layer"
    saved: tuple[str, ...] = ("bank", "router")
    around = False
    owner: Owner

    @property
    def place(self) -> str:
        """The path in the base of what it wraps."""
        raise NotImplementedError(f"{type(self).__name__}.place")

    def sites(self) -> Mapping[str, RoutedModule]:
        """The sites that it is or holds, by their path in the base."""
        return {}

    def weight_of(self, site: RoutedModule) -> Any:
        """The base's weight that a site of its is for; None where the base has none."""
        assert self.wrapped is not None
        return self.wrapped._parameters.get("weight")

    @property
    def wrapped(self) -> nn.Module | None:
        """The base's module; None while the mixture is not in force."""
        return self._modules[self.inner]

    def wrap(self, module: nn.Module | None) -> None:
        """Hold another module, or none."""
        setattr(self, self.inner, module)

    def own_parameters(self) -> Iterator[nn.Parameter]:
        """Those that are not the base's."""
        for name, child in self.named_children():
            if name != self.inner:
                yield from child.parameters()
