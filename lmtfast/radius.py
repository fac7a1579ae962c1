# SPDX-License-Identifier: MIT
"""From enclosed logits and a guaranteed Lipschitz bound to certified radii, rounded down."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lmtfast.bound import LipschitzBound
from lmtfast.composing import SQRT2_UP
from lmtfast.errors import ArgumentError, NotCertifiedError, ShapeError
from lmtfast.verified.rounding import add_up, mul_up

if TYPE_CHECKING:
    from lmtfast.execution.recursion import ExecutionError

# Bounds are stored with 24 significant bits, after a margin for machines that sum in another order:
# a bound proved elsewhere for the same weights is then below the stored one.
CANONICAL_BITS = 24
CANONICAL_MARGIN = 1.0 + 2.0**-26


def canonical_up(bound: float) -> float:
    """A bound with 24 significant bits, at most 1.4e-7 (relative) above ``bound``, never below."""
    if not math.isfinite(bound) or bound == 0.0:
        return bound
    try:
        mantissa, exponent = math.frexp(mul_up(bound, CANONICAL_MARGIN))
        raised = math.ceil(math.ldexp(mantissa, CANONICAL_BITS))
        return math.ldexp(float(raised), exponent - CANONICAL_BITS)
    except OverflowError:
        return math.inf


class PairTable:
    """Rows of ``||w_c - w_j||`` for the classes asked for, each computed once.

    Args:
        bound: The bound whose head they belong to.
    """

    def __init__(self, bound: LipschitzBound) -> None:
        self._bound = bound
        self._rows: dict[int, Tensor] = {}

    def rows(self, classes: Tensor) -> Tensor:
        """Upper bounds, ``(N,)`` class indices to ``(N, K)`` float64."""
        missing = [c for c in classes.unique().tolist() if c not in self._rows]
        if missing:
            norms = self._bound.pair_norms(torch.tensor(missing)).to(torch.float64)
            self._rows.update(zip(missing, norms, strict=True))
        return torch.stack([self._rows[c] for c in classes.tolist()])


def radius_lower(
    value: Tensor,
    error: Tensor,
    bound: LipschitzBound,
    *,
    scale: float | None = None,
    pairs: PairTable | None = None,
    execution: ExecutionError | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Prediction, certified radius and smallest margin of every sample.

    For every perturbation d with ``||d||_2 <= r`` the exact real function keeps its class strictly:
    ``f_c(x) - f_j(x) >= m_j > r * scale * P[c, j] >= |change of f_c - f_j|`` for every rival j.

    Args:
        value: Logits, ``(N, K)`` float64.
        error: Bounds on their distance from the exact logits, ``(N, K)`` float64, nonnegative.
        bound: Guaranteed bound.
        scale: Upper bound on the Lipschitz constant to use instead of the bound's own (of the
            features where there is a head, of the logits elsewhere).
        pairs: Table of pair norms to share between calls.
        execution: What separates executions under a profile from the exact function. The radius
            then holds for them: ``r * (reach + growth) + error < m_j``, error and growth of the
            difference of two logits, and nothing overflows.

    Returns:
        ``(prediction, radius, margin_lower)``: ``(N,)`` int64 and twice ``(N,)`` float64, on the
        CPU. The radius is 0 for ties and wherever NaN or infinity occurs, and infinite where no
        rival can
        ever catch up: one class only, or a Lipschitz constant of exactly 0.

    Raises:
        NotCertifiedError: The bound is an estimate, or is NaN.
        ShapeError: Shapes disagree.
        ArgumentError: The bound's norm is not L2.

    Guarantee:
        That of ``bound``; every operation here rounds to the safe side.

    Source:
        Tsuzuku, Sato, Sugiyama (2018), arXiv:1802.04034, Prop. 1 and 2.

    Example:
        >>> import torch
        >>> import lmtfast as lf
        >>> bound = lf.certified_bound(torch.nn.Linear(2, 2).eval(), (2,))
        >>> value = torch.tensor([[1.0, 1.0]], dtype=torch.float64)
        >>> radius_lower(value, torch.zeros_like(value), bound)[1].tolist()
        [0.0]
    """
    if bound.level == "estimate":
        raise NotCertifiedError(
            "a bound of level 'probabilistic' or 'rigorous'",
            f"level 'estimate' from {bound.method}",
            "radius_lower(bound)",
            "compute it with lmtfast.certified_bound: power iteration underestimates norms",
        )
    if bound.norm != "l2":
        raise ArgumentError("an L2 bound", repr(bound.norm), "radius_lower(bound)", "bound in L2")
    if value.ndim != 2 or value.shape != error.shape or bound.classes not in (None, value.shape[1]):
        raise ShapeError(
            f"logits and errors of one shape (N, {bound.classes})",
            f"{tuple(value.shape)} and {tuple(error.shape)}",
            "radius_lower",
            "pass the enclosure of the network the bound belongs to",
        )
    own = bound.features if bound.head_weight is not None else bound.total
    lipschitz = float(own) if scale is None else float(scale)
    if not lipschitz >= 0.0:
        raise NotCertifiedError(
            "a nonnegative Lipschitz constant", repr(lipschitz), "radius_lower(bound)",
            "check the weights for NaN",
        )  # fmt: skip
    value, error = value.detach().cpu().double(), error.detach().cpu().double()
    if len(value) == 0:
        return torch.zeros(0, dtype=torch.int64), torch.zeros(0).double(), torch.zeros(0).double()
    known = (value.isfinite() & error.isfinite() & (error >= 0)).all(1)
    prediction = value.argmax(1)
    up, down = torch.full((), math.inf).double(), torch.full((), -math.inf).double()
    # Each float operation errs by at most half a step, so one step outward ends on the safe side;
    # the last step of the quotient makes r * reach < margin strict.
    lowest = torch.nextafter(value - error, down)
    highest = torch.nextafter(value + error, up)
    margin = torch.nextafter(lowest.gather(1, prediction[:, None]) - highest, down)
    pair = (PairTable(bound) if pairs is None else pairs).rows(prediction)
    if execution is None:
        reach, room = torch.nextafter(lipschitz * pair, up), margin
    else:
        # e_c - e_j is at most ||w_c - w_j|| times the features' error, and sqrt(2) times the rest.
        slope = add_up(lipschitz, execution.features.slope)
        reach = raised_sum(slope * pair, mul_up(SQRT2_UP, execution.logits.slope))
        moved = raised_sum(
            execution.features.constant * pair, mul_up(SQRT2_UP, execution.logits.constant)
        )
        room = torch.nextafter(margin - moved, down)
    quotient = torch.nextafter(room / reach, down).clamp_min(0.0)
    # Exactly 0: identical rows, or a constant network. The margin then never changes.
    never = (pair == 0.0) | (lipschitz == 0.0)
    if execution is None:
        quotient = torch.where(never, math.inf, quotient)
    quotient = torch.where(room > 0, quotient, 0.0)  # a NaN margin fails the comparison
    own_column = prediction[:, None]
    radius = quotient.scatter(1, own_column, math.inf).amin(1)
    if execution is not None:
        radius = radius.clamp_max(execution.largest_radius)
    margin_lower = margin.scatter(1, own_column, math.inf).amin(1)
    zero = torch.zeros_like(radius)
    radius = torch.where(known & radius.isnan().logical_not(), radius, zero)
    margin_lower = torch.where(known & (margin_lower > 0), margin_lower, zero)
    return prediction, radius, margin_lower


def raised_sum(a: Tensor, b: Tensor | float) -> Tensor:
    """Upper bound of ``a + b`` for nonnegative ``b`` and nonnegative ``a`` from one rounding.

    Half a step of ``a`` and half a step of the sum are at most one step of the sum.
    """
    return torch.nextafter(a + b, a.new_full((), math.inf))
