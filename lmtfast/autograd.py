# SPDX-License-Identifier: MIT
"""The autograd nodes: each pairs a forward with its vector-Jacobian product, no mathematics."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lmtfast.backends import pair_norm
from lmtfast.engines.network import spectral_step, spectral_vjp
from lmtfast.errors import ArgumentError

if TYPE_CHECKING:
    from lmtfast.plan import BoundPlan


def refuse_second_order(node: str) -> None:
    """Raise when backward runs with ``create_graph=True``.

    ``once_differentiable`` objects only to an incoming gradient that requires grad; for a plain
    scalar loss it would hand out first gradients that silently are constants.
    """
    if torch.is_grad_enabled():
        raise ArgumentError(
            "a first-order gradient",
            "create_graph=True",
            f"the backward of {node}",
            "drop create_graph; this node has no second derivative.",
        )


class MarginCrossEntropy(torch.autograd.Function):
    """Per-sample margin cross-entropy, differentiable once in logits, head weight and coefficient.

    ``rows`` handed to the backend are the pair norms of the head's rows ``classes`` (None: all K),
    times ``row_scale`` where given; without a head, ``row_scale`` alone. One node for both steps,
    so that only the (U, K) rows are kept between forward and backward and the head's gradient is a
    single product.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,  # (N, K)
        head_weight: Tensor | None,  # (K, D)
        coefficient: Tensor,  # (N,)
        target: Tensor,  # (N,)
        classes: Tensor | None,  # (U,)
        row_index: Tensor,  # (N,)
        row_scale: Tensor | None,  # (U, K)
        member: str,
        backend: ModuleType,
    ) -> Tensor:
        norms = None
        if head_weight is not None:
            norms = _pair_norms(backend).pair_norm_forward(head_weight, classes)
            norms = norms.to(coefficient.dtype)
        if norms is None or row_scale is None:
            rows = row_scale if norms is None else norms
            assert rows is not None, "a margin needs a head or row_scale"
        else:
            rows = norms * row_scale
        logits, coefficient = logits.contiguous(), coefficient.contiguous()
        loss, dlogits, scale = backend.margin_forward(
            member, logits, target, row_index, rows, coefficient
        )
        ctx.member, ctx.backend = member, backend
        ctx.save_for_backward(
            logits, head_weight, coefficient, target, classes, row_index,
            row_scale, norms, rows, dlogits, scale,
        )  # fmt: skip
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_order("MarginCrossEntropy")
        (logits, head_weight, coefficient, target, classes, row_index,
         row_scale, norms, rows, dlogits, scale) = ctx.saved_tensors  # fmt: skip
        grad_logits, grad_rows, grad_coefficient = ctx.backend.margin_backward(
            ctx.member, logits, target, row_index, rows, coefficient, scale, dlogits,
            grad_loss.contiguous(),
        )  # fmt: skip
        grad_weight = None
        if head_weight is not None and ctx.needs_input_grad[1]:
            grad_norms = grad_rows if row_scale is None else grad_rows * row_scale
            dtype = pair_norm.pair_norm_dtype(head_weight)
            grad_weight = _pair_norms(ctx.backend).pair_norm_vjp(
                head_weight, classes, norms.to(dtype), grad_norms.to(dtype)
            )
        return grad_logits, grad_weight, grad_coefficient, None, None, None, None, None, None


def _pair_norms(backend: ModuleType) -> ModuleType:
    """Where the pair norms come from: the backend, if it has them."""
    return backend if hasattr(backend, "pair_norm_forward") else pair_norm


class SpectralNorms(torch.autograd.Function):
    """Spectral norms of all operators of a plan and the bounds composed of them: one node.

    Returns sigmas ``(R,)``, the bounds of features and logits ``(2,)``, and the new iterates, which
    the caller stores. Backward is one weight gradient per operator from the saved vectors.
    """

    @staticmethod
    def forward(
        ctx: Any, plan: Any, state: Tensor, update: bool, *tensors: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        step = spectral_step(plan, state, tensors, update=update)
        ctx.plan = plan
        ctx.save_for_backward(*tensors, step.jacobian, step.saved, step.rest)
        ctx.mark_non_differentiable(step.iterates)
        return step.sigmas, step.values, step.iterates

    @staticmethod
    def backward(
        ctx: Any, grad_sigmas: Tensor, grad_values: Tensor, _: Any
    ) -> tuple[Tensor | None, ...]:
        refuse_second_order("NetworkBound")
        *tensors, jacobian, saved, rest = ctx.saved_tensors
        grad = grad_sigmas + grad_values @ jacobian
        wanted = ctx.needs_input_grad[3:]
        return (None, None, None, *spectral_vjp(ctx.plan, tensors, saved, rest, grad, wanted))


def spectral_norms(
    plan: BoundPlan, state: Tensor, update: bool, tensors: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Sigmas ``(R,)``, composed bounds ``(2,)`` and new iterates, differentiable in ``tensors``.

    While a graph is being compiled the step is an operator of torch, which tracing does not enter.
    """
    if torch.compiler.is_compiling():
        sigmas, values, _, iterates, _, _ = torch.ops.lmtfast.spectral_step(
            list(tensors), state, plan.fingerprint, update
        )
        return sigmas, values, iterates
    found: tuple[Tensor, Tensor, Tensor] = SpectralNorms.apply(plan, state, update, *tensors)
    return found
