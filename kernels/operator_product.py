# SPDX-License-Identifier: MIT
"""Power iteration on the true padded, strided operators of a network: v <- A^T A v.

The definition is :mod:`lmtfast.engines.operator`; all operators are in each of three launches, two
where nothing is to move:

``operator_pack``     kernels with scales and identity as (tap, rows, channels), unless they can be
                      read in place; pieces of ||v||^2; the scale buffer; zero counters
``operator_product``  u = A v, and pieces of ||u||^2
``operator_product``  v = A^T u, and pieces of ||v||^2

A product divides its source by the source's norm as it loads it, so that no magnitude of weights
over- or underflows twice. In the last of a step's products the programs of an operator also keep
their shares of the source as a unit vector, and the one that comes last has all pieces of the
target's norm: it adds them in their order and writes sigma, the target as a unit vector and the new
iterate. Programs own tiles of the target and add visits (operator_work.py) in a fixed order;
strided adjoints gather, so nothing is added across programs. float32 by default; TF32 where
torch.backends.cuda.matmul.allow_tf32 says so.

Floor of one step of WRN-28-10: 21 GFLOP, 313 us at 67 TFLOP/s in float32, 53 us in TF32; weights
are packed once (146 MB read, 146 MB written, 68 us at 4.3 TB/s) and read once per product.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lmtfast.kernels.arrival import last_of
from lmtfast.kernels.channel_scale import fill_scales
from lmtfast.kernels.descriptor import (
    CHANNELS,
    CIRCULAR,
    IN,
    NUMBER,
    OUT,
    ROWS,
    SAVED,
    STATE,
    STRIDE,
    TRANSPOSED,
    specialized,
    whole,
)
from lmtfast.kernels.operator_work import (
    BACK,
    BACK_COUNT,
    BACK_PARTS,
    DIRECT,
    ENTERED_COUNT,
    ENTERED_PARTS,
    FLAT,
    IMAGE,
    IMAGE_COUNT,
    IMAGE_PARTS,
    IMAGE_SIZE,
    IN_POINTS,
    ITEM_WIDTH,
    OPERATOR_WIDTH,
    OUT_POINTS,
    PACKED,
    PACKED_WIDTH,
    PIECE,
    SHAPES,
    THIN,
    VECTOR_SIZE,
)
from lmtfast.kernels.packing import kernel_view, pack_block, read_in_place
from lmtfast.kernels.scale_work import SCALE_BLOCK
from lmtfast.kernels.specialization import Specialization
from lmtfast.kernels.vector import inverse_of, keep_scaled
from lmtfast.kernels.visit_work import VISIT_WIDTH

PIECE_SIZE, PARTS_AT_ONCE, BLOCK = tl.constexpr(PIECE), tl.constexpr(128), tl.constexpr(1024)
FLAT_SHAPE, THIN_SHAPE = tl.constexpr(FLAT), tl.constexpr(THIN)
HIGH, WIDE = tl.constexpr(SHAPES[0][0]), tl.constexpr(SHAPES[0][1])
LOW, NARROW = tl.constexpr(SHAPES[THIN][0]), tl.constexpr(SHAPES[FLAT][1])
PACK_GEOMETRY = {"SCALE_BLOCK": SCALE_BLOCK, "num_warps": 4}


@triton.jit
def doubles(workspace, offset):
    """float64 that lie in the workspace."""
    return (workspace + offset).to(tl.pointer_type(tl.float64), bitcast=True)


@triton.jit
def norm_of(row, workspace, PARTS: tl.constexpr, COUNT: tl.constexpr):
    """Root of a sum of pieces, added in their order, float64."""
    parts, count = doubles(workspace, tl.load(row + PARTS)), whole(row, COUNT)
    total = tl.zeros((PARTS_AT_ONCE,), tl.float64)
    for start in range(0, count, PARTS_AT_ONCE):
        i = start + tl.arange(0, PARTS_AT_ONCE)
        total += tl.load(parts + i, i < count, other=0.0)
    return tl.sqrt(tl.sum(total, 0))


@triton.jit(do_not_specialize=["n_squares", "n_packing"])
def operator_pack(
    operators, tensors, factors, stretches, squares, packing, state, saved, workspace, counters,
    sigmas, n_squares, n_packing,
    SCALE_BLOCK: tl.constexpr,
):  # fmt: skip
    item = tl.program_id(0)
    if item < n_squares:
        row = operators + tl.load(squares + 2 * item) * OPERATOR_WIDTH
        piece, size = tl.load(squares + 2 * item + 1), tl.load(row + VECTOR_SIZE)
        if piece == 0:
            tl.store(counters + tl.load(squares + 2 * item), 0)
        vector = state + tl.load(row + STATE)
        total = tl.zeros((BLOCK,), tl.float64)
        for start in range(0, PIECE_SIZE, BLOCK):
            i = piece * PIECE_SIZE + start + tl.arange(0, BLOCK)
            x = tl.load(vector + i, i < size, other=0.0).to(tl.float64)
            total += x * x
        tl.store(doubles(workspace, tl.load(row + ENTERED_PARTS)) + piece, tl.sum(total, 0))
    elif item < n_squares + n_packing:
        place = packing + 4 * (item - n_squares)
        row = operators + tl.load(place) * OPERATOR_WIDTH
        if not read_in_place(row, tensors, tl.load(row + DIRECT)):
            pack_block(
                row, tensors, factors, tl.load(place + 1), tl.load(place + 2), tl.load(place + 3),
                workspace + tl.load(row + PACKED), whole(row, PACKED_WIDTH),
            )  # fmt: skip
    else:
        block = item - n_squares - n_packing
        fill_scales(tensors, factors, stretches, block, saved, sigmas, SCALE_BLOCK)


@triton.jit
def operator_product(
    operators, tensors, visits, items, state, saved, workspace, counters, sigmas, new_state,
    SECOND: tl.constexpr, LAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of A v, or with SECOND of A^T u; with LAST unit vectors, sigma and new iterate."""
    item = items + tl.program_id(0) * ITEM_WIDTH
    row = operators + tl.load(item) * OPERATOR_WIDTH
    if SECOND:
        source = workspace + tl.load(row + IMAGE)
        norm = norm_of(row, workspace, IMAGE_PARTS, IMAGE_COUNT)
        target = workspace + tl.load(row + BACK)
        squares = doubles(workspace, tl.load(row + BACK_PARTS))
        adjoint = tl.load(row + TRANSPOSED) == 0
    else:
        source = state + tl.load(row + STATE)
        norm = norm_of(row, workspace, ENTERED_PARTS, ENTERED_COUNT)
        target = workspace + tl.load(row + IMAGE)
        squares = doubles(workspace, tl.load(row + IMAGE_PARTS))
        adjoint = tl.load(row + TRANSPOSED) != 0
    squares += tl.load(item + 6)
    inverse = inverse_of(norm)
    if adjoint:
        shaped_tile(
            row, tensors, visits, item, source, inverse, target, squares, workspace, True, PRECISION
        )
    else:
        shaped_tile(
            row, tensors, visits, item, source, inverse, target, squares, workspace, False,
            PRECISION,
        )  # fmt: skip
    if LAST:
        finish(
            row, tl.load(item + 6), state, saved, workspace, counters + tl.load(item), sigmas,
            new_state, SECOND,
        )  # fmt: skip


@triton.jit
def finish(
    row, part, state, saved, workspace, counter, sigmas, new_state, SECOND: tl.constexpr
):  # fmt: skip
    """This program's share of the source and, by the last of an operator, all of the target.

    It finds both anew: registers that hold them during the product are registers too many.
    """
    u_size, v_size = tl.load(row + IMAGE_SIZE), tl.load(row + VECTOR_SIZE)
    image, entered = workspace + tl.load(row + IMAGE), state + tl.load(row + STATE)
    u = saved + tl.load(row + SAVED)
    v = u + u_size
    if SECOND:
        count = whole(row, BACK_COUNT)
        inverse = inverse_of(norm_of(row, workspace, IMAGE_PARTS, IMAGE_COUNT))
        keep_scaled(image, inverse, u, u, u_size, part, count)
    else:
        count = whole(row, IMAGE_COUNT)
        inverse = inverse_of(norm_of(row, workspace, ENTERED_PARTS, ENTERED_COUNT))
        keep_scaled(entered, inverse, v, v, v_size, part, count)
    if last_of(counter, count):
        if SECOND:
            sigma = norm_of(row, workspace, BACK_PARTS, BACK_COUNT)
            back, inverse = workspace + tl.load(row + BACK), inverse_of(sigma)
            if (sigma == 0) | (sigma - sigma != 0):
                # Weights that are zero now must not end the iteration, nor may what is not finite.
                back = entered
                inverse = inverse_of(norm_of(row, workspace, ENTERED_PARTS, ENTERED_COUNT))
            # The gradient is that of <u, A v> at the new pair.
            keep_scaled(back, inverse, v, new_state + tl.load(row + STATE), v_size, 0, 1)
        else:
            sigma = norm_of(row, workspace, IMAGE_PARTS, IMAGE_COUNT)
            keep_scaled(image, inverse_of(sigma), u, u, u_size, 0, 1)
        tl.store(sigmas + tl.load(row + NUMBER), sigma.to(tl.float32))


@triton.jit
def extents(row, FIELD: tl.constexpr):
    return whole(row, FIELD), whole(row, FIELD + 1), whole(row, FIELD + 2)


@triton.jit
def shaped_tile(
    row, tensors, visits, item, source, inverse, target, squares, workspace,
    ADJOINT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # In float32 all of a step's operands pass through registers.
    DEPTH: tl.constexpr = 16 if PRECISION == "ieee" else 32
    shape = tl.load(item + 7)
    if shape == FLAT_SHAPE:
        product_tile(
            row, tensors, visits, item, source, inverse, target, squares, workspace, ADJOINT,
            PRECISION, HIGH, NARROW, DEPTH,
        )  # fmt: skip
    elif shape == THIN_SHAPE:
        product_tile(
            row, tensors, visits, item, source, inverse, target, squares, workspace, ADJOINT,
            PRECISION, LOW, WIDE, 16,
        )  # fmt: skip
    else:
        product_tile(
            row, tensors, visits, item, source, inverse, target, squares, workspace, ADJOINT,
            PRECISION, HIGH, WIDE, DEPTH,
        )  # fmt: skip


@triton.jit
def product_tile(
    row, tensors, visits, item, source, inverse, target, squares, workspace,
    ADJOINT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Target rows times positions: the sum over visits and inner rows of kernel times source."""
    group, first, last = tl.load(item + 1), tl.load(item + 4), tl.load(item + 5)
    rows, channels = whole(row, ROWS), whole(row, CHANNELS)
    width = whole(row, PACKED_WIDTH) // 4 * 4
    packed = workspace + tl.load(row + PACKED)
    kernel, step, tap_step = kernel_view(
        row, tensors, tl.load(row + DIRECT), packed, width, group
    )  # fmt: skip
    m = tl.load(item + 2) // BLOCK_M * BLOCK_M + tl.arange(0, BLOCK_M)
    j = tl.load(item + 3) * BLOCK_N + tl.arange(0, BLOCK_N)
    n0, n1, n2 = tl.load(item + 11), tl.load(item + 12), tl.load(item + 13)
    present = j < n0 * n1 * n2
    x0, x1, x2 = j // (n1 * n2), j // n2 % n1, j % n2
    if ADJOINT:
        inner, outer = rows, channels
        l0, l1, l2 = extents(row, OUT)
        points = whole(row, OUT_POINTS)
        s0, s1, s2 = 1, 1, 1
        w0, w1, w2 = 0, 0, 0
    else:
        inner, outer = channels, rows
        l0, l1, l2 = extents(row, IN)
        points = whole(row, IN_POINTS)
        s0, s1, s2 = extents(row, STRIDE)
        circular = whole(row, CIRCULAR)
        w0, w1, w2 = circular * l0, circular * l1, circular * l2
    source += (group * inner).to(tl.int64) * points
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for number in range(first, last):
        visit = visits + number * VISIT_WIDTH
        i0 = wrapped(x0 * s0 + tl.load(visit + 1), l0, w0)
        i1 = wrapped(x1 * s1 + tl.load(visit + 2), l1, w1)
        i2 = wrapped(x2 * s2 + tl.load(visit + 3), l2, w2)
        reads = present & (i0 >= 0) & (i0 < l0) & (i1 >= 0) & (i1 < l1) & (i2 >= 0) & (i2 < l2)
        here = source + ((i0 * l1 + i1) * l2 + i2)
        tap = tl.multiple_of(kernel + tl.load(visit).to(tl.int64) * tap_step, 16)
        for k_start in range(0, inner, BLOCK_K):
            k = k_start + tl.arange(0, BLOCK_K)
            # Positions come first, so that neighbouring threads read neighbouring ones.
            x = tl.load(
                here[:, None] + k[None, :] * points,
                reads[:, None] & (k < inner)[None, :],
                other=0.0,
            )
            if ADJOINT:
                w = tl.load(
                    tap + (k[:, None] * step + m[None, :]),
                    (k < inner)[:, None] & (m < width)[None, :], other=0.0,
                )  # fmt: skip
                w = tl.trans(w)
            else:
                w = tl.load(
                    tap + (m[:, None] * step + k[None, :]),
                    (m < outer)[:, None] & (k < width)[None, :], other=0.0,
                )  # fmt: skip
            total = tl.dot(w, tl.trans(x * inverse), total, input_precision=PRECISION)
    if ADJOINT:
        t0, t1, t2 = extents(row, IN)
        a0, a1, a2 = extents(row, STRIDE)
        x0 = tl.load(item + 8) + a0 * x0
        x1 = tl.load(item + 9) + a1 * x1
        x2 = tl.load(item + 10) + a2 * x2
    else:
        t0, t1, t2 = extents(row, OUT)
    inside = (m < outer)[:, None] & present[None, :]
    target += (group * outer).to(tl.int64) * (t0 * t1 * t2)
    at = m[:, None] * (t0 * t1 * t2) + ((x0 * t1 + x1) * t2 + x2)[None, :]
    tl.store(target + at, total, inside)
    kept = tl.where(inside, total, 0.0).to(tl.float64)
    tl.store(squares, tl.sum(tl.sum(kept * kept, 1), 0))


@triton.jit
def wrapped(i, length, period):
    """Positions beyond either end of a circular axis; period 0 leaves them where they are."""
    i = tl.where(i < 0, i + period, i)
    return tl.where(i >= length, i - period, i)


def product_geometry(precision: str) -> dict[str, int]:
    """Launch options; a third stage of float32 would spill."""
    return {"num_warps": 8, "num_stages": 2 if precision == "ieee" else 3}


def shipped() -> list[Specialization]:
    found = [specialized(operator_pack, "any network", PACK_GEOMETRY)]
    products = (("A v", False, False), ("A v, no update", False, True), ("A^T u", True, True))
    for label, second, last in products:
        for precision in ("ieee", "tf32"):
            constants = {"SECOND": second, "LAST": last, "PRECISION": precision}
            label_here = f"{label}, {precision}"
            geometry = product_geometry(precision)
            found.append(specialized(operator_product, label_here, geometry, **constants))
    return found
