# SPDX-License-Identifier: MIT
"""What a network is to a Lipschitz bound: linear regions, and a tape that composes their norms.

Everything here is frozen data: no tensors, no numerics. Shapes never include the batch dimension.
A *region* is a maximal linear map between two nonlinearities (a conv with its batch norm, ``I +
W``, a pool with its conv); it counts as one operator. The *tape* says how the operators' spectral
norms ``sigma`` compose: chains multiply, additions add, concatenations take the root of the sum of
squares, and only branches that read pairwise disjoint slices of one tensor may take the maximum.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field, fields
from typing import Any, TypeAlias

Shape: TypeAlias = tuple[int, ...]


@dataclass(frozen=True)
class ParameterRef:
    """A parameter or buffer of the model, by qualified name."""

    name: str


@dataclass(frozen=True)
class ConstantRef:
    """A tensor written into the forward code. ``data`` is its raw little-endian content."""

    shape: Shape
    dtype: str
    data: bytes


def number(value: float) -> ConstantRef:
    """A Python number as a float64 constant."""
    return ConstantRef((), "float64", struct.pack("<d", value))


@dataclass(frozen=True)
class BatchNormScale:
    """``weight / sqrt(variance + eps)``, the gain batch norm applies to each channel."""

    weight: WeightRef | None
    variance: WeightRef
    eps: float
    module: str


@dataclass(frozen=True)
class Derived:
    """A tensor the forward code computes from parameters alone (weight norm and its like)."""

    target: str
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...] = ()


WeightRef: TypeAlias = ParameterRef | ConstantRef | BatchNormScale | Derived


@dataclass(frozen=True)
class Call:
    """One ATen call on one tensor; ``INPUT`` marks the tensor, ``BATCH`` the batch size."""

    target: str
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...] = ()


INPUT = "<input>"
BATCH = "<batch>"


@dataclass(frozen=True)
class Primitive:
    """A linear map that is one call of the traced program. ``name`` is the module it came from."""

    name: str
    in_shape: Shape
    out_shape: Shape


@dataclass(frozen=True)
class Conv(Primitive):
    """Convolution or its transpose, without bias.

    The kernel that acts is ``gain * row_scales * weight * column_scales + identity_gain * delta``:
    scales are folded batch norms and constant factors per output and input channel, ``delta`` is
    the centre tap of the identity, so that ``x + conv(x)`` is one operator.
    ``padding`` holds (low, high) per axis; ``padding_mode`` is ``"zeros"`` or ``"circular"``.
    """

    weight: WeightRef
    kernel: Shape
    stride: Shape
    padding: tuple[tuple[int, int], ...]
    dilation: Shape
    groups: int
    transposed: bool = False
    output_padding: Shape = ()
    padding_mode: str = "zeros"
    row_scales: tuple[ChannelScale, ...] = ()
    column_scales: tuple[ChannelScale, ...] = ()
    gain: float = 1.0
    identity_gain: float = 0.0


@dataclass(frozen=True)
class Linear(Primitive):
    """``x @ weight.T`` on the last dimension, without bias; the rest as in :class:`Conv`."""

    weight: WeightRef
    row_scales: tuple[ChannelScale, ...] = ()
    column_scales: tuple[ChannelScale, ...] = ()
    gain: float = 1.0
    identity_gain: float = 0.0


@dataclass(frozen=True)
class ChannelScale:
    """A per-channel factor: the tensor ``ref`` flattened to channels, or its reciprocal."""

    ref: WeightRef
    inverse: bool = False


@dataclass(frozen=True)
class Scale(Primitive):
    """Multiplication by ``gain`` times ``ref`` (or its reciprocal) of shape ``broadcast``."""

    ref: WeightRef | None = None
    broadcast: Shape = ()
    inverse: bool = False
    gain: float = 1.0


@dataclass(frozen=True)
class Copy(Primitive):
    """Every output entry is one input entry or zero (views, pads, slices, repeats, shuffles).

    Its norm is exactly ``sqrt(copies)``, the largest number of times one entry is copied.
    ``bijective`` says that it only reorders, ``ordered`` that it does not even do that.
    """

    call: Call
    copies: int
    bijective: bool
    ordered: bool


@dataclass(frozen=True)
class Average(Primitive):
    """A fixed map with nonnegative entries (average pooling, mean, sum) times ``gain``.

    ``norm`` bounds the norm of the map before ``gain``.
    """

    call: Call
    norm: float
    gain: float = 1.0


@dataclass(frozen=True)
class RegionNode:
    """One step of a region: a primitive, ``"add"`` or ``"concat"``; input -1 is its input."""

    op: Primitive | str
    inputs: tuple[int, ...]
    axis: int = 0


@dataclass(frozen=True)
class Region:
    """A linear map as a small program; its last node is the output. Shapes without batch."""

    name: str
    in_shape: Shape
    out_shape: Shape
    nodes: tuple[RegionNode, ...]

    @property
    def primitive(self) -> Primitive | None:
        """The one primitive the region consists of, or None for a composite."""
        only = self.nodes[0].op if len(self.nodes) == 1 else None
        return only if isinstance(only, Primitive) else None

    @property
    def kind(self) -> str:
        """``conv``, ``linear``, ``scale``, ``copy``, ``average`` or ``composite``."""
        return type(self.primitive).__name__.lower() if self.primitive else "composite"


@dataclass(frozen=True)
class Slope:
    """A learned nonlinearity: PReLU, whose constant is ``max(1, max |a|)``."""

    name: str
    in_shape: Shape
    out_shape: Shape
    ref: WeightRef

    kind = "slope"


Operator: TypeAlias = Region | Slope


@dataclass(frozen=True)
class Instruction:
    """One step of the tape: ``sigma`` (operator index), ``constant`` (value), ``mul``, ``add``,
    ``hypot`` or ``max`` (indices of earlier steps)."""

    op: str
    args: tuple[Any, ...]


@dataclass(frozen=True)
class BoundGraph:
    """Operators and the tape over their norms.

    Attributes:
        input_shape: Shape of one input, no batch dimension.
        output_shape: Shape of one output.
        operators: Linear regions and learned slopes; ``sigma[i]`` belongs to ``operators[i]``.
        tape: Instructions; ``features`` and ``total`` index into it.
        head: Index of the final Linear operator, or None.
        notes: One line per traced call that carries no operator: (name, rule, constant).
    """

    input_shape: Shape
    output_shape: Shape
    operators: tuple[Operator, ...]
    tape: tuple[Instruction, ...]
    features: int
    total: int
    head: int | None
    notes: tuple[tuple[str, str, float], ...] = field(default=())


def leaf_refs(item: Any) -> tuple[WeightRef, ...]:
    """As :func:`weight_refs`, with a batch norm's gain as the tensors it is computed from."""
    found: dict[WeightRef, None] = {}
    for ref in weight_refs(item):
        if isinstance(ref, BatchNormScale):
            parts = (ref.weight, ref.variance)
            found.update(dict.fromkeys(r for part in parts if part for r in leaf_refs(part)))
        else:
            found.setdefault(ref)
    return tuple(found)


def weight_refs(item: Any) -> tuple[WeightRef, ...]:
    """Every weight reference inside a primitive, region or operator, in order, without repeats."""
    found: dict[WeightRef, None] = {}

    def walk(x: Any) -> None:
        if isinstance(x, (ParameterRef, ConstantRef, BatchNormScale, Derived)):
            found.setdefault(x)
        elif isinstance(x, (Primitive, Region, RegionNode, Slope, ChannelScale)):
            for f in fields(x):
                walk(getattr(x, f.name))
        elif isinstance(x, tuple):
            for y in x:
                walk(y)

    walk(item)
    return tuple(found)
