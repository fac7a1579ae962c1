# SPDX-License-Identifier: MIT
"""Compiles every CUDA kernel for sm_90a and tabulates what it needs. No GPU; needs nvcc.

    python benchmarks/cuda_resources.py            compile all, write the table
    python benchmarks/cuda_resources.py --check    compare the sources' digests, compile nothing
    python benchmarks/cuda_resources.py --check --all

Columns: file; kernel; registers per thread; static shared memory per block; stack; spilled bytes,
stores and loads; a digest of the file and of what it includes of ops/cuda and core, comments apart,
by which ``--check`` sees without compiling that a row is out of date.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "csrc" / "ops" / "cuda"
TABLE = Path(__file__).parent / "results" / "resources" / "cuda.csv"
ARCHITECTURE = "90a"
COLUMNS = (
    "file", "kernel", "registers", "shared_bytes", "stack_bytes", "spill_bytes", "source",
)  # fmt: skip
Row = dict[str, str]


def flags() -> list[str]:
    """Those of CMakeLists.txt that decide what code is made."""
    text = (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")
    match = re.search(r"target_compile_options\(lmtfast_cuda PRIVATE ([^)]*)\)", text)
    assert match, "CMakeLists.txt has no options for lmtfast_cuda"
    made = [flag for flag in match[1].split() if flag.startswith("--") and "threads" not in flag]
    return ["-std=c++20", "-O3", *made]


def without_comments(text: str) -> str:
    return "\n".join(
        line.rstrip() for line in re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.S).splitlines()
        if line.strip()
    )  # fmt: skip


def included(path: Path, seen: dict[Path, None]) -> dict[Path, None]:
    """The file and every header of ops/cuda and core that it includes, in order."""
    if path not in seen:
        seen[path] = None
        for name in re.findall(r'#include "((?:ops/cuda|core)/[^"]+)"', path.read_text("utf-8")):
            included(ROOT / "csrc" / name, seen)
    return seen


def digest(path: Path) -> str:
    """Of everything that decides the compiler's output but the compiler."""
    parts = [without_comments(p.read_text(encoding="utf-8")) for p in included(path, {})]
    return hashlib.sha256("\0".join([*flags(), *parts]).encode()).hexdigest()[:16]


def version() -> str:
    text = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    match = re.search(r"V(\d+\.\d+\.\d+)", text)
    assert match, text
    return match[1]


def plain(symbol: str) -> str:
    """A kernel's name without namespaces, return type and parameters."""
    command = ["c++filt", symbol]
    name = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    name = name.replace("(anonymous namespace)::", "").replace("lmtfast::cuda::", "")
    return re.sub(r"^void ", "", name[: name.rindex("(")])


def rows_of(path: Path) -> Iterator[Row]:
    """What ptxas says of every kernel of a file."""
    command = [
        "nvcc", *flags(), f"-gencode=arch=compute_{ARCHITECTURE},code=sm_{ARCHITECTURE}",
        "-Xptxas", "-v", "-I", str(ROOT / "csrc"), "-I", str(ROOT / "csrc" / "include"), "-cubin",
        "-o", "/dev/null", str(path),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    pattern = (
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers([^\n]*)"
    )
    for symbol, stack, stores, loads, registers, rest in re.findall(pattern, done.stderr, re.S):
        shared = re.search(r"(\d+) bytes smem", rest)
        values = (
            path.name, plain(symbol), registers, shared[1] if shared else "0", stack,
            str(int(stores) + int(loads)), digest(path),
        )  # fmt: skip
        yield dict(zip(COLUMNS, values, strict=True))


def compiled() -> list[Row]:
    rows = [row for path in sorted(SOURCES.glob("*.cu")) for row in rows_of(path)]
    return sorted(rows, key=lambda row: (row["file"], row["kernel"]))


def header() -> str:
    return f"# sm_{ARCHITECTURE}, nvcc {version()}\n"


def read(path: Path) -> tuple[str, list[Row]]:
    with path.open(encoding="utf-8", newline="") as file:
        return file.readline(), list(csv.DictReader(file))


def write(path: Path) -> None:
    rows = compiled()
    with path.open("w", encoding="utf-8", newline="") as file:
        file.write(header())
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def differences(path: Path, *, everything: bool) -> list[str]:
    """What the table at ``path`` says that is not so."""
    first, table = read(path)
    digests = {source.name: digest(source) for source in SOURCES.glob("*.cu")}
    changed = {row["file"] for row in table if digests.get(row["file"]) != row["source"]}
    with_kernels = {
        source.name for source in SOURCES.glob("*.cu") if "__global__" in source.read_text("utf-8")
    }
    missing = with_kernels - {row["file"] for row in table}
    problems = [f"{name}: its source has changed" for name in sorted(changed)]
    problems += [f"{name}: has no row" for name in sorted(missing)]
    if everything:
        if first != header():
            problems.append(f"made by another compiler: {first.strip()}, here {header().strip()}")
        now = {(row["file"], row["kernel"]): row for row in compiled()}
        then = {(row["file"], row["kernel"]): row for row in table}
        for key in sorted(now.keys() | then.keys()):
            if now.get(key) != then.get(key):
                problems.append(f"{key}: table {then.get(key)}, compiler {now.get(key)}")
    return problems


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", type=Path, default=TABLE)
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    parser.add_argument("--all", action="store_true", help="compile everything to compare")
    options = parser.parse_args()
    if (options.all or not options.check) and shutil.which("nvcc") is None:
        sys.exit("expected nvcc; got none; at PATH.\n  Do this: install the CUDA toolkit")
    if not options.check:
        write(options.table)
        return
    problems = differences(options.table, everything=options.all)
    if problems:
        sys.exit("\n".join([*problems, "Do this: python benchmarks/cuda_resources.py"]))


if __name__ == "__main__":
    main()
