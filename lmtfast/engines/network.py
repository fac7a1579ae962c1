# SPDX-License-Identifier: MIT
"""One step of every operator of a network, and its gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lmtfast.backends.reference import Leaves
from lmtfast.engines import get_engine
from lmtfast.engines.step import Saved
from lmtfast.graph import Operator, Region, Slope, WeightRef
from lmtfast.state import PowerState

if TYPE_CHECKING:
    from lmtfast.plan import BoundPlan

CLOSED_FORM = "closed form"


def state_sizes(plan: BoundPlan) -> list[int]:
    """Packed state entries per operator, 0 where a closed form needs none."""
    return [
        0
        if name == CLOSED_FORM or not isinstance(op, Region)
        else get_engine(name, plan.backend).state_size(op)
        for op, name in zip(plan.operators, plan.engines, strict=True)
    ]


def spectral_step(
    plan: BoundPlan, state: PowerState, tensors: Sequence[Tensor], *, update: bool
) -> tuple[Tensor, list[Saved]]:
    """Estimates of all spectral norms. Shape ``(R,)``; advances the state when ``update``."""
    leaves = dict(zip(plan.slots, tensors, strict=True))
    weights = Leaves(leaves)
    sigmas, saved, parts = [], [], []
    for i, (operator, name) in enumerate(zip(plan.operators, plan.engines, strict=True)):
        # The saved vectors must survive the in-place update below and a second call in one step.
        iterate = state.slice(i).clone()
        if name == CLOSED_FORM or not isinstance(operator, Region):
            sigma, keep = largest_entry(operator, leaves)
            parts.append(iterate)
        else:
            result = get_engine(name, plan.backend).step(operator, weights, iterate, update=update)
            sigma, keep = result.sigma, result.saved
            parts.append(result.state)
        sigmas.append(sigma)
        saved.append(keep)
    if update:
        state.advance(parts)
    return torch.stack(sigmas) if sigmas else state.iterates.new_zeros(0), saved


def rescan_parts(plan: BoundPlan, state: PowerState, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Fresh states found by a full search at the present weights, one per operator."""
    weights = Leaves(dict(zip(plan.slots, tensors, strict=True)))
    parts = []
    for i, (operator, name) in enumerate(zip(plan.operators, plan.engines, strict=True)):
        part = state.slice(i).clone()
        if name != CLOSED_FORM and isinstance(operator, Region):
            part = get_engine(name, plan.backend).rescan(operator, weights, part)
        parts.append(part)
    return parts


def spectral_vjp(
    plan: BoundPlan,
    tensors: Sequence[Tensor],
    saved: Sequence[Saved],
    grad_sigmas: Tensor,
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """Gradient in every slot's tensor; None where it is not wanted."""
    leaves = dict(zip(plan.slots, tensors, strict=True))
    asked = {ref for ref, want in zip(plan.slots, wanted, strict=True) if want}
    total: dict[WeightRef, Tensor] = {}
    for i, (operator, name) in enumerate(zip(plan.operators, plan.engines, strict=True)):
        refs = plan.operator_slots[i]
        if not asked.intersection(refs):
            continue
        if name == CLOSED_FORM or not isinstance(operator, Region):
            grads = largest_entry_vjp(operator, leaves, saved[i])
        else:
            grads = get_engine(name, plan.backend).vjp(
                operator, {r: leaves[r] for r in refs}, saved[i]
            )
        for ref, grad in grads.items():
            if ref in asked:
                part = grad_sigmas[i] * grad
                total[ref] = total[ref] + part if ref in total else part
    return [
        total[ref].to(t.dtype) if ref in total else (torch.zeros_like(t) if want else None)
        for ref, t, want in zip(plan.slots, tensors, wanted, strict=True)
    ]


def _entries(operator: Operator, leaves: dict[WeightRef, Tensor]) -> tuple[WeightRef, Tensor]:
    """The tensor whose largest absolute entry is the operator's norm."""
    if isinstance(operator, Slope):
        return operator.ref, leaves[operator.ref].reshape(-1).abs()
    op = operator.primitive
    ref = op.ref  # type: ignore[union-attr]
    entries = leaves[ref].reshape(-1).abs()
    return ref, (entries.reciprocal() if op.inverse else entries) * abs(op.gain)  # type: ignore[union-attr]


def largest_entry(operator: Operator, leaves: dict[WeightRef, Tensor]) -> tuple[Tensor, Saved]:
    """Norm of a diagonal map, or the slope of a PReLU; saves where the maximum is."""
    _, entries = _entries(operator, leaves)
    sigma, index = entries.max(0)
    # NaN must not hide behind the comparison with one.
    if isinstance(operator, Slope):
        sigma = torch.maximum(sigma, torch.ones_like(sigma))
    return sigma, (index,)


def largest_entry_vjp(
    operator: Operator, leaves: dict[WeightRef, Tensor], saved: Saved
) -> dict[WeightRef, Tensor]:
    """Subgradient: the entry that attains the maximum."""
    with torch.enable_grad():
        ref = _entries(operator, leaves)[0]
        leaf = leaves[ref].detach().requires_grad_()
        value = _entries(operator, {ref: leaf})[1][saved[0]]
        if isinstance(operator, Slope):
            value = torch.where(value > 1, value, value.detach())
        (grad,) = torch.autograd.grad(value, leaf)
    return {ref: grad}
