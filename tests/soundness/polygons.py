# SPDX-License-Identifier: MIT
"""Exact slopes and radii of ReLU networks on the plane: their linear pieces, cut in rationals.

Every hidden unit cuts the convex polygons of the layers before it along a line; on each piece that
is left the network is one affine map. Imports nothing from the library.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from torch import Tensor, nn

Row = list[Fraction]
Point = tuple[Fraction, Fraction]


def exact_rows(tensor: Tensor) -> list[Row]:
    return [[Fraction(v) for v in row] for row in tensor.detach().double().tolist()]


def exact_logits(model: nn.Sequential, x: Sequence[float | Fraction]) -> Row:
    """Output of linear layers, ReLUs and flattening, in rationals."""
    values = [Fraction(v) for v in x]
    for layer in model:
        if isinstance(layer, nn.ReLU):
            values = [max(v, Fraction(0)) for v in values]
        elif isinstance(layer, (nn.Linear, nn.Conv1d)):
            # A convolution here is as long as its only channel.
            rows = exact_rows(layer.weight.flatten(1))
            assert all(len(row) == len(values) for row in rows)
            bias = [0.0] * len(rows) if layer.bias is None else layer.bias.tolist()
            values = [
                sum((a * v for a, v in zip(row, values, strict=True)), Fraction(b))
                for row, b in zip(rows, bias, strict=True)
            ]
        else:
            assert isinstance(layer, nn.Flatten)
    return values


@dataclass(frozen=True)
class Piece:
    """A convex polygon and the affine map on it: rows ``(a, b, c)`` for ``a x + b y + c``."""

    corners: tuple[Point, ...]
    rows: tuple[tuple[Fraction, Fraction, Fraction], ...]

    def slope_exceeds(self, bound: float) -> bool:
        """Whether the norm of the map's matrix is above ``bound``, exactly."""
        aa = sum(a * a for a, _, _ in self.rows)
        bb = sum(b * b for _, b, _ in self.rows)
        ab = sum(a * b for a, b, _ in self.rows)
        rest = Fraction(bound) ** 2
        return rest < max(aa, bb) or (rest - aa) * (rest - bb) < ab * ab


def value(row: Sequence[Fraction], p: Point) -> Fraction:
    return row[0] * p[0] + row[1] * p[1] + row[2]


def clip(corners: Sequence[Point], row: Sequence[Fraction]) -> list[Point]:
    """The part of a convex polygon where ``row`` is at least zero."""
    found: list[Point] = []
    for p, q in zip(corners, [*corners[1:], *corners[:1]], strict=True):
        at_p, at_q = value(row, p), value(row, q)
        if at_p >= 0:
            found.append(p)
        if (at_p < 0 < at_q) or (at_q < 0 < at_p):
            t = at_p / (at_p - at_q)
            found.append((p[0] + t * (q[0] - p[0]), p[1] + t * (q[1] - p[1])))
    return found


def area(corners: Sequence[Point]) -> Fraction:
    """Twice the area."""
    pairs = zip(corners, [*corners[1:], *corners[:1]], strict=True)
    return abs(sum((p[0] * q[1] - p[1] * q[0] for p, q in pairs), Fraction(0)))


def pieces(model: nn.Sequential, low: int = -4, high: int = 5) -> list[Piece]:
    """All linear pieces of a network of linear layers and ReLUs that meet the square with area."""
    a, b = Fraction(low), Fraction(high)
    one, none = Fraction(1), Fraction(0)
    found = [Piece(((a, a), (b, a), (b, b), (a, b)), ((one, none, none), (none, one, none)))]
    for layer in model:
        if isinstance(layer, nn.Linear):
            found = [Piece(p.corners, _mapped(layer, p.rows)) for p in found]
        else:
            assert isinstance(layer, nn.ReLU)
            found = [part for p in found for part in _rectified(p)]
    return found


def _mapped(
    layer: nn.Linear, rows: Sequence[tuple[Fraction, Fraction, Fraction]]
) -> tuple[tuple[Fraction, Fraction, Fraction], ...]:
    bias = [0.0] * layer.out_features if layer.bias is None else layer.bias.tolist()
    mapped = []
    for weights, b in zip(exact_rows(layer.weight), bias, strict=True):
        sums = [sum((w * r[i] for w, r in zip(weights, rows, strict=True)), Fraction(0))
                for i in range(3)]  # fmt: skip
        mapped.append((sums[0], sums[1], sums[2] + Fraction(b)))
    return tuple(mapped)


def _rectified(piece: Piece) -> list[Piece]:
    parts = [(piece.corners, ())]
    zero = (Fraction(0),) * 3
    for row in piece.rows:
        cut = []
        for corners, kept in parts:
            for side, stays in ((row, row), (tuple(-v for v in row), zero)):
                inside = clip(corners, side)
                if len(inside) > 2 and area(inside) > 0:
                    cut.append((tuple(inside), (*kept, stays)))
                if all(value(row, p) == 0 for p in corners):
                    break  # the unit is zero here: both sides are the whole piece
        parts = cut
    return [Piece(corners, rows) for corners, rows in parts]


def square_distance(x: Point, corners: Sequence[Point]) -> Fraction:
    """From a point to a convex polygon that does not hold it, or holds it on its border."""
    best = None
    for p, q in zip(corners, [*corners[1:], *corners[:1]], strict=True):
        dx, dy = q[0] - p[0], q[1] - p[1]
        length = dx * dx + dy * dy
        t = Fraction(0)
        if length:
            t = ((x[0] - p[0]) * dx + (x[1] - p[1]) * dy) / length
            t = min(max(t, Fraction(0)), Fraction(1))
        near = (p[0] + t * dx - x[0]) ** 2 + (p[1] + t * dy - x[1]) ** 2
        best = near if best is None else min(best, near)
    assert best is not None
    return best


def exact_radius(found: Sequence[Piece], x: Point, logits: Row) -> tuple[int, Fraction | None]:
    """Class at ``x`` and squared distance to where another class is at least as large.

    None where that is nowhere inside the square that was cut; zero for a tie at ``x``.
    """
    best = max(range(len(logits)), key=lambda k: logits[k])
    squares = [Fraction(0)] if logits.count(logits[best]) > 1 else []
    for piece in found:
        for j, row in enumerate(piece.rows):
            if j == best:
                continue
            rival = tuple(r - own for r, own in zip(row, piece.rows[best], strict=True))
            lost = clip(piece.corners, rival)
            if lost:
                squares.append(square_distance(x, lost))
    return best, min(squares, default=None)
