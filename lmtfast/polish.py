# SPDX-License-Identifier: MIT
"""Boundary polish: from a point of another class to a closer one, at last by single floats."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lmtfast.judgement import CHANGED, UNDECIDED, Verdicts, along, lengths

# Relative width at which a bracket that cannot touch a radius is narrow enough.
COARSE = 2.0**-20
# The same where classes are read off float32 logits, and how far beyond it their noise may reach.
GLANCED = 2.0**-16
NOISE = 2.0**-14
# Float lengths err by less than this; a bracket this close to the radius is searched to its end.
LENGTH_SLACK = 2.0**-30
MAX_STEPS = 200
# A direction is worth following if the boundary lies at least this much closer along it.
GAIN = 2.0**-12
# Coordinates tried one float at a time, those with the largest perturbation.
FLIPPED = 2048

# Classes at points: a judge's proofs, or a glance at float32 logits.
Look = Callable[[Tensor, Tensor], Verdicts]
Gradient = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Bracket:
    """Segments from inputs to points of another class, shortened.

    Attributes:
        points: Points whose class is proved to differ, ``(N, ...)`` float64.
        last: The closest points beyond them that are not proved to differ; the inputs where none
            was met.
        open: Whether the enclosure can prove nothing of ``last``, ``(N,)`` bool.
    """

    points: Tensor
    last: Tensor
    open: Tensor


def shorten(
    look: Look,
    x: Tensor,
    far: Tensor,
    classes: Tensor,
    radius: Tensor,
    *,
    width: float = COARSE,
) -> Bracket:
    """Bisect every segment from ``x`` to ``far`` for a change of class.

    A bracket ends at relative width ``width`` once no point left in it can decide whether a radius
    is broken: it lies wholly outside, or its far end inside. Otherwise it ends at neighbouring
    floats.

    Args:
        look: Decides classes.
        x: Inputs ``(N, ...)`` float64 of class ``classes``.
        far: Points ``(N, ...)`` float64 of another class, as ``look`` sees them.
        classes: ``(N,)`` int64.
        radius: Certified radii ``(N,)`` float64, infinite ones included.
        width: Of brackets that touch no radius.
    """
    n = len(x)
    direction, length = far - x, lengths(far - x)
    low, high = torch.zeros(n).double(), torch.ones(n).double()
    at_low, at_high = look(x, classes).lead, look(far, classes).lead
    best, last = far.clone(), x.clone()
    unknown = torch.zeros(n, dtype=torch.bool)
    done = length == 0
    for step in range(MAX_STEPS):
        touching = (low * length <= radius * (1 + LENGTH_SLACK)) & (
            high * length > radius * (1 - LENGTH_SLACK)
        )
        active = torch.nonzero(~done & ((high - low > width * high) | touching))[:, 0]
        if len(active) == 0:
            break
        s = _guess(step, low[active], high[active], at_low[active], at_high[active], width)
        middle = along(x[active], direction[active], s)
        ends = [(middle == e[active]).flatten(1).all(1) for e in (best, last)]
        stuck = ends[0] | ends[1] | (s <= low[active]) | (s >= high[active])
        # A secant guess may be stuck where bisection is not.
        done[active[stuck]] = step % 3 == 2
        active, s, middle = active[~stuck], s[~stuck], middle[~stuck]
        verdict = look(middle, classes[active])
        won, lost = active[verdict.changed], active[~verdict.changed]
        high[won], at_high[won] = s[verdict.changed], verdict.lead[verdict.changed]
        best[won] = middle[verdict.changed]
        low[lost], at_low[lost] = s[~verdict.changed], verdict.lead[~verdict.changed]
        last[lost] = middle[~verdict.changed]
        unknown[lost] = verdict.status[~verdict.changed] == UNDECIDED
    return Bracket(best, last, unknown)


def _guess(
    step: int, low: Tensor, high: Tensor, at_low: Tensor, at_high: Tensor, width: float
) -> Tensor:
    """Two guesses around the secant's root, then the middle: a straight bracket closes at once."""
    middle = low + (high - low) / 2
    if step % 3 == 2:
        return middle
    rise = at_high - at_low
    root = low + (high - low) * (-at_low / rise)
    shift = width * high / 4
    guess = root + shift if step % 3 == 0 else root - shift
    usable = rise.isfinite() & (rise > 0) & (guess > low) & (guess < high)
    return torch.where(usable, guess, middle)


def polish(
    judge: Look,
    glance: Look,
    gradient: Gradient,
    x: Tensor,
    far: Tensor,
    classes: Tensor,
    radius: Tensor,
    *,
    rounds: int,
) -> Bracket:
    """Bring points of another class closer to their inputs.

    By float32 logits: bisection along the given direction; then, ``rounds`` times, the direction of
    the boundary's normal where it was met, and the mean of both, if the boundary is closer there.
    By proofs: the points that come out, moved away by the noise of float32; where they are not of
    another class, the ones given. Only points that may lie inside a radius are bisected on, to
    neighbouring floats, and at last moved in single coordinates.

    Args:
        judge: Proves classes.
        glance: Reads them off float32 logits.
        gradient: Of logit ``rivals`` minus logit ``classes`` at ``points``:
            ``gradient(points, classes, rivals)``, ``(N, ...)``. It only steers.
        x, classes, radius: As for :func:`shorten`.
        far: Points ``(N, ...)`` float64 that ``judge`` proves to be of another class.
        rounds: Changes of direction.

    Guarantee:
        Every point returned is proved to be of another class, and none is farther away than it was.
    """
    nowhere = torch.zeros(len(x)).double()
    points = far.clone()
    moving = torch.nonzero(glance(far, classes).changed)[:, 0]
    trial = far[moving]
    for turn in range(rounds + 1):
        base, own = x[moving], classes[moving]
        here = shorten(glance, base, trial, own, nowhere[moving], width=GLANCED).points
        points[moving] = here
        if turn < rounds:
            good, trial = _turned(glance, gradient, base, here, own)
            moving = moving[good]
    points = along(x, points - x, nowhere + 1 + NOISE)
    proved = judge(points, classes).changed & (lengths(points - x) < lengths(far - x))
    points[~proved] = far[~proved]
    last, unknown = x.clone(), torch.zeros(len(x), dtype=torch.bool)
    near = torch.nonzero(lengths(points - x) * (1 - 4 * NOISE) <= radius)[:, 0]
    if len(near):
        found = shorten(judge, x[near], points[near], classes[near], radius[near])
        points[near], last[near], unknown[near] = found.points, found.last, found.open
    distance = lengths(points - x)
    edge = (distance > radius * (1 - LENGTH_SLACK)) & (distance <= radius * (1 + LENGTH_SLACK))
    for i in torch.nonzero(edge)[:, 0].tolist():
        points[i] = _flipped(judge, x[i], points[i], classes[i])
    return Bracket(points, last, unknown)


def _turned(
    glance: Look, gradient: Gradient, x: Tensor, here: Tensor, own: Tensor
) -> tuple[Tensor, Tensor]:
    """Which boundary points have a closer one in another direction, and points beyond those."""
    offset = here - x
    size = lengths(offset)
    normal = _unit(gradient(here, own, glance(here, own).rival).double().cpu())
    reach = size * (1 - GAIN)
    trial = along(x, normal, reach)
    good = glance(trial, own).changed & (size > 0)
    mixed = along(x, _unit(normal + _unit(offset)), reach)
    retry = torch.nonzero(~good & (size > 0))[:, 0]
    better = retry[glance(mixed[retry], own[retry]).changed]
    trial[better], good[better] = mixed[better], True
    return good, trial[good]


def _unit(d: Tensor) -> Tensor:
    size = lengths(d)
    factor = torch.where((size > 0) & size.isfinite(), 1 / size, 0.0)
    return along(torch.zeros_like(d), d.nan_to_num(), factor)


def _flipped(judge: Look, x: Tensor, point: Tensor, own: Tensor) -> Tensor:
    """Move coordinates by one float towards the input while the class stays changed."""
    flat = point.reshape(-1)
    step = torch.nextafter(flat, x.reshape(-1))
    order = torch.argsort((flat - x.reshape(-1)).abs(), descending=True)[:FLIPPED]
    order = order[step[order] != flat[order]]
    trials = flat.repeat(len(order), 1)
    trials[torch.arange(len(order)), order] = step[order]
    free = order[judge(trials.reshape(-1, *point.shape), own.repeat(len(order))).status == CHANGED]
    while len(free):
        trial = flat.clone()
        trial[free] = step[free]
        if bool(judge(trial.reshape(1, *point.shape), own.reshape(1)).changed[0]):
            return trial.reshape(point.shape)
        free = free[: len(free) // 2]
    return point
