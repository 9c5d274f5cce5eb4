"""House rules as functions from source text to a list of faults; test_layers_of_code.py runs them.

Who may import whom, where a method's name may stand, which names hide a dependency, how long a file may be.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LINKED = ("kernels", "routers", "training", "eval")
ALSO_CHECKED = ("benchmarks", "tests")

# Bottom up, as in ARCHITECTURE.md: (layer, modules of one row). A module imports lower layers and its row.
Row = tuple[int, tuple[str, ...]]
ROWS: tuple[Row, ...] = (
    (
        0,
        (
            "molora.errors",
            "molora.activations",
            "molora.config.strict",
            "molora.adapter.strict_json",
            "molora.config.options",
            "molora.config",
            "molora.config.site",
            "molora.routing",
            "molora.context",
            "molora.processes",
            "molora.extras",
            "molora.seeds",
        ),
    ),
    (1, ("molora.adapter.card_section", "molora.adapter.safetensors_file", "molora.adapter.atomic_save")),
    (1, ("molora.recipes",)),
    (1, ("molora.kernels",)),
    (2, ("molora.routers",)),
    (3, ("molora.layers", "molora.surgery.trace", "molora.surgery.blocks")),
    (4, ("molora.adapter.folder", "molora.adapter.config", "molora.adapter.fingerprint")),
    (
        4,
        (
            "molora.adapter.peft_lora",
            "molora.adapter.peft_lora_config",
            "molora.adapter.pickle_file",
            "molora.adapter.names",
        )
        + ("molora.adapter.peft_lora_stacked", "molora.adapter.peft_lora_writer"),
    ),
    (
        5,
        (
            "molora.surgery.targets",
            "molora.surgery.target_parameters",
            "molora.surgery.resolve",
            "molora.surgery.build",
            "molora.surgery.fill",
        )
        + ("molora.surgery.install",),
    ),
    (
        6,
        (
            "molora.surgery.state",
            "molora.forward.aux_loss",
            "molora.forward.recompute",
            "molora.forward.frame",
            "molora.model",
        )
        + (
            "molora.adapter.hub",
            "molora.adapter.card",
            "molora.peft_tuner.inactive",
            "molora.surgery.reshape",
            "molora.forward.scaling_pass",
        ),
    ),
    (7, ("molora.interop", "molora.convert", "molora.load")),
    (7, ("molora.data.examples", "molora.data.packing", "molora.data.records", "molora.data.sources")),
    (8, ("molora.training",)),
    (8, ("molora.eval",)),
    (9, ("molora.cli", "molora.cli_eval", "molora.busy", "molora.demo", "molora.evaluate", "molora.info", "molora")),
)

METHOD_NAME = re.compile("mixlora|xlora|smora|mola|llava_?mole|meteora", re.IGNORECASE)
METHOD_NAMES_ALLOWED = {
    "molora/recipes/": "the methods themselves",
    "molora/interop/": "readers of the methods' released checkpoints",
    "molora/cli.py": "examples in help texts",
}

MAX_LINES = 250
MAX_LINES_KERNEL = 400
LENGTH_EXCEPTIONS: dict[str, str] = {}  # path: reason


def project_files() -> list[Path]:
    """The project's Python files, each once, under its real folder; relative to the root."""
    own = [path for path in (ROOT / "molora").rglob("*.py") if path.relative_to(ROOT).parts[1] not in LINKED]
    rest = [path for folder in (*LINKED, *ALSO_CHECKED) for path in (ROOT / folder).rglob("*.py")]
    return sorted(path.relative_to(ROOT) for path in own + rest)


def module_name(path: Path) -> str:
    """kernels/concat.py -> molora.kernels.concat; molora/recipes/__init__.py -> molora.recipes."""
    parts = path.with_suffix("").parts
    if parts[0] in LINKED:
        parts = ("molora", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def row_of(module: str) -> Row | None:
    """The row whose entry is the module or the nearest package around it; `molora` covers only itself."""
    found = [(len(entry), row) for row in ROWS for entry in row[1] if _covers(entry, module)]
    return max(found)[1] if found else None


def _covers(entry: str, module: str) -> bool:
    return module == entry or (entry != "molora" and module.startswith(entry + "."))


def imported(tree: ast.AST) -> Iterator[str]:
    """Full names of everything imported anywhere in a file: inside functions and under TYPE_CHECKING too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            yield from (f"{base}.{alias.name}" for alias in node.names)


def imported_modules(source: str, modules: set[str]) -> set[str]:
    """The project's modules among them; `from molora.config import Placement` counts as molora.config."""
    names = (name for name in imported(ast.parse(source)) if name.split(".")[0] == "molora")
    return {name if name in modules else name.rpartition(".")[0] or name for name in names}


def layer_faults(module: str, source: str, modules: set[str]) -> list[str]:
    """Imports that point upward or sideways."""
    row = row_of(module)
    if row is None:
        return [f"{module} has no layer: give it one in ROWS (tests/house_rules.py) and in ARCHITECTURE.md"]
    faults = []
    for target in sorted(imported_modules(source, modules)):
        other = row_of(target)
        if other is None:
            faults.append(f"{module} imports {target}, which has no layer")
        elif other != row and other[0] >= row[0]:
            faults.append(f"{module} (layer {row[0]}) imports {target} (layer {other[0]}), which is not lower")
    return faults


def method_name_faults(path: str, source: str) -> list[str]:
    """Identifiers and string literals that contain a method's name; docstrings and comments are free."""
    if path.startswith(tuple(METHOD_NAMES_ALLOWED)):
        return []
    nodes = list(ast.walk(ast.parse(source)))
    docstrings = {id(n.value) for n in nodes if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)}
    faults = []
    for node in nodes:
        if id(node) in docstrings:
            continue
        for _, value in ast.iter_fields(node):
            texts = [text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str)]
            hits = [match.group() for text in texts for match in METHOD_NAME.finditer(text)]
            faults += [f"{path}:{getattr(node, 'lineno', '?')} names {hit!r} in shared code" for hit in hits]
    return faults


def hiding_faults(path: Path, source: str, neighbours: set[str]) -> list[str]:
    """Dependencies that this file, or one beside or around it, would hide when the file runs as a script."""
    local = {part.removesuffix(".py") for part in path.parts} | neighbours
    tops = {name.split(".")[0] for name in imported(ast.parse(source)) if not name.startswith(".")}
    hidden = sorted(tops & local - {"molora", "tests", "benchmarks"})
    return [f"{path} imports {top!r}, but a file or folder here has that name" for top in hidden]


def length_faults(path: str, lines: int) -> list[str]:
    """Files over the limit that are not listed with a reason."""
    limit = MAX_LINES_KERNEL if path.startswith("kernels/") else MAX_LINES
    over = lines > limit and path not in LENGTH_EXCEPTIONS
    return [f"{path} has {lines} lines, limit {limit}"] if over else []
