"""Pictures of routing."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from molora.extras import need

__all__ = ["draw", "load_heatmaps", "need_matplotlib", "site_labels"]

COLOURS = "PuOr_r"  # purple to orange through white: told apart with every common colour blindness
SAFE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")  # Okabe and Ito
FACTOR = 4.0  # the scale ends at a quarter of and four times the balanced load


def need_matplotlib() -> None:
    """Raise a :class:`ConfigError` that names the extra when matplotlib is not installed."""
    need("matplotlib.figure", "eval", "a picture")


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
    _save(figure, path)


def draw(document: Mapping[str, Any], folder: Path, form: str, several: bool = False) -> list[Path]:
    """The pictures of an evaluation document as single files (png, svg or pdf); returns their paths.

    ``load``: by kind of site, domain, layer and expert; ``balance``: MaxVio and entropies by layer; ``ablation``: the
    loss with changed gates. ``several``: put the run's name before each file's.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    need_matplotlib()
    from matplotlib import rc_context

    start, out = f"{document['name']}-" if several else "", list[Path]()
    with rc_context({"svg.hashsalt": "molora", "svg.fonttype": "none"}):  # the same picture gives the same bytes
        for kind, sites in _kinds(document.get("routing", {}).get("sites", [])).items():
            routing, own = document["routing"], kind.strip(".#").replace(".", "-").replace("#", "n")
            load = {name: [shares[i] for i in sites] for name, shares in routing["load"].items()}
            paths = [routing["sites"][i]["path"] for i in sites]
            experts = [routing["sites"][i]["experts"] for i in sites]
            padded = {n: [row + [0.0] * (max(experts) - len(row)) for row in rows] for n, rows in load.items()}
            out.append(folder / f"{start}load-{own}.{form}")
            load_heatmaps(padded, paths, experts, f"{document['name']}: load of {kind}", out[-1])
            out.append(folder / f"{start}balance-{own}.{form}")
            _balance(routing, sites, f"{document['name']}: {kind}", out[-1])
        if "ablation" in document:
            out.append(folder / f"{start}ablation.{form}")
            _ablation(document["ablation"], document["name"], out[-1])
    return out


def _kinds(sites: Sequence[Mapping[str, Any]]) -> dict[str, list[int]]:
    out: dict[str, list[int]] = {}
    for i, site in enumerate(sites):
        out.setdefault(site["kind"], []).append(i)
    return out


def _balance(routing: Mapping[str, Any], sites: Sequence[int], title: str, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    layers = [routing["sites"][i]["layer"] for i in sites]

    def line(axis: Any, key: str, label: str, style: str) -> None:
        values = [routing[key][i] for i in sites]
        axis.plot(layers, [float("nan") if v is None else v for v in values], style, label=label, markersize=3)

    line(above, "max_violation", "over all tokens", "o-")
    line(above, "max_violation_of_a_batch", "mean over batches", "s--")
    above.set_ylabel("MaxVio (0: even)")
    line(below, "entropy_of_load", "of the load (0: collapsed)", "o-")
    line(below, "mean_entropy", "of a token's choice (1: undecided)", "s--")
    below.set_ylabel("entropy / log E")
    below.set_xlabel("layer")
    for axis in (above, below):
        axis.legend(fontsize=8)
        axis.set_ylim(bottom=0)
    figure.suptitle(title, fontsize=11)
    _save(figure, path)


def _ablation(ablation: Mapping[str, Any], name: str, path: Path) -> None:
    from matplotlib.figure import Figure

    changes, domains = ablation["interventions"], list(ablation["loss"])
    figure = Figure(figsize=(8, 1.4 + 0.24 * len(changes) * max(len(domains), 2)), layout="constrained")
    axis, height = figure.subplots(), 0.8 / max(len(domains), 1)
    for d, domain in enumerate(domains):
        values = [c["delta"][domain] for c in changes]
        mean = [v["value"] for v in values]
        bounds = [[max(v["value"] - v["low"], 0) for v in values], [max(v["high"] - v["value"], 0) for v in values]]
        at = [i - 0.4 + height * (d + 0.5) for i in range(len(changes))]
        axis.barh(at, mean, height, xerr=bounds, label=domain, color=SAFE[d % len(SAFE)], error_kw={"elinewidth": 0.8})
    axis.set_yticks(range(len(changes)), [c["name"] for c in changes], fontsize=8)
    axis.invert_yaxis()
    axis.axvline(0, color="0.3", linewidth=0.8)
    axis.set_xlabel("rise of the loss in nats per token (95 % interval)")
    axis.legend(fontsize=8)
    axis.set_title(f"{name}: what changed routing does to the loss", fontsize=11)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    dated = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
    figure.savefig(path, dpi=150, metadata=dated.get(path.suffix))
