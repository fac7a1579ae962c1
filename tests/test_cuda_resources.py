# SPDX-License-Identifier: MIT
"""What every CUDA kernel needs on sm_90a, as the committed table says: no spills, no stack."""

from __future__ import annotations

import csv
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "benchmarks" / "cuda_resources.py"
TABLE = ROOT / "benchmarks" / "results" / "resources" / "cuda.csv"
# Of a block of 1024 threads, 65,536 registers; static shared memory, without asking for more.
REGISTERS = 65536
SHARED_BYTES = 48 * 1024
# Kernels that start blocks of more than 256 threads.
LARGE = {"margin_cross_entropy.cu": 1024}

needs_nvcc = pytest.mark.skipif(
    shutil.which("nvcc") is None, reason="nvcc is not installed; it compiles the kernels"
)


def rows() -> list[dict[str, str]]:
    lines = TABLE.read_text(encoding="utf-8").splitlines()
    return list(csv.DictReader(line for line in lines if not line.startswith("#")))


def check(*options: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, SCRIPT, "--check", *options]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_table_belongs_to_the_sources() -> None:
    done = check()
    assert done.returncode == 0, done.stderr


@needs_nvcc
@pytest.mark.slow
def test_the_table_is_what_the_compiler_says() -> None:
    done = check("--all")
    assert done.returncode == 0, done.stderr


def test_a_change_of_a_source_is_noticed(tmp_path: Path) -> None:
    text = TABLE.read_text(encoding="utf-8")
    forged = tmp_path / "cuda.csv"
    forged.write_text(text.replace(rows()[0]["source"], "0" * 16, 1), encoding="utf-8")
    assert "its source has changed" in check("--table", forged).stderr
    lines = [line for line in text.splitlines() if not line.startswith("operator.cu")]
    forged.write_text("\n".join(lines), encoding="utf-8")
    assert "operator.cu: has no row" in check("--table", forged).stderr


def test_the_pass_needs_no_more_than_the_plan_leaves() -> None:
    plan = (ROOT / "csrc" / "ops" / "cuda" / "plan.h").read_text(encoding="utf-8")
    (left,) = re.findall(r"kOtherShared = (\d+) << 10;", plan)
    (kernel,) = (row for row in rows() if row["file"] == "pass.cu")
    assert int(kernel["shared_bytes"]) <= int(left) << 10


def test_every_kernel_fits_and_none_spills() -> None:
    assert len(rows()) > 20
    for row in rows():
        assert int(row["spill_bytes"]) == 0, row
        assert int(row["stack_bytes"]) == 0, row
        threads = LARGE.get(row["file"], 256)
        assert int(row["registers"]) * threads <= REGISTERS, row
        assert int(row["shared_bytes"]) <= SHARED_BYTES, row
