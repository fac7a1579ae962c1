# SPDX-License-Identifier: MIT
"""Power iteration's work on one network: descriptors, work items and workspace, on the host.

Both products of a step are implicit GEMMs: rows (or channels) times positions, summed over visits
(visit_work.py) and channels (or rows). The adjoint of a strided stencil falls apart into a product
per class of positions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import triton.language as tl
from torch import Tensor

from lmtfast.kernels.descriptor import ADDED
from lmtfast.kernels.gradient_work import WeightTiles, gradient_side, group_tiles, rows_of_engine
from lmtfast.kernels.planner import PackedPlanner, int32_table, longest_first
from lmtfast.kernels.visit_work import (
    VISIT_WIDTH,
    PositionClass,
    adjoint_classes,
    forward_class,
)
from lmtfast.table import FIELDS, OperatorTable

# Fields behind ADDED. Workspace offsets count float32 and are even where float64 lie there. A is
# the operator, of which v is an input; parts are sums of squares of pieces, float64.
OPERATOR_FIELDS = (
    "in_points", "out_points",
    "visits",  # of the gradient: all taps, forward
    "direct",  # 1 where the kernel can be read in place: no scales, no identity
    "width",  # channels of a packed row, a multiple of 4
    "packed",  # (G, T, R, width) the acting kernel; nothing where it is read in place
    "entered_parts", "entered_count",  # of the state
    "image", "image_parts", "image_count",  # A v, in its saved layout
    "back", "back_parts", "back_count",  # A^T u
    "image_size", "vector_size",
    "row_sums",  # gradient in the row scale, (blocks of channels, G R) float64
    "column_sums",  # and in the column scale, (blocks of rows, G C)
)  # fmt: skip
_FIRST = len(FIELDS) + len(ADDED)


def _field(name: str) -> tl.constexpr:
    return tl.constexpr(_FIRST + OPERATOR_FIELDS.index(name))


IN_POINTS, OUT_POINTS, VISITS = _field("in_points"), _field("out_points"), _field("visits")
DIRECT, PACKED_WIDTH, PACKED = _field("direct"), _field("width"), _field("packed")
ENTERED_PARTS, ENTERED_COUNT = _field("entered_parts"), _field("entered_count")
IMAGE, IMAGE_PARTS, IMAGE_COUNT = _field("image"), _field("image_parts"), _field("image_count")
BACK, BACK_PARTS, BACK_COUNT = _field("back"), _field("back_parts"), _field("back_count")
IMAGE_SIZE, VECTOR_SIZE = _field("image_size"), _field("vector_size")
ROW_SUMS, COLUMN_SUMS = _field("row_sums"), _field("column_sums")
OPERATOR_WIDTH = tl.constexpr(_FIRST + len(OPERATOR_FIELDS))

# Of a product's item: operator, group, first row, block of positions, first and last visit, piece,
# shape of the tile, then residue and count of positions per axis.
ITEM_WIDTH = tl.constexpr(14)

# Shapes of tiles, (rows, positions): usual, few positions, few rows.
SHAPES = ((64, 64), (64, 16), (16, 64))
WIDE, FLAT, THIN = range(3)
PIECE = 4096  # entries of a vector that one program squares
SCALING_COST = 16  # multiply-adds of a product in the time in which one entry is scaled


@dataclass(frozen=True)
class OperatorWork:
    """What the launches read; tensors on the CPU, all but the descriptors int32.

    Attributes:
        operators: Descriptors, int64, ``(n, OPERATOR_WIDTH)``.
        visits: ``(n, VISIT_WIDTH)``.
        squares: (operator, piece) of the state, one per program of the first launch.
        packing: (operator, group, block of rows, block of channels), likewise; those of operators
            that are read in place do nothing.
        images: Items of the products A v, ``(n, ITEM_WIDTH)``.
        backs: Items of the products A^T u.
        workspace: Entries of the workspace, float32.
    """

    operators: Tensor
    visits: Tensor
    squares: Tensor
    packing: Tensor
    images: Tensor
    backs: Tensor
    workspace: int


def operator_work(table: OperatorTable) -> OperatorWork | None:
    """The work of all operators that power iteration's launches run; None if there are none."""
    numbers = rows_of_engine(table, "operator")
    if not numbers:
        return None
    planner = _Planner(table)
    for number in numbers:
        planner.add(number)
    return planner.finished()


def operator_tiles(table: OperatorTable) -> list[WeightTiles]:
    """The gradient's tiles (operator_gradient.py), one entry per launch."""
    return group_tiles(
        table, "operator", lambda rows, channels: (gradient_side(rows, channels),) * 2
    )


class _Planner(PackedPlanner):
    def __init__(self, table: OperatorTable) -> None:
        super().__init__(table, OPERATOR_FIELDS)
        self.squares: list[list[int]] = []
        self.products: tuple[list[tuple[int, list[int]]], ...] = ([], [])

    def add(self, number: int) -> None:
        op, row, take = len(self.operators), self.row_of(number), self.take
        groups, rows, channels = row["groups"], row["rows"], row["channels"]
        shared = self.packed(row)
        sizes = [groups * channels * shared["in_points"], groups * rows * shared["out_points"]]
        vector, image = sizes[::-1] if row["transposed"] else sizes
        forward = self._product(op, groups, rows, channels, [forward_class(row)])
        adjoint = self._product(op, groups, channels, rows, adjoint_classes(row))
        image_items, back_items = (adjoint, forward) if row["transposed"] else (forward, adjoint)
        pieces = -(-vector // PIECE)
        for kind, (found, size) in enumerate(((image_items, image), (back_items, vector))):
            for piece, (cost, item) in enumerate(found):
                # Whichever is the last to be done goes on to scale the whole target.
                cost += SCALING_COST * size
                self.products[kind].append((cost, [*item[:6], piece, *item[6:]]))
        values = {
            "entered_parts": take(2 * pieces), "entered_count": pieces, "image": take(image),
            "image_parts": take(2 * len(image_items)), "image_count": len(image_items),
            "back": take(vector), "back_parts": take(2 * len(back_items)),
            "back_count": len(back_items), "image_size": image, "vector_size": vector,
        }  # fmt: skip
        self.describe(row, shared | values)
        self.squares += [[op, piece] for piece in range(pieces)]

    def _product(
        self, op: int, groups: int, rows: int, inner: int, classes: list[PositionClass]
    ) -> list[tuple[int, list[int]]]:
        """Cost and item of every tile of one product with ``rows`` rows, a sum over ``inner``."""
        items = []
        for part in classes:
            span = [len(self.visits), len(self.visits) + len(part.visits)]
            self.visits += part.visits
            positions = math.prod(part.counts)
            few = positions <= SHAPES[FLAT][1]
            shape = FLAT if few else THIN if rows <= SHAPES[THIN][0] else WIDE
            height, width = SHAPES[shape]
            cost = len(part.visits) * inner * height * width
            items += [
                (cost, [op, g, r, p, *span, shape, *part.residue, *part.counts])
                for g in range(groups)
                for r in range(0, rows, height)
                for p in range(-(-positions // width))
            ]
        return items

    def finished(self) -> OperatorWork:
        images, backs = (
            int32_table(longest_first(found), ITEM_WIDTH.value) for found in self.products
        )
        return OperatorWork(
            self.descriptors(), int32_table(self.visits, VISIT_WIDTH.value),
            int32_table(self.squares, 2), int32_table(self.packing, 4), images, backs,
            self.workspace,
        )  # fmt: skip
