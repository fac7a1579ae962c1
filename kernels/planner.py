# SPDX-License-Identifier: MIT
"""What the planners of all engines share: descriptors, parts of the workspace, packed kernels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lmtfast.kernels.descriptor import ADDED
from lmtfast.kernels.gradient_work import scale_sums
from lmtfast.kernels.packing import PACK_CHANNELS, PACK_ROWS
from lmtfast.kernels.scale_work import added_fields
from lmtfast.table import FIELDS, OperatorTable


def int32_table(rows: Sequence[Sequence[int]], width: int) -> Tensor:
    """Shape ``(n, width)``, also where there are no rows."""
    return torch.tensor(rows, dtype=torch.int32).reshape(-1, width)


def longest_first(items: Sequence[tuple[int, list[int]]]) -> list[list[int]]:
    """Items in the order of their costs, so that no program is left alone at the end."""
    return [item for _, item in sorted(items, key=lambda pair: -pair[0])]


class Planner:
    """Descriptors and workspace of the operators of one engine, which adds ``fields`` to ADDED."""

    def __init__(self, table: OperatorTable, fields: Sequence[str]) -> None:
        self.table, self.fields = table, fields
        self.operators: list[list[int]] = []
        self.workspace = 0

    def take(self, entries: int) -> int:
        """Offset of a new part of the workspace; parts start at multiples of 16 bytes."""
        offset, self.workspace = self.workspace, self.workspace + -(-entries // 4) * 4
        return offset

    def row_of(self, number: int) -> dict[str, int]:
        """FIELDS and ADDED of an operator."""
        values = (*self.table.rows[number], *added_fields(self.table, number))
        return dict(zip((*FIELDS, *ADDED), values, strict=True))

    def describe(self, row: Mapping[str, int], values: Mapping[str, int]) -> None:
        self.operators.append([*row.values(), *(values[name] for name in self.fields)])

    def descriptors(self) -> Tensor:
        return torch.tensor(self.operators, dtype=torch.int64)


class PackedPlanner(Planner):
    """Of an engine that acts on true operators: with visits, and kernels packed where need be."""

    def __init__(self, table: OperatorTable, fields: Sequence[str]) -> None:
        super().__init__(table, fields)
        self.sums = scale_sums(table)[0]
        self.visits: list[list[int]] = []
        self.packing: list[list[int]] = []

    def packed(self, row: Mapping[str, int]) -> dict[str, int]:
        """Fields that such engines share; the operator's forward visits must come next."""
        groups, rows, channels = row["groups"], row["rows"], row["channels"]
        inputs, outputs = (math.prod(row[f"{e}_{a}"] for a in range(3)) for e in ("in", "out"))
        direct = row["row_scale"] < 0 and row["column_scale"] < 0 and row["identity"] == 0
        width = -(-channels // 4) * 4
        self.packing += [
            [len(self.operators), g, r, c]
            for g in range(groups)
            for r in range(-(-rows // PACK_ROWS))
            for c in range(-(-channels // PACK_CHANNELS))
        ]
        return {
            "in_points": inputs, "out_points": outputs, "visits": len(self.visits),
            "direct": int(direct), "width": width,
            "packed": self.take(groups * row["taps"] * rows * width),
            "row_sums": self.sums.get(row["row_scale"], (0, 0))[0],
            "column_sums": self.sums.get(row["column_scale"], (0, 0))[0],
        }  # fmt: skip
