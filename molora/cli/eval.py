"""The command line's side of evaluation: ``molora eval routing | score | ablate | all`` and ``molora report``."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from molora.cli.busy import spare_busy_cores
from molora.errors import ConfigError, nearest

__all__ = ["add_commands"]

output = Console()
PAIR = "NAME=DATA"


class Part(StrEnum):
    """What to find out."""

    routing = "routing"
    score = "score"
    ablate = "ablate"
    all = "all"


class Format(StrEnum):
    """Of single pictures."""

    png = "png"
    svg = "svg"
    pdf = "pdf"


SECTIONS = {Part.routing: ("routing", "experts", "training"), Part.score: ("scores",), Part.ablate: ("ablation",)}
PARTS = tuple(SECTIONS)


def evaluate(
    what: Annotated[Part, typer.Argument(help="routing: where tokens go; score: how good; ablate: does it matter.")],
    adapter: Annotated[Path, typer.Argument(help="Adapter folder, as `molora train` or save_pretrained wrote it.")],
    domain: Annotated[
        list[str] | None,
        typer.Option(
            metavar=PAIR, help="Once for each domain: JSON lines, .parquet, .txt, a folder, hf:name or builtin:name."
        ),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="Instead: the YAML file of a training run, for what it held out.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for evaluation.json; all parts go into one file.")] = Path(
        "runs/eval"
    ),
    name: Annotated[str, typer.Option(help="What reports call this run; default: the adapter folder's name.")] = "",
    base: Annotated[str, typer.Option(help="The base model, where it is not where the adapter says.")] = "",
    dtype: Annotated[str, typer.Option(help="Type of the base: bfloat16, float32, float16.")] = "bfloat16",
    documents: Annotated[int, typer.Option(help="At most so many of each domain; 0 takes all.")] = 64,
    max_length: Annotated[int, typer.Option(help="Tokens in a row; longer texts become several rows.")] = 256,
    batch_size: Annotated[int, typer.Option(help="Rows that are run together.")] = 8,
    seed: Annotated[int, typer.Option(help="Of samples, shuffles and resamples.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was found as JSON and nothing else.")] = False,
    samples: Annotated[
        int, typer.Option(help="Documents of each domain to keep for coloured text.", rich_help_panel="routing")
    ] = 8,
    intruders: Annotated[
        bool,
        typer.Option("--intruders", help="Count intruder dimensions: exact, slow.", rich_help_panel="routing"),
    ] = False,
    choices: Annotated[
        list[str] | None,
        typer.Option(
            metavar=PAIR,
            help='Questions, one a line: {"question": "...", "choices": ["...", "..."], "answer": 0}.',
            rich_help_panel="score",
        ),
    ] = None,
    each: Annotated[
        str,
        typer.Option(
            help="What to take away by itself: expert, favourite (what a domain uses most), none, auto.",
            rich_help_panel="ablate",
        ),
    ] = "auto",
) -> None:
    """Ask what a mixture's routing does, and keep the answers in OUT/evaluation.json.

    `molora eval all runs/mine --domain code=code.jsonl --domain law=law.jsonl --out runs/eval`

    `molora eval routing runs/demo/mixlora --config training/configs/demo_mixlora.yaml`

    Intervals are 95 % bootstrap bounds over documents; figures of specialisation stand beside those of shuffled labels.
    Ctrl-C loses nothing that was finished: the same command goes on. `molora report OUT` makes a page of it.
    """
    from molora.cli.evaluate import Evaluation, EvaluationArguments
    from molora.eval.ledger import bar

    arguments = EvaluationArguments(
        adapter, _pairs("--domain", domain), out, config, base, name, documents, max_length, batch_size, dtype, seed
    )
    job, asked = Evaluation(arguments, bar), _pairs("--choices", choices)
    spare_busy_cores(Console(stderr=True))
    run = {
        Part.routing: lambda: job.routing(samples, intruders),
        Part.score: lambda: job.score(asked),
        Part.ablate: lambda: job.ablate(each),
    }
    parts = PARTS if what is Part.all else (what,)
    document: dict[str, Any] = {}
    for part in parts:
        document = run[part]()
    found = [s for part in parts for s in SECTIONS[part]]
    if as_json:
        _print({k: document[k] for k in found if k in document})
        return
    from molora.eval.page.terminal import show_document

    show_document({k: document[k] for k in ("name", "expert_names", *found) if k in document}, output)
    output.print(f"{job.file}: `molora report {out}` makes a page of it", highlight=False, markup=False)


def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders that `molora eval` wrote; several are compared.")],
    out: Annotated[Path | None, typer.Option(help="The page; default: report.html beside the first.")] = None,
    figures: Annotated[Path | None, typer.Option(help="Also draw single pictures into this folder.")] = None,
    figure_format: Annotated[Format, typer.Option("--format", help="Of those pictures.")] = Format.png,
    fail_if: Annotated[
        list[str] | None,
        typer.Option(help="End with code 1 if a run is: collapsed, unbalanced, unspecialised, without-effect."),
    ] = None,
    card: Annotated[
        Path | None, typer.Option(help="Also write what was found into the README.md of this adapter folder.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the verdicts as JSON and nothing else.")] = False,
) -> None:
    """Make one page of what was found, to look at offline: verdict, pictures, coloured text, tables.

    `molora report runs/eval` or, to compare, `molora report runs/eval_a runs/eval_b --out both.html`

    On the model card of the adapter that was evaluated: `molora report runs/eval --card runs/mine`

    For CI: `molora report runs/eval --fail-if collapsed`
    """
    from molora.eval.document import read_document
    from molora.eval.page.report import write_report
    from molora.eval.page.terminal import show_comparison, show_document
    from molora.eval.verdict import FAILURES, fails, verdict

    for condition in fail_if or []:
        if condition not in FAILURES:
            known = ", ".join(FAILURES)
            raise ConfigError(f"--fail-if: got {condition!r}, expected one of {known}{nearest(condition, FAILURES)}")
    documents = [read_document(run) for run in runs]
    if card is not None and len(documents) > 1:
        raise ConfigError(f"--card: got {len(documents)} evaluations, expected the one of the adapter in {card}")
    failed = [f"{d['name']} is {c}" for d in documents for c in fail_if or [] if fails(d, c)]
    page = out or (runs[0] if runs[0].is_dir() else runs[0].parent) / "report.html"
    if card is not None:
        from molora.eval.page.card import write_card

        card = write_card(documents[0], card)
    write_report(documents, page)
    drawn: list[Path] = []
    if figures is not None:
        from molora.eval.page.figures import draw

        drawn = [p for d in documents for p in draw(d, figures, str(figure_format), several=len(documents) > 1)]
    if as_json:
        said = [{"name": d["name"], "verdict": [s._asdict() for s in verdict(d)]} for d in documents]
        written = {"page": str(page), "card": card and str(card), "figures": [str(p) for p in drawn]}
        _print({**written, "runs": said, "failed": failed})
    else:
        show_document(documents[0], output) if len(documents) == 1 else show_comparison(documents, output)
        for path in (page, *([card] if card else []), *drawn):
            output.print(path, highlight=False, soft_wrap=True)
        for line in failed:
            Console(stderr=True).print(f"[bold red]failed:[/] {line}", highlight=False)
    if failed:
        raise typer.Exit(1)


def add_commands(app: typer.Typer) -> None:
    """Both commands, on the command line of the package."""
    app.command(name="eval")(evaluate)
    app.command()(report)


def _pairs(option: str, given: list[str] | None) -> dict[str, str]:
    out: dict[str, str] = {}
    for pair in given or []:
        name, _, value = pair.partition("=")
        if not (name and value) or name in out:
            what = f"{name!r} twice" if name in out else repr(pair)
            raise ConfigError(f"{option}: got {what}, expected {PAIR} with a name of its own, as in code=code.jsonl")
        out[name] = value
    return out


def _print(value: Any) -> None:
    typer.echo(json.dumps(value, ensure_ascii=False))
