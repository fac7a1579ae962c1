# SPDX-License-Identifier: MIT
"""Outward arithmetic against exact rationals. Inequalities carry no tolerance."""

from __future__ import annotations

import ctypes
import math
import platform
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmtfast.errors import DtypeError, NonFiniteError, NotCertifiedError
from lmtfast.verified import rounding
from lmtfast.verified.rounding import next_down, next_up
from tests.oracles import exact_sum_of_squares

finite = st.floats(allow_nan=False, allow_infinity=False)
nonnegative = st.floats(min_value=0.0, allow_nan=False, allow_infinity=False)
many = settings(max_examples=400, deadline=None)

OPERATIONS = {
    "add": (rounding.add_up, rounding.add_down, lambda a, b: a + b),
    "sub": (rounding.sub_up, rounding.sub_down, lambda a, b: a - b),
    "mul": (rounding.mul_up, rounding.mul_down, lambda a, b: a * b),
    "div": (rounding.div_up, rounding.div_down, lambda a, b: a / b),
}


def assert_tight_above(result: float, exact: Fraction) -> None:
    """``result`` is the smallest float (or infinity) at or above ``exact``."""
    assert not math.isnan(result)
    assert math.copysign(1.0, result) > 0 or result != 0
    if result != math.inf:
        assert Fraction(result) >= exact
    below = next_down(result)
    assert below == -math.inf or Fraction(below) < exact


@pytest.mark.parametrize("name", OPERATIONS)
@many
@given(a=finite, b=finite)
def test_binary_operations_round_outward_and_tightly(name: str, a: float, b: float) -> None:
    up, down, exact = OPERATIONS[name]
    if name == "div" and b == 0:
        return
    value = exact(Fraction(a), Fraction(b))
    assert_tight_above(up(a, b), value)
    assert_tight_above(-down(a, b) + 0.0, -value)


@many
@given(x=nonnegative)
def test_square_roots(x: float) -> None:
    up, down = rounding.sqrt_up(x), rounding.sqrt_down(x)
    assert Fraction(up) ** 2 >= Fraction(x) >= Fraction(down) ** 2
    assert up <= next_up(down)
    assert math.copysign(1.0, down) > 0


@many
@given(values=st.lists(finite, max_size=5))
def test_hypot(values: list[float]) -> None:
    exact = sum((Fraction(v) ** 2 for v in values), Fraction(0))
    up, down = rounding.hypot_up(*values), rounding.hypot_down(*values)
    assert up == math.inf or Fraction(up) ** 2 >= exact
    assert Fraction(down) ** 2 <= exact
    assert up <= next_up(down)


@many
@given(values=st.lists(finite, max_size=30))
def test_sums(values: list[float]) -> None:
    exact = sum(map(Fraction, values), Fraction(0))
    assert_tight_above(rounding.sum_up(values), exact)
    assert_tight_above(-rounding.sum_down(values) + 0.0, -exact)


def test_random_chains_stay_above() -> None:
    rng = np.random.default_rng(1)
    for _ in range(2000):
        value, exact = 1.0, Fraction(1)
        for _ in range(6):
            factor = float(rng.standard_normal() ** 2 * 2.0 ** rng.integers(-160, 160))
            if rng.random() < 0.5:
                value, exact = rounding.mul_up(value, factor), exact * Fraction(factor)
            else:
                value, exact = rounding.add_up(value, factor), exact + Fraction(factor)
        assert value == math.inf or Fraction(value) >= exact


@many
@given(x=finite, exponent=st.integers(-2200, 2200))
def test_power_of_two_scaling(x: float, exponent: int) -> None:
    assert_tight_above(rounding.scale_up(x, exponent), Fraction(x) * Fraction(2) ** exponent)


@pytest.mark.parametrize("n", [0, 1, 2, 100, 4608, 10**9, 2**52, 2**53 - 1])
def test_gamma(n: int) -> None:
    u = Fraction(1, 2**53)
    assert Fraction(rounding.gamma_up(n)) >= n * u / (1 - n * u)


def test_gamma_without_a_bound_is_infinite() -> None:
    assert rounding.gamma_up(2**53) == math.inf
    assert rounding.inflate(1.0, 2**53, 1) == math.inf
    assert rounding.inflate(1.0, 2**52, 1) == math.inf


def test_infinite_operands_are_unknown_bounds() -> None:
    inf = math.inf
    assert rounding.mul_up(0.0, inf) == 0.0
    assert rounding.mul_up(2.0, inf) == inf
    assert rounding.add_up(inf, -3.0) == inf
    assert rounding.sum_up([1.0, inf, inf]) == inf
    assert rounding.div_down(1.0, inf) == 0.0
    assert rounding.div_up(1.0, inf) == 5e-324
    assert rounding.div_up(0.0, inf) == 0.0
    assert rounding.div_up(inf, 2.0) == inf
    assert rounding.sqrt_up(inf) == inf
    assert rounding.hypot_up(inf, 1.0) == inf
    assert rounding.scale_up(inf, -5000) == inf
    assert rounding.div_up(1.0, 0.0) == inf
    assert rounding.div_down(-1.0, 0.0) == -inf


def test_overflow_and_underflow_round_to_the_safe_side() -> None:
    largest = float.fromhex("0x1.fffffffffffffp+1023")
    assert rounding.mul_up(1e200, 1e200) == math.inf
    assert rounding.mul_down(1e200, 1e200) == largest
    assert rounding.mul_up(-1e200, 1e200) == -largest
    assert rounding.mul_up(1e-200, 1e-200) == 5e-324
    assert rounding.mul_down(1e-200, 1e-200) == 0.0
    assert math.copysign(1.0, rounding.mul_up(-1e-200, 1e-200)) == 1.0


@pytest.mark.parametrize(
    "call",
    [
        lambda: rounding.add_up(math.nan, 1.0),
        lambda: rounding.sum_up([math.inf, -math.inf]),
        lambda: rounding.mul_down(1.0, math.nan),
        lambda: rounding.div_up(0.0, 0.0),
        lambda: rounding.div_up(math.inf, math.inf),
        lambda: rounding.sqrt_up(math.nan),
        lambda: rounding.sqrt_up(-1.0),
        lambda: rounding.hypot_up(math.nan),
        lambda: rounding.scale_up(math.nan, 1),
        lambda: rounding.frobenius_up(torch.tensor([1.0, math.nan], dtype=torch.float64)),
        lambda: rounding.prescale(torch.tensor([math.inf], dtype=torch.float64)),
    ],
)
def test_undefined_results_raise(call) -> None:
    with pytest.raises(NonFiniteError):
        call()


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(DtypeError, match="float64"):
        rounding.frobenius_up(torch.ones(3))


@pytest.mark.parametrize("exponent", [-1074, -1060, -1022, -700, -149, 0, 127, 500, 1020])
def test_frobenius_is_an_upper_bound(exponent: int) -> None:
    rng = np.random.default_rng(exponent + 5000)
    for size in [1, 2, 3, 17, 300, 1023, 1024, 1025, 5000]:
        for mixed in (False, True):
            values = rng.standard_normal(size) * (
                2.0 ** rng.integers(-60, 1, size) if mixed else 1.0
            )
            scaled = np.ldexp(values, exponent)
            bound = rounding.frobenius_up(torch.from_numpy(scaled))
            exact = exact_sum_of_squares(scaled)
            assert bound == math.inf or Fraction(bound) ** 2 >= exact
            if exponent > -1000 and bound != math.inf:
                assert Fraction(bound) ** 2 <= exact * (1 + Fraction(1, 10**12)) ** 2


def test_frobenius_of_zero_empty_and_views() -> None:
    assert rounding.frobenius_up(torch.zeros(3, 4, dtype=torch.float64)) == 0.0
    assert rounding.frobenius_up(torch.zeros(0, 4, dtype=torch.float64)) == 0.0
    base = torch.arange(24.0, dtype=torch.float64).reshape(4, 6)
    view = base.t()[1:4, ::2]
    assert Fraction(rounding.frobenius_up(view)) ** 2 >= exact_sum_of_squares(view.numpy())


@pytest.mark.parametrize("value", [5e-324, 3e-310, 1e-30, 0.5, 1.0, 3.0, 1e300, 1.7e308])
def test_prescale_is_exact(value: float) -> None:
    scaled, exponent = rounding.prescale(torch.tensor([[value, -value / 2]], dtype=torch.float64))
    assert 0.5 <= float(scaled.abs().max()) < 1.0
    assert Fraction(float(scaled[0, 0])) * Fraction(2) ** exponent == Fraction(value)


def test_self_test_passes_here() -> None:
    rounding.self_test()


def test_self_test_detects_flushed_denormals() -> None:
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormals, so there is nothing to detect")
    try:
        with pytest.raises(NotCertifiedError, match="flush"):
            rounding.self_test()
        with pytest.raises(NotCertifiedError, match="flush"):
            rounding.ensure_arithmetic(torch.device("cpu"))
    finally:
        torch.set_flush_denormal(False)
    rounding.self_test()


@pytest.mark.skipif(platform.machine() != "x86_64", reason="rounding-mode constants are x86-64's")
@pytest.mark.parametrize("mode", [0x400, 0x800, 0xC00])
def test_self_test_detects_other_rounding_modes(mode: int) -> None:
    libm = ctypes.CDLL("libm.so.6")
    assert libm.fesetround(mode) == 0
    try:
        with pytest.raises(NotCertifiedError, match="rounding"):
            rounding.self_test()
        # The scalar helpers do not depend on the mode at all.
        assert Fraction(rounding.add_up(1.0, 1e-30)) > 1
        assert Fraction(rounding.div_up(1.0, 3.0)) >= Fraction(1, 3)
        assert Fraction(rounding.div_down(1.0, 3.0)) <= Fraction(1, 3)
    finally:
        libm.fesetround(0)
    rounding.self_test()


def roots_are_faithful(radicands: torch.Tensor) -> bool:
    """Whether ``torch.sqrt`` gives one of the two floats around every exact root."""
    roots = torch.sqrt(radicands).tolist()
    return all(
        rounding.sqrt_down(x) <= root <= rounding.sqrt_up(x)
        for x, root in zip(radicands.tolist(), roots, strict=True)
    )


@pytest.mark.parametrize("seed", range(3))
def test_roots_in_float64_are_faithful_on_this_machine(seed: int) -> None:
    rng = np.random.default_rng(seed)
    random = np.ldexp(rng.uniform(1.0, 2.0, 2000), rng.integers(-1070, 1020, 2000))
    # Neighbours of squares: roots next to a float, or next to the middle between two.
    near = (1.0 + rng.integers(0, 1 << 26, 1000) * 2.0**-26) ** 2
    sides = [near, np.nextafter(near, 0.0), np.nextafter(near, 4.0), np.nextafter(near, 4.0) * 2]
    radicands = torch.from_numpy(np.concatenate([random, *sides]))
    assert roots_are_faithful(radicands)
    assert roots_are_faithful(radicands[::3])
    for single in radicands[:8]:
        assert roots_are_faithful(single.reshape(1))


def shifted(steps: int):
    """A root that is ``steps`` floats away from torch's."""
    genuine = torch.sqrt

    def root(x: torch.Tensor) -> torch.Tensor:
        result = genuine(x)
        for _ in range(abs(steps)):
            result = torch.nextafter(result, torch.full_like(result, math.copysign(2e300, steps)))
        return result

    return root


def estimated(x: torch.Tensor) -> torch.Tensor:
    """A float32 root improved by one Newton step: off by a few units."""
    start = x.float().sqrt().double()
    return 0.5 * (start + x / start)


@pytest.mark.parametrize(
    "root", [shifted(1), shifted(-1), shifted(2), estimated, lambda x: x.float().sqrt().double()]
)
def test_self_test_refuses_roots_that_are_not_faithful(
    monkeypatch: pytest.MonkeyPatch, root
) -> None:
    # One step away leaves many roots faithful, but not those of squares.
    monkeypatch.setattr(torch, "sqrt", root)
    with pytest.raises(NotCertifiedError, match="square roots"):
        rounding.self_test()


@pytest.mark.parametrize("side", ["sqrt_up", "sqrt_down"])
def test_self_test_accepts_every_faithful_root(monkeypatch: pytest.MonkeyPatch, side: str) -> None:
    exact = getattr(rounding, side)

    def root(x: torch.Tensor) -> torch.Tensor:
        values = [exact(v) for v in x.reshape(-1).tolist()]
        return torch.tensor(values, dtype=x.dtype).reshape(x.shape)

    monkeypatch.setattr(torch, "sqrt", root)
    rounding.self_test()


@pytest.mark.parametrize("name", ["__truediv__", "reciprocal"])
def test_self_test_refuses_quotients_that_are_not_rounded_to_nearest(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    genuine = getattr(torch.Tensor, name)

    def off(self: torch.Tensor, *other: torch.Tensor) -> torch.Tensor:
        result = genuine(self, *other)
        inexact = result * (other[0] if other else self) != 1.0
        moved = torch.nextafter(result, torch.zeros_like(result))
        return torch.where(inexact, moved, result)

    monkeypatch.setattr(torch.Tensor, name, off)
    with pytest.raises(NotCertifiedError, match="quotients|reciprocals|division"):
        rounding.self_test()


@pytest.fixture(params=["sqrt_up", "sqrt_down"])
def worst_roots(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Roots that are faithful and always on one side."""
    exact = getattr(rounding, request.param)

    def root(x: torch.Tensor) -> torch.Tensor:
        values = [exact(v) for v in x.reshape(-1).tolist()]
        return torch.tensor(values, dtype=x.dtype).reshape(x.shape)

    monkeypatch.setattr(torch, "sqrt", root)
    monkeypatch.setattr(torch.Tensor, "sqrt", root)


@pytest.mark.parametrize("exponent", [-520, 0, 300])
def test_lengths_stay_upper_bounds_with_the_worst_faithful_roots(
    worst_roots: None, exponent: int
) -> None:
    from lmtfast.bound import pair_norms_up
    from lmtfast.enclosure.registry import length_up
    from lmtfast.verified.matrix import row_column_up

    generator = torch.Generator().manual_seed(exponent)
    entries = torch.rand((40, 2), dtype=torch.float64, generator=generator) * 2.0**exponent
    for row, bound in zip(entries.tolist(), length_up(entries).tolist(), strict=True):
        assert Fraction(bound) ** 2 >= sum(Fraction(v) ** 2 for v in row)
    norms = pair_norms_up(entries, torch.tensor([0]))[0]
    for row, bound in zip(entries.tolist(), norms.tolist(), strict=True):
        gaps = zip(row, entries[0].tolist(), strict=True)
        square = sum((Fraction(a) - Fraction(b)) ** 2 for a, b in gaps)
        assert Fraction(bound) ** 2 >= square
    for real, imag in entries.tolist():
        parts = (torch.full((1, 1, 1), v, dtype=torch.float64) for v in (real, imag))
        assert Fraction(row_column_up(*parts)) ** 2 >= Fraction(real) ** 2 + Fraction(imag) ** 2
