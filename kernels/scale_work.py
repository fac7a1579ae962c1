# SPDX-License-Identifier: MIT
"""Where an operator's scales are: fields of descriptors, blocks of the scale buffer."""

from __future__ import annotations

import math

from lmtfast.table import FIELDS, KINDS, OperatorTable

SCALE_BLOCK = 256
STRETCH_FIELDS = ("offset", "factor_first", "factor_last", "first", "last", "diagonal")


def added_fields(table: OperatorTable, number: int) -> list[int]:
    """The values of :data:`lmtfast.kernels.descriptor.ADDED` for one operator."""
    row = dict(zip(FIELDS, table.rows[number], strict=True))
    kernel = [row[f"kernel_{a}"] for a in range(3)]
    centre = 0
    for a, k in enumerate(kernel):
        centre = centre * k + row[f"pad_low_{a}"] // row[f"dilation_{a}"]
    spans = []
    for side in ("row_scale", "column_scale"):
        numbers = [i for i, scale in enumerate(table.scales) if scale[0] == row[side]]
        spans += [numbers[0], numbers[-1] + 1] if row[side] >= 0 else [0, 0]
    return [number, math.prod(kernel), centre, *spans]


def diagonal_rows(table: OperatorTable) -> dict[int, int]:
    """Numbers of the diagonal maps by where their entries start in the scale buffer."""
    kind, place = KINDS.index("diagonal"), FIELDS.index("row_scale")
    return {row[place]: i for i, row in enumerate(table.rows) if row[0] == kind}


def scale_stretches(table: OperatorTable) -> list[list[int]]:
    """Blocks of the scale buffer, fields :data:`STRETCH_FIELDS`: all entries of a diagonal map,
    whose norm is the largest of them, SCALE_BLOCK of any other scale."""
    spans: dict[tuple[int, int], list[int]] = {}
    for i, (offset, length, *_) in enumerate(table.scales):
        spans.setdefault((offset, length), [i, i])[1] = i + 1
    diagonals = diagonal_rows(table)
    return [
        [offset, first, last, start, min(start + block, length), diagonals.get(offset, -1)]
        for (offset, length), (first, last) in spans.items()
        for block in [length if offset in diagonals else SCALE_BLOCK]
        for start in range(0, length, block)
    ]
