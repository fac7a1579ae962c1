# SPDX-License-Identifier: MIT
"""Engine ``symbol``, last of three launches: sum the tiles, find frequencies, advance, read sigma.

One program per 32 channels of a group sums its columns of A^T y over the row tiles in their order,
and its part of the response q_t. The program that finds all others of its group done (an integer
counter, reset by the first launch) goes on with the group: lengths, the search over frequencies,
the new x, the explorer. The one that finds all groups of its operator done reads sigma and keeps
what the gradient needs. Which program that is has no effect on any bit: it reads what all have
written, in a fixed order. No float is added across programs.

Floor: the partial sums of the pass once (see symbol_pass), which are an eighth of the weights'
bytes; the rest is a chain of short dependent steps, one program per group at a time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lmtfast.kernels.arrival import last_of
from lmtfast.kernels.channel_scale import scale_of
from lmtfast.kernels.descriptor import (
    AXES,
    CENTRE,
    CHANNELS,
    COLUMN_SCALE,
    GROUPS,
    IDENTITY,
    NUMBER,
    ROWS,
    SAVED,
    SLOT,
    TAPS,
    TENSOR_WIDTH,
    power_of_two,
    real,
    specialized,
    whole,
)
from lmtfast.kernels.frequency_search import (
    BLOCK_TAPS,
    FOUND,
    LENGTH,
    PRESENT,
    REACHED,
    SCALE,
    circles,
    keep_circles,
    kept_circles,
    search,
    store_circles,
    tap_offsets,
    tap_phases,
    turn,
)
from lmtfast.kernels.matrix import finish_matrix
from lmtfast.kernels.specialization import Specialization
from lmtfast.kernels.symbol_pass import state_of_group
from lmtfast.kernels.symbol_work import (
    ADJOINT,
    BLOCK_CHANNELS,
    BLOCKS,
    COUNTER,
    EXPONENTS,
    FRESH,
    IMAGE,
    LENGTHS,
    PARTIALS,
    PARTS,
    PHASES,
    PLANES,
    PRODUCT,
    RESPONSES,
    SCRATCH,
    SCRATCH_SIZE,
    SLOTS,
    SYMBOL_WIDTH,
    TAP_TABLE,
    TAP_WIDTH,
    TILES,
    TURNED,
    USED,
    VALUES,
    F,
    Z,
)

BLOCK_C = tl.constexpr(BLOCK_CHANNELS)
BLOCK_BACK = tl.constexpr(64)
BLOCK = tl.constexpr(256)
BLOCK_GROUPS = tl.constexpr(64)
STALLED = tl.constexpr(1e-3)  # as lmtfast/engines/symbol.py
# Roots of x^(axes + 1) = x + 1, whose inverse powers are the steps of the explorer (as there).
ROOT_1 = tl.constexpr(1.6180339887498949)
ROOT_2 = tl.constexpr(1.3247179572447461)
ROOT_3 = tl.constexpr(1.2207440846057596)
TWO_PI = tl.constexpr(6.283185307179586)


@triton.jit
def symbol_finish(
    operators, tensors, blocks, tap_table, root_table, state, saved, workspace, counters,
    sigmas, new_state,
    UPDATE: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Sigma and what the gradient needs; with UPDATE the new state."""
    item = blocks + tl.program_id(0) * 3
    row = operators + tl.load(item) * SYMBOL_WIDTH
    group, block = tl.load(item + 1), tl.load(item + 2)
    counter = counters + tl.load(row + COUNTER)
    tap_major = tl.load(tensors + tl.load(row + SLOT) * TENSOR_WIDTH + 3) != 0
    last_of_group = block == 0
    exponent = 0
    if UPDATE:
        exponent = largest_exponent(row, workspace, group)
        collect(row, group, block, exponent, tap_major, tap_table, state, saved, workspace)
        last_of_group = last_of(counter + group, whole(row, BLOCKS))
    if last_of_group:
        if whole(row, PARTS) == 1:
            finish_matrix(row, exponent, saved, workspace, sigmas, new_state, UPDATE)
        else:
            before = lengths_of_image(row, group, workspace)
            f = tl.arange(0, F)
            tl.store(workspace + tl.load(row + VALUES) + group * F + f, before.to(tl.float32))
            if UPDATE:
                scratch = workspace + tl.load(row + SCRATCH)
                scratch += group.to(tl.int64) * (2 * SCRATCH_SIZE)
                scratch = scratch.to(tl.pointer_type(tl.float64), bitcast=True)
                tl.store(scratch + LENGTH + f, before)
                q = total_response(row, group, state, workspace, scratch)
                search(row, q, tap_table, root_table, scratch, BITS)
                turn_back(row, group, tap_major, tap_table, workspace, scratch, BITS)
                advance(row, group, exponent, state, workspace, scratch, new_state)
            if last_of(counter + whole(row, GROUPS), whole(row, GROUPS)):
                keep_winner(row, tap_major, saved, workspace, sigmas)


@triton.jit
def largest_exponent(row, workspace, group):
    """The largest of the tiles' exponents, int32."""
    tiles = whole(row, TILES)
    exponents = workspace + tl.load(row + EXPONENTS) + group * tiles
    largest = tl.full((), -200.0, tl.float32)
    for start in range(0, tiles, BLOCK):
        i = start + tl.arange(0, BLOCK)
        part = tl.load(exponents + i, i < tiles, other=-200.0)
        largest = tl.maximum(largest, tl.max(part, 0))
    return largest.to(tl.int32)


@triton.jit(noinline=True)
def collect(row, group, block, exponent, tap_major, tap_table, state, saved, workspace):
    """A^T y times 2 ** -exponent for one block of channels, and its part of the response."""
    channels, n_taps, rows = whole(row, CHANNELS), whole(row, TAPS), whole(row, ROWS)
    columns, tiles, n_blocks = channels * n_taps, whole(row, TILES), whole(row, BLOCKS)
    f, parts, used = tl.arange(0, F), whole(row, PARTS), whole(row, USED)
    c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    scale = scale_of(saved, tl.load(row + COLUMN_SCALE), group * channels + c, c < channels)
    identity = real(row, IDENTITY).to(tl.float32)
    centre = whole(row, CENTRE)
    base, width = state_of_group(row, state, group)
    x = base + f * width + 2 * whole(row, AXES)
    inverse = tl.load(workspace + tl.load(row + LENGTHS) + group * F + f)[:, None, None]
    first_tile = group * tiles
    partials = workspace + tl.load(row + PARTIALS)
    planes = group.to(tl.int64) * PLANES
    adjoint = workspace + tl.load(row + ADJOINT) + planes * columns
    image = workspace + tl.load(row + IMAGE) + planes * rows
    responses = workspace + tl.load(row + RESPONSES)
    responses += (group.to(tl.int64) * (n_blocks + 1) + block) * PLANES * n_taps
    for t_start in range(0, n_taps, BLOCK_TAPS):
        t = t_start + tl.arange(0, BLOCK_TAPS)
        inside = (c < channels)[:, None] & (t < n_taps)[None, :]
        k = c[:, None] * n_taps + t[None, :]
        if tap_major:
            k = t[None, :] * channels + c[:, None]
        at = f[:, None, None] * columns + k[None, :, :]
        every = inside[None, :, :] & (f < used)[:, None, None]
        re = tl.zeros((F, BLOCK_C, BLOCK_TAPS), tl.float32)
        im = tl.zeros((F, BLOCK_C, BLOCK_TAPS), tl.float32)
        for tile in range(first_tile, first_tile + tiles):
            factor = power_of_two(
                tl.load(workspace + tl.load(row + EXPONENTS) + tile).to(tl.int32) - exponent
            )
            part = partials + columns.to(tl.int64) * used * tile
            re += factor * tl.load(part + at, every, other=0.0)
            im += factor * tl.load(part + F * columns + at, every & (parts > 1), other=0.0)
        re, im = re * scale[None, :, None], im * scale[None, :, None]
        if identity != 0:
            here = every & (t == centre)[None, None, :]
            y = image + f[:, None, None] * rows + tl.broadcast_to(c[:, None], k.shape)[None, :, :]
            part = identity * power_of_two(-exponent)
            re += part * tl.load(y, here, other=0.0)
            im += part * tl.load(y + F * rows, here, other=0.0)
        tl.store(adjoint + at, re, every)
        tl.store(adjoint + F * columns + at, im, every)
        if parts > 1:
            taps = tap_table + tl.load(row + TAP_TABLE)
            phase = tl.load(taps + t * TAP_WIDTH + 3, t < n_taps, other=0)
            source = x[:, None, None] + 2 * (phase[None, :] * channels + c[:, None])[None, :, :]
            x_re = tl.load(source, every, other=0.0) * inverse
            x_im = tl.load(source + 1, every, other=0.0) * inverse
            q = f[:, None] * n_taps + t[None, :]
            here = (f >= 0)[:, None] & (t < n_taps)[None, :]
            tl.store(responses + q, tl.sum(re * x_re + im * x_im, 1), here)
            tl.store(responses + F * n_taps + q, tl.sum(re * x_im - im * x_re, 1), here)


@triton.jit
def lengths_of_image(row, group, workspace):
    """||y|| of the candidates, (F,) float64."""
    rows, f = whole(row, ROWS), tl.arange(0, F)
    image = workspace + tl.load(row + IMAGE) + group.to(tl.int64) * PLANES * rows
    squares = tl.zeros((F, BLOCK), tl.float64)
    for start in range(0, rows, BLOCK):
        r = start + tl.arange(0, BLOCK)
        inside = (r < rows)[None, :] & (f >= 0)[:, None]
        at = image + (f[:, None] * rows + r[None, :])
        re = tl.load(at, inside, other=0.0).to(tl.float64)
        im = tl.load(at + F * rows, inside, other=0.0).to(tl.float64)
        squares += re * re + im * im
    return tl.sqrt(tl.sum(squares, 1))


@triton.jit
def total_response(row, group, state, workspace, scratch):
    """Sums the blocks' responses in order and returns where they are; keeps the inverse of the
    largest one and the present frequencies."""
    n_taps, n_blocks, f = whole(row, TAPS), whole(row, BLOCKS), tl.arange(0, F)
    parts = workspace + tl.load(row + RESPONSES)
    parts += group.to(tl.int64) * (n_blocks + 1) * PLANES * n_taps
    total = parts + n_blocks * PLANES * n_taps
    largest = tl.zeros((F,), tl.float64)
    for start in range(0, n_taps, BLOCK_TAPS):
        t = start + tl.arange(0, BLOCK_TAPS)
        inside = (t < n_taps)[None, :] & (f >= 0)[:, None]
        at = f[:, None] * n_taps + t[None, :]
        re = tl.zeros((F, BLOCK_TAPS), tl.float32)
        im = tl.zeros((F, BLOCK_TAPS), tl.float32)
        for block in range(0, n_blocks):
            part = parts + block * PLANES * n_taps
            re += tl.load(part + at, inside, other=0.0)
            im += tl.load(part + F * n_taps + at, inside, other=0.0)
        tl.store(total + at, re, inside)
        tl.store(total + F * n_taps + at, im, inside)
        wide_re, wide_im = re.to(tl.float64), im.to(tl.float64)
        largest = tl.maximum(largest, tl.max(tl.sqrt(wide_re * wide_re + wide_im * wide_im), 1))
    tl.store(scratch + SCALE + f, tl.where(largest > 0, 1.0 / largest, 1.0))
    base, width = state_of_group(row, state, group)
    c, s = circles(base + f * width, whole(row, AXES), f >= 0)
    keep_circles(scratch, PRESENT, c, s)
    return total


@triton.jit(noinline=True)
def advance(row, group, exponent, state, workspace, scratch, new_state):
    """The group's part of the new state."""
    f, axes = tl.arange(0, F), whole(row, AXES)
    base, width = state_of_group(row, state, group)
    before, raw = tl.load(scratch + LENGTH + f), tl.load(scratch + REACHED + f)
    c, s = kept_circles(scratch, PRESENT)
    new_c, new_s = kept_circles(scratch, FOUND)
    # The image was y / ||y|| in truth, and 2 ** exponent times what was summed.
    reached = raw / tl.where(before == 0, 1.0, before) * power_of_two(exponent).to(tl.float64)
    usable = (reached > 0) & (reached < float("inf"))
    c, s = tl.where(usable[:, None], new_c, c), tl.where(usable[:, None], new_s, s)

    explorer = f == F - 1
    after = only(reached, explorer)
    stalled = tl.where(after <= only(before, explorer) * (1.0 + STALLED), 1, 0)
    others = tl.where(explorer, float("inf"), reached)
    comparable = tl.where(tl.sum((reached != reached).to(tl.int32), 0) == 0, 1, 0)
    lowest, worst = tl.min(tl.where(others == others, others, float("inf")), 0, return_indices=True)
    better = tl.where(after > lowest, 1, 0) * comparable * stalled
    promoted = (better != 0) & (f == worst)
    c = tl.where(promoted[:, None], only_row(c, explorer), c)
    s = tl.where(promoted[:, None], only_row(s, explorer), s)
    # The anchor lies behind the candidates; an explorer that has stalled starts at the next one.
    one = tl.arange(0, 1)
    anchor_c, anchor_s = circles(base + F * width + one, axes, one >= 0)
    steps = tl.where(stalled != 0, anchor_steps(axes), 0.0)
    anchor_c, anchor_s = turn(anchor_c, anchor_s, steps)
    restart = explorer & (stalled != 0)
    c = tl.where(restart[:, None], anchor_c, c)
    s = tl.where(restart[:, None], anchor_s, s)

    target, width = state_of_group(row, new_state, group)
    store_circles(target + f * width, axes, f >= 0, c, s)
    store_circles(target + F * width + one, axes, one >= 0, anchor_c, anchor_s)
    source = tl.where(promoted, F - 1, f)
    lengths = tl.load(workspace + tl.load(row + LENGTHS) + group * F + f)
    # Per source: whether its new x is taken, and what brings it to unit length.
    inverse = tl.where(usable, 1.0 / raw, lengths.to(tl.float64))
    size = width - 2 * axes
    fresh = workspace + tl.load(row + FRESH) + group.to(tl.int64) * F * size
    for j in range(0, F):
        chosen = tl.sum(tl.where(f == j, source, 0), 0)
        taken = tl.sum(((f == chosen) & usable).to(tl.int32), 0) > 0
        factor = only(inverse, f == chosen)
        shift = tl.where(j == F - 1, 2 * stalled, 0)
        for start in range(0, size, BLOCK):
            i = start + tl.arange(0, BLOCK)
            # A shifted singular vector is as good a start as a random one.
            k = tl.where(i < shift, i - shift + size, i - shift)
            new = tl.load(fresh + chosen * size + k, (i < size) & taken, other=0.0)
            old = tl.load(base + chosen * width + 2 * axes + k, (i < size) & ~taken, other=0.0)
            value = (tl.where(taken, new, old).to(tl.float64) * factor).to(tl.float32)
            tl.store(target + j * width + 2 * axes + i, value, i < size)


@triton.jit
def only(x, mask):
    """The entry of x where the mask, which is true once, is true."""
    return tl.sum(tl.where(mask, x, 0.0), 0)


@triton.jit
def only_row(x, mask):
    """The row of x, (F, n), where the mask is true, as (1, n)."""
    return tl.sum(tl.where(mask[:, None], x, 0.0), 0)[None, :]


@triton.jit
def anchor_steps(axes):
    """Angles by which the anchor moves, (1, SLOTS): powers of the inverse root, right-aligned."""
    a = tl.arange(0, SLOTS)[None, :] - 3 + axes
    inverse = tl.where(axes == 1, 1 / ROOT_1, tl.where(axes == 2, 1 / ROOT_2, 1 / ROOT_3))
    inverse = inverse.to(tl.float64) + tl.zeros((1, SLOTS), tl.float64)
    power = tl.where(a >= 1, inverse * inverse, inverse)
    return TWO_PI * tl.where(a >= 2, power * inverse, power)


@triton.jit(noinline=True)
def turn_back(row, group, tap_major, tap_table, workspace, scratch, BITS: tl.constexpr):
    """A(w)^H y at the frequencies found, and its lengths."""
    cosine, sine = kept_circles(scratch, FOUND)
    channels, n_taps, phases = whole(row, CHANNELS), whole(row, TAPS), whole(row, PHASES)
    columns, f = channels * n_taps, tl.arange(0, F)
    planes = group.to(tl.int64) * PLANES
    adjoint = workspace + tl.load(row + ADJOINT) + planes * columns
    turned = workspace + tl.load(row + TURNED) + planes * n_taps
    fresh = workspace + tl.load(row + FRESH) + planes * phases * channels
    taps = tap_table + tl.load(row + TAP_TABLE)
    for t_start in range(0, n_taps, BLOCK_TAPS):
        t = t_start + tl.arange(0, BLOCK_TAPS)
        inside = (t < n_taps)[None, :] & (f >= 0)[:, None]
        e_re, e_im = tap_phases(cosine, sine, tap_offsets(taps, t, t < n_taps), BITS)
        at = f[:, None] * n_taps + t[None, :]
        tl.store(turned + at, e_re.to(tl.float32), inside)
        tl.store(turned + F * n_taps + at, e_im.to(tl.float32), inside)
    tl.debug_barrier()
    squares = tl.zeros((F, BLOCK_BACK), tl.float64)
    for p in range(0, phases):
        for c_start in range(0, channels, BLOCK_BACK):
            c = c_start + tl.arange(0, BLOCK_BACK)
            x_re = tl.zeros((F, BLOCK_BACK), tl.float32)
            x_im = tl.zeros((F, BLOCK_BACK), tl.float32)
            for t_start in range(0, n_taps, BLOCK_TAPS):
                t = t_start + tl.arange(0, BLOCK_TAPS)
                phase = tl.load(taps + t * TAP_WIDTH + 3, t < n_taps, other=-1)
                inside = (c < channels)[:, None] & (phase == p)[None, :]
                k = c[:, None] * n_taps + t[None, :]
                if tap_major:
                    k = t[None, :] * channels + c[:, None]
                every = inside[None, :, :] & (f >= 0)[:, None, None]
                at = f[:, None, None] * columns + k[None, :, :]
                re = tl.load(adjoint + at, every, other=0.0)
                im = tl.load(adjoint + F * columns + at, every, other=0.0)
                here = (phase == p)[None, :] & (f >= 0)[:, None]
                at = f[:, None] * n_taps + t[None, :]
                e_re = tl.load(turned + at, here, other=0.0)[:, None, :]
                e_im = tl.load(turned + F * n_taps + at, here, other=0.0)[:, None, :]
                x_re += tl.sum(re * e_re + im * e_im, 2)
                x_im += tl.sum(im * e_re - re * e_im, 2)
            at = fresh + (f[:, None] * (2 * phases * channels) + 2 * (p * channels + c)[None, :])
            inside = (c < channels)[None, :] & (f >= 0)[:, None]
            tl.store(at, x_re, inside)
            tl.store(at + 1, x_im, inside)
            wide_re, wide_im = x_re.to(tl.float64), x_im.to(tl.float64)
            squares += wide_re * wide_re + wide_im * wide_im
    tl.store(scratch + REACHED + f, tl.sqrt(tl.sum(squares, 1)))
    tl.debug_barrier()


@triton.jit(noinline=True)
def keep_winner(row, tap_major, saved, workspace, sigmas):
    """Sigma, and the group, u, z and W diag(column scale) z of the best candidate of all groups."""
    groups, rows = whole(row, GROUPS), whole(row, ROWS)
    channels, n_taps = whole(row, CHANNELS), whole(row, TAPS)
    columns = channels * n_taps
    values = workspace + tl.load(row + VALUES)
    best = tl.full((), -1.0, tl.float32)
    winner = tl.full((), 0, tl.int32)
    for start in range(0, groups * F, BLOCK_GROUPS):
        i = start + tl.arange(0, BLOCK_GROUPS)
        value = tl.load(values + i, i < groups * F, other=-1.0)
        # What is not a number wins, so that it is seen.
        value = tl.where(value == value, value, float("inf"))
        here, at = tl.max(value, 0, return_indices=True)
        winner = tl.where(here > best, start + at, winner)
        best = tl.where(here > best, here, best)
    sigma = tl.load(values + winner)
    tl.store(sigmas + tl.load(row + NUMBER), sigma)
    group, f = winner // F, winner % F
    kept = saved + tl.load(row + SAVED)
    tl.store(kept, group.to(tl.float32))
    safe = tl.where(sigma == 0, 1.0, sigma).to(tl.float64)
    planes = group.to(tl.int64) * PLANES
    image = workspace + tl.load(row + IMAGE) + (planes + f) * rows
    product = workspace + tl.load(row + PRODUCT) + (planes + f) * rows
    u, p = kept + 1, kept + 1 + 2 * rows + 2 * columns
    for start in range(0, rows, BLOCK):
        r = start + tl.arange(0, BLOCK)
        y_re = tl.load(image + r, r < rows, other=0.0).to(tl.float64)
        y_im = tl.load(image + F * rows + r, r < rows, other=0.0).to(tl.float64)
        tl.store(u + 2 * r, (y_re / safe).to(tl.float32), r < rows)
        tl.store(u + 2 * r + 1, (y_im / safe).to(tl.float32), r < rows)
        tl.store(p + 2 * r, tl.load(product + r, r < rows, other=0.0), r < rows)
        tl.store(p + 2 * r + 1, tl.load(product + F * rows + r, r < rows, other=0.0), r < rows)
    z = workspace + tl.load(row + Z) + (planes + f) * columns
    target = kept + 1 + 2 * rows
    for start in range(0, columns, BLOCK):
        i = start + tl.arange(0, BLOCK)
        k = i
        if tap_major:
            k = i % n_taps * channels + i // n_taps
        inside = i < columns
        tl.store(target + 2 * i, tl.load(z + k, inside, other=0.0), inside)
        tl.store(target + 2 * i + 1, tl.load(z + F * columns + k, inside, other=0.0), inside)


FINISH_GEOMETRY = {"num_warps": 8}


def shipped() -> list[Specialization]:
    """Reading sigma alone; offsets up to 3 and up to 31."""
    return [specialized(symbol_finish, "no update", FINISH_GEOMETRY, UPDATE=False, BITS=2)] + [
        specialized(symbol_finish, f"{bits} bits", FINISH_GEOMETRY, UPDATE=True, BITS=bits)
        for bits in (2, 5)
    ]
