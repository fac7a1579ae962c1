# SPDX-License-Identifier: MIT
"""Margin cross-entropy as one step: pair norms, then the loss; and its gradient.

The rows handed to a backend are the pair norms of the head's rows ``classes`` (None: all K), times
``row_scale`` where given; without a head, ``row_scale`` alone. Only the (U, K) norms are kept for
the gradient, and the head's is a single product.
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

from torch import Tensor

from lmtfast.backends import pair_norm


class MarginProblem(NamedTuple):
    """The arguments of one margin cross-entropy.

    Attributes:
        logits: Shape ``(N, K)``.
        head_weight: Shape ``(K, D)``, or None.
        coefficient: ``eps * L`` per sample. Shape ``(N,)``, float32, or float64 for float64 logits.
        target: Shape ``(N,)``, int64.
        classes: Which rows' norms are computed, shape ``(U,)``, or None for all.
        row_index: Row of each sample's reference class. Shape ``(N,)``.
        row_scale: Factor of the rows, shape ``(U, K)``, or None where there is a head.
    """

    logits: Tensor
    head_weight: Tensor | None
    coefficient: Tensor
    target: Tensor
    classes: Tensor | None
    row_index: Tensor
    row_scale: Tensor | None

    def rows(self, norms: Tensor | None) -> Tensor:
        """What one unit of the coefficient adds to each rival. Shape ``(U, K)``."""
        if norms is None:
            assert self.row_scale is not None, "a margin needs a head or row_scale"
            return self.row_scale
        return norms if self.row_scale is None else norms * self.row_scale


class MarginStep(NamedTuple):
    """Loss ``(N,)``; dlogits ``(N, K)``, scale ``(N,)`` and norms ``(U, K)`` for the gradient."""

    loss: Tensor
    dlogits: Tensor
    scale: Tensor
    norms: Tensor | None


def _pair_norms(backend: ModuleType) -> ModuleType:
    """Where the pair norms come from: the backend, if it has them."""
    return backend if hasattr(backend, "pair_norm_forward") else pair_norm


def margin_step(backend: ModuleType, member: str, problem: MarginProblem) -> MarginStep:
    """The loss per sample and what its gradient needs."""
    norms = None
    if problem.head_weight is not None:
        norms = _pair_norms(backend).pair_norm_forward(problem.head_weight, problem.classes)
        norms = norms.to(problem.coefficient.dtype)
    loss, dlogits, scale = backend.margin_forward(
        member, problem.logits.contiguous(), problem.target, problem.row_index,
        problem.rows(norms), problem.coefficient.contiguous(),
    )  # fmt: skip
    return MarginStep(loss, dlogits, scale, norms)


def margin_vjp(
    backend: ModuleType,
    member: str,
    problem: MarginProblem,
    step: MarginStep,
    grad_loss: Tensor,
    *,
    head_wanted: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients to logits ``(N, K)``, coefficient ``(N,)`` and, where wanted, head ``(K, D)``."""
    grad_logits, grad_rows, grad_coefficient = backend.margin_backward(
        member, problem.logits.contiguous(), problem.target, problem.row_index,
        problem.rows(step.norms), problem.coefficient.contiguous(), step.scale, step.dlogits,
        grad_loss.contiguous(),
    )  # fmt: skip
    if problem.head_weight is None or step.norms is None or not head_wanted:
        return grad_logits, grad_coefficient, None
    grad_norms = grad_rows if problem.row_scale is None else grad_rows * problem.row_scale
    dtype = pair_norm.pair_norm_dtype(problem.head_weight)
    grad_head = _pair_norms(backend).pair_norm_vjp(
        problem.head_weight, problem.classes, step.norms.to(dtype), grad_norms.to(dtype)
    )
    return grad_logits, grad_coefficient, grad_head
