# SPDX-License-Identifier: MIT
"""The closed-form bounds of the LMT paper and its predecessors, for comparison."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lmtfast.graph import Conv


def has_closed_form(conv: Conv) -> bool:
    """Whether the two kernel bounds speak of this map: a zero-padded, undilated convolution."""
    return (
        not conv.transposed
        and conv.identity_gain == 0.0
        and conv.padding_mode == "zeros"
        and all(d == 1 for d in conv.dilation)
    )


def corollary_1(conv: Conv, kernel: Tensor) -> float:
    """Cor. 1 of the LMT paper: root of the most windows that read one entry, times the matrix norm.

    Args:
        conv: Geometry; see :func:`has_closed_form`.
        kernel: The acting kernel, ``(C_out, C_in / groups, k...)``, float64.

    Guarantee:
        Estimate: an upper bound in exact arithmetic, here from singular values rounded to nearest.

    Source:
        Tsuzuku, Sato, Sugiyama (2018), arXiv:1802.04034, Cor. 1, with
        ``n = prod over axes of ceil(min(k, n_in + padding - k + 1) / stride)``.

    Example:
        >>> from lmtfast import trace
        >>> layer = torch.nn.Conv2d(1, 1, 4, stride=2, padding=1, bias=False).double()
        >>> _ = torch.nn.init.ones_(layer.weight)
        >>> conv = trace(layer, (1, 28, 28)).operators[0].primitive
        >>> round(corollary_1(conv, layer.weight.detach()), 6)
        8.0
    """
    windows = 1
    for size, k, s, (low, high) in zip(
        conv.in_shape[1:], conv.kernel, conv.stride, conv.padding, strict=True
    ):
        windows *= math.ceil(min(k, size + low + high - k + 1) / s)
    return math.sqrt(windows) * _matrix_norm(conv, kernel)


def cisse(conv: Conv, kernel: Tensor) -> float:
    """The bound of Cisse et al.: root of the kernel's size times the matrix norm.

    Args:
        conv: Geometry; see :func:`has_closed_form`.
        kernel: As for :func:`corollary_1`.

    Guarantee:
        Estimate: an upper bound in exact arithmetic, never below Cor. 1.

    Source:
        Cisse et al. (2017), arXiv:1704.08847, section 3.

    Example:
        As :func:`corollary_1`.
    """
    return math.sqrt(math.prod(conv.kernel)) * _matrix_norm(conv, kernel)


def _matrix_norm(conv: Conv, kernel: Tensor) -> float:
    """Norm of the kernel as a matrix of C_out rows; the largest over groups."""
    blocks = kernel.reshape(conv.groups, kernel.shape[0] // conv.groups, -1)
    return float(torch.linalg.matrix_norm(blocks, ord=2).max())


def stagnation_bound(value: float, previous: float, dimension: int) -> float:
    r"""The paper's bound from two consecutive power iterates that have almost stopped growing.

    With ``m`` the latest estimate of the largest eigenvalue of ``A^T A``, ``e`` its last growth,
    ``n`` the dimension and ``f = |e| n``:

    .. math::  \sigma \le \sqrt{m + (f + \sqrt{f (4 m + f)}) / 2}

    Args:
        value: ``m``, the norm of ``A^T A x`` for a unit vector x, at the last step.
        previous: The same one step before.
        dimension: Entries of x.

    Guarantee:
        Estimate: it holds in exact arithmetic if the start has at least ``1 / n`` of its squared
        length along the top singular vector, which one Gaussian start has with probability about
        0.317. Where rounding stops the growth, it adds nothing. The library's own probabilistic
        level uses the moment bound instead.

    Source:
        Tsuzuku, Sato, Sugiyama (2018), arXiv:1802.04034, Thm. 2 (after Friedman, 1998).

    Example:
        >>> round(stagnation_bound(4.0, 3.999999, 784), 6)
        2.014049
    """
    growth = abs(value - previous) * dimension
    return math.sqrt(value + (growth + math.sqrt(growth * (4.0 * value + growth))) / 2.0)
