# SPDX-License-Identifier: MIT
"""One step of every operator of a network, and its gradient.

The operators that the plan's table marks as compiled run in one call of the backend; the others
run one by one on the reference engines.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from lmtfast.backends import backend_module
from lmtfast.backends.reference import Leaves
from lmtfast.composing import compose_with_jacobian
from lmtfast.engines import get_engine, symbol
from lmtfast.graph import Operator, Region, Shape, Slope, WeightRef, leaf_refs
from lmtfast.table import CLOSED_FORM

if TYPE_CHECKING:
    from lmtfast.plan import BoundPlan


class NetworkStep(NamedTuple):
    """What one step of a network returns.

    Attributes:
        sigmas: Estimates of all spectral norms. Shape ``(R,)``.
        values: Composed bounds of features and logits. Shape ``(2,)``.
        jacobian: Their derivatives in ``sigmas``. Shape ``(2, R)``.
        iterates: All iterates after the step, empty where none was asked for.
        saved: What the backend's gradient needs, flat.
        rest: What the reference engines' gradients need, flat, operator by operator.
    """

    sigmas: Tensor
    values: Tensor
    jacobian: Tensor
    iterates: Tensor
    saved: Tensor
    rest: Tensor


def spectral_step(
    plan: BoundPlan, state: Tensor, tensors: Sequence[Tensor], *, update: bool
) -> NetworkStep:
    """One step of every operator; ``state`` is read, never written.

    An iterate that would not be finite stays as it was.
    """
    module = backend_module(plan.backend)
    if plan.table.compiled:
        sigmas, iterates, saved = module.spectral_step(plan.table, tensors, state, update=update)
    else:
        sigmas, saved = state.new_zeros(len(plan.operators)), state.new_empty(0)
        iterates = state.clone() if update else state.new_empty(0)
    kept: list[Tensor] = []
    if plan.uncompiled:
        leaves = _leaves(plan, tensors, state.dtype, plan.uncompiled)
        weights = Leaves(leaves)
        for i in plan.uncompiled:
            operator, name = plan.operators[i], plan.engines[i]
            if name == CLOSED_FORM or not isinstance(operator, Region):
                sigmas[i] = largest_entry(operator, leaves)
                continue
            part = slice(plan.state_offsets[i], plan.state_offsets[i + 1])
            result = get_engine(name, plan.backend).step(
                operator, weights, state[part], update=update
            )
            sigmas[i] = result.sigma
            kept += [t.reshape(-1) for t in result.saved]
            if update:
                new = result.state.reshape(-1).to(state.dtype)
                iterates[part] = torch.where(new.isfinite(), new, state[part])
    rest = torch.cat(kept) if kept else state.new_empty(0)
    if hasattr(module, "compose"):
        values, jacobian = module.compose(plan.table, sigmas)
    else:
        graph = plan.graph
        values, jacobian = compose_with_jacobian(graph.tape, sigmas, (graph.features, graph.total))
    return NetworkStep(sigmas, values, jacobian, iterates, saved, rest)


def _leaves(
    plan: BoundPlan, tensors: Sequence[Tensor], dtype: torch.dtype, indices: Iterable[int]
) -> dict[WeightRef, Tensor]:
    """The tensors that some operators read, in the dtype of the iterates."""
    slots = dict(zip(plan.slots, tensors, strict=True))
    refs = dict.fromkeys(ref for i in indices for ref in leaf_refs(plan.operators[i]))
    return {
        ref: slots[ref].detach().to(dtype)
        if slots[ref].is_floating_point()
        else slots[ref].detach()
        for ref in refs
    }


def saved_shapes(plan: BoundPlan, index: int) -> tuple[Shape, ...]:
    """Shapes of what one reference operator adds to ``NetworkStep.rest``."""
    operator, name = plan.operators[index], plan.engines[index]
    if name == CLOSED_FORM or not isinstance(operator, Region):
        return ()
    return get_engine(name, plan.backend).saved_shapes(operator)


def rest_size(plan: BoundPlan) -> int:
    """Entries of ``NetworkStep.rest``."""
    return sum(math.prod(s) for i in plan.uncompiled for s in saved_shapes(plan, i))


def rescan_iterates(plan: BoundPlan, state: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """Fresh iterates found by a full search at the present weights. Shape of ``state``.

    Every engine's ``rescan`` defines it. Where the backend compiles the symbol engine, regions of
    one shape are scanned together, and the steps after the scan are the compiled ones.
    """
    weights = Leaves(_leaves(plan, tensors, state.dtype, range(len(plan.operators))))
    found = state.clone()
    parts = [slice(*ends) for ends in pairwise(plan.state_offsets)]
    compiled = set(plan.table.compiled)
    alike: dict[Hashable, list[tuple[slice, Region]]] = {}
    for i, (operator, name) in enumerate(zip(plan.operators, plan.engines, strict=True)):
        if name == CLOSED_FORM or not isinstance(operator, Region):
            continue
        part = parts[i]
        if name == symbol.name and i in compiled:
            alike.setdefault(symbol.shape_key(operator), []).append((part, operator))
            continue
        new = get_engine(name, plan.backend).rescan(operator, weights, state[part].clone())
        found[part] = torch.where(new.isfinite(), new.to(state.dtype), state[part])
    module = backend_module(plan.backend)
    power = getattr(module, "power_vectors", None)
    for same in alike.values():
        regions, before = [r for _, r in same], [state[part] for part, _ in same]
        fresh = symbol.reseed(regions, weights, before, power)
        for (part, _), new in zip(same, fresh, strict=True):
            found[part] = new
    for _ in range(symbol.REFINE if alike else 0):
        found = module.spectral_step(plan.table, tensors, found, update=True)[1]
    return found


def spectral_vjp(
    plan: BoundPlan,
    tensors: Sequence[Tensor],
    saved: Tensor,
    rest: Tensor,
    grad_sigmas: Tensor,
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """Gradient in every slot's tensor; None where it is not wanted."""
    total: dict[WeightRef, Tensor] = {}
    if plan.table.compiled:
        grads = backend_module(plan.backend).spectral_vjp(
            plan.table, tensors, saved, grad_sigmas, wanted
        )
        total = {ref: g for ref, g in zip(plan.slots, grads, strict=True) if g is not None}
    asked = {ref for ref, want in zip(plan.slots, wanted, strict=True) if want}
    if plan.uncompiled:
        leaves = _leaves(plan, tensors, grad_sigmas.dtype, plan.uncompiled)
        closed: list[int] = []
        offset = 0
        for i in plan.uncompiled:
            operator, name = plan.operators[i], plan.engines[i]
            parts: list[Tensor] = []
            for shape in saved_shapes(plan, i):
                parts.append(rest[offset : offset + math.prod(shape)].reshape(shape))
                offset += math.prod(shape)
            refs = leaf_refs(operator)
            if not asked.intersection(refs):
                continue
            if name == CLOSED_FORM or not isinstance(operator, Region):
                closed.append(i)
                continue
            found = get_engine(name, plan.backend).vjp(
                operator, {r: leaves[r] for r in refs}, tuple(parts)
            )
            _add(total, {r: grad_sigmas[i] * g for r, g in found.items() if r in asked})
        operators = [plan.operators[i] for i in closed]
        _add(total, largest_entries_vjp(operators, leaves, grad_sigmas[closed], asked))
    return [
        total[ref].to(t.dtype) if ref in total else (torch.zeros_like(t) if want else None)
        for ref, t, want in zip(plan.slots, tensors, wanted, strict=True)
    ]


def _entries(operator: Operator, leaves: Mapping[WeightRef, Tensor]) -> Tensor:
    """The values whose largest one is the operator's norm."""
    weights = Leaves(leaves)
    if isinstance(operator, Slope):
        return weights[operator.ref].reshape(-1).abs()
    op = operator.primitive
    entries = weights[op.ref].reshape(-1).abs()  # type: ignore[union-attr]
    return (entries.reciprocal() if op.inverse else entries) * abs(op.gain)  # type: ignore[union-attr]


def largest_entry(operator: Operator, leaves: Mapping[WeightRef, Tensor]) -> Tensor:
    """Norm of a diagonal map, or the slope of a PReLU."""
    sigma = _entries(operator, leaves).max()
    # NaN must not hide behind the comparison with one.
    return torch.maximum(sigma, torch.ones_like(sigma)) if isinstance(operator, Slope) else sigma


def largest_entries_vjp(
    operators: Sequence[Operator],
    leaves: Mapping[WeightRef, Tensor],
    grad: Tensor,
    wanted: Collection[WeightRef],
) -> dict[WeightRef, Tensor]:
    """Gradient of ``<grad, norms>``; a subgradient: of the entry that attains the maximum."""
    refs = dict.fromkeys(r for o in operators for r in leaf_refs(o) if r in wanted)
    if not refs:
        return {}
    with torch.enable_grad():
        variables = {r: t.detach().requires_grad_(r in refs) for r, t in leaves.items()}
        values = []
        for operator in operators:
            entries = _entries(operator, variables)
            value = entries[entries.argmax()]
            if isinstance(operator, Slope):
                value = torch.where(value > 1, value, value.detach())
            values.append(value)
        inputs = [variables[r] for r in refs]
        grads = torch.autograd.grad(torch.stack(values), inputs, grad, allow_unused=True)
    return {r: g for r, g in zip(refs, grads, strict=True) if g is not None}


def _add(total: dict[WeightRef, Tensor], parts: Mapping[WeightRef, Tensor]) -> None:
    for ref, part in parts.items():
        total[ref] = total[ref] + part if ref in total else part
