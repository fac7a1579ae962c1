# SPDX-License-Identifier: MIT
"""The same cases under pytest-benchmark, for its statistics and its comparisons between commits.

    python -m pytest benchmarks -k wrn-28-10 --benchmark-autosave
    python -m pytest benchmarks --benchmark-compare

Not part of the test suite. A result that fails the gate fails here, and is not timed.
"""

from __future__ import annotations

import functools

import pytest
import torch

from benchmarks.cases import CASES, Case
from benchmarks.run import CaseRun

CPU_CASES = {case.name: case for case in CASES if "cpu" in case.suites}


@functools.lru_cache(maxsize=1)
def prepared(name: str) -> CaseRun:
    """The case with its runners; the tests of one case follow each other."""
    return CaseRun(CPU_CASES[name], torch.device("cpu"))


def parameters(case: Case) -> list:
    pairs = [(mode, provider) for mode in case.modes for provider in case.providers]
    return [pytest.param(case.name, *pair, id=f"{case.name}-{'-'.join(pair)}") for pair in pairs]


@pytest.mark.parametrize(
    ("name", "mode", "provider"), [row for case in CPU_CASES.values() for row in parameters(case)]
)
def test_speed(name: str, mode: str, provider: str, benchmark) -> None:
    case = prepared(name)
    status, reason = case.refused.get(provider, ("ok", ""))
    if status == "not available":
        pytest.skip(reason)
    assert status == "ok", f"{status}: {reason}"
    benchmark.group = f"{name}, {mode}"
    benchmark.pedantic(getattr(case.runners[provider][0], mode), rounds=5, warmup_rounds=1)
