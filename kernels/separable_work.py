# SPDX-License-Identifier: MIT
"""The separable engine's work on one network: descriptors, items and workspace, on the host."""

from __future__ import annotations

from dataclasses import dataclass

import triton.language as tl
from torch import Tensor

from lmtfast.kernels.descriptor import ADDED
from lmtfast.kernels.gradient_work import (
    SEPARABLE_ROWS,
    WeightTiles,
    group_tiles,
    rows_of_engine,
)
from lmtfast.kernels.planner import PackedPlanner, int32_table, longest_first
from lmtfast.kernels.visit_work import VISIT_WIDTH, adjoint_classes, forward_class
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


class _Planner(PackedPlanner):
    def __init__(self, table: OperatorTable) -> None:
        super().__init__(table, SEPARABLE_FIELDS)
        self.classes: list[list[int]] = []
        self.groups: list[list[int]] = []
        self.tiles: list[tuple[int, list[int]]] = []
        self.counters = 0

    def add(self, number: int) -> None:
        op, row, take = len(self.operators), self.row_of(number), self.take
        groups, rows, channels, taps = (row[n] for n in ("groups", "rows", "channels", "taps"))
        shared = self.packed(row)
        inputs, outputs = shared["in_points"], shared["out_points"]
        tiles, depth = -(-rows // SEPARABLE_ROWS), taps * RANK
        first_class = len(self.classes)
        self.visits += forward_class(row).visits
        for part in adjoint_classes(row):
            span = [len(self.visits), len(self.visits) + len(part.visits)]
            self.visits += part.visits
            self.classes.append([*span, *part.residue, *part.counts])
        counter, self.counters = self.counters, self.counters + 2 * groups + 1
        values = {
            "class_first": first_class, "class_last": len(self.classes), "tiles": tiles,
            "image_counter": counter, "adjoint_counter": counter + groups + 1,
            "channels_in": take(groups * channels * RANK), "patterns": take(groups * inputs * RANK),
            "moved": take(groups * inputs * RANK), "windows": take(groups * outputs * depth),
            "mixed_windows": take(groups * outputs * depth), "image": take(groups * rows * depth),
            "mixed_image": take(groups * rows * depth), "exponents": take(groups * tiles),
            "grams": take(groups * tiles * depth**2), "gram": take(groups * depth**2),
            "mixing": take(groups * depth**2), "triangle": take(groups * TRIANGLE_SIZE.value),
            "norms": take(groups * NORMS_WIDTH.value),
            "parts": take(groups * tiles * channels * RANK),
        }  # fmt: skip
        self.describe(row, shared | values)
        for g in range(groups):
            self.groups.append([op, g])
            self.tiles += [(channels * taps, [op, g, t]) for t in range(tiles)]

    def finished(self) -> SeparableWork:
        return SeparableWork(
            self.descriptors(), int32_table(self.visits, VISIT_WIDTH.value),
            int32_table(self.classes, CLASS_WIDTH.value), int32_table(self.groups, 2),
            int32_table(self.packing, 4), int32_table(longest_first(self.tiles), 3),
            self.workspace, self.counters,
        )  # fmt: skip
