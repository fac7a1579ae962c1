# SPDX-License-Identifier: MIT
"""Writes the results table of README.md from the certificates under benchmarks/results/.

    python benchmarks/readme_table.py

Every figure is read from a file; a run without a certificate has no row.
"""

from __future__ import annotations

import json
from pathlib import Path

import lmtfast as lf

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
BEGIN, END = "<!-- results: begin -->\n", "<!-- results: end -->\n"
HEADER = (
    "| run | level | inputs | clean | certified accuracy at L2 radius | median radius |\n"
    "|---|---|---|---|---|---|\n"
)
RADII = (0.1, 0.25, 0.5, 1.0)


def radii_of(folder: Path) -> list[float]:
    """Radii that the run's own configuration reports, else the usual four."""
    config = folder / "config.json"
    values = json.loads(config.read_text(encoding="utf-8")) if config.exists() else {}
    return list(values.get("certify_radii") or RADII)


def row(path: Path) -> str:
    certificate = lf.load_certificate(path)
    shares = ", ".join(
        f"{100 * certificate.certified_accuracy(r):.1f} % at {r:g}" for r in radii_of(path.parent)
    )
    name = f"[{path.parent.name}]({path.parent.relative_to(ROOT)})"
    clean = 100 * certificate.n_correct / certificate.n_total
    return (
        f"| {name} | {certificate.level} | {certificate.n_total} | {clean:.2f} % | {shares} | "
        f"{certificate.median_radius:.3f} |\n"
    )


def table() -> str:
    """The table in Markdown; empty without results."""
    rows = [row(path) for path in sorted(RESULTS.glob("*/*.npz"))]
    return "\n" + HEADER + "".join(rows) + "\n" if rows else ""


def with_table(readme: str) -> str:
    """The text with what stands between the two marks replaced."""
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + table() + END + after


def main() -> None:
    README.write_text(with_table(README.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
