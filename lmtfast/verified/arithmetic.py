# SPDX-License-Identifier: MIT
"""Self-test of the arithmetic under rigorous bounds: IEEE 754 binary64, gradual underflow.

Sums, products and quotients must be rounded to nearest. A square root need only be *faithful*: one
of the two floats around the exact root (the root itself where that is a float), so its relative
error is below 2u, u = 2**-53. Torch takes float64 roots from vector libraries that are no better
(ADR 0014), and every proof that holds one counts two roundings for it.
"""

from __future__ import annotations

import math
import sys
from functools import cache

import torch

from lmtfast.errors import NotCertifiedError
from lmtfast.weights import on_host


def _refuse(finding: str, where: str) -> None:
    raise NotCertifiedError(
        "IEEE 754 double precision with round to nearest, gradual underflow and faithful roots",
        finding,
        where,
        "turn off torch.set_flush_denormal, unload libraries built with -ffast-math and restore "
        "the rounding mode",
    )


def _check_arithmetic(one: torch.Tensor, where: str) -> None:
    """Elementwise probes; ``one`` is a tensor of ones, so nothing is folded at compile time."""
    eps, half = 2.0**-52, 2.0**-53
    if bool(((one * 2.0**-1022) * 0.5 == 0).any()) or bool(
        ((one * 2.0**-537) * (one * 2.0**-537) == 0).any()
    ):
        _refuse("denormal results flushed to zero", where)
    if bool(((one * 5e-324) * 2.0**1000 == 0).any()) or bool(((one * 5e-324) + 0.0 == 0).any()):
        _refuse("denormal operands read as zero", where)
    probes = (
        (one + half, 1.0),
        (one + half * 1.5, 1.0 + eps),
        ((one + eps) + half, 1.0 + 2 * eps),
        (-one - half, -1.0),
        (-one - half * 1.5, -1.0 - eps),
        (one - half / 2, 1.0),
        ((one + eps) * (one + eps), 1.0 + 2 * eps),
        (one / 3.0 * 3.0, 1.0),
        (one / 10.0, float.fromhex("0x1.999999999999ap-4")),
        ((one * 3.0 * 2.0**-1074) / 2.0, 2.0**-1073),
    )
    if any(bool((value != expected).any()) for value, expected in probes):
        _refuse("a rounding mode other than to nearest, or inexact division", where)


_SPREAD = tuple(1.0 + math.fmod(i * 0.6180339887498949, 1.0) for i in range(1, 98))


def _around_root(x: float) -> tuple[float, float]:
    """Largest float at or below, and smallest at or above, the root of x > 0, by integers alone."""
    mantissa, exponent = math.frexp(x)
    n, exponent = int(math.ldexp(mantissa, 53)), exponent - 53
    if exponent % 2:
        n, exponent = 2 * n, exponent - 1
    radicand, half = n << 52, (exponent - 52) // 2  # 105 or 106 bits, so the root has 53
    root = math.isqrt(radicand)
    return math.ldexp(root, half), math.ldexp(root + (root * root < radicand), half)


@cache
def _root_probes() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Radicands and the floats on either side of their roots, each ``(n,)``.

    Evenly spread significands with exponents of both parities, from denormals to large numbers;
    squares; and the neighbours of squares, whose roots come closest to a float or to the middle
    between two.
    """
    radicands = [math.ldexp(m, e) for m in _SPREAD for e in (-1030, -501, 0, 1, 700)]
    for square in (1.0, 2.25, 4.0, 9.0, (1.0 + 2.0**-26) ** 2, (2.0 - 2.0**-25) ** 2):
        radicands += [square, math.nextafter(square, 0.0), math.nextafter(square, math.inf)]
    radicands += [math.ldexp(1.0, -1074), sys.float_info.min, sys.float_info.max]
    low, high = zip(*map(_around_root, radicands), strict=True)
    return tuple(torch.tensor(v, dtype=torch.float64) for v in (radicands, low, high))  # type: ignore[return-value]


def _check_roots(one: torch.Tensor, where: str) -> None:
    """Every root is one of the two floats around the exact one: long runs, strided and single."""
    radicands, low, high = (probe.to(one.device) for probe in _root_probes())
    roots = torch.sqrt(radicands)
    faithful = (roots >= low) & (roots <= high)
    every_other = torch.sqrt(radicands[::2])
    faithful[::2] &= (every_other >= low[::2]) & (every_other <= high[::2])
    for i in range(3):
        single = torch.sqrt(radicands[i])
        faithful[i] &= (single >= low[i]) & (single <= high[i])
    if not bool(faithful.all()):
        _refuse("square roots off by one unit in the last place or more", where)


def _check_quotients(one: torch.Tensor, where: str) -> None:
    """Quotients and reciprocals against integer division, which Python rounds to nearest."""
    values = torch.tensor(_SPREAD, dtype=one.dtype, device=one.device)
    # Beyond 53 bits, Python divides integers as integers.
    scaled = [int(math.ldexp(m, 116)) for m in _SPREAD]
    for top, numerators in ((one[0], [1 << 116] * len(scaled)), (values.flip(0), scaled[::-1])):
        exact = [p / q for p, q in zip(numerators, scaled, strict=True)]
        expected = torch.tensor(exact, dtype=one.dtype, device=one.device)
        if bool((top / values != expected).any()):
            _refuse("quotients that are not rounded to nearest", where)
    reciprocals = torch.tensor([(1 << 116) / q for q in scaled], dtype=one.dtype)
    if bool((values.reciprocal() != reciprocals.to(one.device)).any()):
        _refuse("reciprocals that are not rounded to nearest", where)


def _check_products(one: torch.Tensor) -> None:
    """Probe matrix products of ``one`` (k, k): exact integers, denormals, ties to even."""
    k = one.shape[0]
    if bool(((one * 3.0) @ (one * 5.0) != 15.0 * k).any()):
        _refuse("inexact integer matrix product", "torch.matmul")
    if bool(((one * 2.0**-1000) @ (one * 2.0**-70) != k * 2.0**-1070).any()):
        _refuse("denormal matrix products flushed to zero", "torch.matmul")
    eye = torch.eye(k, dtype=one.dtype, device=one.device)
    left, right = torch.cat([eye, eye], 1), torch.cat([one, one * (2.0**-53 * 1.5)], 0)
    if bool((left @ right != 1.0 + 2.0**-52).any()) or bool(
        (left @ -right != -1.0 - 2.0**-52).any()
    ):
        _refuse("matrix products that do not round to nearest", "torch.matmul")
    value = one + (2.0**-20 + 2.0**-40)
    if bool((value @ eye != value).any()):
        _refuse("matrix products in reduced precision", "torch.matmul")
    # Beside 2^200 a small entry is lost wherever rows are scaled to integers (emulated float64) or
    # blocks are added before they are multiplied (Strassen).
    wide, rest = one.clone(), one.clone()
    wide[:, 0], rest[0] = 2.0**200, 0.0
    if bool((wide @ rest != k - 1.0).any()) or bool((rest.mT @ wide.mT != k - 1.0).any()):
        _refuse("matrix products other than sums of products of entries", "torch.matmul")


def _check_floats() -> None:
    """Probe Python floats in this thread; operands come from calls so that nothing is folded."""
    one = float.fromhex("0x1p+0")
    tiny, half, least = math.ldexp(one, -1022), math.ldexp(one, -53), math.ldexp(one, -1074)
    if tiny * 0.5 == 0.0 or least * one == 0.0 or least + 0.0 == 0.0:
        _refuse("denormals flushed to zero", "Python floats")
    up, down = one + half * 1.5, -one - half * 1.5
    if (
        one + half != one
        or -one - half != -one
        or up == one
        or down == -one
        or up + half != up + 2 * half
    ):
        _refuse("a rounding mode other than to nearest", "Python floats")


def self_test(device: torch.device | str = "cpu") -> None:
    """Look for arithmetic that voids rigorous bounds; takes about a millisecond on an idle CPU.

    Detects results or operands flushed to zero, a rounding mode other than to nearest, quotients
    that are not rounded to nearest, roots that are not faithful, and matrix products in reduced
    precision, emulated or by Strassen's scheme, in Python floats and in torch on ``device``. On a
    CPU the elementwise probe is long enough to be spread over torch's worker threads, each of which
    has a control register of its own.

    Raises:
        NotCertifiedError: The arithmetic is not IEEE 754 binary64 round to nearest with gradual
            underflow, or its roots err by one unit in the last place or more.

    Source:
        Soundness requirement T27 of this project.
    """
    _check_floats()
    ones, place = torch.ones(1 << 6, dtype=torch.float64, device=device), f"torch on {device}"
    for check in (_check_arithmetic, _check_quotients, _check_roots):
        check(ones, place)
    threads = torch.get_num_threads() if torch.device(device).type == "cpu" else 1
    if threads > 1:
        wide = torch.full(((1 << 15) * threads,), 2.0**-1022, dtype=torch.float64)
        if bool((wide * 0.5 == 0).any()):
            _refuse("denormals flushed to zero in a worker thread", f"torch on {device}")
    # Libraries choose their algorithm by size.
    for size in (24,) if torch.device(device).type == "cpu" else (24, 512, 2048):
        _check_products(torch.ones((size, size), dtype=torch.float64, device=device))


@cache
def _self_test_once(device: torch.device) -> None:
    with on_host():
        self_test(device)


def ensure_arithmetic(device: torch.device) -> None:
    """First call of every rigorous path: the scalar probes, and the self-test once per device."""
    _check_floats()
    _self_test_once(device)
