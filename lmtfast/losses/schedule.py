# SPDX-License-Identifier: MIT
"""How eps (the papers' c) grows over training: frozen callables from a fractional epoch to a value.

Call with the fractional epoch of the step, ``epoch + step / steps_per_epoch``. Every schedule holds
its exact last value once its epochs are over.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields

from lmtfast.errors import ArgumentError


@dataclass(frozen=True)
class Schedule(ABC):
    """Base of the family: every field is a finite, non-negative number.

    Guarantee:
        None: part of the training recipe.
    """

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not (isinstance(value, (int, float)) and math.isfinite(value) and value >= 0):
                raise ArgumentError(
                    "a finite number >= 0",
                    repr(value),
                    f"{type(self).__name__}({field.name}=)",
                    "give every value of a schedule as a plain non-negative number.",
                )

    @abstractmethod
    def __call__(self, epoch: float) -> float:
        """Value at a fractional epoch, 0 at the start of training."""


@dataclass(frozen=True)
class ConstantSchedule(Schedule):
    """The same value throughout.

    Example:
        >>> ConstantSchedule(1.0)(7.5)
        1.0
    """

    value: float

    def __call__(self, epoch: float) -> float:
        return self.value


@dataclass(frozen=True)
class LinearSchedule(Schedule):
    """``start + (end - start) * epoch / epochs``, then exactly ``end``.

    The warm-up of Lipschitz-margin training (1e-5 to 1e-2 over 5 epochs on SVHN). The authors' code
    freezes c at its last value inside the ramp instead (0.00999958 in that run); this one ends at
    ``end``.

    Source:
        Tsuzuku, Sato, Sugiyama 2018, arXiv:1802.04034, authors' code (GoyalSchedule).

    Example:
        >>> schedule = LinearSchedule(1e-5, 1e-2, epochs=5)
        >>> round(schedule(1), 6), schedule(5)
        (0.002008, 0.01)
    """

    start: float
    end: float
    epochs: float

    def __call__(self, epoch: float) -> float:
        if epoch >= self.epochs:
            return self.end
        share = epoch / self.epochs
        return self.end * share + self.start * (1.0 - share)


@dataclass(frozen=True)
class LogSchedule(Schedule):
    """Logarithm of a linear ramp from ``exp(start)`` to ``exp(end)``.

    The shape gloro's schedule strings call ``log``: concave, so nearly linear for values well below
    1 and steeper at first for larger ones. ``[0.01]-log-[50%:1.1]`` with base eps over E epochs is
    ``LogSchedule(0.01 * eps, 1.1 * eps, E / 2)``. Here the value follows the fractional epoch;
    gloro tabulates whole epochs and interpolates between the previous and the current one, an epoch
    late.

    Source:
        gloro 1.1, gloro/training/schedules.py.

    Example:
        >>> round(LogSchedule(0.0, 1.0, epochs=10)(5), 6)
        0.620115
    """

    start: float
    end: float
    epochs: float

    def __call__(self, epoch: float) -> float:
        if epoch >= self.epochs:
            return self.end
        if epoch <= 0:
            return self.start
        # Log-sum-exp about the larger term: exp(end) overflows for budgets in 0..255 units.
        share = epoch / self.epochs
        falling, rising = self.start + math.log1p(-share), self.end + math.log(share)
        high, low = max(falling, rising), min(falling, rising)
        return high + math.log1p(math.exp(low - high))


@dataclass(frozen=True)
class RampSchedule(Schedule):
    """``eps`` times a factor rising linearly over the first half of ``epochs``, then constant.

    Training ends at a budget above the one certified: 3 for CIFAR, 2 for ImageNet.

    Source:
        LiResNet, train.py (``eps_fn``; there evaluated once per epoch, here at the fractional
        epoch).

    Example:
        >>> ramp = RampSchedule(eps=0.5, epochs=100)
        >>> ramp(0), ramp(50), ramp(99)
        (0.05, 1.5, 1.5)
    """

    eps: float
    epochs: float
    min_ratio: float = 0.1
    max_ratio: float = 3.0

    def __call__(self, epoch: float) -> float:
        if 2 * epoch >= self.epochs:
            return self.eps * self.max_ratio
        share = 2 * epoch / self.epochs
        return self.eps * (self.min_ratio + (self.max_ratio - self.min_ratio) * share)
