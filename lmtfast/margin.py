# SPDX-License-Identifier: MIT
"""Margins of logits, distances between head rows, and the float radii they suggest.

The radii here are estimates for tests and plots. A radius that may be believed comes from
:func:`lmtfast.certify`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lmtfast.backends.pair_norm import without_autocast


def pair_norms(weight: Tensor, rows: Tensor | None = None) -> Tensor:
    """Distances ``||w_c - w_j||_2`` from the rows ``rows`` of a linear head to all its rows.

    Exact differences summed on the fly, so nearly equal rows keep their accuracy; no (U, K, D)
    tensor. Slower than the matrix product the losses use for many classes: about 0.3 s per 256 rows
    of a 1000 x 512 head on one core.

    Args:
        weight: (K, D), floating point; computed in float32, or float64 for float64.
        rows: Class indices, (U,) int64, or None for all K.

    Returns:
        (U, K), exactly 0 where the class meets itself. Differentiable in ``weight``, with gradient
        0 at distance 0.

    Guarantee:
        Estimate: rounded to nearest.

    Source:
        Tsuzuku, Sato, Sugiyama 2018, arXiv:1802.04034, Proposition 2.

    Example:
        >>> import torch
        >>> pair_norms(torch.tensor([[3.0, 0.0], [0.0, 4.0]]), torch.tensor([1]))
        tensor([[5., 0.]])
    """
    with without_autocast(weight.device):
        w = weight if weight.dtype == torch.float64 else weight.float()
        chosen = w if rows is None else w.index_select(0, rows)
        return torch.cdist(chosen, w, compute_mode="donot_use_mm_for_euclid_dist")


def logit_margin(logits: Tensor, target: Tensor) -> Tensor:
    """Logit of the true class minus the best other.

    Args:
        logits: (N, K), floating point.
        target: (N,) int64.

    Returns:
        (N,), negative where misclassified, +inf where K = 1.

    Guarantee:
        Estimate: rounded to nearest.

    Source:
        Tsuzuku, Sato, Sugiyama 2018, arXiv:1802.04034, section 4.

    Example:
        >>> import torch
        >>> logit_margin(torch.tensor([[3.0, 1.0, 0.5]]), torch.tensor([0]))
        tensor([2.])
    """
    t = target[:, None]
    return (logits.gather(1, t) - logits.scatter(1, t, -math.inf)).amin(1)


def prop1_radius(logits: Tensor, target: Tensor, total: Tensor | float) -> Tensor:
    """Estimate of the radius by Proposition 1: ``max(0, margin) / (sqrt(2) * total)``.

    Args:
        logits: (N, K), floating point.
        target: (N,) int64.
        total: Lipschitz bound of the whole network, L2, a number or 0-dim tensor.

    Returns:
        (N,) in input units; 0 for a misclassified sample, a tie or NaN.

    Guarantee:
        Estimate: rounded to nearest, and no better than ``total``.

    Source:
        Tsuzuku, Sato, Sugiyama 2018, arXiv:1802.04034, Proposition 1.

    Example:
        >>> import torch
        >>> prop1_radius(torch.tensor([[0.6, 0.1, -0.6]]), torch.tensor([0]), math.sqrt(2))
        tensor([0.2500])
    """
    margin = logit_margin(logits, target)
    return torch.where(margin > 0, margin / (math.sqrt(2.0) * total), 0.0)


def prop2_radius(
    logits: Tensor, target: Tensor, features: Tensor | float, head_weight: Tensor
) -> Tensor:
    """Estimate of the radius by Proposition 2.

    ``min over j of max(0, z_t - z_j) / (||w_t - w_j|| * features)``.

    Never smaller than :func:`prop1_radius` at ``total = features * ||W||``.

    Args:
        logits: (N, K), floating point.
        target: (N,) int64.
        features: Lipschitz bound of the network up to its head, L2, a number or 0-dim tensor.
        head_weight: (K, D).

    Returns:
        (N,) in input units; 0 for a misclassified sample, a tie or NaN; +inf where no rival can
        ever catch up.

    Guarantee:
        Estimate: rounded to nearest, and no better than ``features``.

    Source:
        Tsuzuku, Sato, Sugiyama 2018, arXiv:1802.04034, Proposition 2.

    Example:
        >>> import torch
        >>> w = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
        >>> prop2_radius(torch.tensor([[0.6, 0.1, -0.6]]), torch.tensor([0]), 1.0, w)
        tensor([0.3536])
    """
    t = target[:, None]
    margin = logits.gather(1, t) - logits
    reach = pair_norms(head_weight).index_select(0, target) * features
    radius = torch.where(margin > 0, margin / reach, 0.0)
    return radius.scatter(1, t, math.inf).amin(1)
