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
    with _eager_dispatch(), torch.no_grad():
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
    with _eager_dispatch(), torch.no_grad():
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
    grads = torch.ops.lmtfast.spectral_vjp(
        tensors, saved, rest, grad_sigmas + grad_values @ jacobian, ctx.plan, ctx.wanted
    )
    found = [g if want else None for g, want in zip(grads, ctx.wanted, strict=True)]
    return found, None, None, None


for _name, _kernel, _fake in (
    ("spectral_step", _step, _fake_step),
    ("spectral_vjp", _vjp, _fake_vjp),
):
    LIBRARY.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lmtfast::{_name}", _fake, lib=LIBRARY)
torch.library.register_autograd(
    "lmtfast::spectral_step", _backward, setup_context=_save, lib=LIBRARY
)
