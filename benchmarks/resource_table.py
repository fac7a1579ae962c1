# SPDX-License-Identifier: MIT
"""Compiles every Triton kernel for sm_90 and tabulates what it needs. No GPU.

    python benchmarks/resource_table.py            compile all, write the table
    python benchmarks/resource_table.py --check    compile one of each file, compare
    python benchmarks/resource_table.py --check --all

The kernels and their configurations are ``lmtfast.kernels.specialization.all_of_them()``. Columns:
registers per thread; shared memory per program; spilled bytes (stack and local memory); atomic
instructions, and those among them on floats; load instructions from global memory, which multiply
where an alignment is lost; a digest of the kernel's source, by which ``--check`` also sees that a
row is out of date without compiling it.
"""

from __future__ import annotations

import argparse
import csv
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton

from lmtfast.kernels.specialization import Specialization, all_of_them

CAPABILITY = 90
TABLE = Path(__file__).parent / "results" / "resources" / "triton.csv"
COLUMNS = (
    "kernel", "specialization", "warps", "registers", "shared_bytes", "spill_bytes", "atomics",
    "float_atomics", "global_loads", "source",
)  # fmt: skip
Row = dict[str, str]


def usage_of(cubin: bytes) -> dict[str, int]:
    """REG, STACK, LOCAL and the other figures that cuobjdump prints of the one kernel inside."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"\b([A-Z]+):(\d+)", text)}


def row_of(entry: Specialization) -> Row:
    compiled = entry.compile(CAPABILITY)
    usage, ptx = usage_of(compiled.asm["cubin"]), compiled.asm["ptx"]
    atomics = re.findall(r"^\s*(?:@\S+ )?((?:atom|red)\.\S+)", ptx, re.MULTILINE)
    values = (
        entry.name,
        entry.label,
        entry.num_warps,
        usage["REG"],
        compiled.metadata.shared,
        usage["STACK"] + usage["LOCAL"],
        len(atomics),
        len([name for name in atomics if re.search(r"\.b?f\d", name)]),
        len(re.findall(r"\bld\.global|\bcp\.async\.c[ag]\.|\bcp\.async\.bulk", ptx)),
        entry.digest(),
    )
    return dict(zip(COLUMNS, map(str, values), strict=True))


def header() -> str:
    return f"# sm_{CAPABILITY}, Triton {triton.__version__}\n"


def write(path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        file.write(header())
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(row_of(entry) for entry in all_of_them())


def differences(path: Path, *, everything: bool) -> list[str]:
    """What the table at ``path`` says that is not so."""
    with path.open(encoding="utf-8", newline="") as file:
        problems = [] if file.readline() == header() else ["made by another version of Triton"]
        table = {(row["kernel"], row["specialization"]): row for row in csv.DictReader(file)}
    shipped = {(entry.name, entry.label): entry for entry in all_of_them()}
    problems += [
        f"{key}: in one of table and kernels only" for key in table.keys() ^ shipped.keys()
    ]
    compiled: set[str] = set()
    for key in table.keys() & shipped.keys():
        if table[key]["source"] != shipped[key].digest():
            problems.append(f"{key}: its source has changed")
    for key, entry in shipped.items():
        file = entry.kernel.fn.__module__
        if key in table and (everything or file not in compiled):
            compiled.add(file)
            row = row_of(entry)
            if row != table[key]:
                problems.append(f"{key}: table {table[key]}, compiler {row}")
    return problems


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", type=Path, default=TABLE)
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    parser.add_argument("--all", action="store_true", help="compile all, not one of each file")
    options = parser.parse_args()
    if not options.check:
        write(options.table)
        return
    problems = differences(options.table, everything=options.all)
    if problems:
        sys.exit("\n".join([*problems, "Do this: python benchmarks/resource_table.py"]))


if __name__ == "__main__":
    main()
