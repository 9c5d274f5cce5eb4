"""Pictures of routing."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from molora.errors import ConfigError

__all__ = ["load_heatmaps", "need_matplotlib", "site_labels"]

COLOURS = "PuOr_r"  # purple to orange through white: told apart with every common colour blindness
FACTOR = 4.0  # the scale ends at a quarter of and four times the balanced load


def need_matplotlib() -> None:
    """Raise a :class:`ConfigError` that names the extra when matplotlib is not installed."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as e:
        raise ConfigError("pictures need the package matplotlib: pip install 'molora[eval]'") from e


def site_labels(sites: Sequence[str]) -> list[str]:
    """``model.layers.3.mlp.gate_proj`` -> ``3``; with the module's name where a layer has several sites."""
    numbers = [next(iter(re.findall(r"(?<![^.])\d+(?![^.])", path)), "") for path in sites]
    alone = len(set(numbers)) == len(sites)
    return [
        n if alone and n else f"{n} {path.rsplit('.', 1)[-1]}".strip() for n, path in zip(numbers, sites, strict=True)
    ]


def load_heatmaps(
    load: dict[str, list[list[float]]], sites: Sequence[str], experts: Sequence[int], title: str, path: Path
) -> None:
    """Draw load per site (rows) and expert (columns), one panel a domain, as a multiple of the balanced 1/E.

    Args:
        load: domain name to (M, E) shares; columns beyond a site's own number of experts are left blank.
        sites: paths of the M sites.
        experts: number of experts of each site.
        title: written above the panels.
        path: a .png, .svg or .pdf file.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    need_matplotlib()
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    width, labels, columns = max(experts), site_labels(sites), len(load)
    figure = Figure(
        figsize=(2.2 + columns * (0.9 + 0.24 * width), 1.6 + 0.17 * max(len(sites), 8)), layout="constrained"
    )
    axes = figure.subplots(1, columns, sharey=True, squeeze=False)[0]
    image: Any = None
    for axis, (domain, shares) in zip(axes, load.items(), strict=True):
        lift = [
            [row[e] * n if e < n else float("nan") for e in range(width)]
            for row, n in zip(shares, experts, strict=True)
        ]
        image = axis.imshow(lift, cmap=COLOURS, norm=LogNorm(1 / FACTOR, FACTOR, clip=True), aspect="auto")
        axis.set_facecolor("0.8")  # shows where a site has no such expert
        axis.set_title(domain, fontsize=10)
        axis.set_xticks(range(width), [str(e) for e in range(width)], fontsize=7)
        axis.set_xlabel("expert", fontsize=8)
        axis.tick_params(length=0)
    step = max(1, len(labels) // 32)
    axes[0].set_yticks(range(0, len(labels), step), labels[::step], fontsize=7)
    axes[0].set_ylabel("layer", fontsize=8)
    ticks = [1 / FACTOR, 0.5, 1.0, 2.0, FACTOR]
    bar = figure.colorbar(image, ax=list(axes), ticks=ticks, pad=0.015, fraction=0.05)
    bar.ax.set_yticklabels(["≤ ¼", "½", "1 = balanced", "2", "≥ 4"], fontsize=8)
    bar.minorticks_off()
    bar.set_label("load, as a multiple of 1/E", fontsize=8)
    figure.suptitle(title, fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
