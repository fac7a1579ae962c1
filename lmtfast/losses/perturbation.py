# SPDX-License-Identifier: MIT
"""Margins for inputs that are already perturbed."""

from __future__ import annotations

import torch
from torch import Tensor

from lmtfast.errors import ShapeError


def perturbed_eps(eps: float | Tensor, perturbation: Tensor) -> Tensor:
    """Budget left after a perturbation of each sample: ``max(0, eps - ||perturbation_i||_2)``.

    For training on adversarial examples: a point already moved by ``r`` needs a margin for
    ``eps - r`` only, so that the margin and the attack together cover the ball of radius ``eps``
    around the clean point once.

    Args:
        eps: Budget in input units, L2; a number, a 0-dim tensor or one value per sample, (N,).
        perturbation: Adversarial minus clean inputs, (N, ...), any floating dtype; measured in
            float32 at least. In the same units as ``eps``: before any input normalisation.

    Returns:
        (N,) float32 (float64 for float64 input), for ``margin_cross_entropy(eps=...)``. Carries no
        gradient to ``perturbation``.

    Raises:
        ShapeError: ``eps`` is neither a scalar nor (N,).

    Guarantee:
        None: a training heuristic.

    Source:
        Tsuzuku, Sato, Sugiyama 2018, arXiv:1802.04034, extensions (combination with adversarial
        training).

    Example:
        >>> import torch
        >>> from lmtfast.losses import perturbed_eps
        >>> perturbed_eps(0.5, torch.tensor([[0.3, 0.4], [0.0, 0.2]]))
        tensor([0.0000, 0.3000])
    """
    dtype = torch.float64 if perturbation.dtype == torch.float64 else torch.float32
    n = perturbation.shape[0] if perturbation.dim() else -1
    if n < 0 or (isinstance(eps, Tensor) and eps.shape not in ((), (n,))):
        raise ShapeError(
            "perturbation (N, ...) and eps a scalar or (N,)",
            f"perturbation {tuple(perturbation.shape)}, eps {tuple(getattr(eps, 'shape', ()))}",
            "perturbed_eps",
            "pass the batch of perturbations and one eps, or one eps per sample.",
        )
    flat = perturbation.detach().to(dtype).reshape(n, perturbation[:1].numel() if n else 0)
    return (eps - torch.linalg.vector_norm(flat, dim=1)).clamp(min=0)
