# SPDX-License-Identifier: MIT
"""The operator table: one packed int64 row per operator, the ABI shared with the compiled core.

Only convolutions and matrices have rows that a compiled backend can run; every other operator has a
row of kind ``composite`` and is run by the reference backend from its region.
"""

from __future__ import annotations

from dataclasses import dataclass

from lmtfast.graph import ChannelScale, Conv, Linear, Operator, Region, WeightRef, weight_refs

KINDS = ("composite", "conv", "linear", "scale", "slope")
AXES = 3
SCALARS = (
    "kind", "weight_slot", "row_scale_slot", "column_scale_slot", "ndim", "c_out", "c_in", "groups",
    "transposed",
)  # fmt: skip
PER_AXIS = ("in", "out", "kernel", "stride", "pad_low", "pad_high", "dilation", "output_padding")
FIELDS = SCALARS + tuple(f"{name}_{axis}" for name in PER_AXIS for axis in range(AXES))


@dataclass(frozen=True)
class OperatorSpec:
    """What a compiled backend needs of one operator. Slots index the weights; -1 is none."""

    kind: str
    weight_slot: int = -1
    row_scale_slot: int = -1
    column_scale_slot: int = -1
    c_out: int = 0
    c_in: int = 0
    groups: int = 1
    transposed: bool = False
    in_size: tuple[int, ...] = ()
    out_size: tuple[int, ...] = ()
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[tuple[int, int], ...] = ()
    dilation: tuple[int, ...] = ()
    output_padding: tuple[int, ...] = ()

    def row(self) -> tuple[int, ...]:
        """The packed row, in the order of ``FIELDS``."""

        def pad(values: tuple[int, ...], fill: int) -> tuple[int, ...]:
            return (fill,) * (AXES - len(values)) + values

        scalars = (
            KINDS.index(self.kind), self.weight_slot, self.row_scale_slot, self.column_scale_slot,
            len(self.kernel), self.c_out, self.c_in, self.groups, int(self.transposed),
        )  # fmt: skip
        return (
            *scalars, *pad(self.in_size, 1), *pad(self.out_size, 1), *pad(self.kernel, 1),
            *pad(self.stride, 1), *pad(tuple(p for p, _ in self.padding), 0),
            *pad(tuple(p for _, p in self.padding), 0), *pad(self.dilation, 1),
            *pad(self.output_padding, 0),
        )  # fmt: skip

    @property
    def bucket(self) -> tuple[int, ...]:
        """What operators must share to run in one batch: everything but the slots."""
        row = self.row()
        return (row[0], *row[4:])


@dataclass(frozen=True)
class OperatorTable:
    """Rows of all operators and the buckets of identical shape they fall into."""

    rows: tuple[tuple[int, ...], ...]
    buckets: tuple[int, ...]

    @property
    def n_buckets(self) -> int:
        return len(set(self.buckets))


def operator_spec(operator: Operator, slots: dict[WeightRef, int]) -> OperatorSpec:
    """The description of one operator; composite where only the reference can run it."""
    primitive = operator.primitive if isinstance(operator, Region) else None
    if not isinstance(primitive, (Conv, Linear)):
        refs = weight_refs(operator)
        kind = operator.kind if operator.kind in KINDS else "composite"
        return OperatorSpec(kind, slots[refs[0]] if refs else -1)
    plain = primitive.gain == 1.0 and primitive.identity_gain == 0.0
    scales = (primitive.row_scales, primitive.column_scales)
    if not plain or any(len(s) > 1 or any(x.inverse for x in s) for s in scales):
        return OperatorSpec("composite")

    def slot(scale: tuple[ChannelScale, ...]) -> int:
        return slots[scale[0].ref] if scale else -1

    common = (slots[primitive.weight], slot(primitive.row_scales), slot(primitive.column_scales))
    if isinstance(primitive, Linear):
        return OperatorSpec("linear", *common, primitive.out_shape[-1], primitive.in_shape[-1])
    if primitive.padding_mode != "zeros":
        return OperatorSpec("composite")
    return OperatorSpec(
        "conv", *common, primitive.out_shape[0], primitive.in_shape[0], primitive.groups,
        primitive.transposed, primitive.in_shape[1:], primitive.out_shape[1:], primitive.kernel,
        primitive.stride, primitive.padding, primitive.dilation, primitive.output_padding,
    )  # fmt: skip


def build_table(operators: tuple[Operator, ...], slots: dict[WeightRef, int]) -> OperatorTable:
    """Rows and buckets in operator order; bucket numbers follow first appearance."""
    specs = [operator_spec(o, slots) for o in operators]
    seen: dict[tuple[object, ...], int] = {}
    numbers = []
    for i, (spec, operator) in enumerate(zip(specs, operators, strict=True)):
        alone = spec.kind in ("composite", "scale", "slope")
        key: tuple[object, ...] = (operator.kind, i) if alone else spec.bucket
        numbers.append(seen.setdefault(key, len(seen)))
    return OperatorTable(tuple(s.row() for s in specs), tuple(numbers))
