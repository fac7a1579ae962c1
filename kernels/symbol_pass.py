# SPDX-License-Identifier: MIT
"""Engine ``symbol``, first two of three launches: the vectors z, and one pass over all weights.

The definition is :mod:`lmtfast.engines.symbol`; all operators of a network are in each launch, and
the matrices that power iteration runs (:mod:`lmtfast.kernels.matrix`).

``symbol_prepare``: one program per candidate normalises its x and writes z, one per 256 channels
writes a piece of the scale buffer, one per diagonal map its scale and its norm.

``symbol_pass``: one program per tile of rows. With the four real columns of the two candidates'
z it forms y = A z for its rows, keeps it, and adds the rows up again, weighted by y: its part of
A^T y, unnormalised but for a power of two that brings the tile's largest entry to [1, 2). So no
square over- or underflows, and no program waits for another. Nothing is added across programs here.

Floor: every weight once from memory, 36.5 M of WRN-28-10 in 34 us at 4.3 TB/s, and 16 flop per
weight in float32, 9 us at 67 TFLOP/s. The second reading of a tile comes from L2 where the tiles
in flight fit there; z is read once per 32 rows and the partial sums written once per tile, an
eighth of the weights' bytes each at 32 rows per tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lmtfast.kernels.channel_scale import fill_scales, scale_of, scale_product
from lmtfast.kernels.descriptor import (
    AXES,
    CENTRE,
    CHANNELS,
    COLUMN_FIRST,
    COLUMN_LAST,
    COLUMN_SCALE,
    DTYPE_NAMES,
    GROUPS,
    IDENTITY,
    ROW_SCALE,
    ROWS,
    SLOT,
    STATE,
    TAPS,
    TENSOR_WIDTH,
    entries,
    exponent_of,
    power_of_two,
    real,
    specialized,
    whole,
)
from lmtfast.kernels.frequency_search import BLOCK_TAPS, circles, tap_offsets, tap_phases
from lmtfast.kernels.scale_work import SCALE_BLOCK
from lmtfast.kernels.specialization import Specialization
from lmtfast.kernels.symbol_work import (
    CARRIED,
    COUNTER,
    EXPONENTS,
    IMAGE,
    LENGTHS,
    PARTIALS,
    PARTS,
    PHASES,
    PLANES,
    PRODUCT,
    SYMBOL_WIDTH,
    TAP_TABLE,
    TAP_WIDTH,
    TILE_ROWS,
    TILES,
    USED,
    Z_CENTRE,
    Z_SCALED,
    F,
    Z,
)
from lmtfast.kernels.vector import inverse_of, length_of

BLOCK_C = tl.constexpr(64)
ROWS_AT_ONCE = tl.constexpr(TILE_ROWS)


@triton.jit
def state_of_group(row, state, group):
    """Where a group's part of the state starts, and the entries of one candidate."""
    axes, x_size = whole(row, AXES), whole(row, PARTS) * whole(row, PHASES) * whole(row, CHANNELS)
    width = 2 * axes + x_size
    first = tl.load(row + STATE) + group.to(tl.int64) * (F * width + 2 * axes)
    return state + first, width


@triton.jit(do_not_specialize=["n_vectors"])
def symbol_prepare(
    operators, tensors, factors, stretches, vectors, tap_table, state, saved, workspace, counters,
    sigmas, n_vectors,
    BITS: tl.constexpr, SCALE_BLOCK: tl.constexpr,
):  # fmt: skip
    """z of every candidate, inverse lengths of x, zero counters; and the scale buffer."""
    item = tl.program_id(0)
    if item < n_vectors:
        row = operators + tl.load(vectors + item * 3) * SYMBOL_WIDTH
        group, f = tl.load(vectors + item * 3 + 1), tl.load(vectors + item * 3 + 2)
        if f == 0:
            tl.store(counters + tl.load(row + COUNTER) + group, 0)
            # One past the groups': every program writes the same.
            tl.store(counters + tl.load(row + COUNTER) + whole(row, GROUPS), 0)
        candidate_vector(
            row, group, f, tensors, factors, tap_table, state, workspace, BITS
        )  # fmt: skip
    else:
        fill_scales(tensors, factors, stretches, item - n_vectors, saved, sigmas, SCALE_BLOCK)


@triton.jit
def candidate_vector(
    row, group, f, tensors, factors, tap_table, state, workspace, BITS: tl.constexpr
):  # fmt: skip
    axes, channels, n_taps = whole(row, AXES), whole(row, CHANNELS), whole(row, TAPS)
    columns, parts = channels * n_taps, whole(row, PARTS)
    tap_major = tl.load(tensors + tl.load(row + SLOT) * TENSOR_WIDTH + 3) != 0
    base, width = state_of_group(row, state, group)
    base += f * width
    x = base + 2 * axes
    inverse = inverse_of(length_of(x, width - 2 * axes))
    tl.store(workspace + tl.load(row + LENGTHS) + group * F + f, inverse)

    one = tl.arange(0, 1)
    cosine, sine = circles(base + one, axes, one >= 0)
    taps = tap_table + tl.load(row + TAP_TABLE)
    planes = group.to(tl.int64) * PLANES * columns
    z = workspace + tl.load(row + Z) + planes
    scaled = workspace + tl.load(row + Z_SCALED) + planes
    has_scale = tl.load(row + COLUMN_SCALE) >= 0
    first, last = whole(row, COLUMN_FIRST), whole(row, COLUMN_LAST)
    for c_start in range(0, channels, BLOCK_C):
        c = c_start + tl.arange(0, BLOCK_C)
        for t_start in range(0, n_taps, BLOCK_TAPS):
            t = t_start + tl.arange(0, BLOCK_TAPS)
            e_re, e_im = tap_phases(cosine, sine, tap_offsets(taps, t, t < n_taps), BITS)
            e_re, e_im = e_re.to(tl.float32), e_im.to(tl.float32)  # (1, taps)
            phase = tl.load(taps + t * TAP_WIDTH + 3, t < n_taps, other=0)
            inside = (c < channels)[:, None] & (t < n_taps)[None, :]
            at = parts * (phase[None, :] * channels + c[:, None])
            x_re = tl.load(x + at, inside, other=0.0) * inverse
            x_im = tl.load(x + at + 1, inside & (parts > 1), other=0.0) * inverse
            z_re, z_im = x_re * e_re - x_im * e_im, x_re * e_im + x_im * e_re
            k = c[:, None] * n_taps + t[None, :]
            if tap_major:
                k = t[None, :] * channels + c[:, None]
            tl.store(z + f * columns + k, z_re, inside)
            tl.store(z + (F + f) * columns + k, z_im, inside)
            if has_scale:
                scale = scale_product(
                    tensors, factors, first, last, -1, group * channels + c, c < channels
                ).to(tl.float32)[:, None]  # fmt: skip
                tl.store(scaled + f * columns + k, z_re * scale, inside)
                tl.store(scaled + (F + f) * columns + k, z_im * scale, inside)
            # Rows are channels where there is an identity.
            if tl.load(row + Z_CENTRE) >= 0:
                identity = real(row, IDENTITY).to(tl.float32)
                centre = inside & (t == whole(row, CENTRE))[None, :]
                kept = workspace + tl.load(row + Z_CENTRE)
                kept += group.to(tl.int64) * PLANES * channels
                across = tl.broadcast_to(c[:, None], k.shape)
                tl.store(kept + f * channels + across, identity * z_re, centre)
                tl.store(kept + (F + f) * channels + across, identity * z_im, centre)


@triton.jit
def symbol_pass(
    operators, tensors, tiles, saved, workspace,
    UPDATE: tl.constexpr, DTYPES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """y of a tile's rows, and with UPDATE the tile's part of A^T y."""
    item = tiles + tl.program_id(0) * 5
    row = operators + tl.load(item) * SYMBOL_WIDTH
    tensor = tensors + tl.load(row + SLOT) * TENSOR_WIDTH
    if tl.load(tensor + 4) != 0:
        tile_pass(row, tensors, item, saved, workspace, UPDATE, DTYPES, COLUMNS, True)
    else:
        tile_pass(row, tensors, item, saved, workspace, UPDATE, DTYPES, COLUMNS, False)


@triton.jit
def tile_pass(
    row, tensors, item, saved, workspace,
    UPDATE: tl.constexpr, DTYPES: tl.constexpr, COLUMNS: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    group, tile = tl.load(item + 1), tl.load(item + 2)
    first, last = tl.load(item + 3), tl.load(item + 4)
    tensor = tensors + tl.load(row + SLOT) * TENSOR_WIDTH
    address, code = tl.load(tensor), tl.load(tensor + 1)
    rows, columns = whole(row, ROWS), whole(row, CHANNELS) * whole(row, TAPS)
    if ALIGNED:
        # Rows are multiples of 16 bytes: eight entries of a 16-bit type, four of float32.
        columns = columns // 8 * 8 if DTYPES > 0 else columns // 4 * 4
    begin = (group * rows).to(tl.int64) * columns
    scaled = workspace + tl.load(row + Z_SCALED) + group.to(tl.int64) * PLANES * columns
    planes = group.to(tl.int64) * PLANES * rows
    plane, used = tl.arange(0, PLANES), whole(row, USED)
    there = (plane < used)[None, :]
    scales = tl.load(row + ROW_SCALE)
    centre = tl.load(row + Z_CENTRE)
    product = workspace + tl.load(row + PRODUCT) + planes
    image = workspace + tl.load(row + IMAGE) + planes
    largest = tl.full((), 0.0, tl.float32)
    for r_start in range(first, last, ROWS_AT_ONCE):
        within = tl.arange(0, ROWS_AT_ONCE)
        r = r_start + within
        inside = r < last
        start = begin + columns.to(tl.int64) * r_start
        p = tl.zeros((ROWS_AT_ONCE, PLANES), tl.float32)
        for k_start in range(0, columns, COLUMNS):
            k = k_start + tl.arange(0, COLUMNS)
            w = entries(
                address, code, start, within[:, None] * columns + k[None, :],
                inside[:, None] & (k < columns)[None, :], DTYPES, ALIGNED,
            )  # fmt: skip
            z = tl.load(
                scaled + (plane[:, None] * columns + k[None, :]),
                (k < columns)[None, :] & (plane < used)[:, None], other=0.0,
            )  # fmt: skip
            p = tl.dot(w, tl.trans(z), p, input_precision="ieee")
        at = plane[None, :] * rows + r[:, None]
        tl.store(product + at, p, inside[:, None])
        y = p * scale_of(saved, scales, group * rows + r, inside)[:, None]
        if centre >= 0:
            y += tl.load(workspace + centre + planes + at, inside[:, None] & there, other=0.0)
        tl.store(image + at, y, inside[:, None])
        largest = tl.maximum(largest, tl.max(tl.max(tl.abs(y), 1), 0))
    if UPDATE:
        exponent = exponent_of(largest)
        tile_index = group * whole(row, TILES) + tile
        tl.store(workspace + tl.load(row + EXPONENTS) + tile_index, exponent.to(tl.float32))
        carried = workspace + tl.load(row + CARRIED) + planes
        # What this program has written it now reads in another order.
        tl.debug_barrier()
        for r_start in range(first, last, ROWS_AT_ONCE):
            r = r_start + tl.arange(0, ROWS_AT_ONCE)
            at = plane[None, :] * rows + r[:, None]
            y = tl.load(image + at, (r < last)[:, None], other=0.0) * power_of_two(-exponent)
            y *= scale_of(saved, scales, group * rows + r, r < last)[:, None]
            tl.store(carried + at, y, (r < last)[:, None])
        tl.debug_barrier()
        partial = workspace + tl.load(row + PARTIALS) + tile_index.to(tl.int64) * used * columns
        wide: tl.constexpr = 2 * COLUMNS if ALIGNED else COLUMNS
        n_chunks = (columns + wide - 1) // wide
        for chunk in range(0, n_chunks):
            # From the end: what was read last is nearest.
            k = (n_chunks - 1 - chunk) * wide + tl.arange(0, wide)
            total = tl.zeros((wide, PLANES), tl.float32)
            for r_start in range(first, last, ROWS_AT_ONCE):
                within = tl.arange(0, ROWS_AT_ONCE)
                r = r_start + within
                start = begin + columns.to(tl.int64) * r_start
                w = entries(
                    address, code, start, within[:, None] * columns + k[None, :],
                    (r < last)[:, None] & (k < columns)[None, :], DTYPES, ALIGNED,
                )  # fmt: skip
                g = tl.load(
                    carried + (plane[None, :] * rows + r[:, None]), (r < last)[:, None], other=0.0
                )
                total = tl.dot(tl.trans(w), g, total, input_precision="ieee")
            at = plane[None, :] * columns + k[:, None]
            tl.store(partial + at, total, (k < columns)[:, None] & there)


PREPARE_GEOMETRY = {"SCALE_BLOCK": SCALE_BLOCK, "num_warps": 4}
PASS_GEOMETRY = {"COLUMNS": 64, "num_warps": 4, "num_stages": 3}


def shipped() -> list[Specialization]:
    """Offsets up to 3 and up to 31; each dtype, and several in one network."""
    reading = specialized(
        symbol_pass, "float32, no update", PASS_GEOMETRY, UPDATE=False, DTYPES=0
    )  # fmt: skip
    found = [reading] + [
        specialized(symbol_prepare, f"{bits} bits", PREPARE_GEOMETRY, BITS=bits) for bits in (2, 5)
    ]
    for name, code in zip((*DTYPE_NAMES, "several dtypes"), (0, 1, 2, -1), strict=True):
        found.append(specialized(symbol_pass, name, PASS_GEOMETRY, UPDATE=True, DTYPES=code))
    return found
