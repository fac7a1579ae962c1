# SPDX-License-Identifier: MIT
"""What attacks found: the closest change of class per input, beside the certified radii."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from lmtfast.errors import ArgumentError, ViolationError
from lmtfast.files import write_atomically

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class AttackRow:
    """What one attack did.

    Attributes:
        name, library, settings: Which attack it was.
        inputs: How many inputs it attacked.
        changed: Inputs for which it found a point proved to be of another class.
        closest: Inputs whose closest point, after the polish, started from it.
        median: Median L2 distance of its own points, before the polish, over ``changed``.
        seconds: Time it took, the polish of its points included.
    """

    name: str
    library: str
    settings: str
    inputs: int
    changed: int
    closest: int
    median: float
    seconds: float


@dataclass(frozen=True)
class Violation:
    """A point inside a certified radius that is proved to be of another class.

    Attributes:
        index: Which input.
        attack: The attack it started from.
        distance: L2 distance to the input, rounded; the verdict used the exact one.
        radius: The certified radius.
        prediction, rival: The certified class, and one with a logit at least as large.
        point: The point itself, float64.
    """

    index: int
    attack: str
    distance: float
    radius: float
    prediction: int
    rival: int
    point: np.ndarray = field(repr=False)


@dataclass(frozen=True, eq=False)
class AttackReport:
    """The attacks on one certificate.

    Attributes:
        radius: Certified radii of the predictions, ``(N,)`` float64.
        distance: L2 distance of the closest point proved to be of another class, ``(N,)`` float64;
            infinity where none was found.
        found_by: Name of the attack behind ``distance``, or an empty string, length N.
        correct: Whether the prediction is right, ``(N,)`` bool, or None without labels.
        rows: One per attack, in the order they ran.
        skipped: ``(name, reason)`` of attacks that did not run.
        violations: Proved contradictions of the certificate.
        undecided: Inputs with a point inside the radius whose class the enclosure cannot decide.
        unattacked: Inputs whose own class the enclosure cannot prove; nothing starts from them.
        box: Smallest and largest value the attacks used; wider than the input range.
        seed: Seed of every attack.

    Guarantee:
        Every violation is one, under assumptions A1 to A5. No violation is no proof: attacks only
        bound the true distance from above.

    Source:
        Athalye, Carlini, Wagner (2018), arXiv:1802.00420, on attacks as upper bounds.

    Example:
        >>> lf.attack(model, certificate, (x, y)).check()  # doctest: +SKIP
    """

    radius: np.ndarray = field(repr=False)
    distance: np.ndarray = field(repr=False)
    found_by: tuple[str, ...] = field(repr=False)
    correct: np.ndarray | None = field(repr=False)
    rows: tuple[AttackRow, ...]
    skipped: tuple[tuple[str, str], ...]
    violations: tuple[Violation, ...]
    undecided: tuple[int, ...]
    unattacked: tuple[int, ...]
    box: tuple[float, float]
    seed: int

    @property
    def gap(self) -> np.ndarray:
        """Certified radius over attacked distance, of every input that has both; at most 1 unless
        the certificate is wrong, and 1 where the certificate is tight."""
        both = (self.radius > 0) & np.isfinite(self.radius) & np.isfinite(self.distance)
        both &= self.distance > 0
        return self.radius[both] / self.distance[both]

    def gap_quantiles(self, shares: Sequence[float] = QUANTILES) -> dict[float, float]:
        """Quantiles of :attr:`gap`; NaN if no input has one."""
        gap = self.gap
        values = np.quantile(gap, shares) if len(gap) else np.full(len(shares), np.nan)
        return dict(zip(shares, values.tolist(), strict=True))

    def attacked_accuracy(self, eps: float) -> float:
        """Share of inputs classified correctly for which no change of class was found within
        ``eps``: at least the certified accuracy there, and at least the true robust accuracy.

        Args:
            eps: Radius in units of the inputs, at least 0.
        """
        if not eps >= 0:
            raise ArgumentError(
                "a radius of at least 0", repr(eps), "attacked_accuracy(eps)",
                "pass an L2 radius in input units",
            )  # fmt: skip
        right = self._labelled("attacked_accuracy")
        return float(np.mean(right & (self.distance > eps))) if len(right) else float("nan")

    def curve(self) -> tuple[np.ndarray, np.ndarray]:
        """Attacked accuracy as a step function: ``accuracy[i]`` holds on
        ``[radii[i], radii[i + 1])``, the first radius is 0."""
        right = self._labelled("curve")
        found = self.distance[right & np.isfinite(self.distance)]
        values, counts = np.unique(found, return_counts=True)
        left = right.sum() - np.cumsum(counts)
        accuracy = np.concatenate(([right.sum()], left)) / max(len(right), 1)
        return np.concatenate(([0.0], values)), accuracy

    def check(self) -> None:
        """Raise if an attack landed inside a certified radius.

        Raises:
            ViolationError: One did; the message names the first.
        """
        if not self.violations:
            return
        first = self.violations[0]
        raise ViolationError(
            "no change of class within any certified radius",
            f"{len(self.violations)} inside, proved; input {first.index}: class {first.rival} in "
            f"place of {first.prediction} at distance {first.distance!r}, certified "
            f"{first.radius!r}",
            f"attack {first.attack}",
            "do not use this certificate; report the network and the points (save_violations)",
        )

    def _labelled(self, where: str) -> np.ndarray:
        if self.correct is None:
            raise ArgumentError(
                "a certificate with labels", "one without", f"AttackReport.{where}",
                "certify (x, y) instead of x",
            )  # fmt: skip
        return self.correct

    def to_csv(self, path: str | os.PathLike[str]) -> Path:
        """Write one line per input: radius, distance, their ratio, the attack behind it."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["input", "correct", "certified", "attacked", "certified/attacked", "by"])
        broken = {v.index for v in self.violations}
        for i, (r, d, by) in enumerate(
            zip(self.radius.tolist(), self.distance.tolist(), self.found_by, strict=True)
        ):
            right = "" if self.correct is None else int(self.correct[i])
            ratio = f"{r / d:.6g}" if 0 < d < float("inf") and r < float("inf") else ""
            note = f"{by}, VIOLATION" if i in broken else by
            writer.writerow([i, right, repr(r), repr(d), ratio, note])
        return write_atomically(Path(path), text.getvalue().encode())

    def save_violations(self, path: str | os.PathLike[str]) -> Path:
        """Write the points of all violations and what they contradict as a ``.npz`` file."""
        some = self.violations
        columns: Mapping[str, np.ndarray] = {
            "index": np.array([v.index for v in some], dtype=np.int64),
            "radius": np.array([v.radius for v in some], dtype=np.float64),
            "distance": np.array([v.distance for v in some], dtype=np.float64),
            "prediction": np.array([v.prediction for v in some], dtype=np.int64),
            "rival": np.array([v.rival for v in some], dtype=np.int64),
            "point": np.array([v.point for v in some], dtype=np.float64),
        }
        content = io.BytesIO()
        np.savez(content, **columns)  # type: ignore[arg-type]
        return write_atomically(Path(path), content.getvalue())
