# SPDX-License-Identifier: MIT
"""Engine ``symbol``: the gradient of sigma in every weight, and all gradients in scales.

With u, z and p of the winner (csrc/ops/spectral.h), dW = g rs cs (u_re z_re + u_im z_im) in its
group and 0 in the others; g is the gradient that comes in for sigma. One program owns one tile of a
weight tensor and adds the operators that share it in the order of the table. Behind these programs
come those that own entries of the scales' tensors (:mod:`lmtfast.kernels.scale_gradient`). One
launch for all.

Floor: every gradient written once, 34 us for the 146 MB of WRN-28-10 at 4.3 TB/s; u and z are
vectors. Only a column scale that wants a gradient has weights read again, or any of a matrix.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lmtfast.kernels.channel_scale import scale_of
from lmtfast.kernels.descriptor import (
    CHANNELS,
    COLUMN_SCALE,
    DTYPE_NAMES,
    NUMBER,
    ROW_SCALE,
    ROWS,
    TAPS,
    TENSOR_WIDTH,
    specialized,
    store_entries,
    stored_entries,
    whole,
)
from lmtfast.kernels.gradient_work import GRADIENT_COLUMNS, GRADIENT_ROWS
from lmtfast.kernels.matrix import kept_pair
from lmtfast.kernels.scale_gradient import scale_entries
from lmtfast.kernels.specialization import Specialization
from lmtfast.kernels.symbol_work import SYMBOL_WIDTH

BLOCK_ROWS = tl.constexpr(GRADIENT_ROWS)
BLOCK_COLUMNS = tl.constexpr(GRADIENT_COLUMNS)


@triton.jit(do_not_specialize=["n_tiles"])
def symbol_gradient(
    operators, tensors, factors, tiles, sharers, entries, uses, targets, saved, grad_sigmas,
    grad_scales, gradients, n_tiles,
    DTYPES: tl.constexpr,
):  # fmt: skip
    """Tiles of weights' gradients, then blocks of the scales' ones.

    ``targets`` holds per tensor the byte at which its gradient starts in ``gradients``, or -1.
    """
    item = tl.program_id(0)
    if item < n_tiles:
        slot = tl.load(tiles + item * 8)
        target = tl.load(targets + slot)
        if target >= 0:
            if tl.load(tensors + slot * TENSOR_WIDTH + 4) != 0:
                gradient_tile(
                    operators, tensors, tiles + item * 8, sharers, saved, grad_sigmas,
                    gradients + target, DTYPES, True,
                )  # fmt: skip
            else:
                gradient_tile(
                    operators, tensors, tiles + item * 8, sharers, saved, grad_sigmas,
                    gradients + target, DTYPES, False,
                )  # fmt: skip
    else:
        scale_entries(
            operators, tensors, factors, entries + (item - n_tiles) * 4, uses, targets, saved,
            grad_sigmas, grad_scales, gradients,
        )  # fmt: skip


@triton.jit
def gradient_tile(
    operators, tensors, item, sharers, saved, grad_sigmas, place,
    DTYPES: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """The tile (slot, first and last sharer, first and last row, first and last column, whether
    to add to what is there) of one gradient."""
    tensor = tensors + tl.load(item) * TENSOR_WIDTH
    code, tap_major = tl.load(tensor + 1), tl.load(tensor + 3) != 0
    first, last = tl.load(item + 1), tl.load(item + 2)
    row_last, column_last = tl.load(item + 4), tl.load(item + 6)
    some = operators + tl.load(sharers + first) * SYMBOL_WIDTH
    channels, n_taps = whole(some, CHANNELS), whole(some, TAPS)
    columns = channels * n_taps
    if ALIGNED:
        columns = columns // 8 * 8 if DTYPES > 0 else columns // 4 * 4
    for r_start in range(tl.load(item + 3), row_last, BLOCK_ROWS):
        within = tl.arange(0, BLOCK_ROWS)
        r = r_start + within
        start = columns.to(tl.int64) * r_start
        for k_start in range(tl.load(item + 5), column_last, BLOCK_COLUMNS):
            k = k_start + tl.arange(0, BLOCK_COLUMNS)
            c, i = k // n_taps, k
            if tap_major:
                c, i = k % channels, k % channels * n_taps + k // channels
            inside = (r < row_last)[:, None] & (k < columns)[None, :]
            at = within[:, None] * columns + k[None, :]
            total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
            if tl.load(item + 7) != 0:
                total += stored_entries(place, code, start, at, inside, DTYPES, ALIGNED)
            for sharer in range(first, last):
                row = operators + tl.load(sharers + sharer) * SYMBOL_WIDTH
                rows = whole(row, ROWS)
                group, u, z, parts = kept_pair(row, saved)
                local = r - group * rows
                present = (local >= 0) & (local < rows) & (r < row_last)
                scale = scale_of(saved, tl.load(row + ROW_SCALE), r, present)
                scale *= tl.load(grad_sigmas + tl.load(row + NUMBER))
                u += parts * local
                u_re = tl.load(u, present, other=0.0) * scale
                u_im = tl.load(u + 1, present & (parts > 1), other=0.0) * scale
                z += parts * i
                scale = scale_of(
                    saved, tl.load(row + COLUMN_SCALE), group * channels + c, k < columns
                )
                z_re = tl.load(z, k < columns, other=0.0) * scale
                z_im = tl.load(z + 1, (k < columns) & (parts > 1), other=0.0) * scale
                outer = u_re[:, None] * z_re[None, :] + u_im[:, None] * z_im[None, :]
                total += tl.where(present[:, None], outer, 0.0)
            store_entries(place, code, start, at, total, inside, DTYPES, ALIGNED)


GRADIENT_GEOMETRY = {"num_warps": 4}


def shipped() -> list[Specialization]:
    """Each dtype of weights, and several in one network."""
    return [
        specialized(symbol_gradient, name, GRADIENT_GEOMETRY, DTYPES=code)
        for name, code in zip((*DTYPE_NAMES, "several dtypes"), (0, 1, 2, -1), strict=True)
    ]
