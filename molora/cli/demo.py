"""The demo: fine-tune mixtures of about the same size on the same domains, compare, reload, answer, look at routing."""

from __future__ import annotations

import datetime
import gc
import importlib.metadata
import json
import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.markup import escape
from transformers import PreTrainedModel

from molora.cli.evaluate import Evaluation, EvaluationArguments
from molora.data.builtin.domains import score_answer
from molora.data.builtin.model import model_folder
from molora.data.records import source
from molora.errors import CheckpointError, ConfigError
from molora.eval.counting.counter import routed_sites
from molora.eval.document import FILE, read_document
from molora.eval.ledger import bar
from molora.eval.page.report import write_report
from molora.eval.page.terminal import verdict_panel
from molora.eval.page.terminal_tables import data_table, result_table, verdicts
from molora.eval.scoring.fresh_process import fresh_answers, peak_gb
from molora.eval.scoring.losses import answer, exact_match, heldout_loss, prompt_text
from molora.eval.verdict import verdict
from molora.extras import package_folder
from molora.training.arguments import Arguments, read_arguments
from molora.training.job import load_base, load_tokenizer, mixture, recipe_config, train
from molora.training.match import matched
from molora.training.models import CAUSAL, task_of
from molora.training.rows import Data, prepare_data, supervised_experts

__all__ = ["run_demo"]

BASE = "base"
ANSWER_TOKENS = 20


def run_demo(configs: Sequence[Path], out: Path, overrides: Sequence[str], console: Console) -> dict[str, Any]:
    """Run every config in turn on the same base and data; write all results under ``out`` and return them.

    The first config sets the size: one with single experts gets the rank that comes closest to it.

    Raises:
        ConfigError: bad configs or data, or configs that differ in base, data or seed.
        CheckpointError: a reloaded adapter that does not answer as the trained one did.
    """
    started = time.perf_counter()
    for package in ("jinja2", "plotly"):  # now, not after the training
        package_folder(package, package, "eval", "the report")
    runs = _comparable([read_arguments(path, overrides) for path in configs], out)
    first = next(iter(runs.values()))
    if task_of(first.model) != CAUSAL:
        raise ConfigError(f"demo: got a model for {task_of(first.model)}, expected a causal language model")
    console.rule("Base model and data")
    tokenizer = load_tokenizer(first.model)
    data = prepare_data(first.data, tokenizer, first.training.seed)
    console.print(f"base: {model_folder(first.model.model_name_or_path).name}, {first.model.dtype}", highlight=False)
    console.print(data_table(first.data.domains, data.train_records, data.heldout_records, data.heldout))
    results: dict[str, Any] = {BASE: _scores(load_base(first.model), tokenizer, data)}
    for name, arguments in runs.items():
        console.rule(f"Training {name}")
        gc.collect()
        results[name] = _one_run(arguments, tokenizer, data, out, console)
    report = {"runs": results, "not_below_base": verdicts(results, BASE), **_circumstances(started, results)}
    _write_json(out / "metrics.json", report)
    chosen = {name: arguments.chosen() for name, arguments in runs.items()}
    (out / "config.yaml").write_text(yaml.safe_dump(chosen, sort_keys=False), encoding="utf-8")
    _report(out, console)
    console.rule("Results")
    _tell(report, out, console)
    return report


def _comparable(runs: list[Arguments], out: Path) -> dict[str, Arguments]:
    """The runs by recipe, each writing under ``out``, the later ones sized like the first."""
    names = [r.mixture.recipe for r in runs]
    if len(set(names)) < len(names) or BASE in names:
        raise ConfigError(f"demo: got the recipes {names}, expected distinct ones")
    for other in runs[1:]:
        if (other.model, other.data, other.training.seed) != (runs[0].model, runs[0].data, runs[0].training.seed):
            raise ConfigError(
                f"demo: {names[0]} and {other.mixture.recipe} differ in model, data or seed, so their losses cannot be "
                "compared; give both configs the same"
            )
    for run in runs:
        run.training.output_dir = os.fspath(out / run.mixture.recipe)
    return dict(zip(names, [runs[0], *(matched(r, runs[0]) for r in runs[1:])], strict=True))


def _one_run(arguments: Arguments, tokenizer: Any, data: Data, out: Path, console: Console) -> dict[str, Any]:
    """Convert, train, save, score, follow the routing, and answer: here and in a fresh process."""
    experts = supervised_experts(recipe_config(arguments.mixture), arguments.data)
    if experts:
        data = prepare_data(arguments.data, tokenizer, arguments.training.seed, experts=experts)
    model: Any = mixture(arguments, data, tokenizer)
    count, total = model.get_nb_trainable_parameters()
    options = ", ".join(f"{k}={v}" for k, v in arguments.mixture.options.items())
    console.print(f"{options}: {count:,} trainable parameters of {total:,}; {len(data.train)} rows", highlight=False)
    trained = train(model, tokenizer, data, arguments.training)
    prompts = {name: prompt_text(records[0], tokenizer) for name, records in data.heldout_records.items()}
    answers = answer(model, tokenizer, prompts, ANSWER_TOKENS)
    base = model_folder(arguments.model.model_name_or_path)
    resident = peak_gb(now=True)
    fresh = fresh_answers(base, arguments.model.dtype, trained.folder, prompts, ANSWER_TOKENS)
    if fresh.texts != answers:
        raise CheckpointError(
            f"{trained.folder}: reloaded, it answers {fresh.texts}; the trained model answered {answers}"
        )
    console.print(f"saved to {trained.folder}; loaded into a fresh process, it gives the same answers", highlight=False)
    return {
        "trainable_parameters": count,
        "options": dict(arguments.mixture.options),
        "train_seconds": trained.seconds,
        "steps": int(trained.log[-1]["step"]),
        "peak_gb_with_fresh_process": resident + fresh.peak_gb,
        **_scores(model, tokenizer, data),
        **_routing(model, data, arguments, trained.folder, out),
        "answers": {name: {"prompt": prompts[name], "answer": text} for name, text in answers.items()},
    }


def _scores(model: PreTrainedModel, tokenizer: Any, data: Data) -> dict[str, Any]:
    pad = tokenizer.pad_token_id or 0
    loss = {name: heldout_loss(model, rows, pad) for name, rows in data.heldout.items()}
    exact: dict[str, float] = {}
    for name, records in data.heldout_records.items():
        asked = [r for r in records if r.messages]
        found = exact_match(model, tokenizer, asked, score_answer, ANSWER_TOKENS) if asked else {}
        exact.update({task or name: share for task, share in found.items()})
    return {"heldout_loss": loss, "exact_match": exact}


def _routing(model: Any, data: Data, arguments: Arguments, folder: Path, out: Path) -> dict[str, Any]:
    """Where the held-out documents go, in an evaluation document; nothing for a recipe without a choice of experts."""
    if not routed_sites(model):
        return {}
    settings = EvaluationArguments(
        adapter=folder,
        domains={name: source(value).path for name, value in arguments.data.domains.items()},
        out=out / "eval" / folder.name,
        base=arguments.model.model_name_or_path,
        documents=0,
        max_length=arguments.data.max_length,
        dtype=arguments.model.dtype,
        seed=arguments.training.seed,
    )
    found = Evaluation(settings, bar, data.heldout_records, model).routing()["routing"]
    violation = [v for v in found["max_violation"] if v is not None]
    short = {k: v for k, v in found["specialisation"].items() if k != "nmi_per_site"} if found["specialisation"] else {}
    return {"routing": {**short, "max_violation": sum(violation) / len(violation)}}


def _report(out: Path, console: Console) -> None:
    """One page of what all runs' routing says; the verdicts here."""
    documents = [read_document(path.parent) for path in sorted(out.glob(f"eval/*/{FILE}"))]
    if not documents:
        return
    console.rule("What the routing does")
    for document in documents:
        console.print(verdict_panel(verdict(document), document["name"]))
    write_report(documents, out / "report.html")
    console.print(f"look at it: {out / 'report.html'}", highlight=False, soft_wrap=True)


def _tell(report: dict[str, Any], out: Path, console: Console) -> None:
    runs = report["runs"]
    console.print(result_table(runs))
    for name, above in report["not_below_base"].items():
        where = "in every domain" if not above else f"but not in: {', '.join(above)}"
        console.print(f"{name}: held-out loss below the base {where}")
    console.rule("One held-out prompt per domain, answered by the reloaded adapters")
    trained = {name: run["answers"] for name, run in runs.items() if "answers" in run}
    for domain, asked in next(iter(trained.values())).items():
        console.print(f"[bold]{domain}[/] {escape(asked['prompt'].strip())}", highlight=False)
        for name, answers in trained.items():
            console.print(f"  [cyan]{name}:[/] {escape(answers[domain]['answer'].strip())}", highlight=False)
    console.print(f"\n{report['seconds']:.0f} s, peak memory {report['peak_memory_gb']:.1f} GB; results in {out}:")
    console.print("  " + "  ".join(sorted(p.name for p in out.iterdir())), highlight=False)


def _circumstances(started: float, results: dict[str, Any]) -> dict[str, Any]:
    """Time, memory, machine and versions."""
    with_fresh = max((run.get("peak_gb_with_fresh_process", 0.0) for run in results.values()), default=0.0)
    packages = ("molora", "torch", "transformers", "accelerate", "safetensors")
    installed = {
        d.metadata["Name"].lower(): d.version for d in importlib.metadata.distributions() if d.metadata["Name"]
    }
    return {
        "seconds": time.perf_counter() - started,
        "peak_memory_gb": max(peak_gb(), with_fresh),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "versions": {"python": platform.python_version()} | {p: installed[p] for p in packages if p in installed},
    }


def _write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
