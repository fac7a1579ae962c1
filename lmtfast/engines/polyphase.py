# SPDX-License-Identifier: MIT
"""A convolution as its engines see it: one forward stencil, its taps split by stride, any dtype.

A transposed convolution is the adjoint of the convolution with the same kernel, so both become one
form: the operator reads ``x[s o + e]`` at output o, with ``e = d t - p`` for tap t. Splitting
``e = s q + r`` gives a stride-1 convolution with tap offsets q between phases r of the input
(Vaidyanathan, Multirate Systems and Filter Banks, 1993, section 4.3). The kernel itself is never
copied or enlarged: taps only carry the index of the phase they read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lmtfast.backends.reference import Leaves, effective_weight
from lmtfast.graph import Conv, Region, Shape, WeightRef
from lmtfast.weights import Weights

# Terms of the separable engine's iterate: eight real columns are the symbol engine's four complex.
RANK = 8


@dataclass(frozen=True)
class ConvForm:
    """Sizes of the forward stencil: rows and channels per group, shapes of the axes only."""

    groups: int
    rows: int
    channels: int
    kernel: Shape
    stride: Shape
    dilation: Shape
    padding: tuple[tuple[int, int], ...]
    in_extent: Shape
    out_extent: Shape
    circular: bool

    @property
    def axes(self) -> int:
        return len(self.kernel)

    @property
    def taps(self) -> int:
        return math.prod(self.kernel)

    @property
    def phases(self) -> int:
        """Phases of the input that a stride splits it into."""
        return math.prod(self.stride)

    @property
    def rank(self) -> int:
        """Terms of a low-rank iterate: a grid or channel axis shorter than RANK needs no more."""
        return min(RANK, self.channels, math.prod(self.in_extent))

    @property
    def operator_products(self) -> int:
        """Multiply-adds of one power step on the true operator."""
        weights = self.groups * self.rows * self.channels * self.taps
        return 2 * weights * math.prod(self.out_extent)

    @property
    def separable_products(self) -> int:
        """Multiply-adds of one separable step: two weight products, four stencils on the grid."""
        weights = self.rows * self.channels * self.taps
        grid = math.prod(self.out_extent) * (self.taps * self.rank) ** 2
        return self.groups * (2 * self.rank * weights + 4 * grid)


def conv_form(region: Region) -> ConvForm | None:
    """The form of a region that is one convolution or transposed convolution, else None."""
    op = region.primitive
    if not isinstance(op, Conv):
        return None
    ends = (op.out_shape, op.in_shape) if op.transposed else (op.in_shape, op.out_shape)
    return ConvForm(
        op.groups, ends[1][0] // op.groups, ends[0][0] // op.groups, op.kernel, op.stride,
        op.dilation, op.padding, ends[0][1:], ends[1][1:], op.padding_mode == "circular",
    )  # fmt: skip


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


def axis_offsets(form: ConvForm, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
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


def degrees(form: ConvForm) -> list[int]:
    """Per axis the degree of the symbol in exp(-i w): the spread of the offsets."""
    spread = []
    for k, s, d, (low, _) in zip(
        form.kernel, form.stride, form.dilation, form.padding, strict=True
    ):
        spread.append(k - 1 if s == 1 else ((k - 1) * d - low) // s - (-low) // s)
    return spread


def tap_table(form: ConvForm, device: torch.device) -> tuple[Tensor, Tensor]:
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
