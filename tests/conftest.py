# SPDX-License-Identifier: MIT
"""What every test starts from: fixed seeds and threads, no TF32, marks, and one tolerance table."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import NamedTuple

import hypothesis
import numpy as np
import pytest
import torch

from lmtfast import backends
from lmtfast.rules import MODULE_RULES, OPERATION_RULES
from tests.emulation import emulated

# Without a GPU the Triton kernels run in Triton's interpreter. Triton reads this when it is first
# imported, which none of the imports above do; a test that compiles kernels runs a subprocess
# with COMPILING as its environment.
COMPILING = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
TRITON_DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
assert "triton" not in sys.modules, "triton was imported before its interpreter was chosen"

SEED = 20180212
# The suite runs one process per core (make pytest), so each takes one thread.
THREADS = 1


class Tolerance(NamedTuple):
    """``|got - want| <= atol + rtol * |want|``."""

    rtol: float
    atol: float


# For equalities between two implementations only. A bound is compared with >= and nothing else.
TOLERANCE: Mapping[torch.dtype, Tolerance] = {
    torch.float64: Tolerance(1e-12, 1e-12),
    torch.float32: Tolerance(1e-5, 1e-6),
    torch.bfloat16: Tolerance(2e-2, 1e-2),
    torch.float16: Tolerance(2e-3, 1e-3),
}

# Derandomised: the same examples in every run, so a failure is a fact and not luck.
hypothesis.settings.register_profile("lmtfast", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("lmtfast")

torch.set_num_threads(min(THREADS, torch.get_num_threads()))
torch.backends.cuda.matmul.allow_tf32 = False
torch.backends.cudnn.allow_tf32 = False


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow as well")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave slow tests out unless asked for, skip gpu tests without a device; both are counted."""
    slow = [] if config.getoption("--slow") else [i for i in items if "slow" in i.keywords]
    if slow:
        config.hook.pytest_deselected(items=slow)
        items[:] = [i for i in items if "slow" not in i.keywords]
    gpu = [] if torch.cuda.is_available() else [i for i in items if "gpu" in i.keywords]
    for item in gpu:
        item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU; torch finds none"))
    config.stash[LEFT_OUT] = (len(slow), len(gpu))


LEFT_OUT = pytest.StashKey[tuple[int, int]]()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    slow, gpu = terminalreporter.config.stash.get(LEFT_OUT, (0, 0))
    if slow:
        terminalreporter.write_line(f"slow: {slow} tests not run; run them with: make slow")
    if gpu:
        terminalreporter.write_line(f"gpu: {gpu} tests skipped: torch finds no NVIDIA GPU")


@pytest.fixture(autouse=True)
def _fixed_start() -> Iterator[None]:
    """Every test draws the same numbers, whatever ran before it, and leaves the settings alone."""
    random.seed(SEED)
    np.random.seed(SEED)  # noqa: NPY002  (scikit-learn and plain NumPy code read the global one)
    torch.manual_seed(SEED)
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)


@pytest.fixture
def emulated_cuda() -> Iterator[ModuleType]:
    """Backend "cuda" runs its kernels on CPU tensors, compiled for the CPU."""
    with emulated() as core:
        yield core


@pytest.fixture(autouse=True)
def _cuda_on_the_cpu(request: pytest.FixtureRequest) -> None:
    """A test whose parameters name the backend "cuda" gets the emulated one."""
    callspec = getattr(request.node, "callspec", None)
    names = [] if callspec is None else [v for v in callspec.params.values() if type(v) is str]
    if "cuda" in names:
        request.getfixturevalue("emulated_cuda")


@pytest.fixture
def tolerance() -> Mapping[torch.dtype, Tolerance]:
    """The table of tolerances for equalities; soundness assertions never use it."""
    return TOLERANCE


@pytest.fixture
def registries() -> Iterator[None]:
    """Undo what a test or an example registers."""
    tables: list[dict] = [MODULE_RULES, OPERATION_RULES, backends._REGISTRY]
    before = [dict(table) for table in tables]
    yield
    for table, saved in zip(tables, before, strict=True):
        table.clear()
        table.update(saved)
