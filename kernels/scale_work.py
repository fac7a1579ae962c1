# SPDX-License-Identifier: MIT
"""Where an operator's scales are: fields of descriptors, blocks of the scale buffer."""

from __future__ import annotations

import math

from lmtfast.table import FIELDS, OperatorTable

SCALE_BLOCK = 256


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


def scale_stretches(table: OperatorTable) -> list[list[int]]:
    """Blocks of the scale buffer: offset, length, first and last factor, first entry."""
    spans: dict[tuple[int, int], list[int]] = {}
    for i, (offset, length, *_) in enumerate(table.scales):
        spans.setdefault((offset, length), [i, i])[1] = i + 1
    return [
        [offset, length, first, last, start]
        for (offset, length), (first, last) in spans.items()
        for start in range(0, length, SCALE_BLOCK)
    ]
