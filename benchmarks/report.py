# SPDX-License-Identifier: MIT
"""Rows of results: the CSV with its machine header, and the table for a terminal."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

FILE = "speed.csv"


@dataclass(frozen=True)
class Row:
    """One implementation in one mode of one case. Numbers are empty where nothing was timed.

    ``status`` is ``ok``, ``red`` (the gate failed: no time), ``not available`` or ``failed``.
    """

    op: str
    shape: str
    mode: str
    provider: str
    quantity: str
    status: str
    reason: str = ""
    clock: str = ""
    samples: int | None = None
    p20_ms: float | None = None
    median_ms: float | None = None
    p80_ms: float | None = None
    times_faster: float | None = None
    light_ms: float | None = None
    share_of_light: float | None = None
    value_error: float | None = None
    gradient_error: float | None = None
    extra_bytes: int | None = None
    limit_bytes: int | None = None


def write_rows(path: Path, header: Mapping[str, str], rows: Iterable[Row]) -> None:
    """The CSV; lines of the header start with ``# ``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        file.writelines(f"# {key}: {value}\n" for key, value in header.items())
        writer = csv.DictWriter(file, [f.name for f in fields(Row)], lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({k: _cell(v) for k, v in asdict(row).items()})


def _cell(value: object) -> object:
    return f"{value:.6g}" if isinstance(value, float) else "" if value is None else value


def read_rows(path: Path) -> tuple[dict[str, str], list[dict[str, str]]]:
    """Header and rows of a file that :func:`write_rows` wrote."""
    lines = path.read_text(encoding="utf-8").splitlines()
    comments = [line[2:] for line in lines if line.startswith("# ")]
    header = dict(comment.split(": ", 1) for comment in comments)
    return header, list(csv.DictReader(line for line in lines if not line.startswith("# ")))


HEAD = ("provider", "median ms", "p20", "p80", "faster", "of light", "extra MiB", "remark")
WIDTHS = (34, 10, 8, 8, 8, 9, 10, 0)


def text_table(rows: Iterable[Row]) -> str:
    """Aligned lines: one per row, a blank line between cases."""
    lines: list[str] = []
    last: tuple[str, ...] = ()
    for row in rows:
        case = (row.op, row.shape, row.mode)
        if case != last:
            lines += ["", f"{row.op}, {row.shape}, {row.mode}", _line(HEAD)]
            last = case
        times = (_number(ms) for ms in (row.median_ms, row.p20_ms, row.p80_ms))
        light = "" if row.share_of_light is None else f"{100 * row.share_of_light:.0f} %"
        extra = "" if row.extra_bytes is None else f"{row.extra_bytes / 2**20:.1f}"
        faster = _number(row.times_faster, "x")
        lines.append(_line((row.provider, *times, faster, light, extra, remark(row))))
    return "\n".join(lines) + "\n"


def remark(row: Row) -> str:
    """Status with its reason, and whether the memory is within its limit."""
    text = row.status if not row.reason else f"{row.status}: {row.reason}"
    if row.extra_bytes is not None and row.limit_bytes is not None:
        within = "within" if row.extra_bytes <= row.limit_bytes else "above"
        text += f"; memory {within} {row.limit_bytes / 2**20:.1f} MiB"
    return text


def _number(value: float | None, unit: str = "") -> str:
    if value is None:
        return ""
    return f"{value:.0f}{unit}" if value >= 100 else f"{value:.3g}{unit}"


def _line(cells: tuple[str, ...]) -> str:
    first, *rest = zip(cells, WIDTHS, strict=True)
    padded = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)]
    return "  ".join(padded).rstrip()
