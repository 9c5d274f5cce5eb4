"""What ``molora info`` prints: versions and recipes, the options of one recipe, and the choice of kernels."""

from __future__ import annotations

import importlib.metadata
import inspect

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from molora.errors import ConfigError, nearest
from molora.recipes import RECIPES

__all__ = ["show_kernels", "show_recipe", "show_versions"]

PACKAGES = ("torch", "transformers", "peft", "accelerate", "safetensors", "triton", "deepspeed", "datasets")


def show_versions(output: Console) -> None:
    """Installed versions, and the recipes with their first lines."""
    versions = Table("package", "version", title="Versions", title_justify="left")
    for name in ("molora", *PACKAGES):
        versions.add_row(name, _version(name))
    output.print(versions)
    table = Table("recipe", "what it is", title="Recipes (molora info NAME lists the options)", title_justify="left")
    for name, function in RECIPES.items():
        table.add_row(name, escape(inspect.cleandoc(function.__doc__ or "").split("\n\n")[0]))
    output.print(table)


def show_recipe(name: str, output: Console) -> None:
    """The text of one recipe, and its options with their defaults.

    Raises:
        ConfigError: no recipe of that name.
    """
    if name not in RECIPES:
        raise ConfigError(f"info: got {name!r}, expected one of {', '.join(RECIPES)}{nearest(name, RECIPES)}")
    function = RECIPES[name]
    output.print(escape(inspect.cleandoc(function.__doc__ or "")), highlight=False)
    table = Table("option", "default", title=f"Options of {name}", title_justify="left")
    for option, parameter in inspect.signature(function).parameters.items():
        needed = parameter.default is inspect.Parameter.empty
        table.add_row(option, "(needed)" if needed else escape(repr(parameter.default)))
    output.print(table)


def show_kernels(output: Console) -> None:
    """Which kernel ``auto`` takes on CUDA for some shapes and why, and which can be asked for here."""
    import torch

    from molora.kernels.dispatch import KERNELS, Call, choose
    from molora.kernels.tiles import tile

    here = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.cuda.get_device_name() if here == "cuda" else "no CUDA device"
    output.print(
        f"This machine: {device}; triton {_version('triton')}. On a CPU, kernel='auto' is torch.", highlight=False
    )
    names = ("experts x rank", "dtype", "kernel", "why", "tile of the first product")
    table = Table(*names, title="kernel='auto' on CUDA", title_justify="left")
    for experts, rank, choices in ((1, 8, 0), (8, 8, 2), (8, 16, 2), (64, 1, 8), (64, 32, 2)):
        for dtype in (torch.bfloat16, torch.float32):
            total = experts * rank
            found = choose("auto", Call(total, "cuda", dtype, experts, choices, rank))
            t = tile("contract", 8192, total, dtype.itemsize)
            size = f"{t.rows} x {t.cols} x {t.depth}, {t.warps} warps" if found.name == "triton" else ""
            shape = f"{experts} x {rank}, {choices or 'all'} chosen"
            table.add_row(shape, str(dtype)[6:], found.name, found.reason, size)
    output.print(table)
    known = Table("kernel=", f"asked for here ({here})")
    for kernel, implementation in KERNELS.items():
        known.add_row(kernel, implementation.refuses(Call(64, here, torch.float32, 8, 2, 8, grad=False)) or "runs")
    output.print(known)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
