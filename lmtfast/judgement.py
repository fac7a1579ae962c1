# SPDX-License-Identifier: MIT
"""Judges perturbed inputs: exact distances, and classes proved by the enclosure of the logits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor, nn

from lmtfast.enclosure import LogitEnclosure
from lmtfast.subject import chunk_size
from lmtfast.tracing import trace_model
from lmtfast.weights import named_tensors

# What the enclosure proves of a point.
KEPT, UNDECIDED, CHANGED = 0, 1, 2
SIGNIFICAND = 53


@dataclass(frozen=True)
class Verdicts:
    """Judged points.

    Attributes:
        status: ``KEPT``, ``UNDECIDED`` or ``CHANGED``, ``(N,)`` int64.
        lead: Largest logit of another class minus that of the given one, ``(N,)`` float64; not
            rigorous, it only steers searches.
        rival: The class that lead belongs to, ``(N,)`` int64.
    """

    status: Tensor
    lead: Tensor
    rival: Tensor

    @property
    def changed(self) -> Tensor:
        return self.status == CHANGED


class Judge:
    """Decides whether the exact real function of a model's parameters keeps a class at a point.

    Args:
        model: The certified network, in eval mode.
        input_shape: Shape of one input.
        norms: Upper bounds of the operators' norms, those of the certificate. If they are right the
            verdicts are; if they are wrong the certificate is. Either way a violation refutes it.

    Guarantee:
        ``CHANGED``: some other class has at least the logit of the given one, so the class is not
        kept strictly. ``KEPT``: it is kept strictly. Both under assumptions A1 to A5.

    Example:
        >>> layer = nn.Linear(1, 2, bias=False).eval()
        >>> _ = layer.weight.data.copy_(torch.tensor([[1.0], [-1.0]]))
        >>> judge = Judge(layer, (1,), {})
        >>> points = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
        >>> judge(points, torch.tensor([0, 0])).changed.tolist()
        [False, True]
    """

    def __init__(
        self, model: nn.Module, input_shape: tuple[int, ...], norms: Mapping[str, float]
    ) -> None:
        tensors = {n: t.detach().clone() for n, t in named_tensors(model).items()}
        self.device = next((t.device for t in tensors.values()), torch.device("cpu"))
        with torch.autocast("cpu", enabled=False), torch.autocast(self.device.type, enabled=False):
            traced = trace_model(model, input_shape)
        self._enclosure = LogitEnclosure(model, traced, norms=norms, tensors=tensors)
        self.chunk = chunk_size(traced)

    def __call__(self, points: Tensor, classes: Tensor) -> Verdicts:
        """Judge float64 points ``(N, ...)`` against one class each, ``(N,)``; results on the CPU.

        Where the logits are not finite nothing is known: ``UNDECIDED``.
        """
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        for part, own in zip(points.split(self.chunk), classes.split(self.chunk), strict=True):
            if len(part) == 0:
                continue
            value, error = (t.cpu() for t in self._enclosure(part.to(self.device)))
            found.append(_judged(value, error, own))
        if not found:
            return Verdicts(*(torch.zeros(0, dtype=d) for d in (torch.int64, torch.float64,
                                                                torch.int64)))  # fmt: skip
        return Verdicts(*(torch.cat(column) for column in zip(*found, strict=True)))


def _judged(value: Tensor, error: Tensor, classes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    own = classes[:, None]
    n, count = value.shape
    if count == 1:
        return torch.full((n,), KEPT), torch.full((n,), -math.inf).double(), classes.clone()
    up, down = torch.full((), math.inf).double(), torch.full((), -math.inf).double()
    lowest, highest = torch.nextafter(value - error, down), torch.nextafter(value + error, up)
    others = torch.ones_like(value, dtype=torch.bool).scatter(1, own, False)
    changed = ((lowest >= highest.gather(1, own)) & others).any(1)
    kept = ((lowest.gather(1, own) > highest) | ~others).all(1)
    known = (value.isfinite() & error.isfinite()).all(1)
    status = torch.full((n,), UNDECIDED)
    status[known & kept], status[known & changed] = KEPT, CHANGED
    lead = torch.where(others, value - value.gather(1, own), -math.inf).nan_to_num(
        -math.inf, math.inf, -math.inf
    )
    best = lead.max(1)
    return status, best.values, best.indices


def squared_distance(a: Tensor, b: Tensor) -> Fraction:
    """``||a - b||_2`` squared of two stored tensors, exactly.

    Example:
        >>> squared_distance(torch.tensor([0.5, 1.0]), torch.tensor([0.0, 1.0]))
        Fraction(1, 4)
    """
    fractions, exponents = np.frexp(
        torch.stack([t.detach().reshape(-1).double().cpu() for t in (a, b)]).numpy()
    )
    if not np.isfinite(fractions).all():
        raise ValueError("only finite points have a distance")
    # Every float64 is an integer times a power of two.
    integers = np.ldexp(fractions, SIGNIFICAND).astype(np.int64)
    used = exponents[integers != 0]
    lowest = int(used.min()) if used.size else 0
    shifts = np.where(integers != 0, exponents - lowest, 0)
    total = 0
    moved = np.nonzero((integers[0] != integers[1]) | (shifts[0] != shifts[1]))[0]
    for i in moved.tolist():
        first, second = (int(integers[k, i]) << int(shifts[k, i]) for k in (0, 1))
        total += (first - second) ** 2
    return total * Fraction(2) ** (2 * (lowest - SIGNIFICAND))


def inside(a: Tensor, b: Tensor, radius: float) -> bool:
    """Whether ``||a - b||_2 <= radius``, decided in rational numbers.

    Equality counts: a certificate speaks of the closed ball. A radius of 0 claims nothing.
    """
    if not radius > 0.0:
        return False
    return math.isinf(radius) or squared_distance(a, b) <= Fraction(radius) ** 2


def lengths(d: Tensor) -> Tensor:
    """L2 length of every sample, ``(N, ...)`` to ``(N,)``; rounded."""
    return torch.linalg.vector_norm(d.flatten(1), dim=1)


def along(base: Tensor, direction: Tensor, step: Tensor) -> Tensor:
    """``base + step * direction``, one step per sample."""
    return base + step.reshape(-1, *(1,) * (direction.ndim - 1)) * direction
