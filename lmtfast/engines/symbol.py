# SPDX-License-Identifier: MIT
r"""Engine ``symbol``: the supremum over frequencies of a convolution's symbol.

.. math::  \lVert \mathrm{conv} \rVert \le \sup_\omega \lVert A(\omega) \rVert_2, \qquad
           A(\omega) = \sum_t W_t\, e^{-i \omega \cdot \tau_t},

because every zero-padded convolution is a compression of the bi-infinite one. F candidates per
group, each a frequency and a complex channel vector x, climb by alternation: with
``u = A(w) x / ||A(w) x||`` fixed, the response of (x, u) to any frequency is a T-term trigonometric
polynomial, maximised on a grid and by a Newton step; then ``x = A(w)^H u / ||A(w)^H u||``. No step
lowers a candidate's value. The last candidate explores: once it stalls it replaces the worst of the
others if it beats it, and starts again at the next frequency of a Kronecker sequence.

Cost: two products with the weights read as a ``(C_out, C_in T)`` matrix, whatever the image size.

Guarantee:
    None. ``sigma`` is a lower estimate of the supremum; converged at the right frequency, it is an
    upper estimate of the zero-padded norm.

Source:
    Boettcher and Silbermann, Introduction to Large Truncated Toeplitz Matrices (1999), for symbols.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from lmtfast.engines import polyphase
from lmtfast.engines.frequency import (
    PowerVectors,
    improve,
    response_phases,
    scan_candidates,
    separate_peaks,
)
from lmtfast.engines.polyphase import conv_form, polar, tap_table
from lmtfast.engines.step import Saved, Step
from lmtfast.graph import Region, Shape, WeightRef
from lmtfast.table import CANDIDATES, Stencil
from lmtfast.weights import Weights

name = "symbol"

# The explorer has settled when one power step gains less than this fraction.
STALLED = 1e-3
# Steps of the alternation after a scan of all frequencies.
REFINE = 24
# Frequencies of a scan that are climbed from before the best are kept, and the steps of it: the
# order of two points of a grid is not that of the peaks beside them.
POOL, CLIMBS = 32, 8
# Increments of the Kronecker sequence per axis: powers of the root of x^(axes + 1) = x + 1.
_ROOTS = {1: 1.6180339887498949, 2: 1.3247179572447461, 3: 1.2207440846057596}


def refusal(region: Region) -> str | None:
    """Why the engine cannot run the region, or None."""
    reason, form = polyphase.refusal(region), conv_form(region)
    if reason is not None or form is None:
        return reason
    if form.circular:
        for n, m, k, s, d, (low, high) in zip(
            form.in_extent, form.out_extent, form.kernel, form.stride, form.dilation,
            form.padding, strict=True,
        ):  # fmt: skip
            full = n + low + high - d * (k - 1)
            if full != n or n % s or m * s != n:
                return "circular padding whose stride-1 output is not the input's size"
    return None


def state_size(region: Region) -> int:
    """Per group F candidates (a point on the circle per axis, a complex x) and an anchor."""
    form = conv_form(region)
    assert form is not None
    return form.state_size(name)


def saved_shapes(region: Region) -> tuple[Shape, ...]:
    """Shapes of u, z and the indicator of the winner's group."""
    form = conv_form(region)
    assert form is not None
    return (form.rows, 2), (form.channels * form.taps, 2), (form.groups,)


def _width(form: Stencil) -> int:
    return 2 * form.axes + 2 * form.phases * form.channels


def _unpack(form: Stencil, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Frequencies ``(G, F, axes)``, unit vectors ``(G, F, P * C)`` complex, anchor ``(G, axes)``.

    A frequency is the angle of two reals, so that independent Gaussians give a uniform one and no
    scale matters.
    """
    per_group = state.reshape(form.groups, -1)
    points = per_group[:, CANDIDATES * _width(form) :].reshape(form.groups, form.axes, 2)
    rows = per_group[:, : CANDIDATES * _width(form)].reshape(form.groups, CANDIDATES, -1)
    circle = rows[..., : 2 * form.axes].reshape(form.groups, CANDIDATES, form.axes, 2)
    x = rows[..., 2 * form.axes :].reshape(form.groups, CANDIDATES, -1, 2)
    return (
        torch.atan2(circle[..., 1], circle[..., 0]),
        polar(torch.view_as_complex(x.contiguous()))[1],
        torch.atan2(points[..., 1], points[..., 0]),
    )


def pack(w: Tensor, x: Tensor, anchor: Tensor) -> Tensor:
    """The inverse of :func:`_unpack`."""
    circle = torch.stack((w.cos(), w.sin()), -1).flatten(-2)
    rows = torch.cat((circle, torch.view_as_real(x).flatten(-2)), -1).flatten(-2)
    points = torch.stack((anchor.cos(), anchor.sin()), -1).flatten(-2)
    return torch.cat((rows, points), -1).reshape(-1)


def _tap_vectors(form: Stencil, w: Tensor, x: Tensor, table: Tensor, phase: Tensor) -> Tensor:
    """z_t = exp(-i w . tau_t) x_phase(t). Shape ``(G, F, C * T)`` complex."""
    blocks = x.reshape(*x.shape[:-1], form.phases, form.channels)
    z = blocks[..., phase, :] * response_phases(w, table).unsqueeze(-1)  # (G, F, T, C)
    return z.transpose(-1, -2).flatten(-2)


def _apply(matrix: Tensor, z: Tensor) -> Tensor:
    """Real ``(G, m, n)`` times complex ``(G, F, n)``, as one product with 2F real columns."""
    columns = torch.view_as_real(z).permute(0, 2, 1, 3).flatten(-2)  # (G, n, 2F)
    image = (matrix @ columns).unflatten(-1, (-1, 2))
    return torch.view_as_complex(image.permute(0, 2, 1, 3).contiguous())


def _gather_phases(form: Stencil, taps: Tensor, w: Tensor, table: Tensor, phase: Tensor) -> Tensor:
    """A(w)^H u from ``taps = W^T u`` of shape ``(G, F, C, T)``. Shape ``(G, F, P * C)``."""
    aligned = taps * response_phases(w, table).conj().unsqueeze(-2)
    if form.phases == 1:
        return aligned.sum(-1)
    numbers = torch.arange(form.phases, device=taps.device)
    member = (phase[:, None] == numbers).to(taps.dtype)
    return (aligned @ member).transpose(-1, -2).flatten(-2)


def step(region: Region, weights: Weights, state: Tensor, *, update: bool) -> Step:
    """One alternation of all candidates. ``sigma`` is the best ``||A(w) x||`` before it.

    Saved: ``u`` ``(rows, 2)`` and ``z`` ``(C T, 2)`` of the winner, and the indicator of its group.
    """
    form = conv_form(region)
    assert form is not None
    acting = polyphase.kernel(region, weights).detach().flatten(-2)  # (G, rows, C T)
    w, x, anchor = _unpack(form, state.to(acting.dtype))
    table, phase = tap_table(form, acting.device)
    z = _tap_vectors(form, w, x, table, phase)
    values, u = polar(_apply(acting, z))  # (G, F), (G, F, rows)
    sigma, best = values.reshape(-1).max(0)
    saved = (
        torch.view_as_real(u).reshape(-1, form.rows, 2).index_select(0, best[None])[0],
        torch.view_as_real(z).reshape(-1, z.shape[-1], 2).index_select(0, best[None])[0],
        (torch.arange(form.groups, device=best.device) == best // CANDIDATES).to(acting.dtype),
    )
    if not update:
        return Step(sigma, state, saved)
    new_w, new_x, reached = _climb(form, acting, w, x, u)
    packed = pack(*_explore(form, new_w, new_x, anchor, values, reached))
    return Step(sigma, packed.to(state.dtype), saved)


def _climb(
    form: Stencil, acting: Tensor, w: Tensor, x: Tensor, u: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Better frequencies and vectors for the images u, and ``||A(w)^H u||`` there."""
    table, phase = tap_table(form, acting.device)
    taps = _apply(acting.transpose(-1, -2), u).unflatten(-1, (form.channels, form.taps))
    blocks = x.reshape(*x.shape[:-1], form.phases, form.channels)[..., phase, :]
    response = (taps.conj().transpose(-1, -2) * blocks).sum(-1)  # (G, F, T)
    new_w = improve(form, response, w)
    reached, new_x = polar(_gather_phases(form, taps, new_w, table, phase))
    usable = ((reached > 0) & reached.isfinite()).unsqueeze(-1)
    return torch.where(usable, new_w, w), torch.where(usable, new_x, x), reached


def _explore(
    form: Stencil, w: Tensor, x: Tensor, anchor: Tensor, before: Tensor, after: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Let a stalled explorer replace a worse candidate and start at the next frequency."""
    stalled = after[:, -1] <= before[:, -1] * (1.0 + STALLED)  # (G,)
    lowest, worst = after[:, :-1].min(-1)
    numbers = torch.arange(CANDIDATES, device=w.device)
    promoted = (stalled & (after[:, -1] > lowest))[:, None] & (numbers == worst[:, None])
    w = torch.where(promoted[..., None], w[:, -1:], w)
    x = torch.where(promoted[..., None], x[:, -1:], x)
    powers = [2 * math.pi * _ROOTS[form.axes] ** -(a + 1) for a in range(form.axes)]
    moved = torch.stack([anchor[:, a] + p for a, p in enumerate(powers)], -1)
    anchor = torch.where(stalled[:, None], moved, anchor)
    restart = stalled[:, None] & (numbers == CANDIDATES - 1)
    w = torch.where(restart[..., None], anchor[:, None, :], w)
    # A shifted singular vector is as good a start as a random one, and costs no generator.
    x = torch.where(restart[..., None], x.roll(1, -1), x)
    return w, x, anchor


def vjp(region: Region, tensors: dict[WeightRef, Tensor], saved: Saved) -> dict[WeightRef, Tensor]:
    """Gradient of sigma: Re(conj(u) z) of the winner, a rank-2 outer product, in its group."""
    u, z, group = saved
    return polyphase.kernel_vjp(region, tensors, group[:, None, None] * (u @ z.T))


@torch.no_grad()
def rescan(region: Region, weights: Weights, state: Tensor, *, refine: int = REFINE) -> Tensor:
    """Scan all frequencies, keep the best candidate and reseed the others; returns the new state.

    Args:
        region: One that the engine does not refuse.
        weights: Resolved in the state's dtype.
        state: Packed state, shape ``(state_size(region),)``. Not modified.
        refine: Steps of the alternation after the scan.

    Returns:
        A state whose sigma is not below that of ``state``, up to rounding.
    """
    (state,) = reseed([region], weights, [state])
    for _ in range(refine):
        state = step(region, weights, state, update=True).state
    return state


@torch.no_grad()
def reseed(
    regions: Sequence[Region],
    weights: Weights,
    states: Sequence[Tensor],
    power: PowerVectors | None = None,
) -> list[Tensor]:
    """What :func:`rescan` does before its steps, for regions whose kernels have one form.

    Args:
        regions: Ones that the engine does not refuse, of one :func:`shape_key`.
        weights: Resolved in the states' dtype.
        states: Packed states. Not modified.
        power: What runs the power iterations; None: the reference.

    Returns:
        Packed states: the best separate peaks among the old candidates and those of the scan, the
        leading one first. A state whose search is not finite stays.
    """
    forms = [conv_form(region) for region in regions]
    form = forms[0]
    assert form is not None
    acting = torch.cat([polyphase.kernel(region, weights).detach() for region in regions])
    parts = [_unpack(f, s.to(acting.dtype)) for f, s in zip(forms, states, strict=True) if f]
    w, x, anchor = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    found_w, found_x = scan_candidates(form, acting, POOL, power)
    w, x = torch.cat((w, found_w), 1), torch.cat((x, found_x), 1)
    w, x = best_peaks(form, acting, w, x, CANDIDATES)
    packed = pack(w, x, anchor).split([s.numel() for s in states])
    fresh = [p.to(s.dtype) for p, s in zip(packed, states, strict=True)]
    return [torch.where(p.isfinite().all(), p, s) for p, s in zip(fresh, states, strict=True)]


def best_peaks(
    form: Stencil, acting: Tensor, w: Tensor, x: Tensor, count: int
) -> tuple[Tensor, Tensor]:
    """Where the best of many candidates climb to, on separate peaks, the leading one first.

    Args:
        form: Geometry of the taps.
        acting: Kernels, shape ``(G, rows, C, T)``.
        w: Frequencies, shape ``(G, N, axes)``.
        x: Unit vectors, shape ``(G, N, P * C)`` complex.
        count: Candidates wanted, at most N.

    Returns:
        Frequencies ``(G, count, axes)`` and vectors ``(G, count, P * C)``.
    """
    table, phase = tap_table(form, acting.device)
    acting = acting.flatten(-2)
    for _ in range(CLIMBS):
        _, u = polar(_apply(acting, _tap_vectors(form, w, x, table, phase)))
        w, x, reached = _climb(form, acting, w, x, u)
    kept = separate_peaks(form, w, reached, count)[..., None]
    return w.take_along_dim(kept, 1), x.take_along_dim(kept, 1)


def shape_key(region: Region) -> Hashable:
    """Equal for regions whose kernels one scan can take together."""
    form = conv_form(region)
    assert form is not None
    shape = (form.rows, form.channels, form.kernel)
    return (*shape, form.stride, form.dilation, form.padding)
