# SPDX-License-Identifier: MIT
"""Self-test of the arithmetic under rigorous bounds: IEEE 754 binary64, gradual underflow."""

from __future__ import annotations

import math
from functools import cache

import torch

from lmtfast.errors import NotCertifiedError


def _refuse(finding: str, where: str) -> None:
    raise NotCertifiedError(
        "IEEE 754 double precision with round to nearest and gradual underflow",
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
        (torch.sqrt(one * 2.0), float.fromhex("0x1.6a09e667f3bcdp+0")),
        (torch.sqrt(one * 3.0), float.fromhex("0x1.bb67ae8584caap+0")),
    )
    if any(bool((value != expected).any()) for value, expected in probes):
        _refuse("a rounding mode other than to nearest, or inexact division or root", where)


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
    """Look for arithmetic that voids rigorous bounds; takes well under a millisecond on a CPU.

    Detects results or operands flushed to zero, a rounding mode other than to nearest, and matrix
    products in reduced precision, in Python floats and in torch on ``device``. On a CPU the
    elementwise probe is long enough to be spread over torch's worker threads, each of which has a
    control register of its own.

    Raises:
        NotCertifiedError: The arithmetic is not IEEE 754 binary64 round to nearest with gradual
            underflow.

    Source:
        Soundness requirement T27 of this project.
    """
    _check_floats()
    _check_arithmetic(torch.ones(1 << 6, dtype=torch.float64, device=device), f"torch on {device}")
    threads = torch.get_num_threads() if torch.device(device).type == "cpu" else 1
    if threads > 1:
        wide = torch.full(((1 << 15) * threads,), 2.0**-1022, dtype=torch.float64)
        if bool((wide * 0.5 == 0).any()):
            _refuse("denormals flushed to zero in a worker thread", f"torch on {device}")
    _check_products(torch.ones((24, 24), dtype=torch.float64, device=device))


@cache
def _self_test_once(device: torch.device) -> None:
    self_test(device)


def ensure_arithmetic(device: torch.device) -> None:
    """First call of every rigorous path: the scalar probes, and the self-test once per device."""
    _check_floats()
    _self_test_once(device)
