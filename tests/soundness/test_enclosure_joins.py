# SPDX-License-Identifier: MIT
"""Error rules of joins, one call at a time: exact least errors, and bounds hardly above them."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor

from lmtfast.builder import Value
from lmtfast.enclosure.joining import CONCATENATIONS, EXTREMA, SUMS
from lmtfast.enclosure.registry import Enclosed
from tests.soundness.error_calls import (
    UNIT,
    are_lengths,
    enclosed,
    fractions,
    is_close_above,
    result_of,
)

N = 2
# Far below and far above the rounding of values near 1.
CARRIED = (0.0, 2.0**-300, 2.0**-10, 2.0**60)


def sum_of(target: str, x: Fraction, y: Fraction, alpha: Fraction) -> Fraction:
    if "rsub" in target:
        return y - alpha * x
    return x - alpha * y if "sub" in target else x + alpha * y


def weights_of(target: str, alpha: float) -> tuple[Fraction, Fraction]:
    size = abs(Fraction(alpha))
    return (size, Fraction(1)) if "rsub" in target else (Fraction(1), size)


def addends(kind: str, error: float) -> tuple[Any, Any]:
    """First argument, second argument."""
    a = torch.tensor([[0.1, -3.0, 7e-5], [1.5, 0.0, -0.7]]).double()
    b = torch.tensor([[0.3, 0.9, -0.2], [1.0, 0.5, -0.3]]).double()
    first = enclosed(a, error * torch.rand(N, 3).double(), 0.5)
    second = enclosed(b, error * torch.rand(N, 3).double(), 0.25)
    constants = {"traced": second, "constant": b[0], "number": 0.3, "first constant": second}
    return (a[0] if kind == "first constant" else first), constants[kind]


def plain(item: Any) -> Tensor:
    value = item.value if isinstance(item, Enclosed) else item
    return torch.as_tensor(value, dtype=torch.float64).expand(N, 3)


def local(item: Any) -> Tensor:
    return item.local if isinstance(item, Enclosed) else torch.zeros(N, 3).double()


@pytest.mark.parametrize("alpha", [1.0, 0.3, -0.7, 0.0])
@pytest.mark.parametrize("target", SUMS)
def test_a_sum_carries_both_errors_and_every_rounding(target: str, alpha: float) -> None:
    torch.manual_seed(0)
    tensor = target.endswith("Tensor")
    for kind in ("traced", "constant", "first constant") if tensor else ("number",):
        for error in CARRIED:
            first, second = addends(kind, error)
            found = result_of(target, first, second, alpha=alpha)
            w1, w2 = weights_of(target, alpha)
            rows = zip(
                *map(fractions, (plain(first), plain(second), found.value)),
                *map(fractions, (local(first), local(second))), strict=True,
            )  # fmt: skip
            least, most = [], []
            for x, y, z, d, e in rows:
                moved = w1 * d + w2 * e
                # What any hardware may round: the product, then the sum.
                product = abs(w1 * x) if "rsub" in target else abs(w2 * y)
                rounding = UNIT * (abs(z) + (product if abs(alpha) != 1.0 else 0))
                assert abs(z - sum_of(target, x, y, Fraction(alpha))) <= rounding
                least.append(moved + rounding)
                most.append(moved + 2 * rounding)
            bounds = fractions(found.local)
            assert all(w <= b for w, b in zip(least, bounds, strict=True))
            assert is_close_above(torch.maximum(found.local, ceiling(most)), most)


def ceiling(values: list[Fraction]) -> Tensor:
    """Floats above the values, so that only what lies still higher is noticed."""
    floats = torch.tensor([float(v) for v in values], dtype=torch.float64)
    return torch.nextafter(floats, torch.tensor(1e308).double()).reshape(N, -1)


@pytest.mark.parametrize("target", SUMS)
def test_lengths_of_a_sum_add_up(target: str) -> None:
    alpha = 0.3
    w1, w2 = weights_of(target, alpha)
    x, y = torch.rand(N, 3), torch.rand(N, 3)
    first = enclosed(x, 0.0, 0.7)
    norms = {id(first.traced): 3.0}
    if not target.endswith("Tensor"):
        found = result_of(target, first, 0.5, alpha=alpha, norm=lambda v: norms[id(v)])
        assert is_close_above(found.base, [w1 * Fraction(0.7) * 3] * N)
        return
    second = enclosed(y, 0.0, 0.9)
    norms[id(second.traced)] = 0.1
    parts = (w1 * Fraction(0.7) * 3, w2 * Fraction(0.9) * Fraction(0.1))

    def based(*arguments: Any, output: Value | None = None) -> Tensor:
        return result_of(
            target, *arguments, alpha=alpha, norm=lambda v: norms[id(v)], output=output
        ).base

    assert is_close_above(based(first, second), [sum(parts)] * N)
    assert is_close_above(based(first, y[0].double()), [parts[0]] * N)
    assert is_close_above(based(x[0].double(), second), [parts[1]] * N)
    # One of the two lies over the base of the result: its length is what it was.
    assert is_close_above(
        based(first, second, output=first.traced), [w1 * Fraction(0.7) + parts[1]] * N
    )
    twin = enclosed(y, 0.0, 0.7, first.traced)
    assert torch.equal(based(first, twin, output=first.traced), first.base)


@pytest.mark.parametrize("target", ["aten.add.Tensor", "aten.sub.Tensor", "aten.rsub.Tensor"])
def test_a_repeated_entry_counts_as_often_as_it_is_repeated(target: str) -> None:
    for shapes, copies in (
        (((N, 1), (N, 5)), (5, 1)), (((N, 4, 1), (N, 4, 3)), (3, 1)),
        (((N, 2, 1), (N, 1, 3)), (3, 2)), (((N, 1, 2), (N, 2, 1)), (2, 2)),
    ):  # fmt: skip
        a, b = (enclosed(torch.rand(s), 0.0, c) for s, c in zip(shapes, (0.7, 0.9), strict=True))
        one = result_of(target, a, torch.rand(shapes[1][1:]).double(), norm=lambda v: 3.0)
        assert are_lengths(one.base, [copies[0] * (Fraction(0.7) * 3) ** 2] * N)
        alone = result_of(target, torch.rand(shapes[0][1:]).double(), b, norm=lambda v: 3.0)
        assert are_lengths(alone.base, [copies[1] * (Fraction(0.9) * 3) ** 2] * N)
    a, b = enclosed(torch.rand(N, 4, 1), 0.0, 0.7), enclosed(torch.rand(N, 1, 9), 0.0, 0.9)
    both = result_of(target, a, b, norm=lambda v: 5.0).base
    assert is_close_above(both, [3 * Fraction(0.7) * 5 + 2 * Fraction(0.9) * 5] * N)


@pytest.mark.parametrize("target", CONCATENATIONS)
def test_a_concatenation_keeps_every_error(target: str) -> None:
    a = enclosed(torch.rand(N, 3), torch.rand(N, 3), 0.7)
    b = enclosed(torch.rand(N, 3), torch.rand(N, 3), 0.9)
    c = torch.rand(N, 3).double()
    norms = {id(a.traced): 3.0, id(b.traced): 5.0}
    join = torch.stack if "stack" in target else torch.cat

    def joined(parts: list[Any], output: Value | None = None, plain: bool = False) -> Enclosed:
        return result_of(target, parts, 1, output=output,
                         norm=None if plain else lambda v: norms[id(v)])  # fmt: skip

    for plainly in (True, False):
        found = joined([a, c, b], plain=plainly)
        assert torch.equal(found.value, join([a.value, c, b.value], 1))
        assert torch.equal(found.local, join([a.local, torch.zeros_like(c), b.local], 1))
    lengths = (Fraction(0.7) * 3) ** 2, (Fraction(0.9) * 5) ** 2
    assert are_lengths(joined([a, c, b]).base, [sum(lengths)] * N)
    assert are_lengths(joined([c, b]).base, [lengths[1]] * N)
    assert are_lengths(joined([a, b], a.traced).base, [Fraction(0.7) ** 2 + lengths[1]] * N)
    twin = enclosed(c, 0.0, 0.7, a.traced)
    assert torch.equal(joined([twin, a, c], a.traced).base, a.base)


@pytest.mark.parametrize("target", EXTREMA)
def test_an_extreme_moves_as_its_arguments_do(target: str) -> None:
    extreme = torch.maximum if "max" in target else torch.minimum
    for shapes, copies in ((((N, 3), (N, 3)), (1, 1)), (((N, 2, 1), (N, 1, 3)), (3, 2))):
        a = enclosed(torch.rand(shapes[0]), torch.rand(shapes[0]), 0.7)
        b = enclosed(torch.rand(shapes[1]), torch.rand(shapes[1]), 0.9)
        norms = {id(a.traced): 3.0, id(b.traced): 5.0}
        found = result_of(target, a, b)
        assert torch.equal(found.value, extreme(a.value, b.value))
        assert torch.equal(found.local, torch.maximum(*torch.broadcast_tensors(a.local, b.local)))
        found = result_of(target, a, b, norm=lambda v, norms=norms: norms[id(v)])
        assert not found.local.any()
        assert found.local.shape == found.value.shape
        lengths = [are_moved(a, 3, copies[0]), are_moved(b, 5, copies[1])]
        least = [x + y for x, y in zip(*(low for low, _ in lengths), strict=True)]
        most = [x + y for x, y in zip(*(high for _, high in lengths), strict=True)]
        squares = [f**2 for f in fractions(found.base)]
        assert all(x <= f <= y for x, f, y in zip(least, squares, most, strict=True))
        one = result_of(target, a, torch.rand(shapes[1]).double(), norm=lambda v: 3.0)
        low, high = are_moved(a, 3, copies[0])
        assert all(x <= f**2 <= y for x, f, y in zip(low, fractions(one.base), high, strict=True))


def are_moved(item: Enclosed, norm: int, copies: int) -> tuple[list[Fraction], list[Fraction]]:
    """Squares between which the length of the repeated error of every sample lies."""
    least, most = [], []
    for errors, base in zip(item.local, item.base.tolist(), strict=True):
        square = sum(e**2 for e in fractions(errors))
        root = Fraction(float(square) ** 0.5)
        # (r + c)^2 from below, where r^2 may lie on either side of the square.
        low, high = root * (1 - 4 * UNIT), root * (1 + 4 * UNIT)
        assert low**2 <= square <= high**2
        least.append(copies * (low + Fraction(base) * norm) ** 2)
        most.append(copies * (high * (1 + 1000 * UNIT) + Fraction(base) * norm) ** 2
                    * (1 + 10000 * UNIT))  # fmt: skip
    return least, most


def test_tensors_without_entries_join() -> None:
    nothing = enclosed(torch.zeros(N, 0))
    for target in ("aten.add.Tensor", "aten.maximum.default"):
        for norm in (None, lambda v: 3.0):
            found = result_of(target, nothing, enclosed(torch.zeros(N, 0)), norm=norm)
            assert found.local.shape == (N, 0)
            assert found.base.shape == (N,)


@pytest.mark.parametrize("target", ["aten.add.Tensor", "aten.maximum.default"])
def test_a_constant_has_no_error_of_its_own(target: str) -> None:
    x = enclosed(torch.rand(N, 3), 2.0**-10)
    for pair in ((x, torch.rand(3).double()), (torch.rand(3).double(), x)):
        found = result_of(target, *pair)
        assert bool((found.local <= 2.0**-10 * (1 + 2.0**-30)).all())
        assert torch.equal(found.base, x.base)
