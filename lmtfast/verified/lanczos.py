# SPDX-License-Identifier: MIT
"""Largest eigenvalues by Lanczos with full reorthogonalisation: a guess, never a bound."""

from __future__ import annotations

import secrets
from collections.abc import Callable

import torch

_CHECK_EVERY = 8  # the small eigenproblem costs more than a step on tiny matrices


def fresh_generator(device: torch.device | str = "cpu") -> torch.Generator:
    """A torch generator seeded by the operating system; the global generators stay untouched."""
    return torch.Generator(device=device).manual_seed(secrets.randbits(63))


def top_eigenvalue(
    apply: Callable[[torch.Tensor], torch.Tensor],
    batch: int,
    dimension: int,
    *,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
    steps: int = 300,
    tolerance: float = 2.0**-36,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Estimate the largest eigenvalue of each Hermitian positive semidefinite operator of a batch.

    Args:
        apply: Maps ``(batch, dimension)`` to the same shape, row by row the operators' products.
        batch: Number of operators, at least one.
        dimension: Their order, at least one.
        dtype: float64, or complex128 for complex operators.
        device: Where the iterates live.
        steps: Largest number of products.
        tolerance: Relative error, as guessed from residual and gap, at which to stop.

    Returns:
        ``(theta, error)``, float64 tensors of shape ``(batch,)``: Ritz values and guessed errors.
        In exact arithmetic ``theta`` never exceeds the true value.

    Guarantee:
        None (estimate). The start is random and fresh on every call, so no weights are built
        against it.

    Source:
        Golub and Van Loan, Matrix Computations, 4th edition, section 10.1 and 10.3
        (reorthogonalisation).

    Example:
        >>> matrix = torch.diag(torch.tensor([1.0, 3.0], dtype=torch.float64))
        >>> float(top_eigenvalue(lambda v: v @ matrix, 1, 2)[0]) <= 3.0 + 1e-12
        True
    """
    theta, error, _ = _lanczos(apply, batch, dimension, dtype, device, steps, tolerance)
    return theta, error


def top_eigenvector(
    apply: Callable[[torch.Tensor], torch.Tensor],
    dimension: int,
    *,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
    steps: int = 300,
    tolerance: float = 2.0**-36,
) -> torch.Tensor:
    """Estimate a unit eigenvector of the largest eigenvalue; arguments as for one operator above.

    Returns:
        Shape ``(dimension,)``, real or complex as ``dtype`` says.

    Guarantee:
        None (estimate).

    Source:
        As :func:`top_eigenvalue`.

    Example:
        >>> matrix = torch.diag(torch.tensor([1.0, 3.0], dtype=torch.float64))
        >>> top_eigenvector(lambda v: v @ matrix, 2).abs().round().tolist()
        [0.0, 1.0]
    """
    vector = _lanczos(apply, 1, dimension, dtype, device, steps, tolerance)[2]
    return vector[0]


def _lanczos(
    apply: Callable[[torch.Tensor], torch.Tensor],
    batch: int,
    dimension: int,
    dtype: torch.dtype,
    device: torch.device | str,
    steps: int,
    tolerance: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ritz values ``(batch,)``, guessed errors and unit Ritz vectors ``(batch, dimension)``."""
    steps = min(steps, dimension)
    generator = fresh_generator(device)
    v = torch.randn(batch, dimension, dtype=dtype, device=device, generator=generator)
    v = v / torch.linalg.vector_norm(v, dim=1, keepdim=True)
    basis = torch.zeros(batch, steps, dimension, dtype=dtype, device=device)
    tridiagonal = torch.zeros(batch, steps + 1, steps + 1, dtype=torch.float64, device=device)
    # Below this a direction is rounding noise: taken for one, it ruins the orthogonality.
    exhausted = 2.0**7 * torch.finfo(dtype).eps
    theta = error = torch.zeros(batch, dtype=torch.float64, device=device)
    for k in range(steps):
        basis[:, k] = v
        w = apply(v)
        tridiagonal[:, k, k] = (v.conj() * w).sum(1).real
        known = basis[:, : k + 1]
        for _ in range(2):  # twice is enough for orthogonality to working precision
            w = w - ((known.conj() @ w.unsqueeze(2)).mT @ known).squeeze(1)
        beta = torch.linalg.vector_norm(w, dim=1)
        tridiagonal[:, k, k + 1] = tridiagonal[:, k + 1, k] = beta
        if (k + 1) % _CHECK_EVERY == 0 or k + 1 == steps:
            theta, error = _ritz(tridiagonal[:, : k + 1, : k + 1], beta)
            if bool((error <= tolerance * theta).all()):
                break
        # An exhausted Krylov space continues with zeros, which add zero eigenvalues and change
        # nothing.
        alive = beta > exhausted * tridiagonal[:, 0, 0]
        v = torch.where(
            alive.unsqueeze(1), w / beta.clamp_min(2.0**-900).unsqueeze(1), torch.zeros_like(w)
        )
    taken = tridiagonal[:, : k + 1, : k + 1]
    weights = torch.linalg.eigh(taken).eigenvectors[:, :, -1].to(dtype)
    vectors = (weights.unsqueeze(1) @ basis[:, : k + 1]).squeeze(1)
    length = torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
    return theta, error, vectors / length.clamp_min(2.0**-900)


def _ritz(tridiagonal: torch.Tensor, beta: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Largest Ritz value and its guessed error, from residual and gap."""
    values, vectors = torch.linalg.eigh(tridiagonal)
    theta, residual = values[:, -1], beta * vectors[:, -1, -1].abs()
    if values.shape[1] == 1:
        return theta, residual
    gap = (theta - values[:, -2]).clamp_min(2.0**-900)
    return theta, torch.minimum(residual, residual / gap * residual)
