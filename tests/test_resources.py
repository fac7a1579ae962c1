# SPDX-License-Identifier: MIT
"""Every Triton kernel compiles for sm_90, and needs what the committed table says: no spills."""

from __future__ import annotations

import ast
import csv
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import COMPILING

pytest.importorskip("triton", reason="triton is not installed; it compiles the kernels")

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "benchmarks" / "resource_table.py"
TABLE = ROOT / "benchmarks" / "results" / "resources" / "triton.csv"
# Kernels whose last program goes on with what all have written, found by counting in integers.
COUNTING = {"operator_product", "symbol_finish", "separable_image", "separable_adjoint"}
SHARED_BYTES = 227 * 1024  # per program on sm_90


def rows() -> list[dict[str, str]]:
    lines = TABLE.read_text(encoding="utf-8").splitlines()
    return list(csv.DictReader(line for line in lines if not line.startswith("#")))


def launched_kernels() -> set[str]:
    """Names of the functions under ``@triton.jit`` that ask which program they are."""
    names = set()
    for path in (ROOT / "kernels").glob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and "program_id" in ast.unparse(node):
                names.add(node.name)
    return names


def check(*options: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, SCRIPT, "--check", *options]
    return subprocess.run(command, capture_output=True, text=True, env=COMPILING)


def test_the_table_is_what_the_compiler_says() -> None:
    """Of one configuration per file; that the others' sources have not changed, of all."""
    done = check()
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_all_of_the_table_is_what_the_compiler_says() -> None:
    done = check("--all")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("column", ["registers", "spill_bytes", "source", "specialization"])
def test_a_wrong_table_is_noticed(tmp_path: Path, column: str) -> None:
    header, names, first, *rest = TABLE.read_text(encoding="utf-8").splitlines()
    values = first.split(",")
    values[names.split(",").index(column)] += "1"
    forged = tmp_path / "triton.csv"
    forged.write_text("\n".join([header, names, ",".join(values), *rest]), encoding="utf-8")
    assert check("--table", forged).returncode == 1


def test_every_kernel_is_in_the_table() -> None:
    assert {row["kernel"] for row in rows()} == launched_kernels()


def test_no_kernel_spills() -> None:
    for row in rows():
        assert int(row["spill_bytes"]) == 0, row
        assert int(row["float_atomics"]) == 0, "results must not depend on the order of programs"
        assert int(row["atomics"]) == 0 or row["kernel"] in COUNTING, row
        assert 0 < int(row["registers"]) <= 255, row
        assert int(row["shared_bytes"]) <= SHARED_BYTES, row
