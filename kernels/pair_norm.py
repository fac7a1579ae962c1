# SPDX-License-Identifier: MIT
"""Distances between the rows of a linear head, and their gradient to the head.

The definition is :mod:`lmtfast.backends.pair_norm`: ``norms[u, j] = ||w_c(u) - w_j||``, exactly 0
where j is c(u), for the rows ``classes`` of a (K, D) head, or all. Computed in float32, or float64
for float64 heads.

Up to :data:`EXACT_CLASSES` classes, and always in float64, from differences; beyond, from a product
of rows minus their mean, with three TF32 products in place of one of float32 (22 bits of mantissa)
where the device has them.

The gradient, with A = grad / norms, 0 at distance 0: row u sends
``own_u = sum_j A_uj (w_u - w_j)`` to class c(u) and ``A_uj (w_j - w_u)`` to each class j. One
launch forms ``own`` (U, D), a second one gathers both for its classes, so that nothing is added
from two programs: no atomics. The rows of a class that occurs several times are picked out by a
product with a 0-1 matrix.
"""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl

from lmtfast.kernels.alignment import alignment, multiple
from lmtfast.kernels.specialization import Specialization

EXACT_CLASSES = 256


@triton.jit
def square_root(x):
    """Rounded to nearest: the default one of float32 is approximate."""
    if x.dtype == tl.float32:
        return tl.sqrt_rn(x)
    else:
        return tl.sqrt(x)


@triton.jit
def class_of(classes, i, present, ALL: tl.constexpr):
    """Class of each row of the table, int64."""
    if ALL:
        return i.to(tl.int64)
    else:
        return tl.load(classes + i, present, other=0)


@triton.jit
def rows_of(weight, mean, index, present, f, d, row_stride, dtype: tl.constexpr):
    """Rows of the head minus the mean row, one tile; 0 outside."""
    inside = present[:, None] & (f < d)[None, :]
    w = tl.load(weight + (index * row_stride)[:, None] + f[None, :], inside, other=0.0).to(dtype)
    centre = tl.load(mean + f, f < d, other=0.0)
    return tl.where(inside, w - centre[None, :], 0.0)


@triton.jit
def ratio_of(grad, norms, i, j, u, k):
    """grad / norms of one tile, 0 at distance 0 and outside."""
    inside = (i < u)[:, None] & (j < k)[None, :]
    offset = i.to(tl.int64)[:, None] * k + j[None, :]
    g = tl.load(grad + offset, inside, other=0.0)
    norm = tl.load(norms + offset, inside, other=0.0)
    return tl.where(norm == 0, 0.0, g / norm)


@triton.jit
def pair_norm_exact(
    weight, classes, norms, u, k, d, row_stride,
    ALL: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_U: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """norms (U, K) contiguous, from differences."""
    k, d = multiple(k, ALIGN), multiple(d, ALIGN)
    row_stride = multiple(row_stride, ALIGN)
    dtype = norms.dtype.element_ty
    i = tl.program_id(0) * BLOCK_U + tl.arange(0, BLOCK_U)
    j = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    c = class_of(classes, i, i < u, ALL)
    left = (weight + c * row_stride)[:, None, None]
    right = (weight + j.to(tl.int64) * row_stride)[None, :, None]
    squares = tl.zeros((BLOCK_U, BLOCK_K), dtype)
    for start in range(0, d, BLOCK_D):
        f = (start + tl.arange(0, BLOCK_D))[None, None, :]
        a = tl.load(left + f, (i < u)[:, None, None] & (f < d), other=0.0).to(dtype)
        b = tl.load(right + f, (j < k)[None, :, None] & (f < d), other=0.0).to(dtype)
        squares += tl.sum((a - b) * (a - b), 2)
    distance = tl.where(c[:, None] == j[None, :], 0.0, square_root(squares))
    offset = i.to(tl.int64)[:, None] * k + j[None, :]
    tl.store(norms + offset, distance, (i < u)[:, None] & (j < k)[None, :])


@triton.jit
def pair_norm_product(
    weight, mean, classes, norms, u, k, d, row_stride,
    ALL: tl.constexpr, PRECISION: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_U: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """norms (U, K) contiguous, from the Gram matrix of the centred rows."""
    k, d = multiple(k, ALIGN), multiple(d, ALIGN)
    row_stride = multiple(row_stride, ALIGN)
    dtype = norms.dtype.element_ty
    i = tl.program_id(0) * BLOCK_U + tl.arange(0, BLOCK_U)
    j = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    c = class_of(classes, i, i < u, ALL)
    gram = tl.zeros((BLOCK_U, BLOCK_K), dtype)
    left = tl.zeros((BLOCK_U,), dtype)
    right = tl.zeros((BLOCK_K,), dtype)
    for start in range(0, d, BLOCK_D):
        f = start + tl.arange(0, BLOCK_D)
        a = rows_of(weight, mean, c, i < u, f, d, row_stride, dtype)
        b = rows_of(weight, mean, j.to(tl.int64), j < k, f, d, row_stride, dtype)
        gram += tl.dot(a, tl.trans(b), input_precision=PRECISION, out_dtype=dtype)
        left += tl.sum(a * a, 1)
        right += tl.sum(b * b, 1)
    squares = left[:, None] + right[None, :] - 2.0 * gram
    # Not maximum, which may drop NaN.
    squares = tl.where(squares < 0, 0.0, squares)
    distance = tl.where(c[:, None] == j[None, :], 0.0, square_root(squares))
    offset = i.to(tl.int64)[:, None] * k + j[None, :]
    tl.store(norms + offset, distance, (i < u)[:, None] & (j < k)[None, :])


@triton.jit
def pair_norm_vjp_own(
    weight, mean, classes, norms, grad, own, u, k, d, row_stride,
    ALL: tl.constexpr, PRECISION: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_U: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """own (U, D) contiguous: what each row of the table sends to its own class."""
    k, d = multiple(k, ALIGN), multiple(d, ALIGN)
    row_stride = multiple(row_stride, ALIGN)
    dtype = norms.dtype.element_ty
    i = tl.program_id(0) * BLOCK_U + tl.arange(0, BLOCK_U)
    f = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    c = class_of(classes, i, i < u, ALL)
    product = tl.zeros((BLOCK_U, BLOCK_D), dtype)
    total = tl.zeros((BLOCK_U,), dtype)
    for start in range(0, k, BLOCK_K):
        j = start + tl.arange(0, BLOCK_K)
        ratio = ratio_of(grad, norms, i, j, u, k)
        w = rows_of(weight, mean, j.to(tl.int64), j < k, f, d, row_stride, dtype)
        product += tl.dot(ratio, w, input_precision=PRECISION, out_dtype=dtype)
        total += tl.sum(ratio, 1)
    rows = rows_of(weight, mean, c, i < u, f, d, row_stride, dtype)
    offset = i.to(tl.int64)[:, None] * d + f[None, :]
    tl.store(own + offset, total[:, None] * rows - product, (i < u)[:, None] & (f < d)[None, :])


@triton.jit
def pair_norm_vjp_gather(
    weight, mean, classes, norms, grad, own, grad_weight, u, k, d, row_stride,
    ALL: tl.constexpr, PRECISION: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_U: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """grad_weight (K, D) contiguous, in the head's dtype."""
    k, d = multiple(k, ALIGN), multiple(d, ALIGN)
    row_stride = multiple(row_stride, ALIGN)
    dtype = norms.dtype.element_ty
    j = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    f = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    product = tl.zeros((BLOCK_K, BLOCK_D), dtype)
    total = tl.zeros((BLOCK_K,), dtype)
    for start in range(0, u, BLOCK_U):
        i = start + tl.arange(0, BLOCK_U)
        c = class_of(classes, i, i < u, ALL)
        ratio = ratio_of(grad, norms, i, j, u, k)
        rows = rows_of(weight, mean, c, i < u, f, d, row_stride, dtype)
        product -= tl.dot(tl.trans(ratio), rows, input_precision=PRECISION, out_dtype=dtype)
        total += tl.sum(ratio, 0)
        if not ALL:
            chosen = (j[:, None] == c[None, :]) & (i < u)[None, :]
            if tl.sum(chosen.to(tl.int32)) > 0:
                offset = i.to(tl.int64)[:, None] * d + f[None, :]
                sent = tl.load(own + offset, (i < u)[:, None] & (f < d)[None, :], other=0.0)
                product += tl.dot(
                    chosen.to(dtype), sent, input_precision=PRECISION, out_dtype=dtype
                )
    rows = rows_of(weight, mean, j.to(tl.int64), j < k, f, d, row_stride, dtype)
    result = product + total[:, None] * rows
    inside = (j < k)[:, None] & (f < d)[None, :]
    offset = j.to(tl.int64)[:, None] * d + f[None, :]
    if ALL:
        result += tl.load(own + offset, inside, other=0.0)
    tl.store(grad_weight + offset, result.to(grad_weight.dtype.element_ty), inside)


def forward_geometry(k: int, itemsize: int) -> dict[str, int]:
    """Blocks and warps for k classes."""
    if k <= EXACT_CLASSES or itemsize == 8:
        return {"BLOCK_U": 16, "BLOCK_K": 16, "BLOCK_D": 128 // itemsize**2, "num_warps": 4}
    return {"BLOCK_U": 64, "BLOCK_K": 64, "BLOCK_D": 32, "num_warps": 4}


def vjp_geometry(k: int, itemsize: int, summed: str) -> dict[str, int]:
    """The same for a launch of the gradient; ``summed`` names the block of the inner loop."""
    if k <= 32 or itemsize == 8:
        return {"BLOCK_U": 16, "BLOCK_K": 16, "BLOCK_D": 32, "num_warps": 4}
    return {"BLOCK_U": 64, "BLOCK_K": 64, "BLOCK_D": 64, summed: 32, "num_warps": 8}


def shipped() -> list[Specialization]:
    return list(_specializations())


def _specializations() -> Iterator[Specialization]:
    """Few classes from differences, many from the product; all rows and chosen ones."""
    cases = [(10, "fp32", True), (10, "fp64", True), (1000, "fp32", False), (1000, "bf16", True)]
    cases += [(32768, "bf16", False)]
    for k, dtype, every in cases:
        wide, itemsize = ("fp64", 8) if dtype == "fp64" else ("fp32", 4)
        forward = pair_norm_exact if k <= EXACT_CLASSES else pair_norm_product
        precision = "ieee" if dtype == "fp64" else "tf32x3"
        for kernel, geometry in (
            (forward, forward_geometry(k, itemsize)),
            (pair_norm_vjp_own, vjp_geometry(k, itemsize, "BLOCK_K")),
            (pair_norm_vjp_gather, vjp_geometry(k, itemsize, "BLOCK_U")),
        ):
            types = dict.fromkeys(kernel.arg_names, f"*{wide}")
            types |= dict.fromkeys(("weight", "grad_weight"), f"*{dtype}")
            types |= {
                "classes": None if every else "*i64",
                "u": "i32:16",
                "d": "i32:16",
                "row_stride": "i32:16",
            }
            types |= {"k": "i32:16" if k % 16 == 0 else "i32", "ALL": every}
            types |= {"PRECISION": precision, "ALIGN": alignment(k), **geometry}
            arguments = {name: types[name] for name in kernel.arg_names}
            label = f"{dtype} K={k}{'' if every else ', chosen rows'}"
            yield Specialization(kernel, label, arguments, geometry["num_warps"])
