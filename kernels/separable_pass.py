# SPDX-License-Identifier: MIT
"""Engine ``separable``: the true operator on iterates sum_k h_k (x) a_k; three launches, two where
nothing is to move.

The definition is :mod:`lmtfast.engines.separable`; all operators are in each launch.

``separable_prepare``  per group orthonormal a, the patterns h and their windows; kernels with
                       scales and identity as (tap, row, channel), unless they can be read in
                       place; the scale buffer
``separable_image``    per tile of rows y = W_t a, and its Gram matrix over taps and terms, scaled
                       by a power of two; the tile that finds all others of its group done goes on
                       with the grid (separable_grid.py): ||A v||, power steps in h, what leads back
``separable_adjoint``  per tile its share of the new a; the group's last one writes the new iterate

Programs count each other in integers, which the first launch has zeroed; which one comes last has
no effect on any bit, and no float is added across programs.

Floor: weights read twice, 68 us for WRN-28-10 at 4.3 TB/s, and packed once. A group's grid is one
program's work: four products of (m, 8 T) and (8 T, 8 T) matrices.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lmtfast.kernels.arrival import last_of
from lmtfast.kernels.channel_scale import fill_scales
from lmtfast.kernels.descriptor import (
    CHANNELS,
    GROUPS,
    NUMBER,
    RANK,
    ROWS,
    SAVED,
    STATE,
    TAPS,
    exponent_of,
    power_of_two,
    specialized,
    whole,
)
from lmtfast.kernels.gradient_work import SEPARABLE_ROWS
from lmtfast.kernels.orthonormal import orthonormalise
from lmtfast.kernels.packing import kernel_view, pack_block, read_in_place
from lmtfast.kernels.scale_work import SCALE_BLOCK
from lmtfast.kernels.separable_grid import (
    fold,
    gather_windows,
    inner_product,
    multiply,
    scale_to_unit,
    square,
)
from lmtfast.kernels.separable_work import (
    ADJOINT_COUNTER,
    CHANNELS_IN,
    DIRECT,
    EXPONENTS,
    GRAM,
    GRAMS,
    IMAGE,
    IMAGE_COUNTER,
    IN_POINTS,
    LANES,
    MIXED_IMAGE,
    MIXED_WINDOWS,
    MIXING,
    MOVED,
    NORMS,
    NORMS_WIDTH,
    OUT_POINTS,
    PACKED,
    PACKED_WIDTH,
    PARTS,
    PATTERNS,
    SEPARABLE_WIDTH,
    TILES,
    TRIANGLE,
    TRIANGLE_SIZE,
    WINDOWS,
)
from lmtfast.kernels.specialization import Specialization

TILE = tl.constexpr(SEPARABLE_ROWS)
BLOCK, BLOCK_C, BLOCK_GROUPS = tl.constexpr(64), tl.constexpr(64), tl.constexpr(64)
FLAT = tl.constexpr(512)
PREPARE_GEOMETRY = {"SCALE_BLOCK": SCALE_BLOCK, "num_warps": 4}
PASS_GEOMETRY = {"num_warps": 8, "num_stages": 2}


@triton.jit
def part_of(row, workspace, FIELD: tl.constexpr, group, size):
    """A group's part of one of the workspace's arrays."""
    return workspace + tl.load(row + FIELD) + group.to(tl.int64) * size


@triton.jit
def state_of_group(row, state, group):
    """A group's part of the state: h (n, rank), then a (C, rank)."""
    size = whole(row, RANK) * (whole(row, IN_POINTS) + whole(row, CHANNELS))
    return state + tl.load(row + STATE) + group.to(tl.int64) * size


@triton.jit(do_not_specialize=["n_groups", "n_packing"])
def separable_prepare(
    operators, tensors, factors, stretches, visits, groups, packing, state, saved, workspace,
    counters, sigmas, n_groups, n_packing,
    SCALE_BLOCK: tl.constexpr,
):  # fmt: skip
    item = tl.program_id(0)
    if item < n_groups:
        row = operators + tl.load(groups + 2 * item) * SEPARABLE_WIDTH
        group = tl.load(groups + 2 * item + 1)
        tl.store(counters + tl.load(row + IMAGE_COUNTER) + group, 0)
        tl.store(counters + tl.load(row + ADJOINT_COUNTER) + group, 0)
        # One past the groups': every program writes the same.
        tl.store(counters + tl.load(row + IMAGE_COUNTER) + whole(row, GROUPS), 0)
        prepare_group(row, group, visits, state, workspace)
    elif item < n_groups + n_packing:
        place = packing + 4 * (item - n_groups)
        row = operators + tl.load(place) * SEPARABLE_WIDTH
        if not read_in_place(row, tensors, tl.load(row + DIRECT)):
            pack_block(
                row, tensors, factors, tl.load(place + 1), tl.load(place + 2), tl.load(place + 3),
                workspace + tl.load(row + PACKED), whole(row, PACKED_WIDTH),
            )  # fmt: skip
    else:
        block = item - n_groups - n_packing
        fill_scales(tensors, factors, stretches, block, saved, sigmas, SCALE_BLOCK)


@triton.jit
def prepare_group(row, group, visits, state, workspace):
    """Orthonormal a, h with a's triangle in it and of length one, and h's windows."""
    channels, inputs, rank = whole(row, CHANNELS), whole(row, IN_POINTS), whole(row, RANK)
    lane = tl.arange(0, LANES)
    h = state_of_group(row, state, group)
    source = h + inputs * rank
    a = part_of(row, workspace, CHANNELS_IN, group, channels * LANES)
    triangle = part_of(row, workspace, TRIANGLE, group, TRIANGLE_SIZE)
    squares = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, channels, BLOCK):
        c = start + tl.arange(0, BLOCK)
        inside = (c < channels)[:, None] & (lane < rank)[None, :]
        x = tl.load(source + (c[:, None] * rank + lane[None, :]), inside, other=0.0)
        tl.store(a + (c[:, None] * LANES + lane[None, :]), x, (c < channels)[:, None])
        wide = x.to(tl.float64)
        squares += tl.sum(wide * wide, 1)
    tl.debug_barrier()
    scale_to_unit(a, channels, tl.sum(squares, 0))
    orthonormalise(a, channels, rank, triangle)
    patterns = part_of(row, workspace, PATTERNS, group, inputs * LANES)
    squares = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, inputs, BLOCK):
        i = start + tl.arange(0, BLOCK)
        total = tl.zeros((BLOCK, LANES), tl.float64)
        for k in range(0, rank):
            x = tl.load(h + i * rank + k, i < inputs, other=0.0).to(tl.float64)
            total += x[:, None] * tl.load(triangle + lane * LANES + k).to(tl.float64)[None, :]
        tl.store(
            patterns + (i[:, None] * LANES + lane[None, :]), total.to(tl.float32),
            (i < inputs)[:, None],
        )  # fmt: skip
        squares += tl.sum(total * total, 1)
    tl.debug_barrier()
    scale_to_unit(patterns, inputs, tl.sum(squares, 0))
    depth = whole(row, TAPS) * LANES
    windows = part_of(row, workspace, WINDOWS, group, whole(row, OUT_POINTS) * depth)
    gather_windows(row, visits, patterns, windows)


@triton.jit
def separable_image(
    operators, tensors, visits, classes, tiles, saved, workspace, counters, sigmas,
    UPDATE: tl.constexpr,
):  # fmt: skip
    item = tiles + tl.program_id(0) * 3
    row = operators + tl.load(item) * SEPARABLE_WIDTH
    group, tile = tl.load(item + 1), tl.load(item + 2)
    image_tile(row, tensors, group, tile, workspace)
    counter = counters + tl.load(row + IMAGE_COUNTER)
    if last_of(counter + group, whole(row, TILES)):
        read_norm(row, group, workspace)
        if UPDATE:
            move_patterns(row, group, visits, classes, workspace)
        if last_of(counter + whole(row, GROUPS), whole(row, GROUPS)):
            keep_winner(row, saved, workspace, sigmas)


@triton.jit
def image_tile(row, tensors, group, tile, workspace):
    """y of the tile's rows, its exponent, and its Gram matrix."""
    rows, channels, n_taps = whole(row, ROWS), whole(row, CHANNELS), whole(row, TAPS)
    depth, tiles = n_taps * LANES, whole(row, TILES)
    width = whole(row, PACKED_WIDTH) // 4 * 4
    kernel, step, tap_step = kernel_view(
        row, tensors, tl.load(row + DIRECT), workspace + tl.load(row + PACKED), width, group
    )  # fmt: skip
    lane = tl.arange(0, LANES)
    r = tile * TILE + tl.arange(0, TILE)
    a = part_of(row, workspace, CHANNELS_IN, group, channels * LANES)
    image = part_of(row, workspace, IMAGE, group, rows * depth)
    largest = tl.full((), 0.0, tl.float32)
    for t in range(0, n_taps):
        tap = kernel + tap_step.to(tl.int64) * t
        total = tl.zeros((TILE, LANES), tl.float32)
        for start in range(0, channels, BLOCK_C):
            c = start + tl.arange(0, BLOCK_C)
            w = tl.load(
                tap + (r[:, None] * step + c[None, :]),
                (r < rows)[:, None] & (c < width)[None, :], other=0.0,
            )  # fmt: skip
            x = tl.load(
                a + (c[:, None] * LANES + lane[None, :]), (c < channels)[:, None], other=0.0
            )
            total = tl.dot(w, x, total, input_precision="ieee")
        at = r[:, None] * depth + (lane + t * LANES)[None, :]
        tl.store(image + at, total, (r < rows)[:, None])
        largest = tl.maximum(largest, tl.max(tl.max(tl.abs(total), 1), 0))
    exponent = exponent_of(largest)
    tl.store(part_of(row, workspace, EXPONENTS, group, tiles) + tile, exponent.to(tl.float32))
    # What this program has written it now reads in another order.
    tl.debug_barrier()
    gram = part_of(row, workspace, GRAMS, group * tiles + tile, depth * depth)
    present = tl.minimum(rows - tile * TILE, TILE)
    square(image + tile * TILE * depth, present, depth, power_of_two(-exponent), gram)


@triton.jit
def read_norm(row, group, workspace):
    """The group's Gram matrix from its tiles in their order, X G, and ||A v||."""
    tiles, depth = whole(row, TILES), whole(row, TAPS) * LANES
    points = whole(row, OUT_POINTS)
    exponents = part_of(row, workspace, EXPONENTS, group, tiles)
    exponent = tl.full((), -200.0, tl.float32)
    for tile in range(0, tiles):
        exponent = tl.maximum(exponent, tl.load(exponents + tile))
    gram = part_of(row, workspace, GRAM, group, depth * depth)
    parts = part_of(row, workspace, GRAMS, group * tiles, depth * depth)
    for start in range(0, depth * depth, FLAT):
        i = start + tl.arange(0, FLAT)
        total = tl.zeros((FLAT,), tl.float32)
        for tile in range(0, tiles):
            factor = power_of_two((tl.load(exponents + tile) - exponent).to(tl.int32))
            part = tl.load(parts + tile * (depth * depth) + i, i < depth * depth, other=0.0)
            total += part * factor * factor
        tl.store(gram + i, total, i < depth * depth)
    tl.debug_barrier()
    windows = part_of(row, workspace, WINDOWS, group, points * depth)
    mixed = part_of(row, workspace, MIXED_WINDOWS, group, points * depth)
    multiply(windows, gram, mixed, points, depth, 1.0)
    squares = inner_product(windows, mixed, points * depth)
    # Rounding may turn zero negative; NaN passes.
    relative = tl.sqrt(tl.where(squares < 0, 0.0, squares))
    norms = part_of(row, workspace, NORMS, group, NORMS_WIDTH)
    norm = relative * power_of_two(exponent.to(tl.int32)).to(tl.float64)
    tl.store(norms, relative.to(tl.float32))
    tl.store(norms + 1, norm.to(tl.float32))
    tl.store(norms + 2, exponent)


@triton.jit
def move_patterns(row, group, visits, classes, workspace):
    """Two power steps in h; with the QR h R of the result and its windows X, R^T X^T X."""
    depth, points = whole(row, TAPS) * LANES, whole(row, OUT_POINTS)
    inputs, rank = whole(row, IN_POINTS), whole(row, RANK)
    h = part_of(row, workspace, MOVED, group, inputs * LANES)
    windows = part_of(row, workspace, WINDOWS, group, points * depth)
    mixed = part_of(row, workspace, MIXED_WINDOWS, group, points * depth)
    gram = part_of(row, workspace, GRAM, group, depth * depth)
    # The first step's X G is there: ||A v|| was read from it.
    scale_to_unit(h, inputs, fold(row, visits, classes, mixed, h))
    gather_windows(row, visits, h, windows)
    multiply(windows, gram, mixed, points, depth, 1.0)
    scale_to_unit(h, inputs, fold(row, visits, classes, mixed, h))
    triangle = part_of(row, workspace, TRIANGLE, group, TRIANGLE_SIZE)
    orthonormalise(h, inputs, rank, triangle)
    gather_windows(row, visits, h, windows)
    square(windows, points, depth, 1.0, gram)
    mixing = part_of(row, workspace, MIXING, group, depth * depth)
    for start in range(0, depth * depth, FLAT):
        i = start + tl.arange(0, FLAT)
        inside = i < depth * depth
        d, j = i // depth, i % depth
        total = tl.zeros((FLAT,), tl.float32)
        for k in range(0, rank):
            factor = tl.load(triangle + k * LANES + d % LANES, inside, other=0.0)
            at = gram + ((d // LANES * LANES + k) * depth + j)
            total += factor * tl.load(at, inside, other=0.0)
        tl.store(mixing + i, total, inside)


@triton.jit
def keep_winner(row, saved, workspace, sigmas):
    """Sigma, and of the group that attains it ||A v|| in units of y, h, a and y."""
    groups, rows, channels = whole(row, GROUPS), whole(row, ROWS), whole(row, CHANNELS)
    inputs, rank, n_taps = whole(row, IN_POINTS), whole(row, RANK), whole(row, TAPS)
    norms = workspace + tl.load(row + NORMS)
    best = tl.full((), -1.0, tl.float32)
    winner = tl.full((), 0, tl.int32)
    for start in range(0, groups, BLOCK_GROUPS):
        i = start + tl.arange(0, BLOCK_GROUPS)
        value = tl.load(norms + i * NORMS_WIDTH + 1, i < groups, other=-1.0)
        # What is not a number wins, so that it is seen.
        value = tl.where(value == value, value, float("inf"))
        here, at = tl.max(value, 0, return_indices=True)
        winner = tl.where(here > best, start + at, winner)
        best = tl.where(here > best, here, best)
    norms += winner * NORMS_WIDTH
    tl.store(sigmas + tl.load(row + NUMBER), tl.load(norms + 1))
    kept = saved + tl.load(row + SAVED)
    tl.store(kept, winner.to(tl.float32))
    tl.store(kept + 1, tl.load(norms))
    h = part_of(row, workspace, PATTERNS, winner, inputs * LANES)
    a = part_of(row, workspace, CHANNELS_IN, winner, channels * LANES)
    image = part_of(row, workspace, IMAGE, winner, rows * n_taps * LANES)
    factor = power_of_two(-tl.load(norms + 2).to(tl.int32))
    without_padding(h, inputs, rank, 1.0, kept + 2)
    without_padding(a, channels, rank, 1.0, kept + 2 + inputs * rank)
    without_padding(image, rows * n_taps, rank, factor, kept + 2 + (inputs + channels) * rank)


@triton.jit
def without_padding(source, rows, rank, factor, target):
    """The first ``rank`` columns of a matrix (rows, LANES) times a factor."""
    lane = tl.arange(0, LANES)
    for start in range(0, rows, BLOCK):
        i = start + tl.arange(0, BLOCK)
        x = tl.load(source + (i[:, None] * LANES + lane[None, :]), (i < rows)[:, None], other=0.0)
        inside = (i < rows)[:, None] & (lane < rank)[None, :]
        tl.store(target + (i[:, None] * rank + lane[None, :]), x * factor, inside)


@triton.jit
def separable_adjoint(operators, tensors, tiles, state, workspace, counters, new_state):
    item = tiles + tl.program_id(0) * 3
    row = operators + tl.load(item) * SEPARABLE_WIDTH
    group, tile = tl.load(item + 1), tl.load(item + 2)
    adjoint_tile(row, tensors, group, tile, workspace)
    counter = counters + tl.load(row + ADJOINT_COUNTER)
    if last_of(counter + group, whole(row, TILES)):
        advance(row, group, state, workspace, new_state)


@triton.jit
def adjoint_tile(row, tensors, group, tile, workspace):
    """The tile's rows of y R^T X^T X, and their share of W^T times that."""
    rows, channels, n_taps = whole(row, ROWS), whole(row, CHANNELS), whole(row, TAPS)
    depth, tiles = n_taps * LANES, whole(row, TILES)
    width = whole(row, PACKED_WIDTH) // 4 * 4
    kernel, step, tap_step = kernel_view(
        row, tensors, tl.load(row + DIRECT), workspace + tl.load(row + PACKED), width, group
    )  # fmt: skip
    norms = part_of(row, workspace, NORMS, group, NORMS_WIDTH)
    factor = power_of_two(-tl.load(norms + 2).to(tl.int32))
    image = part_of(row, workspace, IMAGE, group, rows * depth)
    mixed = part_of(row, workspace, MIXED_IMAGE, group, rows * depth)
    mixing = part_of(row, workspace, MIXING, group, depth * depth)
    begin = tile * TILE * depth
    present = tl.minimum(rows - tile * TILE, TILE)
    multiply(image + begin, mixing, mixed + begin, present, depth, factor)
    lane = tl.arange(0, LANES)
    r = tile * TILE + tl.arange(0, TILE)
    part = part_of(row, workspace, PARTS, group * tiles + tile, channels * LANES)
    for start in range(0, channels, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        total = tl.zeros((BLOCK_C, LANES), tl.float32)
        for t in range(0, n_taps):
            w = tl.load(
                kernel + tap_step.to(tl.int64) * t + (r[:, None] * step + c[None, :]),
                (r < rows)[:, None] & (c < width)[None, :], other=0.0,
            )  # fmt: skip
            y = tl.load(
                mixed + (r[:, None] * depth + (lane + t * LANES)[None, :]), (r < rows)[:, None],
                other=0.0,
            )  # fmt: skip
            total = tl.dot(tl.trans(w), y, total, input_precision="ieee")
        tl.store(part + (c[:, None] * LANES + lane[None, :]), total, (c < channels)[:, None])


@triton.jit
def advance(row, group, state, workspace, new_state):
    """The new iterate, or the old one where the new is zero or not finite."""
    channels, inputs, rank = whole(row, CHANNELS), whole(row, IN_POINTS), whole(row, RANK)
    tiles, lane = whole(row, TILES), tl.arange(0, LANES)
    parts = part_of(row, workspace, PARTS, group * tiles, channels * LANES)
    a = part_of(row, workspace, CHANNELS_IN, group, channels * LANES)
    h = part_of(row, workspace, MOVED, group, inputs * LANES)
    squares = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, channels, BLOCK):
        c = start + tl.arange(0, BLOCK)
        at = c[:, None] * LANES + lane[None, :]
        total = tl.zeros((BLOCK, LANES), tl.float32)
        for tile in range(0, tiles):
            part = parts + tile * (channels * LANES)
            total += tl.load(part + at, (c < channels)[:, None], other=0.0)
        tl.store(a + at, total, (c < channels)[:, None])
        wide = total.to(tl.float64)
        squares += tl.sum(wide * wide, 1)
    norm = tl.sqrt(tl.sum(squares, 0))
    tl.debug_barrier()
    old, new = state_of_group(row, state, group), state_of_group(row, new_state, group)
    if (norm > 0) & (norm < float("inf")):
        scale_to_unit(a, channels, norm * norm)
        without_padding(h, inputs, rank, 1.0, new)
        without_padding(a, channels, rank, 1.0, new + inputs * rank)
    else:
        for start in range(0, rank * (inputs + channels), FLAT):
            i = start + tl.arange(0, FLAT)
            inside = i < rank * (inputs + channels)
            tl.store(new + i, tl.load(old + i, inside, other=0.0), inside)


def image_geometry(update: bool) -> dict[str, int]:
    """Launch options; reading alone would spill at two stages."""
    return PASS_GEOMETRY | {"num_stages": 2 if update else 1}


def shipped() -> list[Specialization]:
    return [
        specialized(separable_adjoint, "any network", PASS_GEOMETRY),
        specialized(separable_prepare, "any network", PREPARE_GEOMETRY),
        specialized(separable_image, "update", image_geometry(True), UPDATE=True),
        specialized(separable_image, "no update", image_geometry(False), UPDATE=False),
    ]
