# SPDX-License-Identifier: MIT
r"""The inequality behind every verified spectral norm: a-posteriori Cholesky in residual form.

For a matrix A (m, n), real or complex, m <= n, and *any* number c and *any* matrix L (m, m)

.. math::  c I - A A^* = L L^* + E, \qquad L L^* \succeq 0
           \;\Rightarrow\; \lVert A \rVert^2 = \lambda_{\max}(A A^*) \le c + \lVert E \rVert_2 .

Neither the guess c nor the factor L is trusted; E is bounded from matrix products alone. With G the
computed Gram matrix, D = fl(c I - G), M the computed product of L and S = fl(D - M) entry by entry,
E telescopes into

.. math::  E = (c I - G - D) + (G - A A^*) + (D - M - S) + S + (M - L L^*) .

E is Hermitian, so its Frobenius norm follows from its diagonal blocks and its strictly lower blocks
counted twice; only those are computed (the upper half of G, D, M is never read by the argument).
Term by term, with u = 2^-53:

1. c I - G - D: only the diagonal is rounded, each entry by at most u |D_ii|. Spectral norm at most
   u max_i |D_ii|.
2. G - A A^*: entrywise <= gamma_g |A| |A|^T, whose Frobenius norm is at most |A|_F^2. Real:
   gamma_g |A|_F^2. Complex, from real products: the real part errs by at most
   gamma_g (|Ar||Ar|^T + |Ai||Ai|^T), the imaginary part by gamma_g (|Ai||Ar|^T + |Ar||Ai|^T), each
   of Frobenius norm <= |A|_F^2 gamma_g; together
   sqrt(2) gamma_g |A|_F^2. gamma_g = gamma(depth), depth = roundings on the way of one product: the
   inner dimension is cut into J blocks of at most b, each block is one GEMM (at most b roundings in
   any order), the J results are added one after the other.
3. D - M - S: each entry errs by at most u |S_ij|: Frobenius norm <= u |S|_F.
4. S: its Frobenius norm, from computed squares by :func:`lmtfast.verified.rounding.inflate`.
5. M - L L^*: as 2, gamma_l |L|_F^2 (real) or sqrt(2) gamma_l |L|_F^2 (complex). L is used as stored
   (its strictly upper triangle is set to zero, so inner indices beyond the row's block contribute
   nothing).
6. Underflow: each of the at most K products behind an entry of G or M adds at most UNDERFLOW; over
   m^2 entries, two real parts and both matrices: less than 8 m (K_g + K_l) UNDERFLOW in norm.

So the square of the norm is at most

    c + (1 + u) |S|_F + u max|D_ii| + kappa (gamma_g |A|_F^2 + gamma_l |L|_F^2)
      + 8 m (K_g + K_l) UNDERFLOW,

kappa = 1 (real) or sqrt(2) (complex), every scalar evaluated outward. For a batch the maximum of
each term over the batch is taken. A failed or nonsensical factorisation makes S large or NaN and is
never accepted; an accepted one proves the bound whatever the solver did. In the
spirit of Rump, BIT 51 (2011), 367-384; the proof above is complete.
"""

from __future__ import annotations

import math

import torch

from lmtfast.verified.lanczos import top_eigenvalue
from lmtfast.verified.rounding import (
    UNDERFLOW,
    UNIT_ROUNDOFF,
    add_up,
    gamma_up,
    inflate,
    largest_square_sum,
    mul_up,
    next_up,
    sqrt_up,
    sum_up,
)

# Rows and inner indices per GEMM: above the cache block of every BLAS in use, so it costs no speed;
# it keeps gamma near 512 u for any inner dimension and lets the triangular half be skipped.
BLOCK = 512
# Float64 entries held per batch chunk in the largest intermediates: 16 MiB each, small enough for
# the allocator to hand the same pages out again (fresh ones cost more than the arithmetic) and to
# bound memory for any batch.
CHUNK_ENTRIES = 1 << 21
_EIGH_LIMIT = 640  # below, a full eigensolver costs less than Lanczos to convergence
# Long images give top eigenvalues too close for Lanczos; up to here the eigensolver takes seconds.
_EIGH_FALLBACK = 4096
_CONVERGED = 2.0**-34  # relative error of a Lanczos value that spares the eigensolver
_ROUGH_STEPS = 12  # enough to rank the members of a batch
_ATTEMPTS = 40
_WIDEN = 8.0
# Callers prescale so that the largest norm is at least 1/2; members far below it need no guess of
# their own.
_GUESS_FLOOR = 2.0**-40
_ACCEPT = 2.0**-20  # relative residual above which an attempt counts as failed (good: 1e-10)

Parts = list[tuple[float, torch.Tensor, torch.Tensor]]


def product_depth(parts: int, inner: int) -> int:
    """Roundings any product passes on its way into an entry of :func:`block_row`."""
    return min(inner, BLOCK) + parts * max(1, math.ceil(inner / BLOCK)) - 1


def block_row(parts: Parts, start: int, stop: int, inner: int) -> torch.Tensor:
    """Sum over parts of sign * left[start:stop] @ right[:stop]^T in inner blocks of ``BLOCK``."""
    total: torch.Tensor | None = None
    for sign, left, right in parts:
        for k in range(0, inner, BLOCK):
            term = (
                left[:, start:stop, k : min(k + BLOCK, inner)]
                @ right[:, :stop, k : min(k + BLOCK, inner)].mT
            )
            total = term * sign if total is None else total.add_(term, alpha=sign)
    assert total is not None
    return total


def _products(real: torch.Tensor, imag: torch.Tensor | None) -> tuple[Parts, Parts | None]:
    """Parts of the real and of the imaginary half of X X^*."""
    if imag is None:
        return [(1.0, real, real)], None
    return [(1.0, real, real), (1.0, imag, imag)], [(1.0, imag, real), (-1.0, real, imag)]


def _gram(parts: Parts, sign: float) -> torch.Tensor:
    """Computed (skew-)symmetric product, mirrored into the upper half for the untrusted solvers."""
    left = parts[0][1]
    batch, m, inner = left.shape
    gram = left.new_empty(batch, m, m)
    for start in range(0, m, BLOCK):
        stop = min(start + BLOCK, m)
        gram[:, start:stop, :stop] = block_row(parts, start, stop, inner)
        gram[:, :start, start:stop] = sign * gram[:, start:stop, :start].mT
    return gram


def _largest(sums: torch.Tensor) -> float:
    """Maximum over the batch; NaN if any entry is NaN (torch.amax propagates it)."""
    return float(sums.amax())


class ResidualSweep:
    """Running bound on the largest spectral norm over matrices fed in chunks.

    All members share one guess: it only rises when a member refuses it, so that members below the
    maximum cost a factorisation and no eigenvalue estimate.

    Attributes:
        squared: Verified upper bound on the square of every norm fed so far; infinite after a
            failure.
        estimate: Largest float estimate of a squared norm (untrusted).

    Guarantee:
        Rigorous, for float64 products that sum in any order (no Strassen, Winograd or emulation).
    """

    def __init__(self) -> None:
        self.squared = 0.0
        self.estimate = 0.0
        self._guess = 0.0

    def feed(self, real: torch.Tensor, imag: torch.Tensor | None = None) -> float:
        """Take in a chunk (B, m, n) of finite float64 matrices, real or in two parts.

        Returns an upper bound on the largest of their squared Frobenius norms.
        """
        if real.shape[-2] > real.shape[-1]:
            real, imag = real.mT, None if imag is None else imag.mT
        parts_real, parts_imag = _products(real, imag)
        gram_real = _gram(parts_real, 1.0)
        gram_imag = None if parts_imag is None else _gram(parts_imag, -1.0)
        m, n = real.shape[-2:]
        kappa, count = (1.0, 1) if imag is None else (next_up(math.sqrt(2.0)), 2)
        gamma = gamma_up(product_depth(count, n))
        squares = largest_square_sum(*(t for t in (real, imag) if t is not None))
        underflow = mul_up(8.0 * m * count * (n + m), UNDERFLOW)
        self._search(gram_real, gram_imag, add_up(mul_up(kappa, mul_up(gamma, squares)), underflow))
        return squares

    def _search(self, real: torch.Tensor, imag: torch.Tensor | None, known: float) -> None:
        """Raise the guess until every member accepts it."""
        m = real.shape[-1]
        widening = 16.0 * m * UNIT_ROUNDOFF
        guess, diagonal = self._guess, real.diagonal(dim1=-2, dim2=-1).clone()
        members, top, solved = 0, 0.0, False
        for _ in range(_ATTEMPTS):
            if guess > 0.0:
                refused = self._attempt(real, imag, diagonal, guess, known)
                self._guess = guess
                if refused is None:
                    return
                if not bool(refused.all()):
                    real, diagonal = real[refused], diagonal[refused]
                    imag = None if imag is None else imag[refused]
            if len(real) != members:
                members, top, solved = len(real), *self._top(real, imag, diagonal)
            elif not solved and m <= _EIGH_FALLBACK:
                # Lanczos can settle below the top and report convergence; the refusal has shown it.
                top, solved = self._top(real, imag, diagonal, solve=True)
            self.estimate = max(self.estimate, top)
            wanted = max(top * (1.0 + widening), _GUESS_FLOOR)
            if not wanted > guess:
                widening *= _WIDEN
                wanted = guess * (1.0 + widening)
            if not wanted < math.inf:
                break
            guess = wanted
        self.squared = math.inf

    def _attempt(
        self,
        real: torch.Tensor,
        imag: torch.Tensor | None,
        diagonal: torch.Tensor,
        guess: float,
        known: float,
    ) -> torch.Tensor | None:
        """Factorise guess * I - G; account for what succeeds, return a mask of the rest or None."""
        shifted = -real
        shifted.diagonal(dim1=-2, dim2=-1).copy_(guess - diagonal)
        other = None if imag is None else -imag
        factor, info = torch.linalg.cholesky_ex(
            shifted if other is None else torch.complex(shifted, other)
        )
        refused = info != 0
        if bool(refused.all()):
            return refused
        if bool(refused.any()):
            accepted = ~refused
            shifted, factor = shifted[accepted], factor[accepted]
            other = None if other is None else other[accepted]
        excess = self._excess(shifted, other, factor.tril())
        if not excess <= _ACCEPT * guess:
            return torch.ones_like(refused)
        self.squared = max(self.squared, sum_up((guess, excess, known)))
        return refused if bool(refused.any()) else None

    @staticmethod
    def _excess(shifted: torch.Tensor, other: torch.Tensor | None, factor: torch.Tensor) -> float:
        """Terms 1 and 3 to 5 of the inequality, largest over the batch; infinite if not finite."""
        batch, m, _ = shifted.shape
        lr, li = (
            (factor, None)
            if other is None
            else (factor.real.contiguous(), factor.imag.contiguous())
        )
        parts_real, parts_imag = _products(lr, li)
        sums = shifted.new_zeros(batch)
        for start in range(0, m, BLOCK):
            stop = min(start + BLOCK, m)
            for target, parts in ((shifted, parts_real), (other, parts_imag)):
                if target is None or parts is None:
                    continue
                rest = block_row(parts, start, stop, stop).sub_(target[:, start:stop, :stop])
                squares = rest.square_().sum(-2)
                sums = sums + (2.0 * squares[:, :start].sum(-1) + squares[:, start:].sum(-1))
        largest = _largest(sums)
        if not math.isfinite(largest):
            return math.inf
        # Roundings on the way of one square: itself, two-level sums, then one addition per block
        # and part.
        depth = 2 + BLOCK + m + 2 * math.ceil(m / BLOCK)
        residual = sqrt_up(inflate(largest, depth, 2 * m * m))
        kappa, count = (1.0, 1) if other is None else (next_up(math.sqrt(2.0)), 2)
        gamma = gamma_up(product_depth(count, m))
        return sum_up(
            (
                mul_up(1.0 + 2.0 * UNIT_ROUNDOFF, residual),
                mul_up(UNIT_ROUNDOFF, float(shifted.diagonal(dim1=-2, dim2=-1).abs().max())),
                mul_up(
                    kappa,
                    mul_up(gamma, largest_square_sum(*(t for t in (lr, li) if t is not None))),
                ),
            )
        )

    @staticmethod
    def _top(
        real: torch.Tensor,
        imag: torch.Tensor | None,
        diagonal: torch.Tensor,
        *,
        solve: bool = False,
    ) -> tuple[float, bool]:
        """Guess the largest eigenvalue in a batch: rank members roughly, then refine the winner.

        Returns the guess and whether a full eigensolver made it, which ``solve`` insists on.
        """
        gram = real if imag is None else torch.complex(real, imag)
        batch, m, _ = gram.shape
        if batch > 1 and m > 1:
            rough, _ = top_eigenvalue(
                lambda v: (gram @ v.unsqueeze(2)).squeeze(2),
                batch,
                m,
                dtype=gram.dtype,
                device=gram.device,
                steps=_ROUGH_STEPS,
            )
            winner = int(rough.argmax())
        else:
            winner = int(diagonal.amax(-1).argmax())
        gram = gram[winner]
        if m > _EIGH_LIMIT and not solve:
            theta, error = top_eigenvalue(
                lambda v: v @ gram.mT, 1, m, dtype=gram.dtype, device=gram.device
            )
            if m > _EIGH_FALLBACK or bool(error <= _CONVERGED * theta):
                return float(theta + error), False
        return float(torch.linalg.eigvalsh(gram)[-1]), True


def chunk_size(m: int, n: int) -> int:
    """Members of a batch to feed at once so that intermediates stay near ``CHUNK_ENTRIES``."""
    small = min(m, n)
    return max(1, CHUNK_ENTRIES // max(1, small * (small + max(m, n))))


__all__ = ["BLOCK", "CHUNK_ENTRIES", "ResidualSweep", "block_row", "chunk_size", "product_depth"]
