# SPDX-License-Identifier: MIT
"""What the spectral kernels know of a network: one row of int64 per operator, one per tensor.

An operator's row is that of :class:`lmtfast.table.OperatorTable` and, behind it, what its engine
adds: offsets into tables and workspace. It is made once per plan. A tensor's row
(:data:`TENSOR_FIELDS`) is made again only when a tensor has moved. Kernels read both from the
device, so that one launch serves all operators.

Addresses become pointers inside the kernel. Where the address and the length of a row are multiples
of 16 bytes, which the host checks, the kernel says so to the compiler, and weights are read 16
bytes at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl

from lmtfast.kernels.specialization import Specialization
from lmtfast.table import FIELDS

TENSOR_FIELDS = ("address", "dtype", "size", "tap_major", "aligned")
TENSOR_WIDTH = tl.constexpr(len(TENSOR_FIELDS))
DTYPE_NAMES = ("float32", "bfloat16", "float16")

SLOT = tl.constexpr(FIELDS.index("weight_slot"))
ROW_SCALE = tl.constexpr(FIELDS.index("row_scale"))
COLUMN_SCALE = tl.constexpr(FIELDS.index("column_scale"))
AXES = tl.constexpr(FIELDS.index("axes"))
GROUPS = tl.constexpr(FIELDS.index("groups"))
ROWS = tl.constexpr(FIELDS.index("rows"))
CHANNELS = tl.constexpr(FIELDS.index("channels"))
IDENTITY = tl.constexpr(FIELDS.index("identity"))
STATE = tl.constexpr(FIELDS.index("state_offset"))
SAVED = tl.constexpr(FIELDS.index("saved_offset"))
TRANSPOSED = tl.constexpr(FIELDS.index("transposed"))
CIRCULAR = tl.constexpr(FIELDS.index("circular"))
RANK = tl.constexpr(FIELDS.index("rank"))
# The first of three axes.
IN, OUT = tl.constexpr(FIELDS.index("in_0")), tl.constexpr(FIELDS.index("out_0"))
STRIDE = tl.constexpr(FIELDS.index("stride_0"))
# Fields that every engine adds, in this order: the operator's number, its taps and centre tap, and
# where its scales' factors begin and end.
ADDED = ("number", "taps", "centre", "row_first", "row_last", "column_first", "column_last")
NUMBER = tl.constexpr(len(FIELDS))
TAPS = tl.constexpr(len(FIELDS) + 1)
CENTRE = tl.constexpr(len(FIELDS) + 2)
ROW_FIRST = tl.constexpr(len(FIELDS) + 3)
ROW_LAST = tl.constexpr(len(FIELDS) + 4)
COLUMN_FIRST = tl.constexpr(len(FIELDS) + 5)
COLUMN_LAST = tl.constexpr(len(FIELDS) + 6)


@triton.jit
def whole(row, FIELD: tl.constexpr):
    """A field that is a size or an index within one operator."""
    return tl.load(row + FIELD).to(tl.int32)


@triton.jit
def real(row, FIELD: tl.constexpr):
    """A float64 field, kept by its bits."""
    return tl.load(row + FIELD).to(tl.float64, bitcast=True)


@triton.jit
def entries_as(address, start, offset, mask, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = address.to(tl.pointer_type(dtype)) + start
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return tl.load(pointer + offset, mask, other=0.0).to(tl.float32)


@triton.jit
def entries(address, code, start, offset, mask, DTYPES: tl.constexpr, ALIGNED: tl.constexpr):
    """Entries start + offset of a tensor as float32, 0 where masked.

    DTYPES is the one code there is, or -1. ALIGNED: address and start are multiples of 16 bytes.
    """
    if DTYPES == 0:
        return entries_as(address, start, offset, mask, tl.float32, ALIGNED)
    elif DTYPES == 1:
        return entries_as(address, start, offset, mask, tl.bfloat16, ALIGNED)
    elif DTYPES == 2:
        return entries_as(address, start, offset, mask, tl.float16, ALIGNED)
    else:
        if code == 0:
            found = entries_as(address, start, offset, mask, tl.float32, ALIGNED)
        elif code == 1:
            found = entries_as(address, start, offset, mask, tl.bfloat16, ALIGNED)
        else:
            found = entries_as(address, start, offset, mask, tl.float16, ALIGNED)
        return found


@triton.jit
def store_as(place, start, offset, value, mask, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = place.to(tl.pointer_type(dtype), bitcast=True) + start
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    tl.store(pointer + offset, value.to(dtype), mask)


@triton.jit
def store_entries(
    place, code, start, offset, value, mask, DTYPES: tl.constexpr, ALIGNED: tl.constexpr
):  # fmt: skip
    """Values into a tensor of the given dtype that starts at the byte ``place``."""
    if DTYPES == 0:
        store_as(place, start, offset, value, mask, tl.float32, ALIGNED)
    elif DTYPES == 1:
        store_as(place, start, offset, value, mask, tl.bfloat16, ALIGNED)
    elif DTYPES == 2:
        store_as(place, start, offset, value, mask, tl.float16, ALIGNED)
    else:
        if code == 0:
            store_as(place, start, offset, value, mask, tl.float32, ALIGNED)
        elif code == 1:
            store_as(place, start, offset, value, mask, tl.bfloat16, ALIGNED)
        else:
            store_as(place, start, offset, value, mask, tl.float16, ALIGNED)


@triton.jit
def stored_entries(place, code, start, offset, mask, DTYPES: tl.constexpr, ALIGNED: tl.constexpr):
    """What :func:`store_entries` has stored, as float32."""
    return entries(place.to(tl.int64), code, start, offset, mask, DTYPES, ALIGNED)


@triton.jit
def power_of_two(exponent):
    """2 ** exponent as float32 for int32 exponents; 0 below the smallest normal number."""
    biased = tl.where(exponent < -126, 0, tl.minimum(exponent, 127) + 127)
    return (biased << 23).to(tl.float32, bitcast=True)


@triton.jit
def exponent_of(largest):
    """e with largest * 2 ** -e in [1, 2), int32; 0 for zero and for what is not finite."""
    biased = (largest.to(tl.int32, bitcast=True) >> 23) & 255
    # 2 ** -e is a normal number for these.
    return tl.where((biased == 0) | (biased == 255), 0, tl.minimum(biased, 252) - 127)


_TYPES = dict.fromkeys(
    ("operators", "tensors", "factors", "stretches", "targets"), "*i64"
) | dict.fromkeys(("gradients",), "*u8") | dict.fromkeys(("grad_scales",), "*fp64")  # fmt: skip
_FLOATS = (
    "state", "new_state", "saved", "sigmas", "grad_sigmas", "workspace", "root_table"
)  # fmt: skip


def specialized(
    kernel: Any, label: str, geometry: Mapping[str, int], **constants: object
) -> Specialization:
    """A spectral kernel as it is launched; arguments named alike have the same type in all."""
    launch = {name: geometry[name] for name in ("num_warps", "num_stages") if name in geometry}
    values = constants | {name: value for name, value in geometry.items() if name not in launch}
    arguments: dict[str, object] = {}
    for name in kernel.arg_names:
        integer = "i32" if name.startswith("n_") else "*i32"
        known = "*fp32" if name in _FLOATS else _TYPES.get(name, integer)
        arguments[name] = values.get(name, known)
    return Specialization(kernel, label, arguments, **launch)
