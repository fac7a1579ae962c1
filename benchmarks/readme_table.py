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
CAPTION = """
Share of test inputs, in percent, that are correct, and that are certified at an L2 radius in input
units; median certified radius. The rows are read from the certificates in the folders they name.

"""
RADII = (0.1, 0.25, 0.5, 1.0)


def radii_of(folder: Path) -> list[float]:
    """Radii that the run's own configuration reports, else the usual four."""
    config = folder / "config.json"
    values = json.loads(config.read_text(encoding="utf-8")) if config.exists() else {}
    return list(values.get("certify_radii") or RADII)


def row(path: Path, radii: list[float]) -> list[str]:
    certificate = lf.load_certificate(path)
    name = f"[{path.parent.name}]({path.parent.relative_to(ROOT)})"
    shares = [certificate.n_correct / certificate.n_total]
    shares += [certificate.certified_accuracy(radius) for radius in radii]
    figures = [f"{100 * share:.2f}" for share in shares]
    median = f"{certificate.median_radius:.3f}"
    return [name, certificate.level, str(certificate.n_total), *figures, median]


def table() -> str:
    """The table in Markdown; empty without results."""
    paths = sorted(RESULTS.glob("*/*.npz"))
    if not paths:
        return ""
    radii = sorted({radius for path in paths for radius in radii_of(path.parent)})
    head = ["run", "level", "inputs", "correct", *(f"{radius:g}" for radius in radii), "median"]
    rows = [head, ["---"] * len(head), *(row(path, radii) for path in paths)]
    lines = ["| " + " | ".join(cells) + " |\n" for cells in rows]
    return CAPTION + "".join(lines) + "\n"


def with_table(readme: str) -> str:
    """The text with what stands between the two marks replaced."""
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + table() + END + after


def main() -> None:
    README.write_text(with_table(README.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
