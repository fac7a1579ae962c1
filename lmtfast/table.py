# SPDX-License-Identifier: MIT
"""The operator table: packed int64 rows, the ABI shared with every compiled backend.

A row describes one convolution or matrix as a forward stencil: ``rows x channels`` matrices per
group and tap, read at ``stride * output + dilation * tap - padding``. A transposed convolution is
the adjoint of such a stencil, a matrix is one with a single tap and a single position. A diagonal
map is a stretch of the scale buffer. Every other operator has a row of kind ``composite`` and is
run by the reference backend from its region.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from lmtfast.graph import (
    BatchNormScale,
    ChannelScale,
    Conv,
    Instruction,
    Linear,
    Operator,
    Primitive,
    Region,
    Scale,
    WeightRef,
    leaf_refs,
)

KINDS = ("composite", "stencil", "diagonal")
ENGINES = ("operator", "symbol", "separable")
# Stands for an engine where the norm is the largest of some entries.
CLOSED_FORM = "closed form"
OPERATIONS = ("constant", "sigma", "mul", "add", "hypot", "max")
AXES = 3
SCALARS = (
    "kind", "engine", "weight_slot", "row_scale", "column_scale", "axes", "groups", "rows",
    "channels", "transposed", "circular", "identity", "rank", "state_offset", "saved_offset",
)  # fmt: skip
PER_AXIS = ("in", "out", "kernel", "stride", "pad_low", "pad_high", "dilation")
FIELDS = SCALARS + tuple(f"{name}_{axis}" for name in PER_AXIS for axis in range(AXES))
SCALE_FIELDS = ("offset", "length", "slot", "variance_slot", "inverse", "eps", "constant")
TAPE_FIELDS = ("operation", "a", "b", "constant")
# Terms of the separable engine's iterate (docs/adr/0009).
RANK = 8
# Candidate frequencies of the symbol engine per group.
CANDIDATES = 2


def bits(value: float) -> int:
    """A float64 as the int64 with the same bits."""
    return int(struct.unpack("<q", struct.pack("<d", value))[0])


@dataclass(frozen=True)
class Stencil:
    """One convolution or matrix as every engine and backend sees it; sizes are per group.

    ``axes`` spatial axes; a matrix has none and acts like one tap at one position.
    """

    groups: int
    rows: int
    channels: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    in_extent: tuple[int, ...]
    out_extent: tuple[int, ...]
    circular: bool
    transposed: bool

    @property
    def axes(self) -> int:
        return len(self.kernel)

    @property
    def taps(self) -> int:
        return math.prod(self.kernel)

    @property
    def phases(self) -> int:
        """Phases of the input that a stride splits it into."""
        return math.prod(self.stride)

    @property
    def in_points(self) -> int:
        return math.prod(self.in_extent)

    @property
    def out_points(self) -> int:
        return math.prod(self.out_extent)

    @property
    def rank(self) -> int:
        """Terms of a low-rank iterate: a grid or channel axis shorter than RANK needs no more."""
        return min(RANK, self.channels, self.in_points)

    @property
    def operator_products(self) -> int:
        """Multiply-adds of one power step on the true operator."""
        weights = self.groups * self.rows * self.channels * self.taps
        return 2 * weights * self.out_points

    def state_size(self, engine: str) -> int:
        """Entries of an engine's iterate; its layout is in that engine's module."""
        if engine == "symbol":
            width = 2 * self.axes + 2 * self.phases * self.channels
            return self.groups * (CANDIDATES * width + 2 * self.axes)
        if engine == "separable":
            return self.groups * self.rank * (self.in_points + self.channels)
        domain = (
            (self.rows, self.out_points) if self.transposed else (self.channels, self.in_points)
        )
        return self.groups * math.prod(domain)

    def saved_size(self, engine: str) -> int:
        """Entries a compiled step saves for the gradient (csrc/ops/spectral.h)."""
        columns = self.channels * self.taps
        if engine == "symbol":  # group, u, z, and the image before its row scale
            return 1 + 2 * self.rows + 2 * columns + 2 * self.rows
        if engine == "separable":  # group, ||A v|| over y's scale, h, a, y
            parts = self.in_points + self.channels + self.rows * self.taps
            return 2 + self.rank * parts
        return self.groups * (self.rows * self.out_points + self.channels * self.in_points)


def stencil_of(operator: Operator) -> Stencil | None:
    """The stencil of a region that is one convolution or matrix, else None."""
    op = operator.primitive if isinstance(operator, Region) else None
    if isinstance(op, Linear):
        return Stencil(
            1, op.out_shape[-1], op.in_shape[-1], (), (), (), (), (), (), False, False
        )  # fmt: skip
    if not isinstance(op, Conv):
        return None
    ends = (op.out_shape, op.in_shape) if op.transposed else (op.in_shape, op.out_shape)
    return Stencil(
        op.groups, ends[1][0] // op.groups, ends[0][0] // op.groups, op.kernel, op.stride,
        op.dilation, op.padding, ends[0][1:], ends[1][1:], op.padding_mode == "circular",
        op.transposed,
    )  # fmt: skip


@dataclass(frozen=True)
class OperatorTable:
    """What a compiled backend knows of a network. All integers; floats by their bits.

    Attributes:
        rows: One per operator, fields ``FIELDS``; kind 0 is run by the reference backend.
        scales: Factors of the per-channel scales, fields ``SCALE_FIELDS``. The scale buffer starts
            as ones; each row multiplies ``[offset, offset + length)`` by
            ``constant * t[slot] / sqrt(t[variance_slot] + eps)``, or its inverse.
        tape: The composition, fields ``TAPE_FIELDS``; ``features`` and ``total`` index into it.
        buckets: Number of the operator's bucket of identical shape.
        scale_size: Entries of the scale buffer; saved vectors start behind it.
        saved_size: Entries of the buffer saved for the gradient, scales included.
        state_size: Entries of all iterates.
    """

    rows: tuple[tuple[int, ...], ...]
    scales: tuple[tuple[int, ...], ...]
    tape: tuple[tuple[int, ...], ...]
    buckets: tuple[int, ...]
    features: int
    total: int
    scale_size: int
    saved_size: int
    state_size: int

    @cached_property
    def _hash(self) -> int:
        return hash((self.rows, self.scales, self.tape))

    def __hash__(self) -> int:
        """Computed once: a step looks its table up by it, and there are thousands of entries."""
        return self._hash

    @property
    def n_buckets(self) -> int:
        return len(set(self.buckets))

    @cached_property
    def compiled(self) -> tuple[int, ...]:
        """Operators that a compiled backend runs."""
        return tuple(i for i, row in enumerate(self.rows) if row[0])


@dataclass
class _Packing:
    """Scales and offsets while the rows are being packed."""

    slots: Mapping[WeightRef, int]
    scales: list[tuple[int, ...]] = field(default_factory=list)
    scale_size: int = 0

    def scale(self, factors: Sequence[ChannelScale], length: int, gain: float) -> int:
        """Offset of a new stretch of the scale buffer, -1 where it would be all ones."""
        if not factors and gain == 1.0:
            return -1
        offset, self.scale_size = self.scale_size, self.scale_size + length
        if gain != 1.0:
            self.scales.append((offset, length, -1, -1, 0, bits(0.0), bits(gain)))
        for factor in factors:
            ref, slot, variance, eps = factor.ref, -1, -1, 0.0
            if isinstance(ref, BatchNormScale):
                variance, eps = self.slots[ref.variance], ref.eps
                slot = -1 if ref.weight is None else self.slots[ref.weight]
            else:
                slot = self.slots[ref]
            self.scales.append(
                (offset, length, slot, variance, int(factor.inverse), bits(eps), bits(1.0))
            )
        return offset


def _row(
    stencil: Stencil, op: Conv | Linear, engine: str, packing: _Packing, state: int, saved: int
) -> tuple[int, ...]:
    rows, columns = (op.column_scales, op.row_scales) if stencil.transposed else (
        op.row_scales, op.column_scales,
    )  # fmt: skip
    row_scale = packing.scale(rows, stencil.groups * stencil.rows, op.gain)
    column_scale = packing.scale(columns, stencil.groups * stencil.channels, 1.0)

    def pad(values: Sequence[int], fill: int) -> tuple[int, ...]:
        return (fill,) * (AXES - len(values)) + tuple(values)

    return (
        KINDS.index("stencil"), ENGINES.index(engine), packing.slots[op.weight], row_scale,
        column_scale, stencil.axes, stencil.groups, stencil.rows, stencil.channels,
        int(stencil.transposed), int(stencil.circular), bits(op.identity_gain), stencil.rank, state,
        saved, *pad(stencil.in_extent, 1), *pad(stencil.out_extent, 1), *pad(stencil.kernel, 1),
        *pad(stencil.stride, 1), *pad([p for p, _ in stencil.padding], 0),
        *pad([p for _, p in stencil.padding], 0), *pad(stencil.dilation, 1),
    )  # fmt: skip


def diagonal_of(operator: Operator) -> Scale | None:
    """The scale of a region that is one vector of factors, else None."""
    op = operator.primitive if isinstance(operator, Region) else None
    if not isinstance(op, Scale) or op.ref is None:
        return None
    # A backend reads scales in float32, which it is only sure of where a tensor is a vector.
    return op if 1 <= math.prod(op.broadcast) == max(op.broadcast, default=1) else None


def _diagonal_row(op: Scale, packing: _Packing) -> tuple[int, ...]:
    assert op.ref is not None
    length = math.prod(op.broadcast)
    at = packing.scale([ChannelScale(op.ref, op.inverse)], length, op.gain)
    known = {"kind": KINDS.index("diagonal"), "row_scale": at, "groups": 1, "rows": length}
    return tuple(known.get(name, 0) for name in FIELDS)


def _scale_refs(op: Primitive | None) -> tuple[WeightRef, ...]:
    """Tensors by which an operator scales channels."""
    if isinstance(op, Scale):
        return leaf_refs(op.ref)
    return leaf_refs((op.row_scales, op.column_scales)) if isinstance(op, (Conv, Linear)) else ()


def build_table(
    operators: Sequence[Operator],
    tape: Sequence[Instruction],
    outputs: tuple[int, int],
    *,
    slots: Mapping[WeightRef, int],
    engines: Sequence[str],
    state_sizes: Sequence[int],
    compiled: frozenset[str] = frozenset(),
) -> OperatorTable:
    """Pack a network; bucket numbers follow first appearance.

    Args:
        operators: All operators of the network.
        tape: The composition of their norms.
        outputs: Indices of ``features`` and ``total`` in the tape.
        slots: Number of each leaf tensor.
        engines: Engine per operator.
        state_sizes: Entries of the iterate per operator.
        compiled: Engines that the backend runs for all operators in one call, and ``closed form``
            if it takes the norms of diagonal maps along.
    """
    packing = _Packing(slots)
    primitives = [op.primitive if isinstance(op, Region) else None for op in operators]
    weights = {op.weight for op in primitives if isinstance(op, (Conv, Linear))}
    rows: list[tuple[int, ...]] = []
    numbers: list[int] = []
    seen: dict[tuple[object, ...], int] = {}
    state, saved = 0, 0
    for i, (operator, engine) in enumerate(zip(operators, engines, strict=True)):
        # Backends write the gradient of a tensor as that of a weight or that of a scale.
        apart = weights.isdisjoint(_scale_refs(primitives[i]))
        stencil = stencil_of(operator)
        key: tuple[object, ...] = (
            (operator.kind, i) if stencil is None else (operator.kind, stencil)
        )
        numbers.append(seen.setdefault(key, len(seen)))
        diagonal = diagonal_of(operator) if apart and CLOSED_FORM in compiled else None
        if diagonal is not None:
            rows.append(_diagonal_row(diagonal, packing))
        elif (
            not apart or stencil is None or engine not in compiled or not runs(operator, stencil)
        ):  # fmt: skip
            rows.append((0,) * len(FIELDS))
        else:
            assert isinstance(operator, Region)
            op = operator.primitive
            assert isinstance(op, (Conv, Linear))
            rows.append(_row(stencil, op, engine, packing, state, saved))
            saved += stencil.saved_size(engine)
        state += state_sizes[i]
    # Saved vectors lie behind the scales, whose number is known only now.
    column = FIELDS.index("saved_offset")
    shifted = tuple(
        (*r[:column], r[column] + packing.scale_size, *r[column + 1 :])
        if r[0] == KINDS.index("stencil")
        else r
        for r in rows
    )
    return OperatorTable(
        shifted, tuple(packing.scales), tuple(_instruction(step) for step in tape), tuple(numbers),
        *outputs, packing.scale_size, packing.scale_size + saved, state,
    )  # fmt: skip


def runs(operator: Operator, stencil: Stencil) -> bool:
    """Whether a compiled step covers the operator: at most three axes, no empty side."""
    sizes = (stencil.rows, stencil.channels, stencil.taps, stencil.in_points, stencil.out_points)
    padded = all(low >= 0 and high >= 0 for low, high in stencil.padding)
    # Further wraps around a circular axis would need a modulus in every index.
    wraps = stencil.circular and any(
        max(p) > n for p, n in zip(stencil.padding, stencil.in_extent, strict=True)
    )
    return stencil.axes <= AXES and min(sizes) >= 1 and padded and not wraps


def _instruction(step: Instruction) -> tuple[int, ...]:
    a, b, constant = 0, 0, 0.0
    if step.op == "constant":
        constant = float(step.args[0])
    elif step.op == "sigma":
        a = step.args[0]
    else:
        a, b = step.args
    return (OPERATIONS.index(step.op), a, b, bits(constant))
