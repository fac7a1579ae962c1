# SPDX-License-Identifier: MIT
"""The polyphase form: a strided, dilated convolution as a stride-1 one with blocked channels."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch

from lmtfast.errors import ArgumentError, ShapeError
from lmtfast.verified.rounding import require_float64

Tap = tuple[tuple[int, ...], torch.Tensor]


def polyphase(
    weight: torch.Tensor,
    *,
    stride: Sequence[int],
    padding: Sequence[int | tuple[int, int]],
    dilation: Sequence[int],
) -> tuple[list[Tap], Callable[[Sequence[int]], tuple[int, ...]]]:
    r"""Write a strided, dilated, zero-padded convolution as a stride-1 one on s-fold coarser grids.

    Tap t reads ``x[s o + e]`` with e = d t - p_low; e = s q + r with 0 <= r < s (per axis), so it
    is tap q of a stride-1 convolution on the phase ``x_r[i] = x[s i + r]``. Phases become blocks of
    input channels; only those that some tap reads are present. Re-arranging x into phases is an
    isometry, so the norm is unchanged.

    Args:
        weight: Shape ``(C_out, C_in, k...)``, float64, one to three kernel axes, one group.
        stride: Per axis, positive.
        padding: Per axis, ``(low, high)`` or one number for both. Only ``low`` shapes the taps.
        dilation: Per axis, positive.

    Returns:
        ``(taps, coarse_extent)``: taps with matrices ``(C_out, phases * C_in)``, ordered by offset,
        and a function from the input extent per axis to the coarse extent ceil(n / s) that supports
        every phase.

    Raises:
        DtypeError: Not float64.
        ShapeError: Wrong number of dimensions or parameters.
        ArgumentError: A stride or dilation below one.

    Guarantee:
        Exact: entries are moved, never rounded.

    Source:
        Vaidyanathan, Multirate Systems and Filter Banks (1993), section 4.3.

    Example:
        >>> weight = torch.ones(1, 1, 3, dtype=torch.float64)
        >>> taps, coarse = polyphase(weight, stride=[2], padding=[1], dilation=[1])
        >>> [offset for offset, _ in taps], coarse([7])
        ([(-1,), (0,)], (4,))
    """
    require_float64(weight, "weight")
    axes = weight.dim() - 2
    if not 1 <= axes <= 3 or not len(stride) == len(padding) == len(dilation) == axes:
        raise ShapeError(
            "a weight (C_out, C_in, k...) with one to three axes and parameters for each",
            f"weight {tuple(weight.shape)}, stride {tuple(stride)}, padding {tuple(padding)}, "
            f"dilation {tuple(dilation)}",
            "polyphase",
            "give one number per kernel axis",
        )
    if min(*stride, *dilation) < 1:
        raise ArgumentError(
            "positive strides and dilations",
            f"{tuple(stride)}, {tuple(dilation)}",
            "polyphase",
            "use 1 for an axis that is neither strided nor dilated",
        )
    low = [p if isinstance(p, int) else p[0] for p in padding]
    rows, channels = weight.shape[:2]
    split = {
        t: [divmod(d * i - p, s) for i, d, p, s in zip(t, dilation, low, stride, strict=True)]
        for t in itertools.product(*map(range, weight.shape[2:]))
    }
    phases = sorted({tuple(r for _, r in pairs) for pairs in split.values()})
    matrices: dict[tuple[int, ...], torch.Tensor] = {}
    for t, pairs in split.items():
        offset, phase = tuple(q for q, _ in pairs), tuple(r for _, r in pairs)
        if offset not in matrices:
            matrices[offset] = weight.new_zeros(rows, len(phases) * channels)
        start = phases.index(phase) * channels
        matrices[offset][:, start : start + channels] = weight[(slice(None), slice(None)) + t]

    def coarse_extent(extent: Sequence[int]) -> tuple[int, ...]:
        return tuple(-(-n // s) for n, s in zip(extent, stride, strict=True))

    return sorted(matrices.items(), key=lambda item: item[0]), coarse_extent
