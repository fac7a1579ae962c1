# SPDX-License-Identifier: MIT
"""A convolution as its engines see it: one forward stencil, its taps split by stride, any dtype.

A transposed convolution is the adjoint of the convolution with the same kernel, so both become one
form: the operator reads ``x[s o + e]`` at output o, with ``e = d t - p`` for tap t. Splitting
``e = s q + r`` gives a stride-1 convolution with tap offsets q between phases r of the input
(Vaidyanathan, Multirate Systems and Filter Banks, 1993, section 4.3). The kernel itself is never
copied or enlarged: taps only carry the index of the phase they read.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lmtfast.backends.reference import Leaves, effective_weight
from lmtfast.graph import Conv, Region, WeightRef
from lmtfast.table import Stencil, stencil_of
from lmtfast.weights import Weights


def conv_form(region: Region) -> Stencil | None:
    """The stencil of a region that is one convolution or transposed convolution, else None."""
    return stencil_of(region) if isinstance(region.primitive, Conv) else None


def refusal(region: Region) -> str | None:
    """Why neither frequency nor stencil form covers the region, or None."""
    op, form = region.primitive, conv_form(region)
    if not isinstance(op, Conv) or form is None:
        return "not a single convolution"
    if op.padding_mode not in ("zeros", "circular"):
        return f"{op.padding_mode} padding"
    if not 1 <= form.axes <= 3:
        return f"{form.axes} spatial axes"
    if min((*form.in_extent, *form.out_extent, form.rows, form.channels, form.taps)) < 1:
        return "an empty shape"
    if any(low < 0 or high < 0 for low, high in form.padding):
        return "negative padding"
    return None


def kernel(region: Region, weights: Weights) -> Tensor:
    """The acting kernel. Shape ``(G, rows, channels, T)``, a view where no scale is folded in."""
    op, form = region.primitive, conv_form(region)
    assert isinstance(op, Conv)
    assert form is not None
    shape = (form.groups, form.rows, form.channels, form.taps)
    return effective_weight(op, weights).reshape(shape)


def kernel_vjp(
    region: Region, tensors: Mapping[WeightRef, Tensor], gradient: Tensor
) -> dict[WeightRef, Tensor]:
    """Gradient in each weight tensor from that in the acting kernel, ``(G, rows, channels, T)``."""
    op, refs = region.primitive, list(tensors)
    assert isinstance(op, Conv)
    with torch.enable_grad():
        leaves = {r: t.detach().to(gradient.dtype).requires_grad_() for r, t in tensors.items()}
        acting = effective_weight(op, Leaves(leaves))
        grads = torch.autograd.grad(
            acting, [leaves[r] for r in refs], gradient.reshape(acting.shape), allow_unused=True
        )
    return {r: g for r, g in zip(refs, grads, strict=True) if g is not None}


def axis_offsets(form: Stencil, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    """Per axis the offsets q and phases r of its taps. Shapes ``(k,)``, int64.

    Where the stride is one, padding only shifts the symbol by a factor of modulus one and dilation
    only stretches the frequency axis: the taps themselves serve as offsets. Computed on the device,
    so that no copy from the host is queued.
    """
    offsets, phases = [], []
    for k, s, d, (low, _) in zip(
        form.kernel, form.stride, form.dilation, form.padding, strict=True
    ):
        taps = torch.arange(k, device=device)
        reads = taps * d - low
        offset = torch.div(reads, s, rounding_mode="floor")
        offsets.append(taps if s == 1 else offset)
        phases.append(reads - offset * s)
    return offsets, phases


def degrees(form: Stencil) -> list[int]:
    """Per axis the degree of the symbol in exp(-i w): the spread of the offsets."""
    spread = []
    for k, s, d, (low, _) in zip(
        form.kernel, form.stride, form.dilation, form.padding, strict=True
    ):
        spread.append(k - 1 if s == 1 else ((k - 1) * d - low) // s - (-low) // s)
    return spread


def tap_table(form: Stencil, device: torch.device) -> tuple[Tensor, Tensor]:
    """All taps, the last axis fastest: offsets ``(T, axes)`` and phase numbers ``(T,)``, int64."""
    offsets, phases = axis_offsets(form, device)
    if form.axes == 1:
        return offsets[0][:, None], phases[0]
    table = torch.cartesian_prod(*offsets)
    number = torch.zeros(1, dtype=torch.int64, device=device)
    for phase, s in zip(phases, form.stride, strict=True):
        number = (number[:, None] * s + phase[None, :]).reshape(-1)
    return table, number


def polar(x: Tensor) -> tuple[Tensor, Tensor]:
    """``||x||`` and ``x / ||x||`` over the last dimension; zero stays zero.

    No square overflows or underflows, and no ``eps`` is added: it would shrink small norms.
    """
    largest = x.abs().amax(-1, keepdim=True)
    scaled = x / largest.where(largest > 0, 1.0)
    norm = torch.linalg.vector_norm(scaled, dim=-1, keepdim=True)
    return (largest * norm).squeeze(-1), scaled / norm.where(norm > 0, 1.0)
