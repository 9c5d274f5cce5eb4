"""The links, the import names, the import's cost and the wheel."""

import os
import shutil
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.support.places import ROOT

LINKS = ("kernels", "routers", "training", "eval")
DATA_PATTERNS = (
    "py.typed",
    "training/zero/*.json",
    "training/launch/*.sh",
    "training/configs/*.yaml",
    "training/configs/shapes/*.json",
    "eval/page/templates/*",
)
OPTIONAL = (
    "deepspeed",
    "triton",
    "peft",
    "datasets",
    "plotly",
    "matplotlib",
    "jinja2",
    "lm_eval",
    "typer",
    "rich",
)
IMPORT_LIMIT_S = 0.3

HIDE_OPTIONAL = f"""
import importlib.machinery, sys
class Hide(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {OPTIONAL!r} else super().find_spec(name, path, target)
sys.meta_path = [Hide if finder is importlib.machinery.PathFinder else finder for finder in sys.meta_path]
"""

IMPORT_EVERYTHING = """
import importlib, pathlib, sys, molora
package = pathlib.Path(molora.__file__).parent
folders = [package, *(package / name for name in LINKS)]
for file in [file for folder in folders for file in sorted(folder.glob("**/*.py"))]:
    parts = file.relative_to(package).with_suffix("").parts
    importlib.import_module(".".join(("molora", *(p for p in parts if p != "__init__"))))
"""

FILES_UNDER_OTHER_NAMES = """
root = pathlib.Path(sys.argv[1])
files = {name: pathlib.Path(module.__file__).resolve() for name, module in sys.modules.items()
         if getattr(module, "__file__", None) and name.partition(".")[0] != "molora"}
print([n for n, f in files.items() if any(f.is_relative_to(root / folder) for folder in ("molora", *LINKS))])
"""

SMOKE = """
import pathlib, sys, torch, transformers, molora, molora.kernels.reference
site = pathlib.Path(sys.argv[1]).resolve()
assert pathlib.Path(molora.__file__).resolve().is_relative_to(site), molora.__file__
assert pathlib.Path(molora.kernels.reference.__file__).resolve().is_relative_to(site)
sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=64)
model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).eval()
ids = torch.arange(8)[None]
before = model(ids).logits
model = molora.convert(model, "mola", r=4, num_experts=(2, 4))
assert torch.equal(model(ids).logits, before)
print("smoke ok")
"""


def run_python(code: str, *args: str, cwd: Path, path: Path | None = None, seconds: int = 240) -> str:
    """Standard output of a fresh interpreter; a failure shows the child's traceback."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(path or "")}
    command = [sys.executable, "-c", code, *args]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=seconds)
    assert done.returncode == 0, done.stderr
    return done.stdout


def package_files(root: Path) -> set[str]:
    """What a wheel must hold, as paths below its root: every module and the data files, links followed."""
    package = root / "molora"
    folders = [package, *(package / name for name in LINKS)]
    modules = {file for folder in folders for file in folder.glob("**/*.py")}
    data = {file for pattern in DATA_PATTERNS for file in package.glob(pattern) if file.is_file()}
    return {file.relative_to(root).as_posix() for file in modules | data}


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what a clone holds of the package, links as links."""
    copy = tmp_path / "checkout"
    copy.mkdir()
    for name in ("molora", *LINKS):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    return copy


@pytest.mark.parametrize("name", LINKS)
def test_links_are_relative_and_resolve(name: str):
    link = ROOT / "molora" / name
    assert link.is_symlink()
    assert os.readlink(link) == f"../{name}"
    assert link.resolve() == ROOT / name


def test_git_holds_links_as_links():
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a git checkout: the links themselves are checked by the test above")
    names = [f"molora/{name}" for name in LINKS]
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "-c", f"safe.directory={ROOT}", "ls-files", "-s", *names],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    modes = {line.split("\t")[1]: line.split()[0] for line in listed.stdout.splitlines()}
    assert modes == dict.fromkeys(names, "120000")


def test_every_module_imports_under_one_name():
    """A file loaded as `kernels.x` beside `molora.kernels.x` would be a second copy with classes of its own."""
    code = f"LINKS = {LINKS!r}\n{IMPORT_EVERYTHING}\n{FILES_UNDER_OTHER_NAMES}"
    assert run_python(code, str(ROOT), cwd=ROOT).strip() == "[]"


def test_another_package_called_kernels_wins_in_the_checkout(tmp_path: Path):
    """transformers imports Hugging Face's `kernels`; the folder of that name here must not answer for it."""
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text("NAME = 'the other one'\n")
    assert run_python("import kernels; print(kernels.NAME)", cwd=ROOT, path=tmp_path).strip() == "the other one"


def test_import_needs_no_extra():
    code = f"{HIDE_OPTIONAL}\nimport molora\nprint(sorted(set({OPTIONAL!r}) & set(sys.modules)))"
    assert run_python(code, cwd=ROOT).strip() == "[]"


def test_hidden_packages_are_hidden():
    """Guards the test above: under that finder an optional package looks as if it were not installed."""
    code = f"{HIDE_OPTIONAL}\nimport importlib.util as u\nprint([n for n in {OPTIONAL!r} if u.find_spec(n)])"
    assert run_python(code, cwd=ROOT).strip() == "[]"


@pytest.mark.slow
def test_import_is_quick():
    """molora itself, on top of the parts of torch and transformers that any model needs; best of three."""
    code = (
        "import time, torch, einops, safetensors.torch\n"
        "import transformers.modeling_utils, transformers.cache_utils\n"
        "start = time.perf_counter(); import molora; print(time.perf_counter() - start)"
    )
    assert min(float(run_python(code, cwd=ROOT)) for _ in range(3)) < IMPORT_LIMIT_S


@pytest.mark.parametrize("name", LINKS)
def test_a_link_turned_into_text_gives_one_clear_error(checkout: Path, name: str):
    """What git leaves on a system without the right to make links."""
    link = checkout / "molora" / name
    link.unlink()
    link.write_text(f"../{name}")
    code = (
        "try: import molora\n"
        "except ImportError as error: print(type(error) is ImportError, error, sep='|')\n"
        "else: raise SystemExit('molora imported with a broken link')"
    )
    plain, message = run_python(code, cwd=checkout).split("|", 1)
    assert plain == "True"
    assert "link" in message
    assert "git clone" in message
    assert f"molora/{name}" in message


@pytest.mark.slow
def test_wheel_holds_the_package_and_works_elsewhere(checkout: Path, tmp_path: Path):
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]
    build = ["wheel", "--no-index", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(checkout)]
    done = subprocess.run([*pip, *build], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")

    with zipfile.ZipFile(wheel) as archive:
        entries = [entry for entry in archive.infolist() if ".dist-info/" not in entry.filename]
    assert {entry.filename for entry in entries} == package_files(checkout)
    assert not any(stat.S_ISLNK(entry.external_attr >> 16) for entry in entries)

    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    install = ["install", "--quiet", "--no-index", "--no-deps", "--target", str(site), str(wheel)]
    subprocess.run([*pip, *install], capture_output=True, timeout=240, check=True)
    assert "smoke ok" in run_python(SMOKE, str(site), cwd=elsewhere, path=site)
