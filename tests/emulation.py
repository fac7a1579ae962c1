# SPDX-License-Identifier: MIT
"""The CUDA kernels compiled for the CPU: built on demand, in the folder that `make ctest` uses."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from lmtfast.backends import cuda_device

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "ctest"


def tool(name: str) -> str:
    """The tool beside this interpreter, else the one on PATH."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    assert found, f"the emulated CUDA kernels need {name}; install the 'dev' extra"
    return found


def ran(*command: str) -> str:
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    output = result.stdout + result.stderr
    assert result.returncode == 0, f"{' '.join(command)} failed:\n{output[-8000:]}"
    return result.stdout


@functools.cache
def emulated_core() -> ModuleType:
    """What `lmtfast._C.cuda` is, for CPU tensors; up to date with the sources."""
    BUILD.mkdir(parents=True, exist_ok=True)
    with (BUILD / "emulation.lock").open("w") as lock:
        # One process builds, the others find it done.
        fcntl.flock(lock, fcntl.LOCK_EX)
        pybind = ran(sys.executable, "-m", "pybind11", "--cmakedir").strip()
        ran(
            tool("cmake"), "-S", ".", "-B", str(BUILD), "-G", "Ninja", "--log-level=WARNING",
            f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}", "-DCMAKE_BUILD_TYPE=Release",
            "-DLMTFAST_EMULATED_PYTHON=ON", f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind}",
        )  # fmt: skip
        ran(tool("cmake"), "--build", str(BUILD), "--target", "_C_emulated")
    (path,) = (BUILD / "tests" / "csrc").glob("_C_emulated.*.so")
    spec = importlib.util.spec_from_file_location("_C_emulated", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def emulated() -> Iterator[ModuleType]:
    """Backend "cuda" runs its kernels on CPU tensors, compiled for the CPU."""
    core, before = emulated_core(), cuda_device.core
    core.set_order(0)
    cuda_device.core = core
    try:
        yield core
    finally:
        cuda_device.core = before
