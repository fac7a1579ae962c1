# SPDX-License-Identifier: MIT
"""A wheel is built from a copy of the sources, installed without a compiler in sight, and used."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ["lmtfast", "kernels", "csrc"]
FILES = ["setup.py", "pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE"]

USE = """
import sys
from pathlib import Path
import lmtfast
import lmtfast._C as core
import lmtfast.kernels
home = Path(sys.prefix).resolve()
for module in (lmtfast, core, lmtfast.kernels):
    assert home in Path(module.__file__).resolve().parents, module.__file__
assert lmtfast.kernels.__name__ == "lmtfast.kernels"
assert core.ABI_VERSION == 2
assert "torch" not in sys.modules, "the core must load without torch"

import torch
from lmtfast.backends import native
assert native.available() == (True, ""), native.available()
logits, index = torch.tensor([[3.0, 1.0]]), torch.tensor([0])
rows, coefficient = torch.tensor([[0.0, 1.0]]), torch.tensor([2.0])
loss, _, _ = native.margin_forward("lmt", logits, index, index, rows, coefficient)
assert abs(loss.item() - 0.6931472) < 1e-6, loss
print("used")
"""


def run(command: list[str | Path], **options) -> str:
    result = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, **options
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("wheel")
    tree = work / "tree"
    built = shutil.ignore_patterns("*.so", "__pycache__")
    for name in SOURCES:
        shutil.copytree(ROOT / name, tree / name, ignore=built)
    for name in FILES:
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, tree)
    build = [sys.executable, "-m", "pip", "wheel", tree, "-w", work, "--no-deps", "--no-index"]
    run([*build, "--no-build-isolation"])
    (path,) = work.glob("lmtfast-*.whl")
    return path


def test_contents(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        requirements = archive.read(metadata).decode()
    assert "lmtfast/__init__.py" in names
    assert f"lmtfast/_C{sysconfig.get_config_var('EXT_SUFFIX')}" in names
    kernels = {f"lmtfast/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
    assert kernels <= set(names)
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"lmtfast"}
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "lmtfast").rglob("*.py")}
    assert modules <= set(names)
    assert "Requires-Dist: torch>=2.11\n" in requirements


def test_installs_and_runs_without_a_compiler(wheel: Path, tmp_path: Path):
    home = tmp_path / "environment"
    venv.create(home, with_pip=False, symlinks=True)
    python = home / "bin" / "python"
    # Only the directories of torch and numpy are shared; PATH holds no compiler, cmake or ninja.
    shared = {str(Path(__import__(name).__file__).parents[1]) for name in ("torch", "numpy")}
    site_packages = run([python, "-c", "import site; print(site.getsitepackages()[0])"]).strip()
    (Path(site_packages) / "shared.pth").write_text("\n".join(sorted(shared)) + "\n")
    bare = {
        "PATH": str(home / "bin"),
        "HOME": str(tmp_path),
        "CC": "/bin/false",
        "CXX": "/bin/false",
    }
    for tool in ("cc", "gcc", "c++", "g++", "clang", "cmake", "ninja"):
        assert shutil.which(tool, path=bare["PATH"]) is None
    install = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "--no-deps",
        "--no-index",
    ]
    run([*install, wheel], env=bare)
    assert run([python, "-c", USE], env=bare, cwd=tmp_path) == "used\n"
