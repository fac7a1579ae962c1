# SPDX-License-Identifier: MIT
"""A matrix under power iteration in the launches of the symbol engine: what it does not share.

The definition is :mod:`lmtfast.engines.operator`. The pass and the sums over its tiles take a
matrix as an operator of one tap, whose only vector v is real; no frequency is searched. Saved are u
and the new v, whose product with the weights no launch has formed.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lmtfast.kernels.channel_scale import scale_of
from lmtfast.kernels.descriptor import (
    CHANNELS,
    COLUMN_SCALE,
    NUMBER,
    ROWS,
    SAVED,
    SLOT,
    STATE,
    TENSOR_WIDTH,
    entries,
    power_of_two,
    whole,
)
from lmtfast.kernels.symbol_work import ADJOINT, IMAGE, PARTS, Z
from lmtfast.kernels.vector import inverse_of, keep_scaled, length_of

BLOCK = tl.constexpr(32)


@triton.jit(noinline=True)
def finish_matrix(row, exponent, saved, workspace, sigmas, new_state, UPDATE: tl.constexpr):
    """Sigma, u and v; with UPDATE v is the new iterate, from A^T u times 2 ** -exponent."""
    rows, columns = whole(row, ROWS), whole(row, CHANNELS)
    image, source = workspace + tl.load(row + IMAGE), workspace + tl.load(row + Z)
    u = saved + tl.load(row + SAVED)
    v, target = u + rows, u + rows
    sigma = length_of(image, rows)
    keep_scaled(image, inverse_of(sigma), u, u, rows, 0, 1)
    factor = tl.full((), 1.0, tl.float32)
    if UPDATE:
        back = workspace + tl.load(row + ADJOINT)
        length = length_of(back, columns)
        # The image was y / ||y|| in truth, and 2 ** exponent times what was summed.
        sigma = length / tl.where(sigma == 0, 1.0, sigma) * power_of_two(exponent).to(tl.float64)
        target = new_state + tl.load(row + STATE)
        # Weights that are zero now must not end the iteration, nor may what is not finite.
        if (sigma > 0) & (sigma < float("inf")):
            source, factor = back, inverse_of(length)
    keep_scaled(source, factor, v, target, columns, 0, 1)
    tl.store(sigmas + tl.load(row + NUMBER), sigma.to(tl.float32))


@triton.jit
def kept_pair(row, saved):
    """Of what a step has saved (lmtfast/table.py): the winner's group, where u and z start, and the
    reals per entry of both. A matrix has one group and does not say so."""
    kept, parts = saved + tl.load(row + SAVED), whole(row, PARTS)
    group = tl.load(kept, parts > 1, other=0.0).to(tl.int32)
    u = kept + (parts - 1)
    return group, u, u + parts * whole(row, ROWS), parts


@triton.jit
def saved_image(row, tensors, saved, v, i, mask):
    """Rows i of W diag(column scale) v, float64."""
    columns = whole(row, CHANNELS)
    tensor = tensors + tl.load(row + SLOT) * TENSOR_WIDTH
    address, code = tl.load(tensor), tl.load(tensor + 1)
    first = tl.min(i, 0)
    total = tl.zeros(i.shape, tl.float64)
    for start in range(0, columns, BLOCK):
        c = start + tl.arange(0, BLOCK)
        x = tl.load(v + c, c < columns, other=0.0)
        x *= scale_of(saved, tl.load(row + COLUMN_SCALE), c, c < columns)
        at = (i - first)[:, None] * columns + c[None, :]
        inside = mask[:, None] & (c < columns)[None, :]
        w = entries(address, code, first.to(tl.int64) * columns, at, inside, -1, False)
        total += tl.sum(w * x[None, :], 1).to(tl.float64)
    return total
