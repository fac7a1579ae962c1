# SPDX-License-Identifier: MIT
"""The result type: a bound on a network's L2 Lipschitz constant with the level of its guarantee."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor

from lmtfast.composing import SQRT2_UP
from lmtfast.errors import ShapeError
from lmtfast.level import Level
from lmtfast.verified.rounding import mul_up, prescale, times_power_of_two

Scalar: TypeAlias = "Tensor | float"


class OperatorNorms(Mapping[str, Tensor]):
    """Spectral norms by operator name; the entries of one tensor, taken when asked for."""

    def __init__(self, index: Mapping[str, int], sigmas: Tensor) -> None:
        self._index, self.sigmas = index, sigmas

    def __getitem__(self, name: str) -> Tensor:
        return self.sigmas[self._index[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._index)

    def __len__(self) -> int:
        return len(self._index)

    def __repr__(self) -> str:
        return f"OperatorNorms({dict(self)})"


@dataclass(frozen=True, eq=False)
class LipschitzBound:
    """A bound on the L2 Lipschitz constant of a network, per sample, in the model's input space.

    Attributes:
        total: Constant from input to logits. 0-dim tensor at ``estimate``, else float.
        features: Constant from input to the head's input (equal to ``total`` without a Linear
            head).
        per_operator: Spectral norm of every linear region, by qualified module name.
        level: ``"estimate"`` (no claim), ``"probabilistic"`` or ``"rigorous"``, a
            :class:`~lmtfast.level.Level`: the weakest of the operators'.
        slack: Largest relative excess of an operator's bound over its Lanczos estimate; NaN where
            unknown, always at ``estimate``.
        method: How the norms were obtained.
        methods: The same per operator.
        head_row_error: Bound on the rounding in each row of ``head_weight``, shape ``(K,)``, or
            None if it is exact.
        norm: ``"l2"``.
        head_weight: Rows of the final Linear with all scales folded in, shape ``(K, D)``, or None.
        classes: Number of logits ``K``, or None if the output is not one vector per sample.

    Guarantee:
        What ``level`` says: ``rigorous`` is at least the true constant of the exact real function
        of the stored parameters, all rounding included; ``probabilistic`` is so except with
        probability ``delta`` over the library's own draw; ``estimate`` may lie on either side.

    Source:
        Tsuzuku, Sato, Sugiyama (2018), arXiv:1802.04034, Prop. 1 and 2.

    Example:
        >>> import torch
        >>> import lmtfast as lf
        >>> bound = lf.certified_bound(torch.nn.Linear(3, 2).eval(), (3,))
        >>> bound.level, tuple(bound.pairs.shape)
        ('rigorous', (2, 2))
    """

    total: Scalar
    features: Scalar
    per_operator: Mapping[str, Scalar]
    level: Level
    slack: float
    method: str
    head_weight: Tensor | None = field(repr=False, default=None)
    classes: int | None = None
    methods: Mapping[str, str] = field(default_factory=dict, repr=False)
    head_row_error: Tensor | None = field(repr=False, default=None)
    norm: str = "l2"

    def __post_init__(self) -> None:
        object.__setattr__(self, "level", Level(self.level))

    @property
    def delta(self) -> float:
        """Probability that the bound is below the truth; 0 at ``rigorous``, 1 at ``estimate``."""
        return self.level.delta

    @property
    def pairs(self) -> Tensor:
        """Constants of the differences ``f_i - f_j``. Shape ``(K, K)``, zero diagonal; lazy."""
        if self.classes is None:
            raise ShapeError(
                "one vector of logits per sample", "an output of another shape",
                "LipschitzBound.pairs", "use total, which bounds outputs of any shape",
            )  # fmt: skip
        device = None if self.head_weight is None else self.head_weight.device
        norms = self.pair_norms(torch.arange(self.classes, device=device))
        scale = self.features if self.head_weight is not None else self.total
        if self.level == "estimate":
            return norms * scale
        rows = [[mul_up(float(scale), float(n)) if n else 0.0 for n in row] for row in norms]
        return torch.tensor(rows, dtype=torch.float64)

    def pair_norms(self, classes: Tensor) -> Tensor:
        """``||w_c - w_j||`` for the classes given; ``sqrt(2)`` off the diagonal without a head.

        Shape ``(U, K)``. Rounded up from exact differences at every level but ``estimate``, where
        it is differentiable in the head's weight.
        """
        if self.head_weight is None:
            assert self.classes is not None
            rival = torch.full((classes.numel(), self.classes), SQRT2_UP, dtype=torch.float64)
            return rival.scatter_(1, classes[:, None], 0.0)
        if self.level == "estimate":
            weight = self.head_weight
            return torch.cdist(weight[classes], weight, compute_mode="donot_use_mm_for_euclid_dist")
        return pair_norms_up(self.head_weight, classes, self.head_row_error)


def pair_norms_up(weight: Tensor, classes: Tensor, row_error: Tensor | None = None) -> Tensor:
    """Upper bounds of ``||w_c - w_j||`` from float64 differences, never from the Gram. Shape ``(U,
    K)``.

    ``row_error`` bounds the length of what rounding did to each row of ``weight``, shape ``(K,)``.
    """
    features = weight.shape[1]
    norms = torch.zeros(classes.numel(), weight.shape[0], dtype=torch.float64)
    # fl(a - b) = (a - b)(1 + d); a square, D sums and a faithful root that counts twice: at most
    # D + 8 roundings of 2^-53 each, doubled to cover the inflation's own.
    growth = 1.0 + (features + 8) * 2.0**-52
    for i, c in enumerate(classes.tolist()):
        difference = weight - weight[c]
        scaled, exponent = prescale(difference)
        length = scaled.square().sum(1).sqrt() * growth
        # Squares below the normal range: each is lost by less than 2^-1022, their root by 2^-480.
        length = torch.where((difference != 0).any(1), length + features * 2.0**-480, length)
        length = times_power_of_two(length, exponent)
        if row_error is not None:
            length = (length + row_error + row_error[c]) * (1.0 + 2.0**-51)
        norms[i] = torch.nextafter(length, torch.full_like(length, math.inf))
        norms[i][length == 0] = 0.0
        norms[i, c] = 0.0
    return norms
