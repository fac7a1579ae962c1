# SPDX-License-Identifier: MIT
"""Probabilistic norms of traced operators, from fresh randomness or from a hash of everything.

A hash-derived draw repeats bit for bit, so whoever reads a certificate can compute it again. It is
as good as a fresh one against all who do not search: the seed commits to the weights, the network
and the settings, so each variation of any of them is one more draw, and T variations multiply the
failure probability by T. Hence it is refused above 2^-100.
"""

from __future__ import annotations

import hashlib
import math
import secrets
from collections.abc import Callable
from dataclasses import replace
from typing import TypeAlias

from torch import Tensor

from lmtfast.backends.reference import region_adjoint, region_apply
from lmtfast.errors import ArgumentError
from lmtfast.graph import Region
from lmtfast.level import DELTA, Level
from lmtfast.verified.matrix import NormEnclosure, enclosure
from lmtfast.verified.moment import moment_norm_upper
from lmtfast.verified.region import lanczos_norm
from lmtfast.verified.weight_error import check_weights, product_error_up
from lmtfast.weights import Weights

# With a larger relative error of a product the moment bound's allowance would eat its threshold.
LARGEST_PRODUCT_ERROR = 2.0**-31
# Rounds of operator and adjoint, and so many times more where a fresh draw has to confirm another.
ROUNDS, CONFIRMING = 100, 4
METHOD_OF = {"fresh": "moment", "hash": "hashed moment"}

Entropy: TypeAlias = Callable[[int], bytes]


def check_draw(draw: str, level: Level) -> None:
    """Refuse a draw that does not exist, or one from a hash that could be searched for."""
    if draw not in METHOD_OF:
        raise ArgumentError(
            f"a draw, one of {', '.join(METHOD_OF)}", repr(draw), "draw", "use 'fresh'"
        )
    if draw == "hash" and level.delta > DELTA:
        raise ArgumentError(
            "delta of at most 2**-100 for a draw derived from a hash", repr(level.delta), "delta",
            "leave delta out, or use draw='fresh': a search over weights multiplies it",
        )  # fmt: skip


def hashed_entropy(*commitment: str) -> Entropy:
    """SHAKE-256 of the SHA-256 of texts: any number of bytes, always the same ones.

    Args:
        commitment: All that the bound depends on. Each text is hashed with its length, so that no
            two commitments are the same string.

    Returns:
        A function from a number of bytes to that many.

    Source:
        Fiat and Shamir, "How to prove yourself", CRYPTO 1986; FIPS 180-4 and 202.

    Example:
        >>> hashed_entropy("a", "b")(4) == hashed_entropy("ab", "")(4)
        False
    """
    digest = hashlib.sha256()
    for text in commitment:
        digest.update(len(text.encode()).to_bytes(8, "little") + text.encode())
    return hashlib.shake_256(digest.digest()).digest


def drawn_norm_upper(
    region: Region,
    weights: Weights,
    *,
    level: Level,
    draw: str = "fresh",
    commitment: tuple[str, ...] = (),
    confirming: bool = False,
) -> NormEnclosure | None:
    """Bound the norm of a region with failure probability ``level.delta``.

    Args:
        region: A region of a :class:`~lmtfast.graph.BoundGraph`.
        weights: Resolved in float64.
        level: ``probabilistic``, with this operator's share of the probability.
        draw: ``"fresh"`` or ``"hash"``.
        commitment: What the hash is of, beside the region and the settings here: everything that
            the region's weights are computed from.
        confirming: Whether to compute a tighter bound, for comparison with one drawn elsewhere.

    Returns:
        The enclosure, or None where weights cancel or leave the range: products say too little
        there.

    Guarantee:
        That of :func:`lmtfast.verified.moment.moment_norm_upper`; from a hash, for all who do not
        search for weights with a bad one.
    """
    check_weights(region, weights)

    def apply(x: Tensor) -> Tensor:
        return region_apply(region, weights, x)

    def adjoint(u: Tensor) -> Tensor:
        return region_adjoint(region, weights, u)

    error = product_error_up(region, weights, apply, adjoint)
    if not error <= LARGEST_PRODUCT_ERROR:
        return None
    # It rests on an estimate: up to a power of two it is the same every time.
    error = math.ldexp(1.0, math.frexp(error)[1])
    rounds = ROUNDS * (CONFIRMING if confirming and draw == "fresh" else 1)
    settings = (repr(region), level.delta.hex(), str(rounds))
    entropy = secrets.token_bytes if draw == "fresh" else hashed_entropy(*commitment, *settings)
    upper = moment_norm_upper(
        apply, adjoint, region.in_shape, delta=level.delta, product_error=error, iterations=rounds,
        device=weights.device, entropy=entropy,
    )  # fmt: skip
    found = enclosure(upper, lanczos_norm(region, weights), METHOD_OF[draw])
    return replace(found, level=level)
