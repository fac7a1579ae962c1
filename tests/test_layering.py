# SPDX-License-Identifier: MIT
"""The rules of the house that a parser can check: layers, forbidden names, file sizes."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lmtfast

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "lmtfast"
MAX_LINES = 450
# One file by decision (ADR 0017), so that it can be read and copied alone.
LONGEST = {PACKAGE / "check.py": 500}

# Imports point to the same or a lower layer, and never in a circle. The longest matching prefix
# counts, so a new file inside a package needs no line here.
LAYERS = {
    "errors": 0,
    "files": 0,
    "graph": 0,
    "level": 0,
    "kernels": 0,
    "profiles": 0,
    "table": 0,
    "backends": 1,
    "builder": 1,
    "engines": 1,  # the registry and the protocol; the engines themselves are below
    "exporting": 1,
    "folding": 1,
    "plan": 1,
    "rules": 1,
    "state": 1,
    "tracing": 1,
    "weights": 1,
    "autograd": 2,
    "closed_form": 2,
    "composing": 2,
    "custom_ops": 2,
    "engines.network": 2,
    "engines.operator": 2,
    "engines.separable": 2,
    "engines.symbol": 2,
    "nn": 2,
    "reading": 2,
    "settings": 2,
    "verified": 2,
    "bound": 3,
    "enclosure": 3,
    "estimation": 3,
    "guarantee": 3,
    "margin": 3,
    "radius": 3,
    "certificate": 4,
    "certificate_file": 4,
    "check": 0,
    "check_execution": 0,
    "losses": 4,
    "samples": 4,
    "adversaries": 5,
    "attack_report": 5,
    "attacking": 5,
    "certification": 5,
    "description": 5,
    "execution": 4,
    "judgement": 5,
    "layer_bounds": 5,
    "plot": 5,
    "polish": 5,
    "subject": 5,
    "verification": 5,
    "__main__": 6,
    "checkpoint": 6,
    "cli": 6,
    "commands": 6,
    "config": 6,
    "data": 6,
    "demo": 6,
    "idx": 6,
    "models": 6,
    "options": 6,
    "progress": 6,
    "recipes": 6,
    "tables": 6,
    "training": 6,
}
# Methods of a certificate that only forward to a module above it, imported when they are called.
DOORS = {("lmtfast.certificate", "lmtfast.plot"), ("lmtfast.certificate", "lmtfast.verification")}
# The public names load lazily, so `from lmtfast import name` sits above everything they need.
FACADE = 6

FILES = {
    ".".join(("lmtfast", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(
        ".__init__"
    ): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
PYTHON = [
    path
    for folder in ("lmtfast", "kernels", "tests", "benchmarks")
    for path in sorted((ROOT / folder).rglob("*.py"))
]
NATIVE = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in {".h", ".c", ".cpp", ".cu"}]
TEXTS = [*PYTHON, *NATIVE, ROOT / "setup.py", *(ROOT / "tests" / "csrc").glob("*.*")]


def named(paths: list[Path]) -> list:
    return [pytest.param(path, id=str(path.relative_to(ROOT))) for path in paths]


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def runtime_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those under ``if TYPE_CHECKING:``."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from runtime_nodes(child)


def imports_of(path: Path) -> set[str]:
    """Every module that the file imports when it runs; relative imports do not occur."""
    found = set()
    for node in runtime_nodes(tree_of(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            modules = {name for name in inside if name in FILES or name == "lmtfast._C"}
            found |= modules | ({str(node.module)} if modules != inside else set())
    return found


def layer_of(module: str) -> int:
    name = module.removeprefix("lmtfast").removeprefix(".")
    while name and name not in LAYERS:
        name = name.rpartition(".")[0]
    assert name, f"{module} has no line in LAYERS of tests/test_layering.py"
    return LAYERS[name]


def test_imports_point_down() -> None:
    wrong = []
    for module, path in FILES.items():
        if module == "lmtfast":
            continue
        for target in imports_of(path):
            if target == "lmtfast._C" or target.split(".")[0] != "lmtfast":
                continue
            if (module, target) in DOORS:
                continue
            below = FACADE if target == "lmtfast" else layer_of(target)
            if below > layer_of(module):
                wrong.append(f"{module} (L{layer_of(module)}) imports {target} (L{below})")
    assert not wrong, "\n".join(wrong)


def test_imports_have_no_circles() -> None:
    # A package's __init__ imports its parts; a part that imports a sibling module is no circle.
    edges = {
        module: {
            target
            for target in imports_of(path)
            if target in FILES
            and target not in (module, "lmtfast")
            and (module, target) not in DOORS
        }
        for module, path in FILES.items()
    }
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join((*trail[trail.index(module) :], module))
        if module not in done:
            for target in sorted(edges[module]):
                visit(target, (*trail, module))
            done.add(module)

    for module in FILES:
        visit(module, ())


def test_the_extension_is_imported_by_backends_only() -> None:
    users = {module for module, path in FILES.items() if "lmtfast._C" in imports_of(path)}
    assert all(user.startswith("lmtfast.backends.") for user in users), users


def test_importing_the_package_imports_no_torch() -> None:
    code = (
        "import sys, lmtfast; dir(lmtfast); print(*sorted({'torch', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


@pytest.mark.parametrize("path", named(list(FILES.values())))
def test_library_code_keeps_its_manners(path: Path) -> None:
    """No print, no environment, no device by hand, no autograd node outside autograd.py."""
    for node in ast.walk(tree_of(path)):
        where = f"{path}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Call):
            called = node.func
            assert not (isinstance(called, ast.Name) and called.id == "print"), where
            assert not (isinstance(called, ast.Attribute) and called.attr == "cuda"), where
        if isinstance(node, ast.Attribute):
            assert node.attr not in {"environ", "getenv"}, where
        if isinstance(node, ast.ClassDef) and path.name != "autograd.py":
            bases = [ast.unparse(base) for base in node.bases]
            assert not any(b.endswith("autograd.Function") or b == "Function" for b in bases), where


@pytest.mark.parametrize("path", named(PYTHON))
def test_kernels_are_imported_under_one_name(path: Path) -> None:
    # From the repository's root `import kernels` works too, and makes a second module object.
    assert not {i for i in imports_of(path) if i.split(".")[0] == "kernels"}


def test_kernels_import_only_leaves() -> None:
    for path in (ROOT / "kernels").rglob("*.py"):
        ours = {i for i in imports_of(path) if i.split(".")[0] == "lmtfast"}
        ours = {i for i in ours if not i.startswith("lmtfast.kernels")}
        assert all(layer_of(i) == 0 for i in ours), f"{path} imports {ours}"


def test_oracles_import_nothing_of_ours() -> None:
    for path in (ROOT / "tests").glob("oracle*.py"):
        assert not {i for i in imports_of(path) if i.split(".")[0] in {"lmtfast", "torch"}}, path


@pytest.mark.parametrize("path", named(NATIVE))
def test_the_core_includes_no_framework(path: Path) -> None:
    included = re.findall(r"#\s*include\s*[<\"]([^>\"]+)", path.read_text(encoding="utf-8"))
    framework = [i for i in included if i.split("/")[0] in {"torch", "ATen", "c10", "jax"}]
    assert not framework
    if path.parent.name != "python":
        assert not [i for i in included if i.startswith(("pybind11", "Python.h"))]


@pytest.mark.parametrize("path", named([*PYTHON, *NATIVE]))
def test_files_are_short(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= LONGEST.get(path, MAX_LINES), f"{lines} lines; split the file by noun"


def test_file_names_are_nouns_of_their_own() -> None:
    public = {name for name in lmtfast.__all__ if name.islower()}
    vague = {"utils", "util", "misc", "common", "helpers"}
    stems = {path.stem for path in PYTHON if "tests" not in path.parts}
    assert not stems & (public | vague)


@pytest.mark.parametrize("path", named(TEXTS))
def test_nothing_is_left_undone(path: Path) -> None:
    # Spelled backwards, or this file would find itself.
    backwards = ["ODOT", "EMXIF", "rorrEdetnemelpmItoN esiar", "liafx", "ykalf.kram"]
    marks = [word[::-1] for word in backwards]
    text = path.read_text(encoding="utf-8")
    assert not [mark for mark in marks if re.search(rf"\b{re.escape(mark)}\b", text)]
    assert not re.search(r"pytest\.skip\(\)", text), "a skip needs a reason"
