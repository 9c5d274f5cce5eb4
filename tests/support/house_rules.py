"""House rules as functions from source text to a list of faults; test_layers_of_code.py runs them.

Who may import whom, where a method's name may stand, which names hide a dependency, how long a file may be.
"""

import ast
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from tests.support.places import ROOT

LINKED = ("kernels", "routers", "training", "eval")
ALSO_CHECKED = ("benchmarks", "tests")

# Bottom up, as in ARCHITECTURE.md. A file imports from lower floors only; on the ground floor and inside a folder,
# files import each other, without a circle.
GROUND = ("errors", "activations", "processes", "extras", "seeds", "routing")
FLOORS: tuple[tuple[str, ...], ...] = (
    GROUND,
    ("config",),
    ("context", "kernels"),
    ("routers",),
    ("layers",),
    ("adapter",),
    ("initialisers", "penalties"),
    ("recipes",),
    ("surgery",),
    ("forward",),
    ("model",),
    ("convert",),
    ("interop",),
    ("load", "peft_tuner"),
    ("data",),
    ("training", "eval"),
    ("cli",),
    ("__main__", ""),  # molora itself
)
METHOD_NAME = re.compile("mixlora|xlora|smora|mola|llava_?mole|meteora", re.IGNORECASE)
METHOD_NAMES_ALLOWED = {
    "molora/recipes/": "the methods themselves",
    "molora/interop/": "readers of the methods' released checkpoints",
    "molora/cli/main.py": "examples in help texts",
}

# Where a test file says which recipes it is about: the table itself, or what is made of it.
OVER_RECIPES = {"RECIPES", "MIXTURES", "having", "each_recipe", "matrix", "causal_matrix"}
RECIPE_NAMES_ALLOWED = {
    "tests/kernels/test_gpu.py": "four of unlike shape, since a device's time is short",
    "tests/layers/test_taken_back.py": "ranks that fit the narrowest weight",
    "tests/peft_tuner/test_peft_trl.py": "two examples, one by an option that switches its loss off",
    "tests/routers/test_balance.py": "each method's published loss",
    "tests/routers/test_router_learns.py": "options of each method at which its router learns in a few steps",
    "tests/support/foreign_cases.py": "formats of other software, some called as the method",
    "tests/support/foreign_folders.py": "formats of other software, some called as the method",
    "tests/support/format_fixture.py": "committed folders of the first format",
}

MAX_LINES = 400
LENGTH_EXCEPTIONS: dict[str, str] = {}  # path: reason


def project_files() -> list[Path]:
    """The project's Python files, each once, under its real folder; relative to the root."""
    own = [path for path in (ROOT / "molora").rglob("*.py") if path.relative_to(ROOT).parts[1] not in LINKED]
    rest = [path for folder in (*LINKED, *ALSO_CHECKED) for path in (ROOT / folder).rglob("*.py")]
    return sorted(path.relative_to(ROOT) for path in own + rest)


def module_name(path: Path) -> str:
    """kernels/rank/programs.py -> molora.kernels.rank.programs; molora/recipes/__init__.py -> molora.recipes."""
    parts = path.with_suffix("").parts
    if parts[0] in LINKED:
        parts = ("molora", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room(module: str) -> str:
    """The file or folder of molora/ that holds a module: "layers" for molora.layers.ffn, "" for molora itself."""
    return (module.split(".") + [""])[1]


def floor(name: str) -> int | None:
    """Its number, from the bottom."""
    return next((i for i, rooms in enumerate(FLOORS) if name in rooms), None)


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
    own = room(module)
    if floor(own) is None:
        return [f"{module} has no floor: give {own!r} one in FLOORS and in ARCHITECTURE.md"]
    faults = []
    for target in sorted(imported_modules(source, modules)):
        other = room(target)
        if floor(other) is None:
            faults.append(f"{module} imports {target}, which has no floor")
        elif other != own and not {own, other} <= {*GROUND} and floor(other) >= floor(own):
            faults.append(f"{module} imports {target}, which is not on a lower floor")
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


def over_recipes(source: str) -> bool:
    """Whether a test file takes its recipes from the table or by their traits."""
    nodes = list(ast.walk(ast.parse(source)))
    names = {n.id for n in nodes if isinstance(n, ast.Name)} | {n.attr for n in nodes if isinstance(n, ast.Attribute)}
    return bool(names & OVER_RECIPES)


def recipe_faults(path: str, source: str, recipes: Iterable[str]) -> list[str]:
    """Comparisons with a recipe's name, tables by their names, and lists of most of them: what traits are for."""
    if path in RECIPE_NAMES_ALLOWED:
        return []
    known, faults = set(recipes), []

    def said(nodes: Iterable[ast.expr | None]) -> list[str]:
        return [n.value for n in nodes if isinstance(n, ast.Constant) and n.value in known]

    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare):
            sides = (node.left, *node.comparators)
            inside = [e for s in sides if isinstance(s, ast.Tuple | ast.List | ast.Set) for e in s.elts]
            equal = sides if isinstance(node.ops[0], ast.Eq | ast.NotEq) else ()  # "lora" in a text is no comparison
            found, what = said((*equal, *inside)), "compares with"
        elif isinstance(node, ast.Dict):
            found, what = said(node.keys), "has a table by"
        elif isinstance(node, ast.Tuple | ast.List | ast.Set):
            found, what = said(node.elts), "lists"
            found = found if 2 * len(found) > len(known) else []
        else:
            continue
        faults += [f"{path}:{node.lineno} {what} {', '.join(found)}: ask for a trait"] if found else []
    return faults


# A word that is an entry's name in a table, and means something else in shared code.
OTHER_MEANINGS = {
    "bias": "a tensor of a linear, and an option of PEFT's configs",
    "linear": "a site's role, and a placement's unit",
    "random": "an edit of routing, and an instruction to shuffle",
    "text": "a column, a key of a chat's content, and a key of the page's words",
    "triton": "the package",
}


def entry_faults(path: str, source: str, names: Mapping[str, str], classes: Mapping[str, str]) -> list[str]:
    """Comparisons and keys that hold an entry's name, and questions for an entry's class, in shared code.

    ``names``, ``classes``: the table of an entry's name or class. Free are ``recipes/`` and ``interop/``, a dict
    literal that is a table, and the file that defines an entry.
    """
    tree = ast.parse(source)
    own = {n.name for n in ast.walk(tree) if isinstance(n, ast.ClassDef)}
    if path.startswith(("molora/recipes/", "molora/interop/")) or own & classes.keys():
        return []
    tables = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.AnnAssign | ast.Assign) and _is_table(n)}
    faults = []
    for node in ast.walk(tree):
        texts: Iterable[ast.AST | None] = ()
        if isinstance(node, ast.Compare | ast.MatchValue):
            texts = ast.walk(node)
        elif isinstance(node, ast.Dict) and id(node) not in tables:
            texts = node.keys
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("isinstance", "issubclass"):
            asked = [n.id for n in ast.walk(node.args[1]) if isinstance(n, ast.Name) and n.id in classes]
            faults += [f"{path}:{node.lineno} asks for {name} of {classes[name]}" for name in asked]
        words = [c.value for c in texts if isinstance(c, ast.Constant) and isinstance(c.value, str)]
        known = [word for word in words if word in names and word not in OTHER_MEANINGS]
        faults += [f"{path}:{getattr(node, 'lineno', '?')} names {word!r} of {names[word]}" for word in known]
    return faults


def _is_table(node: ast.AnnAssign | ast.Assign) -> bool:
    targets = [node.target] if isinstance(node, ast.AnnAssign) else node.targets
    return any(isinstance(t, ast.Name) and t.id.isupper() for t in targets)


def hiding_faults(path: Path, source: str, neighbours: set[str]) -> list[str]:
    """Dependencies that this file, or one beside or around it, would hide when the file runs as a script."""
    local = {part.removesuffix(".py") for part in path.parts} | neighbours
    tops = {name.split(".")[0] for name in imported(ast.parse(source)) if not name.startswith(".")}
    hidden = sorted(tops & local - {"molora", "tests", "benchmarks"})
    return [f"{path} imports {top!r}, but a file or folder here has that name" for top in hidden]


def length_faults(path: str, lines: int) -> list[str]:
    """Files over the limit that are not listed with a reason."""
    over = lines > MAX_LINES and path not in LENGTH_EXCEPTIONS
    return [f"{path} has {lines} lines, limit {MAX_LINES}"] if over else []
