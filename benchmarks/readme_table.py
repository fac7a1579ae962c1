# SPDX-License-Identifier: MIT
"""Writes the tables of README.md from the files under benchmarks/results/.

    python -m benchmarks.readme_table

Every figure is read from a file: certified accuracies from certificates, times from ``speed.csv``.
A run without a file has no row.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import lmtfast as lf
from benchmarks.report import FILE, read_rows

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
CAPTION = """
Share of test inputs, in percent, that are correct, and that are certified at an L2 radius in input
units; median certified radius. The rows are read from the certificates in the folders they name.

"""
RADII = (0.1, 0.25, 0.5, 1.0)
ENGINES = ("operator", "symbol", "separable", "auto")
COMPILED = ("native", "cuda", "triton")
BOUND_PEERS = ("per layer", "per layer, compiled", "LiResNet, 1 iteration",
               "LiResNet, 10 iterations")  # fmt: skip
LOSS_PEERS = ("plain, K x K Gram", "plain, (N, K, D) differences")

Cells = dict[str, dict[str, str]]  # provider to its row of one case and mode


def markdown(rows: Iterable[list[str]]) -> str:
    head, *body = rows
    lines = [head, ["---"] * len(head), *body]
    return "".join("| " + " | ".join(cells) + " |\n" for cells in lines)


def radii_of(folder: Path) -> list[float]:
    """Radii that the run's own configuration reports, else the usual four."""
    config = folder / "config.json"
    values = json.loads(config.read_text(encoding="utf-8")) if config.exists() else {}
    return list(values.get("certify_radii") or RADII)


def certificate_row(path: Path, radii: list[float]) -> list[str]:
    certificate = lf.load_certificate(path)
    name = f"[{path.parent.name}]({path.parent.relative_to(ROOT)})"
    shares = [certificate.n_correct / certificate.n_total]
    shares += [certificate.certified_accuracy(radius) for radius in radii]
    figures = [f"{100 * share:.2f}" for share in shares]
    median = f"{certificate.median_radius:.3f}"
    return [name, certificate.level, str(certificate.n_total), *figures, median]


def accuracy_table() -> str:
    """Certified accuracies in Markdown; empty without certificates."""
    paths = sorted(RESULTS.glob("*/*.npz"))
    if not paths:
        return ""
    radii = sorted({radius for path in paths for radius in radii_of(path.parent)})
    head = ["run", "level", "inputs", "correct", *(f"{radius:g}" for radius in radii), "median"]
    return CAPTION + markdown([head, *(certificate_row(path, radii) for path in paths)]) + "\n"


def speed_table() -> str:
    """Times in Markdown, one part per file; empty without files."""
    return "".join(speed_part(path) for path in sorted(RESULTS.glob(f"*/{FILE}")))


def speed_part(path: Path) -> str:
    """Where and how the file was measured, the bound steps, and the losses."""
    header, rows = read_rows(path)
    cases: dict[tuple[str, str, str], Cells] = {}
    for row in rows:
        case = cases.setdefault((row["op"], row["shape"], row["mode"]), {})
        case[row["provider"]] = row
    place = f"[{path.parent.name}]({path.parent.relative_to(ROOT)})"
    machine = header.get("gpu", header["processor"])
    text = (
        f"\n{place}: {machine}; {header['threads']} threads, torch {header['torch']}, commit "
        f"{header['commit']}. Median milliseconds per call of one interleaved run; in brackets, "
        "how many times faster than the one without brackets.\n\n"
    )
    bounds = {(shape, mode): cells for (op, shape, mode), cells in cases.items() if op == "bound"}
    backends = present(bounds.values(), lambda b: [f"lmtfast {e} ({b})" for e in ENGINES])
    ours = [f"lmtfast {engine} ({backend})" for backend in backends for engine in ENGINES]
    if bounds:
        names = {"forward": "", "gradient": ", with gradient"}
        head = ["bound step of", *BOUND_PEERS, *(name.removeprefix("lmtfast ") for name in ours)]
        body = [
            [shape + names[mode], *(time_cell(cells, p) for p in (*BOUND_PEERS, *ours))]
            for (shape, mode), cells in bounds.items()
        ]
        text += markdown([head, *body]) + "\n"
    losses = {shape: cells for (op, shape, _), cells in cases.items() if op == "loss"}
    backends = present(losses.values(), lambda b: [f"lmtfast ({b})"])
    ours = [f"lmtfast ({backend})" for backend in backends]
    if losses:
        head = ["margin cross-entropy of N x K x D", *LOSS_PEERS, *ours]
        head += [f"extra memory of {name}, MiB (limit)" for name in ours]
        body = [
            [shape, *(time_cell(cells, p) for p in (*LOSS_PEERS, *ours)),
             *(memory_cell(cells, p) for p in ours)]
            for shape, cells in losses.items()
        ]  # fmt: skip
        text += markdown([head, *body]) + "\n"
    return text


def present(cases: Iterable[Cells], names: Callable[[str], list[str]]) -> list[str]:
    """Compiled backends that were timed in any of the cases."""
    timed = {p for cells in cases for p, row in cells.items() if row["status"] == "ok"}
    return [backend for backend in COMPILED if timed.intersection(names(backend))]


def time_cell(cells: Cells, provider: str) -> str:
    row = cells.get(provider)
    if row is None or row["status"] != "ok":
        return "–"
    text, faster = number(float(row["median_ms"])), float(row["times_faster"])
    return text if faster == 1.0 else f"{text} ({number(faster)}x)"


def memory_cell(cells: Cells, provider: str) -> str:
    row = cells.get(provider)
    if row is None or not row["extra_bytes"]:
        return "–"
    extra, limit = (int(row[field]) / 2**20 for field in ("extra_bytes", "limit_bytes"))
    return f"{extra:.1f} ({limit:.1f})"


def number(value: float) -> str:
    """Three digits."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


TABLES = {"results": accuracy_table, "speed": speed_table}


def with_tables(readme: str) -> str:
    """The text with what stands between each pair of marks replaced."""
    for name, table in TABLES.items():
        begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->\n"
        assert begin in readme, f"README.md has no mark {begin}"
        assert end in readme, f"README.md has no mark {end}"
        before, _, rest = readme.partition(begin)
        _, _, after = rest.partition(end)
        readme = before + begin + table() + end + after
    return readme


def main() -> None:
    README.write_text(with_tables(README.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
