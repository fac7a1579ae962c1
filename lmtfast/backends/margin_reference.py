# SPDX-License-Identifier: MIT
"""The margin losses in plain PyTorch: the definition that every other margin backend is held to.

A margin backend is anything with two functions. With
``A[i, j] = coefficient[i] * rows[row_index[i], j]``, and ``A[i, r_i] = 0`` at the reference class
``r_i`` whatever ``rows`` holds there::

    margin_forward(member, logits, target, row_index, rows, coefficient) -> (loss, dlogits, scale)
    margin_backward(member, logits, target, row_index, rows, coefficient, scale, dlogits, grad_loss)
        -> (grad_logits, grad_rows, grad_coefficient)

``logits`` (N, K) any floating dtype; ``target``, ``row_index`` (N,) int64; ``rows`` (U, K),
``coefficient`` (N,), ``loss`` (N,) and ``dlogits`` (N, K), the gradient of each sample's own loss,
in the computing dtype (float64 for float64 logits, else float32); ``scale`` (N,) is what the
backend's own backward needs besides, opaque to callers.

Two shapes of loss. A *shift* formula is cross-entropy on ``y = z + s * A`` with ``s`` constant in
backward; it is one registered function here. ``gloro`` is cross-entropy over K + 1 logits, the last
being ``max over j != r of z_j + A_j``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

EMMA_MIN_RATIO = 0.01  # lower end of the ratio clip in the authors' loss (Hu et al. 2024)


@dataclass(frozen=True)
class ShiftFormula:
    """``factor(margin, shift)`` -> s, (N, 1) or (N, K); at the target they are +inf and 0."""

    factor: Callable[[Tensor, Tensor], Tensor]
    per_class: bool


SHIFT_FORMULAS: dict[str, ShiftFormula] = {}


def shift_formula(
    name: str, *, per_class: bool = False
) -> Callable[[Callable[[Tensor, Tensor], Tensor]], Callable[[Tensor, Tensor], Tensor]]:
    """Register the factor s of ``y = z + s * A`` under the name the losses use."""

    def register(
        factor: Callable[[Tensor, Tensor], Tensor],
    ) -> Callable[[Tensor, Tensor], Tensor]:
        SHIFT_FORMULAS[name] = ShiftFormula(factor, per_class)
        return factor

    return register


@shift_formula("lmt")
def full_shift(margin: Tensor, shift: Tensor) -> Tensor:
    """s = 1: every rival is raised by the whole bound."""
    return shift.new_ones(shift.shape[0], 1)


@shift_formula("lmt++")
def sample_factor(margin: Tensor, shift: Tensor) -> Tensor:
    """One s per sample: the largest that overturns no rival, 0 if one already does or ties."""
    # In this order 0/0 is never selected, and NaN passes through both tests.
    ratio = torch.where(margin >= shift, 1.0, margin / shift)
    return torch.where(margin <= 0, 0.0, ratio).amin(1, keepdim=True)


@shift_formula("emma", per_class=True)
def clipped_ratio(margin: Tensor, shift: Tensor) -> Tensor:
    """One s per rival: the share of the shift that makes it tie, clipped to [0.01, 1]."""
    return torch.where(shift == 0, 1.0, (margin / shift).clamp(EMMA_MIN_RATIO, 1.0))


def margin_members() -> tuple[str, ...]:
    """Names accepted as ``member``."""
    return (*SHIFT_FORMULAS, "gloro")


def reference_class(member: str, logits: Tensor, target: Tensor) -> Tensor:
    """The class rivals are compared with, (N,): the target, or for gloro the first largest."""
    return logits.argmax(1) if member == "gloro" else target


def margin_forward(
    member: str,
    logits: Tensor,
    target: Tensor,
    row_index: Tensor,
    rows: Tensor,
    coefficient: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, dlogits and scale: the factor per sample, or p of the bottom class for gloro."""
    z, t = logits.to(rows.dtype), target[:, None]
    if member == "gloro":
        bottom, rival = _bottom(z, row_index, rows, coefficient)
        logp = torch.cat([z, bottom[:, None]], 1).log_softmax(1)
        scale = logp[:, -1].exp()
        loss, dlogits = _cross_entropy(logp[:, :-1], t)
        return loss, dlogits.scatter_add_(1, rival[:, None], scale[:, None]), scale
    shift = _shift(t, row_index, rows, coefficient)
    factor = _factor(member, z, t, shift)
    logp = shift.mul_(factor).add_(z).log_softmax(1)
    scale = factor.new_ones(len(target)) if SHIFT_FORMULAS[member].per_class else factor[:, 0]
    return *_cross_entropy(logp, t), scale


def margin_backward(
    member: str,
    logits: Tensor,
    target: Tensor,
    row_index: Tensor,
    rows: Tensor,
    coefficient: Tensor,
    scale: Tensor,
    dlogits: Tensor,
    grad_loss: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to logits (in their dtype), rows and coefficient; the factor s is a constant."""
    t = target[:, None]
    grad = dlogits * grad_loss[:, None]
    grad_logits = grad.to(logits.dtype)
    if member == "gloro":
        _, rival = _bottom(logits.to(rows.dtype), row_index, rows, coefficient)
        grad_shift = scale * grad_loss
        grad_rows = torch.zeros_like(rows).index_put_(
            (row_index, rival), grad_shift * coefficient, accumulate=True
        )
        return grad_logits, grad_rows, grad_shift * rows[row_index, rival]
    if SHIFT_FORMULAS[member].per_class:
        z = logits.to(rows.dtype)
        factor = _factor(member, z, t, _shift(t, row_index, rows, coefficient))
    else:
        factor = scale[:, None]
    # A is 0 at the target by definition, so nothing flows into its entry of the row.
    grad_shift = (grad * factor).scatter_(1, t, 0.0)
    # Not vecdot: autocast would run it in half precision.
    grad_coefficient = (grad_shift * rows.index_select(0, row_index)).sum(1)
    grad_entries = grad_shift.mul_(coefficient[:, None])
    if rows.shape[0] == 1:
        return grad_logits, grad_entries.sum(0, keepdim=True), grad_coefficient
    grad_rows = torch.zeros_like(rows).index_add_(0, row_index, grad_entries)
    return grad_logits, grad_rows, grad_coefficient


def _shift(
    reference: Tensor, row_index: Tensor, rows: Tensor, coefficient: Tensor
) -> Tensor:  # (N, K)
    shift = rows.index_select(0, row_index).mul_(coefficient[:, None])
    return shift.scatter_(1, reference, 0.0)


def _factor(member: str, z: Tensor, t: Tensor, shift: Tensor) -> Tensor:  # (N, 1) or (N, K)
    margin = (z.gather(1, t) - z).scatter_(1, t, float("inf"))
    return SHIFT_FORMULAS[member].factor(margin, shift)


def _bottom(
    z: Tensor, row_index: Tensor, rows: Tensor, coefficient: Tensor
) -> tuple[Tensor, Tensor]:  # (N,), (N,)
    reference = z.argmax(1, keepdim=True)
    shifted = _shift(reference, row_index, rows, coefficient).add_(z)
    best = shifted.scatter_(1, reference, float("-inf")).max(1)
    return best.values, best.indices


def _cross_entropy(logp: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:  # (N,), (N, K)
    """Loss and softmax minus one-hot; expm1 keeps p_t - 1 where p_t rounds to 1."""
    logp_t = logp.gather(1, t)
    return -logp_t[:, 0], logp.exp().scatter_(1, t, logp_t.expm1())
