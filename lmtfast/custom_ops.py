# SPDX-License-Identifier: MIT
"""The compiled steps as operators of torch: opaque to tracing, with fake kernels and gradients.

Registered with the dispatcher, so that ``torch.compile(fullgraph=True)``, ``torch.export`` and
other frameworks see one node each. Eager code calls the same functions without the dispatcher,
which costs several times as much as the autograd node. A plan is named by its fingerprint.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from lmtfast.backends.margin_choice import choose_margin_backend
from lmtfast.backends.margin_step import MarginProblem, MarginStep, margin_step, margin_vjp
from lmtfast.backends.pair_norm import without_autocast
from lmtfast.engines.network import rest_size, spectral_step, spectral_vjp
from lmtfast.errors import StalePlanError

if TYPE_CHECKING:
    from lmtfast.plan import BoundPlan

LIBRARY = torch.library.Library("lmtfast", "DEF")
LIBRARY.define(
    "spectral_step(Tensor[] tensors, Tensor state, str plan, bool update)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
LIBRARY.define(
    "spectral_vjp(Tensor[] tensors, Tensor saved, Tensor rest, Tensor grad_sigmas, str plan,"
    " bool[] wanted) -> Tensor[]"
)

_PROBLEM = (
    "Tensor logits, Tensor? head_weight, Tensor coefficient, Tensor target, Tensor? classes,"
    " Tensor row_index, Tensor? row_scale, str member, str backend"
)
LIBRARY.define(f"margin_cross_entropy({_PROBLEM}) -> (Tensor, Tensor, Tensor, Tensor)")
LIBRARY.define(
    "margin_cross_entropy_vjp(Tensor grad_loss, Tensor dlogits, Tensor scale, Tensor norms,"
    f" {_PROBLEM}) -> (Tensor, Tensor, Tensor)"
)

_PLANS: WeakValueDictionary[str, BoundPlan] = WeakValueDictionary()


def shared_plan(plan: BoundPlan) -> BoundPlan:
    """The one plan with this content that the operators know; alive as long as anyone holds it."""
    return _PLANS.setdefault(plan.fingerprint, plan)


def _plan(name: str) -> BoundPlan:
    plan = _PLANS.get(name)
    if plan is None:
        raise StalePlanError(
            "a plan that is alive", f"fingerprint {name[:12]}", "torch.ops.lmtfast",
            "keep the NetworkBound, and make it before running a graph that contains it",
        )  # fmt: skip
    return plan


_EAGER_KEYS = tuple(
    getattr(torch._C.DispatchKey, key)
    for key in ("AutogradFunctionality", "ADInplaceOrView", "Conjugate", "Negative", "ZeroTensor")
)


@contextmanager
def _eager_dispatch() -> Iterator[None]:
    """Give a kernel the dispatch of eager code.

    Kernels are called below autograd, from compiled graphs below lazy conjugation too: there
    ``torch.autograd.grad`` would find no graph, and ``x.conj() * y`` would silently be ``x * y``.
    """
    excluded = [torch._C._dispatch_tls_is_dispatch_key_excluded(key) for key in _EAGER_KEYS]
    for key in _EAGER_KEYS:
        torch._C._dispatch_tls_set_dispatch_key_excluded(key, False)
    try:
        yield
    finally:
        for key, before in zip(_EAGER_KEYS, excluded, strict=True):
            torch._C._dispatch_tls_set_dispatch_key_excluded(key, before)


def _step(tensors: Sequence[Tensor], state: Tensor, plan: str, update: bool) -> tuple[Tensor, ...]:
    with _eager_dispatch(), torch.no_grad(), without_autocast(state.device):
        return tuple(spectral_step(_plan(plan), state, tensors, update=update))


def _fake_step(
    tensors: Sequence[Tensor], state: Tensor, plan: str, update: bool
) -> tuple[Tensor, ...]:
    known = _plan(plan)
    r = len(known.operators)
    sizes: tuple[tuple[int, ...], ...] = (
        (r,), (2,), (2, r), tuple(state.shape) if update else (0,), (known.table.saved_size,),
        (rest_size(known),),
    )  # fmt: skip
    return tuple(state.new_empty(size) for size in sizes)


def _vjp(
    tensors: Sequence[Tensor],
    saved: Tensor,
    rest: Tensor,
    grad_sigmas: Tensor,
    plan: str,
    wanted: Sequence[bool],
) -> list[Tensor]:
    with _eager_dispatch(), torch.no_grad(), without_autocast(saved.device):
        grads = spectral_vjp(_plan(plan), tensors, saved, rest, grad_sigmas, wanted)
    # The layout is part of what the fake kernel promises.
    return [
        saved.new_empty(0) if g is None
        else g if g.stride() == torch.empty_like(t, device="meta").stride()
        else torch.empty_like(t).copy_(g)
        for g, t in zip(grads, tensors, strict=True)
    ]  # fmt: skip


def _fake_vjp(
    tensors: Sequence[Tensor],
    saved: Tensor,
    rest: Tensor,
    grad_sigmas: Tensor,
    plan: str,
    wanted: Sequence[bool],
) -> list[Tensor]:
    return [
        torch.empty_like(t) if want else saved.new_empty(0)
        for t, want in zip(tensors, wanted, strict=True)
    ]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors, _, ctx.plan, _ = inputs
    _, _, jacobian, iterates, saved, rest = output
    ctx.wanted = [t.requires_grad for t in tensors]
    ctx.save_for_backward(*tensors, jacobian, saved, rest)
    ctx.mark_non_differentiable(jacobian, iterates, saved, rest)


def _backward(ctx: Any, grad_sigmas: Tensor, grad_values: Tensor, *_: Any) -> tuple[Any, ...]:
    *tensors, jacobian, saved, rest = ctx.saved_tensors
    # Not a matrix product: autocast, which may be on around backward, would round it to bfloat16.
    grad_sigmas = grad_sigmas + (grad_values[:, None] * jacobian).sum(0)
    grads = torch.ops.lmtfast.spectral_vjp(tensors, saved, rest, grad_sigmas, ctx.plan, ctx.wanted)
    found = [g if want else None for g, want in zip(grads, ctx.wanted, strict=True)]
    return found, None, None, None


_FIELDS = len(MarginProblem._fields)


def _margin(*arguments: Any) -> tuple[Tensor, ...]:
    problem, (member, backend) = MarginProblem(*arguments[:_FIELDS]), arguments[_FIELDS:]
    with _eager_dispatch(), torch.no_grad():
        chosen = choose_margin_backend(problem.logits, member, backend or None)
        step = margin_step(chosen, member, problem)
    norms = step.loss.new_empty(0) if step.norms is None else step.norms
    return step.loss, step.dlogits, step.scale, norms


def _fake_margin(*arguments: Any) -> tuple[Tensor, ...]:
    problem = MarginProblem(*arguments[:_FIELDS])
    (n, k), like = problem.logits.shape, problem.coefficient
    u = k if problem.classes is None else problem.classes.shape[0]
    norms = (0,) if problem.head_weight is None else (u, k)
    return like.new_empty(n), like.new_empty(n, k), like.new_empty(n), like.new_empty(norms)


def _margin_vjp(
    grad_loss: Tensor, dlogits: Tensor, scale: Tensor, norms: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    problem, (member, backend) = MarginProblem(*arguments[:_FIELDS]), arguments[_FIELDS:]
    kept = None if problem.head_weight is None else norms
    with _eager_dispatch(), torch.no_grad():
        chosen = choose_margin_backend(problem.logits, member, backend or None)
        grad_logits, grad_coefficient, grad_head = margin_vjp(
            chosen, member, problem, MarginStep(grad_loss, dlogits, scale, kept), grad_loss,
            head_wanted=True,
        )  # fmt: skip
    missing = grad_loss.new_empty(0)
    return grad_logits, grad_coefficient, missing if grad_head is None else grad_head


def _fake_margin_vjp(
    grad_loss: Tensor, dlogits: Tensor, scale: Tensor, norms: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    problem = MarginProblem(*arguments[:_FIELDS])
    head = problem.head_weight
    return (
        problem.logits.new_empty(problem.logits.shape), problem.coefficient.new_empty(scale.shape),
        grad_loss.new_empty(0) if head is None else head.new_empty(head.shape),
    )  # fmt: skip


def _save_margin(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.names = inputs[_FIELDS:]
    ctx.save_for_backward(*inputs[:_FIELDS], *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _margin_backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Any, ...]:
    tensors = ctx.saved_tensors
    grad_logits, grad_coefficient, grad_head = torch.ops.lmtfast.margin_cross_entropy_vjp(
        grad_loss, *tensors[_FIELDS:], *tensors[:_FIELDS], *ctx.names
    )
    head = None if tensors[1] is None else grad_head
    return grad_logits, head, grad_coefficient, *[None] * (_FIELDS - 3 + len(ctx.names))


for _name, _kernel, _fake in (
    ("spectral_step", _step, _fake_step),
    ("spectral_vjp", _vjp, _fake_vjp),
    ("margin_cross_entropy", _margin, _fake_margin),
    ("margin_cross_entropy_vjp", _margin_vjp, _fake_margin_vjp),
):
    LIBRARY.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lmtfast::{_name}", _fake, lib=LIBRARY)
torch.library.register_autograd(
    "lmtfast::spectral_step", _backward, setup_context=_save, lib=LIBRARY
)
torch.library.register_autograd(
    "lmtfast::margin_cross_entropy", _margin_backward, setup_context=_save_margin, lib=LIBRARY
)
