# SPDX-License-Identifier: MIT
"""Who owns what of the gradients: tiles of weights, blocks of entries of the scales' tensors."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lmtfast.kernels.scale_work import diagonal_rows
from lmtfast.table import ENGINES, FIELDS, KINDS, SCALE_FIELDS, OperatorTable

GRADIENT_ROWS, GRADIENT_COLUMNS = 16, 128  # of a weight's gradient, written at once
TILE_ROWS, TILE_COLUMNS = 32, 1024  # of one program's tile
ENTRY_BLOCK = 32
# Side of a square tile of power iteration's gradient: large, and where rows or channels are few.
GRADIENT_SIDES = (64, 16)
# Rows of one program of the separable engine's products and gradient.
SEPARABLE_ROWS = 64
USE_WIDTH = 9
# What a scale belongs to.
OF_ROWS, OF_COLUMNS, OF_DIAGONAL = range(3)
GROUP_TILE_WIDTH = 10
# The engines' gradients are launched in this order; later ones add to what is there.
ORDER = ("operator", "separable", "symbol")


@dataclass(frozen=True)
class WeightTiles:
    """One engine's part of the weights' gradients; int32 on the CPU.

    Attributes:
        tiles: (slot, first and last sharer, first and last row, first and last column, whether an
            engine before has written the tensor), one per program.
        sharers: Positions among the engine's operators, slot by slot in the order of the table.
    """

    tiles: Tensor
    sharers: Tensor


@dataclass(frozen=True)
class ScaleEntries:
    """Gradients in the scales' tensors; int32 on the CPU.

    Attributes:
        entries: (slot, first entry, first and last use), one per program.
        uses: (factor, 1 where it is the variance, position among the symbol engine's operators or
            -1, what the product scales (OF_ROWS, OF_COLUMNS, or OF_DIAGONAL, then the position is
            the diagonal map's number), first and last factor of the product, where and in how
            many parts other engines leave the product's gradient, length).
        sums: Entries that other engines leave, float64.
    """

    entries: Tensor
    uses: Tensor
    sums: int


def rows_of_engine(table: OperatorTable, engine: str) -> list[int]:
    """Numbers of the operators that an engine's launches run: those that the table gives it, but
    the matrices of power iteration go with symbol where that has operators of its own."""
    stencil, symbol = KINDS.index("stencil"), ENGINES.index("symbol")
    engine_at, axes_at = FIELDS.index("engine"), FIELDS.index("axes")
    found = {i: row[engine_at] for i, row in enumerate(table.rows) if row[0] == stencil}
    if symbol in found.values():
        found |= {i: symbol for i in found if table.rows[i][axes_at] == 0}
    return [i for i, runner in found.items() if runner == ENGINES.index(engine)]


def weight_slots(table: OperatorTable, engine: str) -> frozenset[int]:
    """Tensors that are weights of an engine's operators."""
    place = FIELDS.index("weight_slot")
    return frozenset(table.rows[i][place] for i in rows_of_engine(table, engine))


def scale_slots(table: OperatorTable) -> frozenset[int]:
    """Tensors that scale channels."""
    slot, variance = SCALE_FIELDS.index("slot"), SCALE_FIELDS.index("variance_slot")
    return frozenset({s[i] for s in table.scales for i in (slot, variance)} - {-1})


def slots_before(table: OperatorTable, engine: str) -> frozenset[int]:
    """Weights that engines launched before have written the gradients of."""
    earlier = ORDER[: ORDER.index(engine)]
    return frozenset[int]().union(*(weight_slots(table, other) for other in earlier))


def weight_tiles(table: OperatorTable, engine: str) -> WeightTiles:
    place = FIELDS.index("weight_slot")
    before = slots_before(table, engine)
    by_slot: dict[int, list[int]] = {}
    numbers = rows_of_engine(table, engine)
    for position, number in enumerate(numbers):
        by_slot.setdefault(table.rows[number][place], []).append(position)
    tiles, sharers = [], []
    for slot, positions in by_slot.items():
        first = len(sharers)
        sharers += positions
        row = dict(zip(FIELDS, table.rows[numbers[positions[0]]], strict=True))
        rows = row["groups"] * row["rows"]
        columns = row["channels"] * math.prod(row[f"kernel_{a}"] for a in range(3))
        tiles += [
            [slot, first, len(sharers), r, min(rows, r + TILE_ROWS), c,
             min(columns, c + TILE_COLUMNS), int(slot in before)]
            for r in range(0, rows, TILE_ROWS) for c in range(0, columns, TILE_COLUMNS)
        ]  # fmt: skip
    return WeightTiles(
        torch.tensor(tiles, dtype=torch.int32).reshape(-1, 8),
        torch.tensor(sharers, dtype=torch.int32),
    )


def group_tiles(
    table: OperatorTable, engine: str, sides: Callable[[int, int], tuple[int, int]]
) -> list[WeightTiles]:
    """Tiles that lie within a group, one entry per launch: (slot, first and last sharer, first and
    last row, first and last channel, block of rows in the group, side of a block of rows, whether
    to add to what is there).

    Operators that share a weight but not its groups cannot share tiles: each further way to group
    one takes a launch that adds.

    Args:
        table: The plan's table.
        engine: Whose operators.
        sides: Rows and channels of a tile, by rows and channels of a group.
    """
    numbers = rows_of_engine(table, engine)
    before = slots_before(table, engine)
    shared: dict[int, dict[tuple[int, int], list[int]]] = {}
    for position, number in enumerate(numbers):
        row = dict(zip(FIELDS, table.rows[number], strict=True))
        shape = (row["groups"], row["rows"])
        shared.setdefault(row["weight_slot"], {}).setdefault(shape, []).append(position)
    launches = []
    for turn in range(max(map(len, shared.values()), default=0)):
        tiles, sharers = [], []
        for slot, shapes in shared.items():
            for (groups, rows), positions in list(shapes.items())[turn : turn + 1]:
                channels = table.rows[numbers[positions[0]]][FIELDS.index("channels")]
                (high, wide), first = sides(rows, channels), len(sharers)
                sharers += positions
                adds = int(turn > 0 or slot in before)
                tiles += [
                    [slot, first, len(sharers), g * rows + r, g * rows + min(rows, r + high), c,
                     min(channels, c + wide), r // high, high, adds]
                    for g in range(groups)
                    for r in range(0, rows, high)
                    for c in range(0, channels, wide)
                ]  # fmt: skip
        launches.append(
            WeightTiles(
                torch.tensor(tiles, dtype=torch.int32).reshape(-1, GROUP_TILE_WIDTH),
                torch.tensor(sharers, dtype=torch.int32),
            )
        )
    return launches


def gradient_side(rows: int, channels: int) -> int:
    """Side of the tiles of power iteration's gradient, by rows and channels of a group."""
    return GRADIENT_SIDES[0 if min(rows, channels) > GRADIENT_SIDES[1] else 1]


def scale_sums(table: OperatorTable) -> tuple[dict[int, tuple[int, int]], int]:
    """Where engines other than symbol leave the gradient in a stretch of the scale buffer: first
    entry and number of parts by the stretch's offset; and the entries in all."""
    places, size = {}, 0
    for engine in ("operator", "separable"):
        for number in rows_of_engine(table, engine):
            row = dict(zip(FIELDS, table.rows[number], strict=True))
            ends = {"row_scale": row["rows"], "column_scale": row["channels"]}
            side = gradient_side(row["rows"], row["channels"])
            # The separable engine's tiles are as wide as the kernel.
            sides = (row["channels"], SEPARABLE_ROWS) if engine == "separable" else (side, side)
            for name, other, each in zip(ends, ("channels", "rows"), sides, strict=True):
                if row[name] >= 0:
                    parts = -(-row[other] // each)
                    places[row[name]] = (size, parts)
                    size += parts * row["groups"] * ends[name]
    return places, size


def scale_entries(table: OperatorTable) -> ScaleEntries:
    sums, size = scale_sums(table)
    users = {offset: (number, OF_DIAGONAL) for offset, number in diagonal_rows(table).items()}
    for position, number in enumerate(rows_of_engine(table, "symbol")):
        for side, name in ((OF_ROWS, "row_scale"), (OF_COLUMNS, "column_scale")):
            if (offset := table.rows[number][FIELDS.index(name)]) >= 0:
                users[offset] = (position, side)
    spans: dict[int, list[int]] = {}
    for k, scale in enumerate(table.scales):
        spans.setdefault(scale[0], [k, k])[1] = k + 1
    by_slot: dict[int, list[list[int]]] = {}
    for k, scale in enumerate(table.scales):
        values = dict(zip(SCALE_FIELDS, scale, strict=True))
        offset, length = values["offset"], values["length"]
        for variance, name in enumerate(("slot", "variance_slot")):
            if values[name] >= 0:
                place = sums.get(offset, (0, 0))
                use = [k, variance, *users.get(offset, (-1, 0)), *spans[offset], *place, length]
                by_slot.setdefault(values[name], []).append(use)
    entries, uses = [], []
    for slot, found in by_slot.items():
        first = len(uses)
        uses += found
        longest = max(use[-1] for use in found)
        entries += [[slot, i, first, len(uses)] for i in range(0, longest, ENTRY_BLOCK)]
    return ScaleEntries(
        torch.tensor(entries, dtype=torch.int32).reshape(-1, 4),
        torch.tensor(uses, dtype=torch.int32).reshape(-1, USE_WIDTH), size,
    )  # fmt: skip
