# SPDX-License-Identifier: MIT
"""Searches over frequencies: the best one for fixed vectors, and a scan for fresh candidates."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lmtfast.engines.polyphase import axis_offsets, degrees, polar
from lmtfast.table import Stencil

# Grid points per axis and degree: neighbours closer than a sixth of the finest oscillation.
GRID_DENSITY = 4
SCAN_DENSITY = 6
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


def scan_candidates(
    form: Stencil, acting: Tensor, table: Tensor, phase: Tensor, count: int
) -> tuple[Tensor, Tensor]:
    """The ``count`` best separated frequencies of a grid with power vectors, per group.

    Args:
        form: Geometry of the taps.
        acting: Kernel, shape ``(G, rows, C, T)``.
        table: Offsets, shape ``(T, axes)``.
        phase: Phase numbers, shape ``(T,)``.
        count: Candidates wanted.

    Returns:
        Frequencies ``(G, count, axes)`` and unit vectors ``(G, count, P * C)`` complex.
    """
    sizes = grid_sizes(form, SCAN_DENSITY)
    # Weights are real, so w and -w share their singular values: half of the first axis is enough.
    points = torch.arange((sizes[0] // 2 + 1) * math.prod(sizes[1:]), device=acting.device)
    grid = grid_frequencies(points, sizes, acting.dtype)  # (N, axes)
    member = phase[:, None] == torch.arange(form.phases, device=acting.device)
    width = form.phases * form.channels
    chunk = max(1, SCAN_ENTRIES // max(1, form.groups * form.rows * width))
    norms, vectors = [], []
    for part in grid.split(chunk):
        mixing = response_phases(part, table).unsqueeze(-1) * member.to(acting.dtype)  # (N, T, P)
        flat = torch.view_as_real(mixing.transpose(0, 1).contiguous()).reshape(form.taps, -1)
        parts = (acting @ flat).unflatten(-1, (part.shape[0], form.phases, 2))
        symbol = torch.view_as_complex(parts.contiguous())  # (G, rows, C, N, P)
        symbol = symbol.permute(0, 3, 1, 4, 2).flatten(-2)  # (G, N, rows, P * C)
        norm, x = _power(symbol)
        norms.append(norm)
        vectors.append(x)
    value, x = torch.cat(norms, 1), torch.cat(vectors, 1)
    # Two peaks closer than half the width of one are one.
    separation = torch.tensor([math.pi / (d + 1) for d in degrees(form)], dtype=grid.dtype)
    separation = separation.to(grid.device)
    found_w, found_x = [], []
    for _ in range(count):
        best = value.argmax(-1)
        found_w.append(grid[best])
        found_x.append(x.take_along_dim(best[:, None, None], 1)[:, 0])
        gap = torch.remainder(grid - grid[best][:, None] + math.pi, 2 * math.pi) - math.pi
        value = torch.where((gap.abs() < separation).all(-1), value - value.abs() - 1, value)
    return torch.stack(found_w, 1), torch.stack(found_x, 1)


def _power(symbol: Tensor) -> tuple[Tensor, Tensor]:
    """Norm estimates ``(G, N)`` and unit vectors ``(G, N, n)`` of matrices ``(G, N, m, n)``."""
    # A quadratic phase is flat in every coordinate and smooth in none; no generator is needed.
    n = symbol.shape[-1]
    angle = torch.arange(n, device=symbol.device).to(symbol.real.dtype).square() * math.sqrt(2.0)
    x = torch.polar(torch.full_like(angle, n**-0.5), angle % (2 * math.pi))
    x = x.expand(*symbol.shape[:2], n).unsqueeze(-1)
    adjoint = symbol.mH
    for _ in range(SCAN_STEPS):
        _, u = polar((symbol @ x).squeeze(-1))
        _, v = polar((adjoint @ u.unsqueeze(-1)).squeeze(-1))
        x = v.unsqueeze(-1)
    return polar((symbol @ x).squeeze(-1))[0], x.squeeze(-1)
