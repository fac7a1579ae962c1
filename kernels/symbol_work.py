# SPDX-License-Identifier: MIT
"""The symbol engine's work on one network: descriptors, work items and workspace, on the host.

Everything depends on the operator table alone, never on the device: the same network has the same
tiles, and with them the same bits, everywhere.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton.language as tl
from torch import Tensor

from lmtfast.kernels.descriptor import ADDED
from lmtfast.kernels.gradient_work import rows_of_engine
from lmtfast.kernels.planner import Planner, int32_table, longest_first
from lmtfast.table import CANDIDATES, FIELDS, OperatorTable

# Fields behind ADDED. Workspace offsets count float32; R rows, C channels, T taps, K = C T columns,
# F candidates, and 2 F planes per vector: F real parts, then F imaginary ones. A matrix under power
# iteration has one tap, and one vector, which is real: the first plane.
SYMBOL_FIELDS = (
    "phases", "tap_table", "root_table", "grid_0", "grid_1", "grid_2",
    "tiles",  # row tiles per group
    "blocks",  # blocks of channels per group
    "parts",  # reals per entry of x, u and z in state and saved: 2, of a matrix 1
    "used",  # planes that hold anything: 2 F, of a matrix 1
    "counter",  # of finished blocks, one per group, then one of finished groups; int32
    "z",  # (G, 2 F, K) exp(-i w . tau_t) x_phase(t), in the weight's memory order
    "z_scaled",  # the same times the column scale; the same place where there is none
    "z_centre",  # (G, 2 F, R) identity times z at the centre tap; none without identity
    "product",  # (G, 2 F, R) W diag(column scale) z
    "image",  # (G, 2 F, R) y = A z
    "carried",  # (G, 2 F, R) row scale times y, each tile times a power of two
    "exponents",  # (G, tiles) of those powers
    "partials",  # (G, tiles, used, K) W^T carried
    "adjoint",  # (G, 2 F, K) A^T y
    "responses",  # (G, blocks, 2 F, T), then (G, 2 F, T): sums over channels of conj(A^T y) x
    "turned",  # (G, 2 F, T) exp(-i w . tau_t) at the new frequency
    "scratch",  # (G, SCRATCH_SIZE) float64 of the search over frequencies
    "fresh",  # (G, F, 2 P C) the new x, not normalised
    "lengths",  # (G, F) inverse length of x in the state
    "values",  # (G, F) ||A z||
)  # fmt: skip
_FIRST = len(FIELDS) + len(ADDED)
PHASES, TAP_TABLE, ROOT_TABLE = (tl.constexpr(_FIRST + i) for i in range(3))
GRID_0, GRID_1, GRID_2 = (tl.constexpr(_FIRST + i) for i in range(3, 6))
TILES, BLOCKS, PARTS, USED, COUNTER = (tl.constexpr(_FIRST + i) for i in range(6, 11))
Z, Z_SCALED, Z_CENTRE = (tl.constexpr(_FIRST + i) for i in range(11, 14))
PRODUCT, IMAGE, CARRIED, EXPONENTS = (tl.constexpr(_FIRST + i) for i in range(14, 18))
PARTIALS, ADJOINT, RESPONSES, TURNED = (tl.constexpr(_FIRST + i) for i in range(18, 22))
SCRATCH, FRESH, LENGTHS, VALUES = (tl.constexpr(_FIRST + i) for i in range(22, 26))
SYMBOL_WIDTH = tl.constexpr(_FIRST + len(SYMBOL_FIELDS))

F = tl.constexpr(CANDIDATES)
PLANES = tl.constexpr(2 * CANDIDATES)
TAP_WIDTH = tl.constexpr(4)  # of the tap table: offset per axis, phase
SLOTS = tl.constexpr(4)  # of a frequency: three axes, and one more that fills a power of two
# Frequencies in three places, cosines and sines; then three numbers per candidate.
SCRATCH_SIZE = (3 * 2 * SLOTS + 3) * F

TILE_ROWS = 32  # rows that a program of the pass takes at a time
TILE_WEIGHTS = 1 << 16  # weights that it takes in all, about
BLOCK_CHANNELS = 32  # channels per program of the last launch
GRID_DENSITY, MAX_POINTS = 4, 4096  # as lmtfast/engines/frequency.py


@dataclass(frozen=True)
class SymbolWork:
    """What the launches read; tensors on the CPU.

    Attributes:
        operators: Descriptors, int64, ``(n, SYMBOL_WIDTH)``.
        tap_table: int32, per tap three offsets and a phase.
        roots: float32, per axis of a grid of N points the N-th roots of one.
        vectors: (operator, group, candidate) per program of the first launch; a matrix has one.
        tiles: (operator, group, tile, first row, last row) per program of the pass.
        blocks: (operator, group, block of channels) per program of the last launch.
        readings: The same, one per group, where nothing is to move.
        workspace: Entries of the workspace, float32.
        counters: Entries of the counters, int32.
        bits: Binary digits of the largest offset.
    """

    operators: Tensor
    tap_table: Tensor
    roots: Tensor
    vectors: Tensor
    tiles: Tensor
    blocks: Tensor
    readings: Tensor
    workspace: int
    counters: int
    bits: int


def symbol_work(table: OperatorTable) -> SymbolWork:
    """The work of all operators that the symbol engine's launches run, if there are any."""
    planner = _Planner(table)
    for i in rows_of_engine(table, "symbol"):
        planner.add(i)
    return planner.finished()


def rows_per_tile(rows: int, columns: int) -> int:
    """Rows of one tile of the pass: whole multiples of TILE_ROWS, about TILE_WEIGHTS weights."""
    wanted = max(1, TILE_WEIGHTS // (columns * TILE_ROWS))
    return TILE_ROWS * min(wanted, -(-rows // TILE_ROWS))


class _Planner(Planner):
    def __init__(self, table: OperatorTable) -> None:
        super().__init__(table, SYMBOL_FIELDS)
        self.taps: list[list[int]] = []
        self.roots: list[float] = []
        self.root_offsets: dict[tuple[int, ...], int] = {}
        self.vectors: list[list[int]] = []
        self.tiles: list[tuple[int, list[int]]] = []
        self.blocks: list[list[int]] = []
        self.readings: list[list[int]] = []
        self.counters = self.largest = 0

    def add(self, number: int) -> None:
        op, row, take = len(self.operators), self.row_of(number), self.take
        groups, rows, channels, taps = (row[n] for n in ("groups", "rows", "channels", "taps"))
        columns = channels * taps
        phases = math.prod(row[f"stride_{a}"] for a in range(3))
        height = rows_per_tile(rows, columns)
        tiles, blocks = -(-rows // height), -(-channels // BLOCK_CHANNELS)
        parts, used = (2, PLANES.value) if row["axes"] else (1, 1)
        grid = self._grid(row)
        tap_table = len(self.taps)
        self._add_taps(row)
        counter, self.counters = self.counters, self.counters + groups + 1
        planes = groups * PLANES.value
        z = take(planes * columns)
        values = {
            "phases": phases, "tap_table": tap_table * TAP_WIDTH.value,
            "root_table": self._roots(grid), "grid_0": grid[0], "grid_1": grid[1],
            "grid_2": grid[2], "tiles": tiles, "blocks": blocks, "parts": parts, "used": used,
            "counter": counter, "z": z,
            "z_scaled": z if row["column_scale"] < 0 else take(planes * columns),
            "z_centre": take(planes * rows) if row["identity"] else -1,
            "product": take(planes * rows), "image": take(planes * rows),
            "carried": take(planes * rows), "exponents": take(groups * tiles),
            "partials": take(groups * tiles * used * columns),
            "adjoint": take(planes * columns),
            "responses": take(planes * (blocks + 1) * taps),
            "turned": take(planes * taps),
            "scratch": take(groups * 2 * SCRATCH_SIZE.value),
            "fresh": take(planes * phases * channels),
            "lengths": take(groups * CANDIDATES), "values": take(groups * CANDIDATES),
        }  # fmt: skip
        self.describe(row, values)
        for g in range(groups):
            self.vectors += [[op, g, f] for f in range(min(CANDIDATES, used))]
            self.blocks += [[op, g, b] for b in range(blocks)]
            self.readings.append([op, g, 0])
            for tile in range(tiles):
                first, last = tile * height, min(rows, (tile + 1) * height)
                self.tiles.append(((last - first) * columns, [op, g, tile, first, last]))

    def _add_taps(self, row: dict[str, int]) -> None:
        """Offset per axis and phase of every tap, the last axis fastest (polyphase.tap_table)."""
        parts = []
        for a in range(3):
            stride = row[f"stride_{a}"]
            part = []
            for t in range(row[f"kernel_{a}"]):
                read = t * row[f"dilation_{a}"] - row[f"pad_low_{a}"]
                part.append((t if stride == 1 else read // stride, read % stride, stride))
            parts.append(part)
        for q0, r0, _ in parts[0]:
            for q1, r1, s1 in parts[1]:
                for q2, r2, s2 in parts[2]:
                    self.taps.append([q0, q1, q2, (r0 * s1 + r1) * s2 + r2])
                    self.largest = max(self.largest, abs(q0), abs(q1), abs(q2))

    def _grid(self, row: dict[str, int]) -> list[int]:
        """Points per axis (frequency.grid_sizes), 1 on unused axes."""
        sizes = []
        for a in range(3):
            k, s = row[f"kernel_{a}"], row[f"stride_{a}"]
            d, low = row[f"dilation_{a}"], row[f"pad_low_{a}"]
            degree = k - 1 if s == 1 else ((k - 1) * d - low) // s - (-low) // s
            sizes.append(GRID_DENSITY * (degree + 1) if degree else 1)
        while math.prod(sizes) > MAX_POINTS and max(sizes) > 8:
            largest = sizes.index(max(sizes))
            sizes[largest] = -(-sizes[largest] // 2)
        return sizes

    def _roots(self, grid: list[int]) -> int:
        """Offset of the roots of one for the three axes, (cos, sin) pairs."""
        key = tuple(grid)
        if key not in self.root_offsets:
            self.root_offsets[key] = len(self.roots)
            for n in grid:
                for i in range(n):
                    angle = 2 * math.pi * i / n
                    self.roots += [math.cos(angle), math.sin(angle)]
        return self.root_offsets[key]

    def finished(self) -> SymbolWork:
        return SymbolWork(
            self.descriptors(), int32_table(self.taps, TAP_WIDTH.value),
            torch.tensor(self.roots, dtype=torch.float32), int32_table(self.vectors, 3),
            int32_table(longest_first(self.tiles), 5), int32_table(self.blocks, 3),
            int32_table(self.readings, 3), self.workspace, self.counters,
            max(1, self.largest.bit_length()),
        )  # fmt: skip
