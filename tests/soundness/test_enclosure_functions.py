# SPDX-License-Identifier: MIT
"""Error rules of nonlinearities, one call at a time: against 60 digits, and against the worst
function that assumption A5 allows."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import mpmath
import pytest
import torch
from mpmath import mp, mpf
from torch import Tensor

from lmtfast.enclosure.elementwise import ACCURACY, EXPONENTIALS, SELECTIONS
from lmtfast.enclosure.registry import ERROR_RULES, Enclosed, length_up, rounded
from lmtfast.errors import NotCertifiedError
from tests.exact_networks import clip, elu, gelu, gelu_tanh, sigmoid
from tests.soundness.error_calls import (
    UNIT,
    call_of,
    enclosed,
    fractions,
    is_close_above,
    result_of,
)

POINTS = torch.tensor([
    [-1e300, -800.0, -709.8, -36.5, -6.1, -3.1, -2.99, -1.5, -0.3, -1e-3, -1e-9, -1e-310],
    [0.0, 1e-310, 1e-9, 1e-3, 0.3, 1.25, 2.99, 3.1, 6.1, 36.5, 709.8, 1e300],
], dtype=torch.float64)  # fmt: skip
# Digits beside which 1e-310 is seen.
DIGITS = 700


def relu_like(low: float, high: float = 1e305) -> Any:
    return lambda v: clip(v, low, high)


def mish(v: mpf) -> mpf:
    return v * mpmath.tanh(mpmath.log1p(mpmath.exp(v)))


def softplus(v: mpf, beta: float = 1.0) -> mpf:
    # No digit is lost on either side.
    return max(v, mpf(0)) + mpmath.log1p(mpmath.exp(-abs(v * beta))) / mpf(beta)


SELU = mpf("1.0507009873554804934193349852946"), mpf("1.6732632423543772848170429916717")
# The function, its arguments, and what a function of 4 ulp and the operations around it may err by:
# units of 2^-53 of the value's size, of the argument's, and absolute.
FUNCTIONS: dict[str, tuple[str, Any, tuple[Any, ...], tuple[float, float, float]]] = {
    "relu": ("aten.relu.default", relu_like(0.0), (), (0, 0, 0)),
    "relu6": ("aten.relu6.default", relu_like(0.0, 6.0), (), (0, 0, 0)),
    "hardtanh": ("aten.hardtanh.default", relu_like(-0.7, 0.9), (-0.7, 0.9), (0, 0, 0)),
    "abs": ("aten.abs.default", abs, (), (0, 0, 0)),
    "clamp": ("aten.clamp.default", relu_like(-0.3, 0.4), (-0.3, 0.4), (0, 0, 0)),
    "clamp_min": ("aten.clamp_min.default", relu_like(0.1), (0.1,), (0, 0, 0)),
    "clamp_max": ("aten.clamp_max.default", lambda v: min(v, mpf(0.1)), (0.1,), (0, 0, 0)),
    "tanh": ("aten.tanh.default", mpmath.tanh, (), (8, 0, 0)),
    "atan": ("aten.atan.default", mpmath.atan, (), (8, 0, 0)),
    "erf": ("aten.erf.default", mpmath.erf, (), (8, 0, 0)),
    "sigmoid": ("aten.sigmoid.default", sigmoid, (), (10, 0, 0)),
    "log_sigmoid": ("aten.log_sigmoid.default", lambda v: -softplus(-v), (), (17, 0, 0)),
    "leaky_relu": (
        "aten.leaky_relu.default", lambda v: v if v > 0 else mpf(0.3) * v, (0.3,), (1, 0, 0)),
    "hardsigmoid": ("aten.hardsigmoid.default", lambda v: clip(v + 3, 0, 6) / 6, (), (0, 0, 3)),
    "hardswish": (
        "aten.hardswish.default", lambda v: v * clip(v + 3, 0, 6) / 6, (), (0, 4, 0)),
    "silu": ("aten.silu.default", lambda v: v * sigmoid(v), (), (0, 11, 0)),
    "mish": ("aten.mish.default", mish, (), (0, 26, 0)),
    "gelu": ("aten.gelu.default", gelu, (), (0, 13, 0)),
    "gelu tanh": ("aten.gelu.default", gelu_tanh, ("tanh",), (0, 15, 0)),
    "elu": ("aten.elu.default", lambda v: elu(v, mpf(0.7)), (0.7,), (0, 0, 9 * 0.7)),
    "steep elu": (
        "aten.elu.default", lambda v: mpf(1.5) * (v if v > 0 else 3 * mpmath.expm1(v / 2)),
        (3.0, 1.5, 0.5), (1, 0, 11 * 4.5)),
    "celu": (
        "aten.celu.default", lambda v: v if v > 0 else mpf(1.3) * mpmath.expm1(v / mpf(1.3)),
        (1.3,), (0, 0, 11 * 1.3)),
    "selu": ("aten.selu.default", lambda v: SELU[0] * elu(v, SELU[1]), (), (2, 0, 11 * 1.76)),
    "softplus": ("aten.softplus.default", softplus, (), (1, 0, 14)),
    "softplus beta": (
        "aten.softplus.default", lambda v: softplus(v, 4.0), (4.0,), (1, 0, 14 / 4)),
    "shallow softplus": (
        "aten.softplus.default", lambda v: softplus(v, 0.25), (0.25,), (1, 0, 14 * 4)),
    "_prelu_kernel": (
        "aten._prelu_kernel.default", lambda v: v if v > 0 else mpf(-1.5) * v,
        (torch.tensor([-1.5]).double(),), (1, 0, 0)),
    "prelu": (
        "aten.prelu.default", lambda v: v if v > 0 else mpf(0.3) * v,
        (torch.tensor([0.3], dtype=torch.float64),), (1, 0, 0)),
    "sin": ("aten.sin.default", mpmath.sin, (), (8, 0, 0)),
    "cos": ("aten.cos.default", mpmath.cos, (), (8, 0, 0)),
}  # fmt: skip


def test_every_function_is_tested() -> None:
    assert {name for name, *_ in FUNCTIONS.values()} == set(ACCURACY)


def allowed(x: float, y: float, units: tuple[float, float, float]) -> Fraction:
    sizes = zip(units, (y, x, 1.0), strict=True)
    return UNIT * sum(Fraction(u) * abs(Fraction(s)) for u, s in sizes)


def ample(x: float, y: float, units: tuple[float, float, float]) -> Fraction:
    spread = 20 * (allowed(x, y, units) + UNIT * abs(Fraction(y))) if any(units) else 0
    return spread + Fraction(1, 2**900)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_errs_by_its_slope_and_by_its_own_rounding(name: str) -> None:
    target, oracle, arguments, units = FUNCTIONS[name]
    points = POINTS if name not in ("sin", "cos") else POINTS[:, 2:11]
    constant = 1.5 if "prelu" in name else 0.9
    slope = max(1.0, float(arguments[0].abs().max())) if "prelu" in name else constant
    for error in (0.0, 2.0**-20):
        source = enclosed(points, error, 0.5)
        found = result_of(target, source, *arguments, constant=constant)
        assert torch.equal(found.base, source.base)
        flat = zip(points.reshape(-1).tolist(), found.value.reshape(-1).tolist(),
                   fractions(found.local), strict=True)  # fmt: skip
        with mp.workdps(DIGITS):
            for x, y, bound in flat:
                moved = Fraction(slope) * Fraction(error)
                assert abs(mpf(y) - oracle(mpf(x))) <= mpf(float(bound - moved)) * (1 + mpf(1e-12))
                assert moved + allowed(x, y, units) <= bound
                assert bound <= moved * (1 + 64 * UNIT) + ample(x, y, units)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_lengths_grow_by_the_slope(name: str) -> None:
    target, _, arguments, units = FUNCTIONS[name]
    source = enclosed(torch.tensor([[3.0, -1.0]]), torch.tensor([[3.0, 4.0]]), 0.7)
    slope = max(1.0, float(arguments[0].abs().max())) if "prelu" in name else 0.9
    found = result_of(target, source, *arguments, constant=0.9, norm=lambda v: 3.0)
    assert is_close_above(found.base, [Fraction(slope) * (5 + Fraction(0.7) * 3)])
    values = zip([3.0, -1.0], found.value[0].tolist(), fractions(found.local), strict=True)
    for x, y, bound in values:
        assert allowed(x, y, units) <= bound <= ample(x, y, units)


@pytest.mark.parametrize("name", ["sin", "cos"])
def test_large_angles_may_give_anything(name: str) -> None:
    edge = 2.0**20
    x = torch.tensor([[edge, -edge, edge + 1.0, -2.0 * edge, 1e12]]).double()
    found = result_of(f"aten.{name}.default", enclosed(x), constant=1.0)
    assert bool((found.local[0, :2] < 1e-14).all())
    assert bool((found.local[0, 2:] >= 1.0 + found.value[0, 2:].abs()).all())


@pytest.mark.parametrize("name", ["sin", "cos"])
def test_where_angles_have_no_bound_of_their_own_their_size_pays(name: str) -> None:
    x = torch.tensor([1.0, 2.0**20 + 1.0, -(2.0**21), 1e12], dtype=torch.float64)
    found = ACCURACY[f"aten.{name}.default"].bound(x, torch.ones_like(x))
    assert float(found[0]) < 2.0**-18
    assert bool((found[1:] >= 2.0).all())
    assert bool((found <= 2.0**-18 * x.abs()).all())


def test_what_is_not_known_is_refused() -> None:
    x = enclosed(torch.rand(1, 2))
    for slope in (None, float("inf"), float("nan")):
        with pytest.raises(NotCertifiedError, match="unknown"):
            result_of("aten.relu.default", x, constant=slope)
    for scale in (0.0, -1.0, float("nan")):
        with pytest.raises(NotCertifiedError, match="input_scale"):
            result_of("aten.elu.default", x, 1.0, 1.0, scale, constant=1.0)
    known = ERROR_RULES["aten.tanh.default"]
    with pytest.raises(NotCertifiedError, match="accuracy"):
        known(call_of("aten.exp.default", x, constant=1.0))
    assert set(EXPONENTIALS) < set(ACCURACY)


def pooled(x: Tensor) -> Tensor:
    return torch.nn.functional.max_pool1d(x, 2, 1)


def grouped(x: Tensor) -> Tensor:
    return x.topk(2, 1)[0]


BOX = (1, 2, 4, 4, 4)
# Target, shape, arguments, and how far the result moves when the entries move by that much.
MOVES: list[tuple[str, tuple[int, ...], tuple[Any, ...], Any]] = [
    ("aten.max_pool1d.default", (2, 2, 5), ([2], [1]), pooled),
    ("aten.max_pool2d.default", BOX[:1] + BOX[2:], ([2], [2]),
     lambda e: torch.nn.functional.max_pool2d(e, 2)),
    ("aten.max_pool2d_with_indices.default", BOX[:1] + BOX[2:], ([3], [1], [1]),
     lambda e: torch.nn.functional.max_pool2d(e, 3, 1, 1)),
    ("aten.max_pool3d.default", BOX, ([2], [2]), lambda e: torch.nn.functional.max_pool3d(e, 2)),
    ("aten.max_pool3d_with_indices.default", BOX, ([2], [2]),
     lambda e: torch.nn.functional.max_pool3d(e, 2)),
    ("aten.adaptive_max_pool1d.default", (2, 2, 5), ([3],),
     lambda e: torch.nn.functional.adaptive_max_pool1d(e, 3)),
    ("aten.adaptive_max_pool2d.default", BOX[:1] + BOX[2:], ([3, 2],),
     lambda e: torch.nn.functional.adaptive_max_pool2d(e, (3, 2))),
    ("aten.adaptive_max_pool3d.default", BOX, ([3, 2, 1],),
     lambda e: torch.nn.functional.adaptive_max_pool3d(e, (3, 2, 1))),
    ("aten.amax.default", (2, 3, 4), ([1], True), lambda e: e.amax(1, True)),
    ("aten.amin.default", (2, 3, 4), ([1, 2], False), lambda e: e.amax((1, 2))),
    ("aten.max.dim", (2, 3, 4), (1, False), lambda e: e.amax(1)),
    ("aten.min.dim", (2, 3, 4), (2, True), lambda e: e.amax(2, True)),
    ("aten.sort.default", (2, 3, 4), (1,), lambda e: e.amax(1, True).expand(2, 3, 4)),
    ("aten.topk.default", (2, 3, 4), (2, 1), lambda e: e.amax(1, True).expand(2, 2, 4)),
]  # fmt: skip


@pytest.mark.parametrize(
    ("target", "shape", "arguments", "moved"), MOVES, ids=[m[0] for m in MOVES]
)
def test_a_selection_moves_as_its_candidates(
    target: str, shape: tuple[int, ...], arguments: tuple[Any, ...], moved: Any
) -> None:
    torch.manual_seed(0)
    source = enclosed(torch.randn(shape), torch.rand(shape), 0.7)
    plain = result_of(target, source, *arguments, constant=1.0)
    carried = result_of(target, source, *arguments, constant=1.5, norm=lambda v: 3.0)
    several = isinstance(plain, tuple)
    if several:
        assert plain[1] is carried[1] is None
        plain, carried = plain[0], carried[0]
    value = call_of(target, source, *arguments).run()
    assert torch.equal(plain.value, value[0] if several else value)
    assert is_close_above(plain.local, fractions(moved(source.local)))
    assert not carried.local.any()
    lengths = fractions(length_up(source.local))
    assert is_close_above(carried.base, [Fraction(1.5) * (s + Fraction(0.7) * 3) for s in lengths])


def test_every_selection_is_tested() -> None:
    same = {"aten.sort.stable"}  # the rule of aten.sort.default
    assert {m[0] for m in MOVES} == set(SELECTIONS) - same
    assert ERROR_RULES["aten.sort.stable"] is ERROR_RULES["aten.sort.default"]


def test_an_exact_function_rounds_nothing() -> None:
    for name, accuracy in ACCURACY.items():
        nothing = not any((accuracy.value, accuracy.argument, accuracy.absolute))
        assert accuracy.exact == (nothing and name not in EXPONENTIALS)
    x = torch.rand(2, 3).double()
    for name in ("aten.relu.default", "aten.tanh.default"):
        units = ACCURACY[name].value
        found = ACCURACY[name].bound(x, x)
        assert torch.equal(found, rounded(x, units) if units else torch.zeros_like(x))
        assert isinstance(result_of(name, enclosed(x), constant=1.0), Enclosed)
