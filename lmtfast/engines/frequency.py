# SPDX-License-Identifier: MIT
"""Searches over frequencies: the best one for fixed vectors, and a scan for fresh candidates."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from lmtfast.engines.polyphase import axis_offsets, degrees, polar, tap_table
from lmtfast.table import Stencil

# Grid points per axis and degree. A scan only has to land in the reach of every peak.
GRID_DENSITY = 4
SCAN_DENSITY = 4
# Points of one grid; beyond it the grid coarsens and Newton steps do the rest.
MAX_POINTS = 4096
# Power steps at each frequency of a scan, and complex numbers held at once.
SCAN_STEPS = 12
SCAN_ENTRIES = 1 << 23


def response_phases(w: Tensor, table: Tensor) -> Tensor:
    """exp(-i w . tau_t). Shape ``(..., T)`` complex for w ``(..., axes)``."""
    angle = -(w @ table.to(w.dtype).T)
    return torch.polar(torch.ones_like(angle), angle)


def grid_sizes(form: Stencil, density: int) -> list[int]:
    """Points per axis: ``density`` per degree, within the limit on their product."""
    sizes = [density * (d + 1) if d else 1 for d in degrees(form)]
    while math.prod(sizes) > MAX_POINTS and max(sizes) > 8:
        largest = sizes.index(max(sizes))
        sizes[largest] = -(-sizes[largest] // 2)
    return sizes


def grid_frequencies(index: Tensor, sizes: list[int], dtype: torch.dtype) -> Tensor:
    """Frequencies of flat grid indices, the last axis fastest. Shape ``(..., axes)``."""
    parts = []
    for n in reversed(sizes):
        parts.append((index % n).to(dtype) * (2 * math.pi / n))
        index = torch.div(index, n, rounding_mode="floor")
    return torch.stack(parts[::-1], -1)


def improve(form: Stencil, response: Tensor, w: Tensor) -> Tensor:
    """A frequency at which ``|sum_t q_t exp(-i w . tau_t)|`` is no smaller than at ``w``.

    Args:
        form: Geometry of the taps.
        response: q, shape ``(G, F, T)`` complex.
        w: Present frequencies, shape ``(G, F, axes)``.

    Returns:
        The best of the grid and the present frequency, after a Newton step; shape of ``w``.
    """
    sizes = grid_sizes(form, GRID_DENSITY)
    if math.prod(sizes) == 1:
        return w
    largest = response.abs().amax(-1, keepdim=True)
    response = response / largest.where(largest > 0, 1.0)
    offsets, _ = axis_offsets(form, w.device)
    values = response.unflatten(-1, form.kernel)
    for tau, n in zip(offsets, sizes, strict=True):
        # The grid is a product, so one small table per axis evaluates it.
        angle = torch.arange(n, device=w.device).to(w.dtype)[None, :] * (-2 * math.pi / n)
        angle = tau.to(w.dtype)[:, None] * angle
        values = torch.tensordot(values, torch.polar(torch.ones_like(angle), angle), ([2], [0]))
    peak, index = values.flatten(2).abs().square().max(-1)
    table = torch.cartesian_prod(*offsets).reshape(-1, form.axes).to(w.dtype)
    value = _moments(response, w, table)[0]
    better = peak > value
    w = torch.where(better.unsqueeze(-1), grid_frequencies(index, sizes, w.dtype), w)
    return _newton(response, w, table)


def _moments(response: Tensor, w: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``f = |g|^2``, its gradient ``(..., axes)`` and Hessian, with ``g = sum_t q_t e_t(w)``."""
    terms = response * response_phases(w, table)
    g = terms.sum(-1)
    first = -1j * (terms @ table.to(terms.dtype))
    pairs = (table[:, :, None] * table[:, None, :]).flatten(1)
    second = -(terms @ pairs.to(terms.dtype)).unflatten(-1, (table.shape[1], -1))
    gradient = 2 * (g.conj().unsqueeze(-1) * first).real
    outer = first.unsqueeze(-1) * first.conj().unsqueeze(-2)
    hessian = 2 * (outer + g.conj()[..., None, None] * second).real
    return g.abs().square(), gradient, hessian


def _newton(response: Tensor, w: Tensor, table: Tensor) -> Tensor:
    """The better of w and a Newton step, damped where the maximum is not yet concave around w."""
    value, gradient, hessian = _moments(response, w, table)
    # Gershgorin: without damping the Hessian is negative definite where this is negative.
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)
    edge = (diagonal + hessian.abs().sum(-1) - diagonal.abs()).amax(-1)
    damping = torch.where(edge < 0, 0.0, edge + 1e-3 * diagonal.abs().amax(-1))
    matrix = hessian - torch.diag_embed(damping.unsqueeze(-1).expand_as(w))
    inverse = torch.linalg.inv_ex(matrix, check_errors=False).inverse
    trial = w - (inverse @ gradient.unsqueeze(-1)).squeeze(-1)
    reached = (response * response_phases(trial, table)).sum(-1).abs().square()
    w = torch.where((reached > value).unsqueeze(-1), trial, w)
    # Angles stay small, so that float32 keeps its digits.
    return torch.remainder(w + math.pi, 2 * math.pi) - math.pi


# The arguments and results of :func:`power_vectors`.
PowerVectors: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor]]


def scan_candidates(
    form: Stencil,
    acting: Tensor,
    count: int,
    power: PowerVectors | None = None,
    *,
    density: int = SCAN_DENSITY,
    steps: int = SCAN_STEPS,
) -> tuple[Tensor, Tensor]:
    """The ``count`` best frequencies of a grid with power vectors, per group.

    Args:
        form: Geometry of the taps.
        acting: Kernels, shape ``(G, rows, C, T)``; operators of one form may share a call.
        count: Candidates wanted; fewer where the grid has fewer points.
        power: What runs the power iterations; None: :func:`power_vectors`.
        density: Grid points per axis and degree.
        steps: Power steps at each of them.

    Returns:
        Frequencies ``(G, count, axes)`` and unit vectors ``(G, count, P * C)`` complex.
    """
    sizes = grid_sizes(form, density)
    # Weights are real, so w and -w share their singular values: half of the first axis is enough.
    points = torch.arange((sizes[0] // 2 + 1) * math.prod(sizes[1:]), device=acting.device)
    grid = grid_frequencies(points, sizes, acting.dtype)  # (N, axes)
    largest = acting.abs().amax((1, 2, 3), keepdim=True)
    scaled = acting / largest.where(largest > 0, 1.0)  # no product of power steps overflows
    table, phase = tap_table(form, acting.device)
    start = start_vector(form.phases * form.channels, acting)
    terms = response_phases(grid, table)
    value, x = (power or power_vectors)(scaled, phase, terms, start, steps)
    best = value.topk(min(count, len(grid)), -1).indices  # (G, count)
    return grid[best], x.take_along_dim(best[..., None], 1)


def separate_peaks(form: Stencil, w: Tensor, value: Tensor, count: int) -> Tensor:
    """The best of many candidates, none on another's peak while there are others.

    Args:
        form: Geometry of the taps.
        w: Frequencies, shape ``(G, N, axes)``.
        value: What ranks them, not negative, shape ``(G, N)``.
        count: Candidates wanted.

    Returns:
        Indices, shape ``(G, count)``; the first is that of the largest value.
    """
    # Two peaks closer than half the width of one are one.
    width = torch.stack([w.new_full((), math.pi / (d + 1)) for d in degrees(form)])
    largest = value.amax(-1, keepdim=True)
    value, found = value / largest.where(largest > 0, 1.0), []
    for _ in range(count):
        found.append(value.argmax(-1))
        own = w.take_along_dim(found[-1][:, None, None], 1)
        near = torch.zeros_like(value, dtype=torch.bool)
        for twin in (own, -own):  # weights are real
            gap = torch.remainder(w - twin + math.pi, 2 * math.pi) - math.pi
            near = near | (gap.abs() < width).all(-1)
        # Behind all others, but still in order; what is taken comes last.
        value = torch.where(near & (value >= 0), value - 2, value)
        value = value.scatter(1, found[-1][:, None], -math.inf)
    return torch.stack(found, 1)


def power_vectors(
    acting: Tensor, phase: Tensor, terms: Tensor, start: Tensor, steps: int
) -> tuple[Tensor, Tensor]:
    """Power steps on ``A(w) = sum_t W_t terms[w, t]`` at many frequencies.

    Args:
        acting: Kernels with entries of modulus one at most, shape ``(G, rows, C, T)``.
        phase: Phase number of every tap, shape ``(T,)``, int64.
        terms: ``exp(-i w . tau_t)``, shape ``(N, T)`` complex.
        start: The unit vector that every iteration starts from, shape ``(P * C,)`` complex.
        steps: Power steps.

    Returns:
        Norm estimates ``(G, N)`` and unit vectors ``(G, N, P * C)`` complex.
    """
    groups, rows, channels, taps = acting.shape
    phases = start.numel() // channels
    member = (phase[:, None] == torch.arange(phases, device=phase.device)).to(acting.dtype)
    chunk = max(1, SCAN_ENTRIES // max(1, groups * rows * start.numel()))
    norms, vectors = [], []
    for part in terms.split(chunk):
        mixing = (part.unsqueeze(-1) * member).transpose(0, 1).contiguous()  # (T, N, P)
        flat = torch.view_as_real(mixing).reshape(taps, -1)
        parts = (acting @ flat).unflatten(-1, (part.shape[0], phases, 2))
        symbol = torch.view_as_complex(parts.contiguous())  # (G, rows, C, N, P)
        symbol = symbol.permute(0, 3, 1, 4, 2).flatten(-2)  # (G, N, rows, P * C)
        norm, x = _power(symbol.flatten(0, 1), start, steps)
        norms.append(norm.unflatten(0, symbol.shape[:2]))
        vectors.append(x.unflatten(0, symbol.shape[:2]))
    return torch.cat(norms, 1), torch.cat(vectors, 1)


def _power(symbol: Tensor, start: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Norm estimates ``(B,)`` and unit vectors ``(B, n)`` of matrices ``(B, m, n)``."""
    x = start.expand(symbol.shape[0], -1)
    for _ in range(steps):
        image = symbol @ x.unsqueeze(-1)
        # u^H A, so that u and not the matrix is conjugated and copied.
        back = (image.mH.resolve_conj() @ symbol).squeeze(1).conj().resolve_conj()
        length, back = polar(back)
        x = torch.where((length > 0).unsqueeze(-1), back, x)
    return polar((symbol @ x.unsqueeze(-1)).squeeze(-1))[0], x


def start_vector(n: int, like: Tensor) -> Tensor:
    """A unit vector ``(n,)`` that is flat in every coordinate and smooth in none; complex."""
    # A quadratic phase; no generator is needed.
    angle = torch.arange(n, device=like.device).to(like.dtype).square() * math.sqrt(2.0)
    return torch.polar(torch.full_like(angle, n**-0.5), angle % (2 * math.pi))
