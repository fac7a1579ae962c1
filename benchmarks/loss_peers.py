# SPDX-License-Identifier: MIT
"""Margin cross-entropy in plain PyTorch, as others write it: three ways to the pair distances.

The loss is LMT++ (the default of ``lmtfast.margin_cross_entropy``), whose factor is a constant in
backward. Sources: Tsuzuku, Sato, Sugiyama (2018), arXiv:1802.04034; the (N, K, D) differences are
how the code of Leino et al. (2021) and Hu et al. (2024) forms them.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Distances = Callable[[Tensor, Tensor], Tensor]


def by_differences(weight: Tensor, target: Tensor) -> Tensor:
    """``||w_t - w_j||``, (N, K), through the (N, K, D) tensor of differences."""
    return (weight[target][:, None] - weight).norm(dim=2)


def by_gram(weight: Tensor, target: Tensor) -> Tensor:
    """The same through the K x K Gram matrix of the head."""
    return _distances(weight, weight, torch.arange(len(weight), device=weight.device))[target]


def by_target_rows(weight: Tensor, target: Tensor) -> Tensor:
    """The same through N rows of the Gram matrix."""
    return _distances(weight[target], weight, target)


def _distances(rows: Tensor, weight: Tensor, index: Tensor) -> Tensor:
    squares = weight.square().sum(1)
    squared = rows.square().sum(1)[:, None] + squares - 2 * rows @ weight.T
    # The root has no derivative at zero, which only the distance of a row to itself must reach.
    own = torch.zeros_like(squared, dtype=torch.bool).scatter(1, index[:, None], True)
    return squared.clamp(min=0).masked_fill(own, 1.0).sqrt().masked_fill(own, 0.0)


def extra_bytes(distances: Distances, n: int, k: int, d: int) -> int:
    """Bytes of float32 temporaries of forward and backward; a rough lower estimate."""
    entries = {by_differences: 2 * n * k * d, by_gram: 3 * k * k, by_target_rows: 3 * n * k}
    return 4 * entries[distances]


def lmt_plus_plus(logits: Tensor, target: Tensor, addition: Tensor) -> Tensor:
    """Mean cross-entropy with rivals raised by the largest common share of ``addition`` (N, K)
    that keeps a correct prediction correct."""
    margin = logits.gather(1, target[:, None]) - logits
    with torch.no_grad():
        ratio = (margin / addition).clamp(0.0, 1.0)
        ratio = ratio.scatter(1, target[:, None], math.inf).amin(1, keepdim=True).clamp(max=1.0)
    return F.cross_entropy(logits + ratio * addition, target)
