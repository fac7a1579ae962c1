# SPDX-License-Identifier: MIT
r"""Engine ``separable``: the true padded, strided operator on iterates of low rank.

The iterate is ``v = sum_k h_k (x) a_k``: r real patterns h on the real grid times r channel
vectors a. (One complex pattern is two real ones; one pattern per phase of a stride s is s^axes.)
With ``Y_t = W_t a`` the image is ``sum_t,k shift_t h_k (x) Y_tk``, so its Gram matrices over taps
and patterns are all that the grid and the weights need to know of each other. A step alternates

* with orthonormal a: power steps in h, a stencil on the grid with the matrix ``<Y_t, Y_u>``;
* with orthonormal h: a power step in a, with the matrix ``<shift_t h, shift_u h>``.

Each is a power step of the operator compressed to a subspace that contains v, so no step lowers
sigma. At r = the number of grid points or channels this is the full power iteration.

Cost: two products with the weights, r columns each; the grid costs r^2 T^2 per point.

Guarantee:
    None as a bound. ``sigma`` is a lower estimate of the spectral norm, for every state.

Source:
    Alternating optimisation over low-rank factors: Holtz, Rohwedder, Schneider, SIAM J. Sci.
    Comput. 34 (2012), here with two factors.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lmtfast.backends import reference
from lmtfast.engines import polyphase
from lmtfast.engines.operator import OperatorEngine
from lmtfast.engines.polyphase import conv_form
from lmtfast.engines.step import Saved, Step
from lmtfast.graph import Conv, Region, Shape, WeightRef
from lmtfast.table import Stencil
from lmtfast.weights import Weights

name = "separable"

# Power steps on the grid per step; they do not read the weights.
GRID_STEPS = 2
# Steps after a restart from the leading vector.
REFINE = 8


def refusal(region: Region) -> str | None:
    """Why the engine cannot run the region, or None."""
    reason, form = polyphase.refusal(region), conv_form(region)
    if reason is not None or form is None:
        return reason
    if form.circular and any(max(p) > n for p, n in zip(form.padding, form.in_extent, strict=True)):
        return "circular padding longer than the input"
    return None


def state_size(region: Region) -> int:
    """Per group r patterns on the input grid and r channel vectors."""
    form = conv_form(region)
    assert form is not None
    return form.state_size(name)


def saved_shapes(region: Region) -> tuple[Shape, ...]:
    """Shapes of h, a, Y, sigma over the scale of Y, and the indicator of the group."""
    form = conv_form(region)
    assert form is not None
    r = form.rank
    y = (form.rows, form.taps * r)
    return (math.prod(form.in_extent), r), (form.channels, r), y, (), (form.groups,)


def _unpack(form: Stencil, state: Tensor) -> tuple[Tensor, Tensor]:
    """Patterns h ``(G, n, r)`` and orthonormal channel vectors a ``(G, C, r)``, ``||h|| = 1``."""
    r, n = form.rank, math.prod(form.in_extent)
    per_group = state.reshape(form.groups, -1)
    h = per_group[:, : r * n].reshape(form.groups, n, r)
    a, triangle = torch.linalg.qr(_scaled(per_group[:, r * n :].reshape(form.groups, -1, r)))
    return _scaled(h @ triangle.mT), a


def _scaled(x: Tensor) -> Tensor:
    """A matrix per group divided by its Frobenius norm; zero stays zero."""
    return polyphase.polar(x.flatten(1))[1].reshape(x.shape)


def _windows(form: Stencil, h: Tensor) -> Tensor:
    """shift_t h_k at every output. Shape ``(G, J, T r)``, taps before patterns; h ``(G, n, r)``."""
    x = h.mT.reshape(h.shape[0], -1, *form.in_extent)
    pads = [p for pair in reversed(form.padding) for p in pair]
    x = F.pad(x, pads, mode="circular" if form.circular else "constant")
    for axis, (k, s, d, m) in enumerate(
        zip(form.kernel, form.stride, form.dilation, form.out_extent, strict=True)
    ):
        x = x.unfold(2 + axis, d * (k - 1) + 1, s)[..., ::d].narrow(2 + axis, 0, m)
    # (G, r, outputs..., taps...) to (G, outputs, taps, r)
    x = x.flatten(2 + form.axes).reshape(h.shape[0], h.shape[2], -1, form.taps)
    return x.permute(0, 2, 3, 1).flatten(2)


def _fold(form: Stencil, windows: Tensor, patterns: int) -> Tensor:
    """The adjoint of :func:`_windows`."""
    groups = windows.shape[0]
    x = windows.reshape(groups, *form.out_extent, *form.kernel, patterns).movedim(-1, 1)
    for axis in reversed(range(form.axes)):
        k, s, d = form.kernel[axis], form.stride[axis], form.dilation[axis]
        m, (low, high), n = form.out_extent[axis], form.padding[axis], form.in_extent[axis]
        taps = x.unbind(2 + form.axes + axis)
        shape = list(taps[0].shape)
        shape[2 + axis] = low + n + high
        padded = x.new_zeros(shape)
        for t in range(k):
            index = (slice(None),) * (2 + axis) + (slice(d * t, d * t + s * (m - 1) + 1, s),)
            padded[index] += taps[t]
        x = padded.narrow(2 + axis, low, n)
        if form.circular:
            x = x.clone()
            x.narrow(2 + axis, n - low, low).add_(padded.narrow(2 + axis, 0, low))
            x.narrow(2 + axis, 0, high).add_(padded.narrow(2 + axis, low + n, high))
    return x.reshape(groups, patterns, -1).mT


def _tap_products(acting: Tensor, a: Tensor) -> Tensor:
    """Y_tk = W_t a_k. Shape ``(G, rows, T r)`` from ``(G, rows, C, T)`` and ``(G, C, r)``."""
    return (acting.mT @ a[:, None]).flatten(2)


def _stencil(form: Stencil, h: Tensor, gram: Tensor) -> Tensor:
    """One application of the compressed ``A^T A`` in the patterns. Shape of h."""
    return _fold(form, _windows(form, h) @ gram, h.shape[-1])


def step(region: Region, weights: Weights, state: Tensor, *, update: bool) -> Step:
    """One alternation. ``sigma`` is ``||A v||`` before it.

    Saved, of the group with the largest sigma: h ``(n, r)``, a ``(C, r)``, Y ``(rows, T r)``,
    sigma over the scale of Y, and the indicator of the group.
    """
    form = conv_form(region)
    assert form is not None
    acting = polyphase.kernel(region, weights).detach()  # (G, rows, C, T)
    h, a = _unpack(form, state.to(acting.dtype))
    y = _tap_products(acting, a)
    # Squares of y must neither overflow nor underflow; directions do not depend on its scale.
    scale = y.abs().amax((1, 2), keepdim=True)
    y, scale = y / scale.where(scale > 0, 1.0), scale[:, 0, 0]
    gram = y.mT @ y  # (G, T r, T r)
    windows = _windows(form, h)
    # Sums of squares of image entries, through the Gram matrix; rounding may turn zero negative.
    relative = ((windows @ gram) * windows).sum((1, 2)).clamp_min(0).sqrt()
    sigma, best = (scale * relative).max(0)
    winner = (torch.arange(form.groups, device=best.device) == best).to(acting.dtype)
    saved = (*(t.index_select(0, best[None])[0] for t in (h, a, y, relative)), winner)
    if not update:
        return Step(sigma, state, saved)
    for _ in range(GRID_STEPS):
        h = _scaled(_stencil(form, h, gram))
    h, triangle = torch.linalg.qr(h)
    y = (y.unflatten(-1, (form.taps, -1)) @ triangle.mT[:, None]).flatten(2)
    windows = _windows(form, h)
    mixed = (y @ (windows.mT @ windows)).unflatten(-1, (form.taps, -1))  # (G, rows, T, r)
    new_a = torch.einsum("goct,gotk->gck", acting, mixed)
    new = torch.cat((h.flatten(1), _scaled(new_a).flatten(1)), 1)
    usable = (new_a != 0).flatten(1).any(1, keepdim=True) & new.isfinite().all(1, keepdim=True)
    packed = torch.where(usable, new.to(state.dtype), state.reshape(form.groups, -1))
    return Step(sigma, packed.reshape(-1), saved)


@torch.no_grad()
def rescan(region: Region, weights: Weights, state: Tensor, *, refine: int = REFINE) -> Tensor:
    """Start from the best low-rank part of the operator's leading vector; syncs with the host.

    Args:
        region: One that the engine does not refuse.
        weights: Resolved in the state's dtype.
        state: Packed state, shape ``(state_size(region),)``. Not modified.
        refine: Steps after the truncation.

    Returns:
        A state whose sigma is not below that of ``state``.
    """
    op, form = region.primitive, conv_form(region)
    assert isinstance(op, Conv)
    assert form is not None
    whole = OperatorEngine()
    v = whole.rescan(region, weights, state.new_zeros(whole.state_size(region)))
    if op.transposed:
        v = reference.matvec(region, weights, v.reshape(region.in_shape))
    v = v.reshape(form.groups, form.channels, -1).mT  # (G, n, C)
    left, singular, right = torch.linalg.svd(
        polyphase.polar(v.flatten())[1].reshape(v.shape), False
    )
    r = form.rank
    fresh = torch.cat(
        ((left[..., :r] * singular[:, None, :r]).flatten(1), right[:, :r].mT.flatten(1)), 1
    )
    # The leading vector lives in one group; the others keep what they have.
    kept = state.reshape(form.groups, -1)
    present = (singular[:, :1] > 1e-3) & fresh.isfinite().all(1, keepdim=True)
    new = torch.where(present, fresh, kept).reshape(-1)
    for _ in range(refine):
        new = step(region, weights, new, update=True).state
    before = step(region, weights, state, update=False).sigma
    after = step(region, weights, new, update=False).sigma
    return torch.where(after >= before, new, state)


def vjp(region: Region, tensors: dict[WeightRef, Tensor], saved: Saved) -> dict[WeightRef, Tensor]:
    """Gradient of sigma: ``sum_k V_tk a_k^T``, V the image seen through the shifted patterns."""
    form = conv_form(region)
    assert form is not None
    h, a, y, sigma, group = saved
    windows = _windows(form, h[None])[0]
    image = (y @ (windows.mT @ windows) / sigma.where(sigma > 0, 1.0)).unflatten(
        -1, (form.taps, -1)
    )
    outer = torch.einsum("otk,ck->oct", image, a)
    return polyphase.kernel_vjp(region, tensors, group[:, None, None, None] * outer)
