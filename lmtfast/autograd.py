# SPDX-License-Identifier: MIT
"""The autograd nodes: each pairs a forward with its vector-Jacobian product, no mathematics."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lmtfast.backends.margin_choice import choose_margin_backend
from lmtfast.backends.margin_step import MarginProblem, MarginStep, margin_step, margin_vjp
from lmtfast.backends.pair_norm import without_autocast
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
    """Per-sample margin cross-entropy, differentiable once in logits, head and coefficient."""

    @staticmethod
    def forward(ctx: Any, member: str, backend: ModuleType, *tensors: Any) -> Tensor:
        step = margin_step(backend, member, MarginProblem(*tensors))
        ctx.member, ctx.backend = member, backend
        ctx.save_for_backward(*tensors, *step[1:])
        return step.loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_order("MarginCrossEntropy")
        n = len(MarginProblem._fields)
        problem = MarginProblem(*ctx.saved_tensors[:n])
        step = MarginStep(grad_loss, *ctx.saved_tensors[n:])
        grad_logits, grad_coefficient, grad_head = margin_vjp(
            ctx.backend, ctx.member, problem, step, grad_loss, head_wanted=ctx.needs_input_grad[3]
        )
        return None, None, grad_logits, grad_head, grad_coefficient, None, None, None, None


def margin_loss(member: str, backend: str | None, problem: MarginProblem) -> Tensor:
    """Loss per sample ``(N,)``, differentiable once in logits, head weight and coefficient.

    While a graph is being compiled the step is an operator of torch, which tracing does not enter.
    """
    if torch.compiler.is_compiling():
        traced: Tensor = torch.ops.lmtfast.margin_cross_entropy(*problem, member, backend or "")[0]
        return traced
    chosen = choose_margin_backend(problem.logits, member, backend)
    loss: Tensor = MarginCrossEntropy.apply(member, chosen, *problem)
    return loss


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
        wanted = ctx.needs_input_grad[3:]
        # The caller's autocast, which may be on around backward, would round products to bfloat16.
        with without_autocast(grad_values.device):
            grad = grad_sigmas + grad_values @ jacobian
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
    if not torch.is_grad_enabled():
        step = spectral_step(plan, state, tensors, update=update)
        return step.sigmas, step.values, step.iterates
    found: tuple[Tensor, Tensor, Tensor] = SpectralNorms.apply(plan, state, update, *tensors)
    return found
