# SPDX-License-Identifier: MIT
"""A norm bound that holds with stated probability, for operators too large to factorise."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Sequence

import torch

from lmtfast.errors import ArgumentError, DtypeError, NonFiniteError
from lmtfast.verified.rounding import ensure_arithmetic, times_power_of_two

# Largest relative error of one product with the operator or its adjoint that the bound allows for:
# |computed - exact| <= PRODUCT_ERROR * norm * |x|. It is 2^18 u: inner lengths up to 4608 with the
# measured ratio 27 of | |W| | to |W| need less than half of it.
PRODUCT_ERROR = 2.0**-35
# The vector drawn differs from an exactly normal one coupled to it by at most this times its own
# norm: radius and angle of every Box-Muller pair are good to 2^-49 if the logarithm, sine and
# cosine are good to four units and the root to one (half the logarithm's 8u, the root's 2u, the
# product's u: 7u < 2^-50).
_DRAW_ERROR = 2.0**-45
_SMALLEST_SHARE = 2.0**-30  # smallest failure probability asked of a single probe
_OUTWARD = (
    1.0 + 2.0**-36
)  # covers the logarithms and norms of the last line, each good to 2^-45 at worst


def normal_draw(
    shape: Sequence[int], entropy: Callable[[int], bytes] = secrets.token_bytes
) -> torch.Tensor:
    """Float64 standard normal numbers made from random bytes by the Box-Muller map.

    The radius keeps its relative precision at both ends: a fair bit decides whether the 106-bit
    number w in (0, 1/2] is the uniform itself or its distance from 1.
    """
    count = math.prod(shape)
    pairs = (count + 1) // 2
    words = torch.frombuffer(bytearray(entropy(24 * max(1, pairs))), dtype=torch.int64).view(-1, 3)
    high, low, turn = (((words >> 11) & ((1 << 53) - 1)).to(torch.float64)).unbind(1)
    w = (high + (low + 0.5) * 2.0**-53) * 2.0**-54
    exponential = torch.where(words[:, 2] % 2 == 0, -torch.log(w), -torch.log1p(-w))
    radius, angle = torch.sqrt(2.0 * exponential), 2.0 * math.pi * ((turn + 0.5) * 2.0**-53)
    return torch.cat((radius * torch.cos(angle), radius * torch.sin(angle)))[:count].reshape(
        tuple(shape)
    )


def moment_norm_upper(
    matvec: Callable[[torch.Tensor], torch.Tensor],
    rmatvec: Callable[[torch.Tensor], torch.Tensor],
    in_shape: Sequence[int],
    *,
    delta: float,
    probes: int = 10,
    iterations: int = 100,
    device: torch.device | str = "cpu",
    product_error: float = 0.0,
    entropy: Callable[[int], bytes] = secrets.token_bytes,
) -> float:
    r"""Bound an operator norm from above with failure probability at most ``delta``.

    For g_1..g_r standard normal, drawn after the operator W is fixed, and delta_1 = delta^(1/r):
    with v the top right singular vector, P(|v . g_j| <= delta_1 sqrt(pi/2)) <= delta_1, so with
    probability 1 - delta some probe has |v . g_j| > delta_1 sqrt(pi/2), and then ||(W^T W)^k g_j||
    >= sigma^(2k) |v . g_j|. Hence

    .. math::  \sigma \le \Bigl( \max_j \lVert x_j \rVert / t \Bigr)^{1/(2k)}, \qquad
               t = \delta_1 \sqrt{\pi/2} - \bigl(2.1\, \rho k (1 + 2.1 \rho)^k + \tau \bigr) \max_j
               \lVert g_j \rVert .

    The subtracted term is the allowance for rounding. If every product errs by at most rho sigma
    ||x||, one round W^T W errs by at most (2 rho + rho^2) sigma^2 ||x||, which over k rounds moves
    the component along v by at most sigma^(2k) 2.1 rho k (1 + 2.1 rho)^k ||g||. tau is the error of
    the draw. Iterates are rescaled by powers of two, so nothing overflows; the scales are summed
    exactly.

    Args:
        matvec: Applies the operator to a batch ``(probes, *in_shape)`` of float64 tensors.
        rmatvec: Applies its adjoint to what ``matvec`` returned.
        in_shape: Shape of one input, without batch dimension.
        delta: Failure probability, in (0, 1).
        probes: Independent vectors r; more cost time and tighten the bound.
        iterations: Rounds k of operator and adjoint.
        device: Where the operator lives.
        product_error: Bound on the relative error of a product where it exceeds ``PRODUCT_ERROR``.
        entropy: Where the random bytes come from, the operating system by default.

    Returns:
        The bound as a float; 0.0 if the operator annihilates every probe or the input is empty.

    Raises:
        ArgumentError: ``delta`` outside (0, 1), too few probes for it, or a dimension or k for
            which the rounding allowance consumes t. The message says which number to raise.
        DtypeError: A product is not float64.
        NonFiniteError: A product holds NaN or infinity.

    Guarantee:
        Probabilistic: for every fixed operator the bound is below the true norm with probability at
        most ``delta`` over this call's own draw. Assumes (a) the random bytes are uniform and
        independent, (b) every product errs by at most ``PRODUCT_ERROR * norm *
        |x|`` (2^-35, or ``product_error``; no underflow, so scale weights near 1), (c) logarithm,
        sine and cosine in float64 within four units, so that the draw is within 2^-45 |g| of a
        normal vector.

    Source:
        Halko, Martinsson and Tropp, SIAM Review 53 (2011), lemma 4.1, for k = 1/2; powers after
        Dixon, SIAM J. Numer. Anal. 20 (1983). The rounding allowance is this project's.

    Example:
        >>> bound = moment_norm_upper(lambda x: 2 * x, lambda y: 2 * y, (5,), delta=2.0**-100)
        >>> 2.0 <= bound < 2.2
        True
    """
    dimension = math.prod(in_shape)
    if not 0.0 < delta < 1.0 or probes < 1 or iterations < 1:
        raise ArgumentError(
            "0 < delta < 1, probes >= 1, iterations >= 1",
            f"{delta}, {probes}, {iterations}",
            "moment_norm_upper",
            "use delta=2**-100 with the default probes and iterations",
        )
    if dimension == 0:
        return 0.0
    share = math.exp(math.log(delta) / probes) / _OUTWARD
    if share < _SMALLEST_SHARE:
        raise ArgumentError(
            f"delta ** (1 / probes) of at least {_SMALLEST_SHARE}",
            f"{share}",
            "probes",
            f"use at least {math.ceil(math.log(delta) / math.log(_SMALLEST_SHARE))} probes",
        )
    ensure_arithmetic(torch.device(device))
    x = normal_draw((probes, *in_shape), entropy).to(device)
    norms = torch.linalg.vector_norm(x.reshape(probes, -1), dim=1)
    step = 2.1 * max(PRODUCT_ERROR, product_error)
    allowance = step * iterations * (1.0 + step) ** iterations + _DRAW_ERROR
    threshold = share * math.sqrt(math.pi / 2.0) - _OUTWARD * allowance * float(norms.max())
    if threshold < 0.25 * share:
        raise ArgumentError(
            "a rounding allowance below the small-ball threshold",
            f"{allowance} for dimension {dimension}",
            "probes, iterations",
            "use more probes or fewer iterations",
        )
    exponents = [0] * probes
    for _ in range(iterations):
        for product in (matvec, rmatvec):
            x = product(x)
            if x.dtype != torch.float64:
                raise DtypeError(
                    "float64 products", str(x.dtype), "moment_norm_upper", "give a float64 operator"
                )
            x = _rescale(x, exponents)
    norms = torch.linalg.vector_norm(x.reshape(probes, -1), dim=1)
    logs = [
        (math.log2(norm) + exponent - math.log2(threshold)) / (2 * iterations)
        for norm, exponent in zip(norms.tolist(), exponents, strict=True)
        if norm > 0.0
    ]
    if not logs:
        return 0.0
    return math.inf if max(logs) >= 1023.9 else 2.0 ** max(logs) * _OUTWARD


def _rescale(x: torch.Tensor, exponents: list[int]) -> torch.Tensor:
    """Bring each probe's largest entry into [1/2, 1) by a power of two, kept in ``exponents``."""
    largest = x.reshape(len(x), -1).abs().amax(1).tolist() if x.numel() else [0.0] * len(x)
    shifts = [math.frexp(value)[1] if math.isfinite(value) else None for value in largest]
    if None in shifts:
        raise NonFiniteError(
            "finite products",
            "NaN or infinity",
            "moment_norm_upper",
            "scale the weights by a power of two, or repair the tensor that holds NaN",
        )
    if len(set(shifts)) == 1:
        scaled = times_power_of_two(x, -(shifts[0] or 0))
    else:
        scaled = torch.stack(
            [times_power_of_two(row, -(e or 0)) for row, e in zip(x, shifts, strict=True)]
        )
    for j, e in enumerate(shifts):
        exponents[j] += e or 0
    return scaled
