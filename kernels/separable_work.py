# SPDX-License-Identifier: MIT
"""The separable engine's work on one network: descriptors, items and workspace, on the host."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton.language as tl
from torch import Tensor

from lmtfast.kernels.descriptor import ADDED
from lmtfast.kernels.gradient_work import (
    SEPARABLE_ROWS,
    WeightTiles,
    group_tiles,
    rows_of_engine,
    scale_sums,
)
from lmtfast.kernels.packing import PACK_CHANNELS, PACK_ROWS
from lmtfast.kernels.scale_work import added_fields
from lmtfast.kernels.visit_work import adjoint_classes, forward_class
from lmtfast.table import FIELDS, RANK, OperatorTable

# Fields behind ADDED. Workspace offsets count float32. R rows, C channels, T taps, n inputs and m
# outputs of a group; G groups; vectors of terms are padded with zeros to LANES, D = T LANES.
SEPARABLE_FIELDS = (
    "in_points", "out_points",
    "visits",  # forward, in the order of the taps
    "class_first", "class_last",  # of the adjoint's classes
    "direct", "width", "packed",  # as in operator_work.py
    "tiles",  # of SEPARABLE_ROWS rows per group
    "image_counter",  # of finished tiles, one per group, then one of finished groups; int32
    "adjoint_counter",  # of finished tiles of the second product, one per group
    "channels_in",  # (G, C, LANES) orthonormal a, at the end the new one
    "patterns",  # (G, n, LANES) h
    "moved",  # (G, n, LANES) h on its way to the next one
    "windows",  # (G, m, D) shift_t h_k at every output
    "mixed_windows",  # (G, m, D) windows times gram
    "image",  # (G, R, D) y = W_t a_k
    "mixed_image",  # (G, R, D) y times mixing
    "exponents",  # (G, tiles) of the powers of two that bring a tile of y to [1, 2)
    "grams",  # (G, tiles, D, D) y^T y of each tile so scaled
    "gram",  # (G, D, D) y^T y times 2 ** -2e, e the largest exponent of the group; then X^T X
    "mixing",  # (G, D, D) R^T X^T X, R of the patterns' QR
    "triangle",  # (G, TRIANGLE_SIZE) R of the latest QR, and what makes its reflections
    "norms",  # (G, NORMS_WIDTH) ||A v|| times 2 ** -e, ||A v||, e
    "parts",  # (G, tiles, C, LANES) of the new a
    "row_sums",  # gradient in the row scale, (1, G R) float64
    "column_sums",  # and in the column scale, (tiles, G C)
)  # fmt: skip
_FIRST = len(FIELDS) + len(ADDED)


def _field(name: str) -> tl.constexpr:
    return tl.constexpr(_FIRST + SEPARABLE_FIELDS.index(name))


IN_POINTS, OUT_POINTS, VISITS = _field("in_points"), _field("out_points"), _field("visits")
CLASS_FIRST, CLASS_LAST = _field("class_first"), _field("class_last")
DIRECT, PACKED_WIDTH, PACKED = _field("direct"), _field("width"), _field("packed")
TILES, IMAGE_COUNTER = _field("tiles"), _field("image_counter")
ADJOINT_COUNTER, CHANNELS_IN = _field("adjoint_counter"), _field("channels_in")
PATTERNS, MOVED, WINDOWS = _field("patterns"), _field("moved"), _field("windows")
MIXED_WINDOWS, IMAGE, MIXED_IMAGE = _field("mixed_windows"), _field("image"), _field("mixed_image")
EXPONENTS, GRAMS, GRAM = _field("exponents"), _field("grams"), _field("gram")
MIXING, TRIANGLE, NORMS = _field("mixing"), _field("triangle"), _field("norms")
PARTS, ROW_SUMS, COLUMN_SUMS = _field("parts"), _field("row_sums"), _field("column_sums")
SEPARABLE_WIDTH = tl.constexpr(_FIRST + len(SEPARABLE_FIELDS))
LANES = tl.constexpr(RANK)
TRIANGLE_SIZE = tl.constexpr(RANK * (RANK + 1))
NORMS_WIDTH = tl.constexpr(3)
# Of a class: first and last visit, residue and count of positions per axis.
CLASS_WIDTH = tl.constexpr(8)


@dataclass(frozen=True)
class SeparableWork:
    """What the launches read; tensors on the CPU, all but the descriptors int32.

    Attributes:
        operators: Descriptors, int64, ``(n, SEPARABLE_WIDTH)``.
        visits: Of all operators, ``(n, VISIT_WIDTH)``.
        classes: ``(n, CLASS_WIDTH)``.
        groups: (operator, group), one per program of the first launch.
        packing: (operator, group, block of rows, block of channels), likewise.
        tiles: (operator, group, tile), one per program of the two products.
        workspace: Entries of the workspace, float32.
        counters: Entries of the counters, int32.
    """

    operators: Tensor
    visits: Tensor
    classes: Tensor
    groups: Tensor
    packing: Tensor
    tiles: Tensor
    workspace: int
    counters: int


def separable_work(table: OperatorTable) -> SeparableWork | None:
    """The work of all operators that the table gives to the separable engine; None without any."""
    numbers = rows_of_engine(table, "separable")
    if not numbers:
        return None
    planner = _Planner(table)
    for number in numbers:
        planner.add(number)
    return planner.finished()


def separable_tiles(table: OperatorTable) -> list[WeightTiles]:
    """The gradient's tiles (separable_gradient.py), one entry per launch; as wide as a kernel."""
    return group_tiles(table, "separable", lambda rows, channels: (SEPARABLE_ROWS, channels))


class _Planner:
    def __init__(self, table: OperatorTable) -> None:
        self.table, self.sums = table, scale_sums(table)[0]
        self.operators: list[list[int]] = []
        self.visits: list[list[int]] = []
        self.classes: list[list[int]] = []
        self.groups: list[list[int]] = []
        self.packing: list[list[int]] = []
        self.tiles: list[tuple[int, list[int]]] = []
        self.workspace = self.counters = 0

    def _take(self, entries: int) -> int:
        offset, self.workspace = self.workspace, self.workspace + -(-entries // 4) * 4
        return offset

    def add(self, number: int) -> None:
        op, row = len(self.operators), dict(zip(FIELDS, self.table.rows[number], strict=True))
        groups, rows, channels = row["groups"], row["rows"], row["channels"]
        added = added_fields(self.table, number)
        taps = added[1]
        inputs, outputs = (math.prod(row[f"{e}_{a}"] for a in range(3)) for e in ("in", "out"))
        tiles, depth = -(-rows // SEPARABLE_ROWS), taps * RANK
        first_visit, first_class = len(self.visits), len(self.classes)
        self.visits += forward_class(row).visits
        for part in adjoint_classes(row):
            span = [len(self.visits), len(self.visits) + len(part.visits)]
            self.visits += part.visits
            self.classes.append([*span, *part.residue, *part.counts])
        counter, self.counters = self.counters, self.counters + 2 * groups + 1
        width, take = -(-channels // 4) * 4, self._take
        direct = row["row_scale"] < 0 and row["column_scale"] < 0 and row["identity"] == 0
        values = {
            "in_points": inputs, "out_points": outputs, "visits": first_visit,
            "class_first": first_class, "class_last": len(self.classes), "direct": int(direct),
            "width": width, "packed": take(groups * taps * rows * width), "tiles": tiles,
            "image_counter": counter, "adjoint_counter": counter + groups + 1,
            "channels_in": take(groups * channels * RANK), "patterns": take(groups * inputs * RANK),
            "moved": take(groups * inputs * RANK), "windows": take(groups * outputs * depth),
            "mixed_windows": take(groups * outputs * depth), "image": take(groups * rows * depth),
            "mixed_image": take(groups * rows * depth), "exponents": take(groups * tiles),
            "grams": take(groups * tiles * depth**2), "gram": take(groups * depth**2),
            "mixing": take(groups * depth**2), "triangle": take(groups * TRIANGLE_SIZE.value),
            "norms": take(groups * NORMS_WIDTH.value),
            "parts": take(groups * tiles * channels * RANK),
            "row_sums": self.sums.get(row["row_scale"], (0, 0))[0],
            "column_sums": self.sums.get(row["column_scale"], (0, 0))[0],
        }  # fmt: skip
        self.operators.append(
            [*self.table.rows[number], *added, *(values[name] for name in SEPARABLE_FIELDS)]
        )
        for g in range(groups):
            self.groups.append([op, g])
            self.packing += [
                [op, g, r, c]
                for r in range(-(-rows // PACK_ROWS))
                for c in range(-(-channels // PACK_CHANNELS))
            ]
            self.tiles += [(channels * taps, [op, g, t]) for t in range(tiles)]

    def finished(self) -> SeparableWork:
        def table(rows: list[list[int]], width: int) -> Tensor:
            return torch.tensor(rows, dtype=torch.int32).reshape(-1, width)

        # Long tiles first, so that no program is left alone at the end.
        tiles = [item for _, item in sorted(self.tiles, key=lambda pair: -pair[0])]
        return SeparableWork(
            torch.tensor(self.operators, dtype=torch.int64), table(self.visits, 4),
            table(self.classes, CLASS_WIDTH.value), table(self.groups, 2), table(self.packing, 4),
            table(tiles, 3), self.workspace, self.counters,
        )  # fmt: skip
