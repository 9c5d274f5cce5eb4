"""The house rules hold over the project, and each of them catches a planted fault."""

import ast
import graphlib
import re
from pathlib import Path
from typing import Any

import pytest

from molora.data.formats import FORMATS
from molora.initialisers import INITIALISERS
from molora.interop.importers import IMPORTERS
from molora.kernels.dispatch import KERNELS
from molora.layers.banks import BANKS
from molora.penalties import PENALTIES
from molora.recipes import RECIPES
from molora.routers import BALANCES, GATES, ROUTERS
from tests.support.house_rules import (
    ALSO_CHECKED,
    LENGTH_EXCEPTIONS,
    OTHER_MEANINGS,
    RECIPE_NAMES_ALLOWED,
    ROOT,
    entry_faults,
    hiding_faults,
    imported,
    imported_modules,
    layer_faults,
    length_faults,
    method_name_faults,
    module_name,
    over_recipes,
    project_files,
    recipe_faults,
)

FILES = project_files()
PACKAGE_FILES = [path for path in FILES if path.parts[0] not in ALSO_CHECKED]
MODULES = {module_name(path) for path in PACKAGE_FILES}


TABLES: dict[str, dict[str, Any]] = {
    "BALANCES": BALANCES, "BANKS": BANKS, "FORMATS": FORMATS, "GATES": GATES, "IMPORTERS": IMPORTERS,
    "INITIALISERS": INITIALISERS, "KERNELS": KERNELS, "PENALTIES": PENALTIES, "RECIPES": RECIPES, "ROUTERS": ROUTERS,
}  # fmt: skip
NAMES = {name: table for table, entries in TABLES.items() for name in entries}
CLASSES = {e.__name__: table for table, entries in TABLES.items() for e in entries.values() if isinstance(e, type)}
CLASSES |= {type(e).__name__: "FORMATS" for e in FORMATS.values()}
ADDED = Path("tests/support/added")  # files that import each other by name, as a user's own do


def read(path: Path) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def test_the_project_is_found():
    assert {"molora.errors", "molora.kernels.reference", "molora.routers", "molora.recipes.mola"} <= MODULES


def test_imports_point_downward():
    faults = [fault for path in PACKAGE_FILES for fault in layer_faults(module_name(path), read(path), MODULES)]
    assert faults == []


def test_no_import_cycles():
    names = {module_name(path): imported_modules(read(path), MODULES) for path in PACKAGE_FILES}
    graph = {module: targets - {module} for module, targets in names.items()}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which lists the cycle


def test_shared_code_names_no_method():
    faults = [fault for path in PACKAGE_FILES for fault in method_name_faults(path.as_posix(), read(path))]
    assert faults == []


def test_tests_over_recipes_ask_for_traits():
    """A new line of RECIPES is tested without a change of any test: none branches by a recipe's name."""
    over = ("tests/behaviour/", "tests/support/")
    tests = [p.as_posix() for p in FILES if p.parts[0] == "tests"]
    tests = [p for p in tests if p.startswith(over) or over_recipes(read(Path(p)))]
    assert len(tests) > 60
    assert [fault for path in tests for fault in recipe_faults(path, read(Path(path)), RECIPES)] == []
    assert [path for path in RECIPE_NAMES_ALLOWED if not recipe_faults("", read(Path(path)), RECIPES)] == []


def test_shared_code_compares_no_entry_of_a_table():
    faults = [fault for path in PACKAGE_FILES for fault in entry_faults(path.as_posix(), read(path), NAMES, CLASSES)]
    assert faults == []
    assert len(OTHER_MEANINGS) <= 10
    assert [word for word in OTHER_MEANINGS if word not in NAMES] == []


PLANTED_ENTRIES = {
    "a comparison": ("if kind == 'switch': pass", "names 'switch' of BALANCES"),
    "a membership": ("x = kind not in ('z', 'other')", "names 'z' of BALANCES"),
    "a key": ("x = {'hidden': 1}[kind]", "names 'hidden' of ROUTERS"),
    "a match": ("match kind:\n    case 'mica': pass", "names 'mica' of INITIALISERS"),
    "a class": ("x = isinstance(router, LinearRouter)", "asks for LinearRouter of ROUTERS"),
    "one of several classes": ("x = isinstance(m, int | FixedRouter)", "asks for FixedRouter of ROUTERS"),
}


@pytest.mark.parametrize("case", PLANTED_ENTRIES)
def test_the_rule_catches(case: str):
    source, fault = PLANTED_ENTRIES[case]
    found = entry_faults("molora/surgery/new.py", source, NAMES, CLASSES)
    assert [f.partition(" ")[2] for f in found] == [fault]
    assert entry_faults("molora/recipes/new.py", source, NAMES, CLASSES) == []


def test_imports_are_absolute():
    relative = [(str(path), name) for path in FILES for name in imported(ast.parse(read(path))) if name[0] == "."]
    assert relative == []


def test_kernels_is_a_namespace_folder():
    """With an __init__.py it would hide the package `kernels` that transformers imports."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_no_file_hides_a_dependency():
    faults = []
    for path in FILES:
        if path.parent == ADDED:
            continue
        beside = (ROOT / path).parent.iterdir()
        names = {entry.stem for entry in beside if entry.suffix == ".py" or entry.is_dir()}
        faults += hiding_faults(path, read(path), names)
    assert faults == []


def test_files_fit_their_limit():
    faults = [fault for path in FILES for fault in length_faults(path.as_posix(), len(read(path).splitlines()))]
    assert faults == []
    assert [path for path in LENGTH_EXCEPTIONS if Path(path) not in FILES] == []


PLANTED = {
    "molora",
    "molora.config.placements",
    "molora.convert",
    "molora.errors",
    "molora.eval.counting.tape",
    "molora.layers.banks.plain",
    "molora.new",
    "molora.routers",
    "molora.seeds",
    "molora.training.trainer",
}


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("molora.config.placements", "from molora.layers.banks.plain import ExpertBank"),
        ("molora.layers.banks.plain", "def f():\n    import molora.convert"),
        (
            "molora.layers.banks.plain",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from molora import convert",
        ),
        ("molora.layers.banks.plain", "import molora"),
        ("molora.errors", "from molora.config.placements import Placement"),
        ("molora.training.trainer", "from molora.eval.counting.tape import Tape"),
        ("molora.eval.counting.tape", "import molora.training.trainer as t"),
        ("molora.config.placements", "import molora.new"),
        ("molora.new", "x = 1"),
    ],
)
def test_layer_rule_catches(module: str, source: str):
    assert len(layer_faults(module, source, PLANTED)) == 1


def test_layer_rule_allows_lower_floors_the_own_folder_and_the_ground():
    assert layer_faults("molora.cli.main", "from molora.training.trainer import Trainer", PLANTED) == []
    assert layer_faults("molora.layers.banks.plain", "from molora.routers import ROUTERS", PLANTED) == []
    assert layer_faults("molora.config.placements", "from molora.config.options import GateConfig", PLANTED) == []
    assert layer_faults("molora.seeds", "from molora.errors import ConfigError", PLANTED) == []


@pytest.mark.parametrize(
    "source",
    [
        "if name == 'mola': pass",
        "def mixlora_forward(): pass",
        "f(xlora_depth=1)",
        "x = f'{y} smora'",
        "import a.meteora",
        "class LlavaMoleRouter: pass",
    ],
)
def test_method_name_rule_catches(source: str):
    assert len(method_name_faults("molora/layers/banks/plain.py", source)) == 1


def test_method_name_rule_allows_explanations():
    source = '"""As in MoLA, eq. 3."""\nx = 1  # mixlora does this\n"""Unlike mola."""'
    assert method_name_faults("molora/layers/banks/plain.py", source) == []
    assert method_name_faults("molora/recipes/mola.py", "def mola(): pass") == []


@pytest.mark.parametrize(
    "source",
    [
        "x = recipe == 'xlora'",
        "if recipe not in ('lora', 'xlora'): pass",
        "x = {'mola': 1}.get(recipe, 0)",
        "@parametrize('recipe', ['lora', 'mixlora', 'mola', 'smora'])\ndef test(recipe): pass",
    ],
)
def test_recipe_rule_catches(source: str):
    assert len(recipe_faults("tests/behaviour/test_new.py", source, RECIPES)) == 1


def test_recipe_rule_allows_examples_and_texts():
    source = "x = [n for n in names if 'lora' in n]\nf('mola')\n@parametrize('recipe', ['lora', 'mola'])\ndef g(): 0"
    assert recipe_faults("tests/behaviour/test_new.py", source, RECIPES) == []
    assert over_recipes("@each_recipe\ndef test(recipe, name): pass")
    assert over_recipes("tiny.RECIPES")
    assert not over_recipes("convert(model, 'mola')")


def test_hiding_rule_catches():
    assert len(hiding_faults(Path("kernels/triton.py"), "import triton.language as tl", set())) == 1
    assert len(hiding_faults(Path("kernels/sorted/programs.py"), "import triton", {"triton", "grouped"})) == 1
    assert len(hiding_faults(Path("kernels/hub.py"), "from kernels import get_kernel", set())) == 1


def test_length_rule_catches():
    assert length_faults("kernels/sorted/order.py", 400) == []
    assert len(length_faults("kernels/sorted/order.py", 401)) == 1


def test_the_table_of_places_is_true():
    """CONTRIBUTING.md says where things are; every path that it names exists."""
    table = (ROOT / "CONTRIBUTING.md").read_text().split("## Where is what")[1].split("\n## ")[0]
    places = re.findall(r"`([\w/.]+)`", table)
    assert len(places) >= 15
    assert [p for p in places if not (ROOT / p).exists()] == []
