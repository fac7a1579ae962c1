# SPDX-License-Identifier: MIT
"""Margin cross-entropy: forward, and the gradients to logits, pair-norm rows and coefficient.

The definition is :mod:`lmtfast.backends.margin_reference`. For sample i with target t, reference
class r and ``A_j = coefficient_i * rows[row_index_i, j]``, 0 at r:

    0 LMT    y = z + A
    1 LMT++  y = z + a A, a = min over rivals of clip((z_t - z_j) / A_j, 0, 1)
    2 EMMA   y = z + s A, s_j = clip((z_t - z_j) / A_j, 0.01, 1)
    3 GloRo  y = z and one more class, max over j != r of z_j + A_j, r = argmax z

and loss = logsumexp(y) - y_t. Everything is computed in the dtype of ``rows``: float32, or float64.

Layout: a tile is (samples, classes). Up to :data:`WHOLE_CLASSES` classes a program holds its rows
of logits whole, several samples at a time where they are short; beyond, it sweeps one row in tiles:
once for the sample's factor or reference class, once for the maximum and the sum (online), once for
the gradient. No atomics: a row of pair norms has one owner, which adds its samples in ascending
order; of a row with many samples there are SPLIT owners, and the host adds their parts.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import triton
import triton.language as tl

from lmtfast.kernels.alignment import alignment, multiple
from lmtfast.kernels.specialization import Specialization

MEMBERS = {"lmt": 0, "lmt++": 1, "emma": 2, "gloro": 3}
WHOLE_CLASSES = 8192
SMALLEST_RATIO = tl.constexpr(0.01)  # lower end of EMMA's clip (Hu et al. 2024)
LMT_STABLE, EMMA, GLORO = tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
LOWEST = tl.constexpr(float("-inf"))


@triton.jit
def quotient(a, b):
    """a / b rounded to nearest: the default division of float32 is approximate."""
    if a.dtype == tl.float32:
        return tl.div_rn(a, b)
    else:
        return a / b


@triton.jit
def log1p(x):
    """log(1 + x) without loss for small x >= 0 (the quotient undoes the rounding of 1 + x)."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * x / (u - 1.0))


@triton.jit
def limiting_share(margin, shift):
    """LMT++: the share of the shift that makes a rival tie; 0 if it wins already."""
    share = tl.where(margin >= shift, 1.0, quotient(margin, shift))
    return tl.where(margin <= 0, 0.0, share)


@triton.jit
def class_ratio(margin, shift):
    """EMMA: the same share, clipped from below, for each class by itself."""
    ratio = quotient(margin, shift)
    ratio = tl.where(ratio < SMALLEST_RATIO, SMALLEST_RATIO, ratio)
    ratio = tl.where(ratio > 1.0, 1.0, ratio)
    return tl.where(shift == 0, 1.0, ratio)


@triton.jit
def loss_of(highest, own_logit, rivals, own):
    """Cross-entropy from the sums of exponentials below ``highest``; accurate when small."""
    return (highest - own_logit) + log1p(rivals + (own - 1.0))


@triton.jit
def margin_forward_whole(
    logits, target, row_index, rows, coefficient, loss, dlogits, scale,
    n, k, sample_stride, row_stride,
    MEMBER: tl.constexpr, ALIGN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """loss (N,), dlogits (N, K) contiguous, scale (N,) or for GloRo (2, N); K <= BLOCK_K."""
    k, sample_stride = multiple(k, ALIGN), multiple(sample_stride, ALIGN)
    row_stride = multiple(row_stride, ALIGN)
    dtype = loss.dtype.element_ty
    i = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    j = tl.arange(0, BLOCK_K)[None, :]
    present = i < n
    inside = present[:, None] & (j < k)
    t = tl.load(target + i, present, other=0)
    u = tl.load(row_index + i, present, other=0)
    c = tl.load(coefficient + i, present, other=0.0)
    base = logits + i.to(tl.int64) * sample_stride
    z = tl.load(base[:, None] + j, inside, other=LOWEST).to(dtype)
    b = tl.load(rows + (u * row_stride)[:, None] + j, inside, other=0.0)
    # A target that is no class reads nothing and makes its loss NaN.
    valid = present & (t >= 0) & (t < k)
    own_logit = tl.load(base + t, valid, other=float("nan")).to(dtype)
    at_target = j == t[:, None]

    if MEMBER == GLORO:
        y = z
        top = tl.max(z, 1)
        reference = tl.min(tl.where(z == top[:, None], j, BLOCK_K), 1)
        raised = z + c[:, None] * b
        raised = tl.where(inside & (j != reference[:, None]), raised, LOWEST)
        bottom = tl.max(raised, 1)
        rival = tl.min(tl.where(raised == bottom[:, None], j, BLOCK_K), 1)
        # A maximum may skip NaN, and this one is all that the loss sees of the shifts.
        poisoned = tl.max((raised != raised).to(tl.int32), 1) > 0
        bottom = tl.where(poisoned, float("nan"), bottom)
        highest = tl.where(bottom > top, bottom, top)
    else:
        shift = tl.where(at_target, 0.0, c[:, None] * b)
        margin = own_logit[:, None] - z
        if MEMBER == EMMA:
            shift = class_ratio(margin, shift) * shift
        if MEMBER == LMT_STABLE:
            share = tl.where(inside & (j != t[:, None]), limiting_share(margin, shift), 1.0)
            factor = tl.min(share, 1)
            shift = factor[:, None] * shift
        y = z + shift
        highest = tl.max(y, 1)

    e = tl.exp(y - highest[:, None])
    rivals = tl.sum(tl.where(at_target, 0.0, e), 1)
    own = tl.exp(own_logit - highest)
    if MEMBER == GLORO:
        extra = tl.exp(bottom - highest)
        rest = rivals + extra
        inverse = 1.0 / (rest + own)
        share = extra * inverse
        tl.store(scale + i, share, present)
        tl.store(scale + n + i, rival.to(dtype), present)
        gradient = e * inverse[:, None] + tl.where(j == rival[:, None], share[:, None], 0.0)
        # The extra class may be attained by the target: its share then stays with it.
        towards = tl.where(rival == t, rivals, rest) * inverse
    else:
        rest = rivals
        inverse = 1.0 / (rest + own)
        gradient = e * inverse[:, None]
        towards = rest * inverse
        if MEMBER == LMT_STABLE:
            tl.store(scale + i, factor, present)
        else:
            tl.store(scale + i, tl.full((BLOCK_N,), 1.0, dtype), present)
    # p_t - 1 would cancel.
    gradient = tl.where(at_target, -towards[:, None], gradient)
    tl.store(dlogits + i.to(tl.int64)[:, None] * k + j, gradient, inside)
    tl.store(loss + i, loss_of(highest, own_logit, rest, own), present)


@triton.jit
def margin_forward_tiled(
    logits, target, row_index, rows, coefficient, loss, dlogits, scale,
    n, k, sample_stride, row_stride,
    MEMBER: tl.constexpr, ALIGN: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The same for any K: one program sweeps the row of one sample in tiles."""
    k, sample_stride = multiple(k, ALIGN), multiple(sample_stride, ALIGN)
    row_stride = multiple(row_stride, ALIGN)
    dtype = loss.dtype.element_ty
    i = tl.program_id(0)
    t = tl.load(target + i)
    c = tl.load(coefficient + i)
    z_row = logits + i.to(tl.int64) * sample_stride
    b_row = rows + tl.load(row_index + i) * row_stride
    d_row = dlogits + i.to(tl.int64) * k
    valid = (t >= 0) & (t < k)
    own_logit = tl.load(z_row + t, valid, other=float("nan")).to(dtype)

    factor = tl.full((), 1.0, dtype)
    top = tl.full((), LOWEST, dtype)
    bottom = tl.full((), LOWEST, dtype)
    reference = tl.full((), 0, tl.int32) + k
    rival = reference
    if MEMBER == LMT_STABLE:
        for start in range(0, k, BLOCK_K):
            j = start + tl.arange(0, BLOCK_K)
            z = tl.load(z_row + j, j < k, other=LOWEST).to(dtype)
            b = tl.load(b_row + j, j < k, other=0.0)
            share = limiting_share(own_logit - z, c * b)
            share = tl.min(tl.where((j < k) & (j != t), share, 1.0), 0)
            factor = tl.where(share < factor, share, factor)
    if MEMBER == GLORO:
        for start in range(0, k, BLOCK_K):
            j = start + tl.arange(0, BLOCK_K)
            z = tl.load(z_row + j, j < k, other=LOWEST).to(dtype)
            here = tl.max(z, 0)
            first = tl.min(tl.where((z == here) & (j < k), j, k), 0)
            reference = tl.where(here > top, first, reference)
            top = tl.where(here > top, here, top)
        poisoned = tl.full((), 0, tl.int32)
        for start in range(0, k, BLOCK_K):
            j = start + tl.arange(0, BLOCK_K)
            z = tl.load(z_row + j, j < k, other=LOWEST).to(dtype)
            b = tl.load(b_row + j, j < k, other=0.0)
            raised = tl.where((j < k) & (j != reference), z + c * b, LOWEST)
            here = tl.max(raised, 0)
            first = tl.min(tl.where((raised == here) & (j < k), j, k), 0)
            rival = tl.where(here > bottom, first, rival)
            bottom = tl.where(here > bottom, here, bottom)
            poisoned += tl.sum((raised != raised).to(tl.int32), 0)
        bottom = tl.where(poisoned > 0, float("nan"), bottom)

    highest = tl.full((), LOWEST, dtype)
    rivals = tl.full((), 0.0, dtype)
    for start in range(0, k, BLOCK_K):
        j = start + tl.arange(0, BLOCK_K)
        y = raised_logits(z_row, b_row, j, k, t, c, own_logit, factor, MEMBER, dtype)
        here = tl.max(y, 0)
        higher = tl.where(here > highest, here, highest)
        # Where all so far is -inf the sum is 0 and stays so.
        anchor = tl.where(higher == LOWEST, 0.0, higher)
        rivals = rivals * tl.exp(highest - anchor)
        rivals += tl.sum(tl.where(j == t, 0.0, tl.exp(y - anchor)), 0)
        highest = higher
    if MEMBER == GLORO:
        higher = tl.where(bottom > highest, bottom, highest)
        rivals = rivals * tl.exp(highest - higher)
        highest = higher
    own = tl.exp(own_logit - highest)
    extra = tl.exp(bottom - highest)  # 0 for the other members, whose bottom class is at -inf
    rest = rivals + extra
    inverse = 1.0 / (rest + own)
    tl.store(loss + i, loss_of(highest, own_logit, rest, own))
    if MEMBER == GLORO:
        tl.store(scale + i, extra * inverse)
        tl.store(scale + n + i, rival.to(dtype))
    else:
        tl.store(scale + i, factor)
    towards = tl.where(rival == t, rivals, rest) * inverse
    for start in range(0, k, BLOCK_K):
        j = start + tl.arange(0, BLOCK_K)
        y = raised_logits(z_row, b_row, j, k, t, c, own_logit, factor, MEMBER, dtype)
        gradient = tl.exp(y - highest) * inverse
        if MEMBER == GLORO:
            gradient += tl.where(j == rival, extra * inverse, 0.0)
        tl.store(d_row + j, tl.where(j == t, -towards, gradient), j < k)


@triton.jit
def raised_logits(
    z_row, b_row, j, k, t, c, own_logit, factor,
    MEMBER: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """y of one tile of one row, -inf outside."""
    z = tl.load(z_row + j, j < k, other=LOWEST).to(dtype)
    if MEMBER == GLORO:
        return z
    else:
        b = tl.load(b_row + j, j < k, other=0.0)
        shift = tl.where(j == t, 0.0, c * b)
        scaling = class_ratio(own_logit - z, shift) if MEMBER == EMMA else factor
        return z + scaling * shift


@triton.jit
def margin_backward_samples(
    logits, target, row_index, rows, coefficient, scale, dlogits, grad_loss,
    grad_logits, grad_coefficient,
    n, k, sample_stride, row_stride,
    MEMBER: tl.constexpr, ALIGN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """grad_logits (N, K) contiguous and grad_coefficient (N,): the parts with one owner each."""
    k, sample_stride = multiple(k, ALIGN), multiple(sample_stride, ALIGN)
    row_stride = multiple(row_stride, ALIGN)
    dtype = dlogits.dtype.element_ty
    i = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    present = i < n
    t = tl.load(target + i, present, other=0)
    u = tl.load(row_index + i, present, other=0)
    g = tl.load(grad_loss + i, present, other=0.0)
    s = tl.load(scale + i, present, other=0.0)
    offset = i.to(tl.int64)[:, None] * k
    z_row = (logits + i.to(tl.int64) * sample_stride)[:, None]
    b_row = (rows + u * row_stride)[:, None]
    if MEMBER == EMMA:
        c = tl.load(coefficient + i, present, other=0.0)
        valid = present & (t >= 0) & (t < k)
        own_logit = tl.load(logits + i.to(tl.int64) * sample_stride + t, valid, other=0.0).to(dtype)
    total = tl.zeros((BLOCK_N,), dtype)
    for start in range(0, k, BLOCK_K):
        j = (start + tl.arange(0, BLOCK_K))[None, :]
        inside = present[:, None] & (j < k)
        d = tl.load(dlogits + offset + j, inside, other=0.0)
        tl.store(
            grad_logits + offset + j, (g[:, None] * d).to(grad_logits.dtype.element_ty), inside
        )
        if MEMBER != GLORO:
            b = tl.load(b_row + j, inside, other=0.0)
            if MEMBER == EMMA:
                z = tl.load(z_row + j, inside, other=0.0).to(dtype)
                d = d * class_ratio(own_logit[:, None] - z, c[:, None] * b)
            total += tl.sum(tl.where(inside & (j != t[:, None]), d * b, 0.0), 1)
    if MEMBER == GLORO:
        rival = tl.load(scale + n + i, present, other=0.0).to(tl.int32)
        total = tl.load(rows + u * row_stride + rival, present & (rival < k), other=0.0)
    tl.store(grad_coefficient + i, g * s * total, present)


@triton.jit
def margin_backward_rows(
    logits, target, rows, coefficient, scale, dlogits, grad_loss, order, begin, grad_rows,
    n, k, num_rows, sample_stride, row_stride,
    MEMBER: tl.constexpr, ALIGN: tl.constexpr,
    SPLIT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """grad_rows (SPLIT, U, K): one program adds its share of one row's samples, in their order.

    ``order`` lists the samples by row, ``begin`` (U + 1,) where each row's samples start in it.
    """
    k, sample_stride = multiple(k, ALIGN), multiple(sample_stride, ALIGN)
    row_stride = multiple(row_stride, ALIGN)
    dtype = dlogits.dtype.element_ty
    u = tl.program_id(0)
    part = tl.program_id(2)
    j = (tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K))[None, :]
    first, last = tl.load(begin + u), tl.load(begin + u + 1)
    each = (last - first + SPLIT - 1) // SPLIT
    first = first + part * each
    last = tl.minimum(first + each, last)
    if MEMBER == EMMA:
        b = tl.load(rows + u.to(tl.int64) * row_stride + j, j < k, other=0.0)
    total = tl.zeros((BLOCK_K,), dtype)
    for start in range(first, last, BLOCK_N):
        position = start + tl.arange(0, BLOCK_N)
        present = position < last
        i = tl.load(order + position, present, other=0)
        c = tl.load(coefficient + i, present, other=0.0)
        weight = tl.load(grad_loss + i, present, other=0.0) * c
        weight *= tl.load(scale + i, present, other=0.0)
        inside = present[:, None] & (j < k)
        if MEMBER == GLORO:
            rival = tl.load(scale + n + i, present, other=0.0).to(tl.int32)
            share = tl.where(j == rival[:, None], weight[:, None], 0.0)
        else:
            t = tl.load(target + i, present, other=0)
            d = tl.load(dlogits + (i * k)[:, None] + j, inside, other=0.0)
            if MEMBER == EMMA:
                valid = present & (t >= 0) & (t < k)
                z_row = logits + i * sample_stride
                z = tl.load(z_row[:, None] + j, inside, other=0.0).to(dtype)
                own_logit = tl.load(z_row + t, valid, other=0.0).to(dtype)
                d = d * class_ratio(own_logit[:, None] - z, c[:, None] * b)
            share = tl.where(j == t[:, None], 0.0, weight[:, None] * d)
        total += tl.sum(tl.where(inside, share, 0.0), 0)
    row = part.to(tl.int64) * num_rows + u
    tl.store(grad_rows + row * k + j, total[None, :], j < k)


TILE_BYTES = 8192  # of one operand of the gradients' tiles; more spills in float64


def forward_geometry(k: int) -> dict[str, int]:
    """Blocks and warps of the forward kernel for k classes; without BLOCK_N: the tiled one."""
    if k > WHOLE_CLASSES:
        return {"BLOCK_K": 4096, "num_warps": 8}
    block_k = max(16, triton.next_power_of_2(k))
    return {
        "BLOCK_N": min(64, max(1, 2048 // block_k)),
        "BLOCK_K": block_k,
        "num_warps": 4 if block_k <= 2048 else 8,
    }


def samples_geometry(k: int, itemsize: int) -> dict[str, int]:
    """The same for the gradients with one owner per sample."""
    elements = TILE_BYTES // itemsize
    block_k = min(elements, max(16, triton.next_power_of_2(k)))
    return {"BLOCK_N": min(64, elements // block_k), "BLOCK_K": block_k, "num_warps": 4}


def rows_geometry(n: int, k: int, num_rows: int, itemsize: int) -> dict[str, int]:
    """The same for the gradient of the rows; SPLIT programs where a row has many samples."""
    elements = TILE_BYTES // itemsize
    block_k = min(elements // 2, max(16, triton.next_power_of_2(k)))
    split = min(64, triton.next_power_of_2(max(1, n // max(1, num_rows) // 256)))
    return {"SPLIT": split, "BLOCK_N": elements // block_k, "BLOCK_K": block_k, "num_warps": 4}


def _specializations() -> Iterator[Specialization]:
    """Every member at few, some and many classes; the costliest, LMT++, in float64 and at 8192.

    LMT and LMT++ have the same backward kernels.
    """
    cases = list(itertools.product(MEMBERS, ((1000, "fp32"), (10, "bf16"), (32768, "bf16"))))
    cases += [("lmt++", (1000, "fp64")), ("lmt++", (8192, "bf16"))]
    for member, (k, dtype) in cases:
        wide, itemsize = ("fp64", 8) if dtype == "fp64" else ("fp32", 4)
        size = "i32:16" if k % 16 == 0 else "i32"
        forward = margin_forward_whole if k <= WHOLE_CLASSES else margin_forward_tiled
        launches = [(forward, forward_geometry(k))]
        if member != "lmt" and k != 8192:
            launches.append((margin_backward_samples, samples_geometry(k, itemsize)))
            launches.append((margin_backward_rows, rows_geometry(256, k, 256, itemsize)))
        for kernel, geometry in launches:
            types = dict.fromkeys(kernel.arg_names, f"*{wide}")
            types |= dict.fromkeys(("logits", "grad_logits"), f"*{dtype}")
            types |= dict.fromkeys(("target", "row_index", "order", "begin"), "*i64")
            types |= dict.fromkeys(("n", "num_rows"), "i32:16")
            types |= dict.fromkeys(("k", "sample_stride", "row_stride"), size)
            types |= {"MEMBER": MEMBERS[member], "ALIGN": alignment(k), **geometry}
            arguments = {name: types[name] for name in kernel.arg_names}
            label = f"{member} {dtype} K={k}"
            yield Specialization(kernel, label, arguments, geometry["num_warps"])


def shipped() -> list[Specialization]:
    return list(_specializations())
