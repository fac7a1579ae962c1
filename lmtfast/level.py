# SPDX-License-Identifier: MIT
"""What a bound claims: nothing, something with a stated probability of failure, or everything."""

from __future__ import annotations

import math
from collections.abc import Iterable
from fractions import Fraction
from typing import Any

from lmtfast.errors import ArgumentError

DELTA = 2.0**-100
DELTAS = {"estimate": 1.0, "probabilistic": DELTA, "rigorous": 0.0}


class Level(str):
    """Strength of a bound: ``"estimate"``, ``"probabilistic"`` or ``"rigorous"``, and its delta.

    A string equal to its name, so that it is compared, hashed, printed and written to JSON as one;
    the names sort from the weakest to the strongest. ``a & b`` is what a bound made of two others
    claims: it is wrong if either is, so the probabilities add up.

    Args:
        name: One of the three names, or a level.
        delta: Probability that the bound is below the truth, in (0, 1); only at
            ``"probabilistic"``, where it is 2^-100 by default. The others have 1 and 0.

    Raises:
        ArgumentError: No such level, or a probability that does not fit it.

    Guarantee:
        ``estimate``: none. ``probabilistic``: for every fixed network the bound is below the truth
        with probability at most ``delta`` over the library's own draw. ``rigorous``: never.

    Source:
        Union bound; soundness requirements of this project.

    Example:
        >>> import lmtfast as lf
        >>> both = lf.Level("probabilistic", 0.25) & lf.Level("probabilistic", 0.5)
        >>> both == "probabilistic", both.delta, (both & "estimate").label
        (True, 0.75, 'estimate')
    """

    _delta: float

    def __new__(cls, name: str, delta: float | None = None) -> Level:
        if isinstance(name, Level) and delta in (None, name.delta):
            return name
        if name not in DELTAS:
            raise ArgumentError(
                f"a level, one of {', '.join(DELTAS)}", repr(name), "level", "pick one"
            )
        value = DELTAS[name] if delta is None else float(delta)
        fits = 0.0 < value < 1.0 if name == "probabilistic" else value == DELTAS[name]
        if not fits:
            raise ArgumentError(
                "a probability in (0, 1) at 'probabilistic', and none elsewhere",
                f"{value!r} at {str(name)!r}", "delta", "leave it out: the default is 2**-100",
            )  # fmt: skip
        level = super().__new__(cls, name)
        object.__setattr__(level, "_delta", value)
        return level

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError("a level cannot change")

    def __reduce__(self) -> tuple[type[Level], tuple[str, float]]:
        return Level, (str(self), self.delta)

    def __and__(self, other: str) -> Level:
        return weakest((self, other))

    @property
    def delta(self) -> float:
        """Probability that the bound is below the truth; 0 at ``rigorous``, 1 at ``estimate``."""
        return self._delta

    @property
    def label(self) -> str:
        """The name, and the probability where it is neither 0 nor 1."""
        return f"{self}({self.delta:.2g})" if 0.0 < self.delta < 1.0 else str(self)


ESTIMATE, RIGOROUS = Level("estimate"), Level("rigorous")


def weakest(levels: Iterable[str]) -> Level:
    """Level of what rests on all of these: probabilities added up and rounded up, at most 1.

    Example:
        >>> weakest([]).label, weakest(["rigorous", Level("probabilistic", 0.5)]).label
        ('rigorous', 'probabilistic(0.5)')
    """
    total = sum((Fraction(Level(level).delta) for level in levels), Fraction(0))
    if total >= 1 or total == 0:
        return ESTIMATE if total else RIGOROUS
    delta = float(total)
    delta = delta if Fraction(delta) >= total else math.nextafter(delta, 1.0)
    return Level("probabilistic", delta) if delta < 1.0 else ESTIMATE
