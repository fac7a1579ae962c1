# SPDX-License-Identifier: MIT
"""Every bound on the operators of the table against their exact norms. No tolerances below."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import lmtfast as lf
from lmtfast.errors import LmtfastError, NotCertifiedError, UnsupportedLayerError
from lmtfast.level import Level
from lmtfast.radius import radius_lower
from lmtfast.verified.region import METHODS, operator_norm_upper
from tests.cases import Lambda, Layer, layer_bounds
from tests.oracles import norm_is_at_most, rayleigh_exceeds
from tests.soundness.constructions import (
    FAMILIES,
    Construction,
    construction,
    conv,
    geometry,
)
from tests.soundness.geometries import GEOMETRIES
from tests.soundness.traced import Traced

COUNT, MANY = 20, 600
# Bareiss on so many rows takes milliseconds where entries are a few bits.
TABLE_SIZE = 36
UNKNOWN = ("C13", "C17", "C20")  # judged by the oracles alone
# Relative excess that the specification allows; the torus is exact on its own grid only.
EXCESS = {"auto": 1e-6, "dense": 1e-9, "banded": 1e-6}


def members(family: str, seeds: Iterable[int], size: int = 8) -> list[Construction]:
    return [construction(family, seed, size) for seed in seeds]


def assert_sound(case: Construction, bound: float, how: str, excess: float | None = None) -> None:
    assert not math.isnan(bound), (case, how)
    assert not case.understated_by(bound), f"{case}: {how} gives {bound!r}"
    if excess is not None:
        assert case.within(bound, excess), f"{case}: {how} gives {bound!r}"


# -- the table itself ------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_table_is_right(family: str) -> None:
    """Exact, to one unit in the last place: the stated norm is a bound, the float below is none."""
    judged = 0
    for case in members(family, range(2 * COUNT)):
        matrix = case.matrix()
        if case.square is None or min(matrix.shape) > TABLE_SIZE:
            continue
        exponent = math.frexp(float(np.abs(matrix).max()))[1] if matrix.any() else 0
        scaled, square = np.ldexp(matrix, -exponent), case.square / Fraction(4) ** exponent
        root = math.sqrt(square)
        while Fraction(root) ** 2 < square:
            root = math.nextafter(root, math.inf)
        below = root
        while Fraction(below) ** 2 >= square and below > 0.0:
            below = math.nextafter(below, 0.0)
        assert norm_is_at_most(scaled, root), case
        assert square == 0 or not norm_is_at_most(scaled, below), case
        judged += 1
    assert judged > COUNT or family in UNKNOWN, judged


@pytest.mark.parametrize("family", FAMILIES)
def test_a_bound_one_unit_too_small_is_noticed(family: str) -> None:
    """What the judge says of the norm itself and of the next smaller float, where one is exact."""
    judged = 0
    for case in members(family, range(2 * COUNT)):
        root = (
            Fraction(math.isqrt(case.square.numerator), math.isqrt(case.square.denominator))
            if (case.square)
            else Fraction(0)
        )
        if not root or root**2 != case.square:
            continue
        assert not case.understated_by(float(root))
        assert case.understated_by(math.nextafter(float(root), 0.0))
        judged += 1
    assert judged > 0 or family in UNKNOWN


# -- proofs of single operators --------------------------------------------------------------------


def proved(case: Construction, method: str) -> float:
    region, weights = case.region()
    return operator_norm_upper(region, weights, method=method).upper


def prove(case: Construction) -> None:
    for method in METHODS:
        if case.weight.ndim == 2 and method != "auto":
            continue  # a matrix has one proof, whatever is asked for
        assert_sound(case, proved(case, method), method, EXCESS.get(method))


@pytest.mark.parametrize("family", FAMILIES)
def test_no_proof_is_below_the_exact_norm(family: str) -> None:
    for case in members(family, range(COUNT)):
        if not case.traceable_only:
            prove(case)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [4, 8, 24, 96])
def test_no_proof_is_below_the_exact_norm_in_a_long_search(family: str, size: int) -> None:
    for case in members(family, range(1000, 1000 + MANY // size * 4), size):
        if not case.traceable_only:
            prove(case)


# -- the whole route: traced layers, every level and method ----------------------------------------


def narrow(case: Construction) -> Construction:
    """The same operator in the dtype that one trace can hold together."""
    return replace(case, dtype=torch.float64)


def routes(cases: list[Construction]) -> None:
    """Traced bounds of many layers, by every method and at both levels that claim something."""
    layers = [Layer(c.name, narrow(c).module, c.shape, c.matrix) for c in cases]
    ways: list[dict[str, Any]] = [{"method": m} for m in METHODS]
    ways.append({"level": Level("probabilistic", 2.0**-100)})
    for way, bounds in zip(ways, layer_bounds(layers, *ways), strict=True):
        for case, bound in zip(cases, bounds, strict=True):
            excess = None if case.traceable_only else EXCESS.get(way.get("method", ""))
            assert_sound(case, bound, f"certified_bound({way})", excess)


@pytest.mark.parametrize("start", range(3))
def test_no_traced_layer_is_below_the_exact_norm(start: int) -> None:
    routes([construction(family, 100 + start, 6) for family in FAMILIES])


@pytest.mark.parametrize("start", range(0, len(GEOMETRIES), 7))
def test_no_geometry_is_below_the_exact_norm(start: int) -> None:
    rng = np.random.default_rng(start)
    routes([geometry(*row, rng) for row in GEOMETRIES[start : start + 7]])


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_no_geometry_is_below_the_exact_norm_in_a_long_search(seed: int) -> None:
    rng = np.random.default_rng([7, seed])
    routes([geometry(*row, rng) for row in GEOMETRIES])


@pytest.mark.parametrize("family", ["C11", "C13"])
def test_layers_in_narrow_types_are_bounded_as_stored(family: str) -> None:
    for case in members(family, range(200, 203), 6):
        if case.weight.size and case.dtype != torch.float64:
            total = lf.certified_bound(case.module(), case.shape).total
            assert_sound(case, total, str(case.dtype), 1e-9)


# -- C15: what training or a checkpoint may have left in the power iterates ------------------------


def stored_states() -> dict[str, Any]:
    """From the state that is there to one that a certificate must not read."""
    return {
        "zero": torch.zeros_like,
        "nan": lambda v: torch.full_like(v, math.nan),
        "infinite": lambda v: torch.full_like(v, math.inf),
        "tiny": lambda v: torch.full_like(v, 1e-38),
        "not of unit length": lambda v: v * 1e6,
        "of another shape": lambda v: v[:2].clone(),
        "orthogonal to the top": lambda v: torch.zeros_like(v).index_fill_(0, torch.tensor(0), 1.0),
    }


@pytest.mark.parametrize("name", stored_states())
def test_stored_iterates_reach_no_certificate(name: str) -> None:
    model = nn.Linear(3, 3, bias=False).eval()
    with torch.no_grad():
        model.weight.copy_(torch.diag(torch.tensor([1.0, 2.0, 1414.0])))
    network = lf.NetworkBound(model, (3,), engine="operator")
    network()
    network.state.iterates = stored_states()[name](network.state.iterates)
    assert lf.certified_bound(model, (3,)).total >= 1414.0
    if name == "of another shape":
        with pytest.raises(LmtfastError):
            network(update=False)
        return
    stuck = network(update=False)
    # What the state alone would have claimed.
    assert name == "not of unit length" or not stuck.total.item() >= 1414.0
    value = torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64)
    with pytest.raises(NotCertifiedError):
        radius_lower(value, torch.zeros_like(value), stuck)


@pytest.mark.parametrize("name", ["zero", "nan", "tiny", "orthogonal to the top"])
def test_buffers_of_torch_spectral_norm_are_part_of_the_weight(name: str) -> None:
    """u and v divide the weight: whatever they hold, the bound is of the weight that acts."""
    layer = nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3, bias=False).double()).eval()
    norm = layer.parametrizations.weight
    with torch.no_grad():
        norm.original.copy_(torch.diag(torch.tensor([1.0, 2.0, 1414.0])))
        for vector in (norm[0]._u, norm[0]._v):
            vector.copy_(stored_states()[name](vector))
    acting = layer.weight.detach()
    try:
        total = lf.certified_bound(layer, (3,)).total
    except LmtfastError:
        assert name != "orthogonal to the top"
        return
    assert bool(acting.isfinite().all())
    assert not rayleigh_exceeds(acting.numpy(), total)


# -- C18: pooling ----------------------------------------------------------------------------------

POOLS: list[tuple[nn.Module, tuple[int, ...], Fraction]] = [
    (nn.AvgPool1d(3), (1, 9), Fraction(1, 3)),
    (nn.AvgPool2d(2), (1, 4, 6), Fraction(1, 4)),
    (nn.AvgPool2d((2, 3)), (2, 4, 6), Fraction(1, 6)),
    (nn.AvgPool3d(2), (1, 2, 4, 2), Fraction(1, 8)),
    (nn.AdaptiveAvgPool2d(1), (2, 3, 5), Fraction(1, 15)),
    (Lambda(lambda m, x: x.mean((2, 3))), (2, 4, 7), Fraction(1, 28)),
    (Lambda(lambda m, x: x.sum(2)), (2, 7), Fraction(7)),
    (nn.AvgPool2d(2, divisor_override=1), (1, 2, 2), Fraction(4)),
    (nn.MaxPool1d(2), (1, 6), Fraction(1)),
    (nn.MaxPool1d(3, 1), (1, 6), Fraction(3)),
    (nn.MaxPool1d(3, 1, 1), (1, 6), Fraction(3)),
    (nn.MaxPool2d(3, 2), (1, 7, 7), Fraction(4)),
    (nn.MaxPool2d(3, 1), (1, 5, 5), Fraction(9)),
    (nn.MaxPool2d(3, 1), (1, 4, 3), Fraction(2)),
    (nn.MaxPool2d(2, 1, dilation=2), (1, 5, 5), Fraction(4)),
    (nn.AdaptiveMaxPool2d(1), (1, 3, 4), Fraction(1)),
    (Lambda(lambda m, x: x.amax((2, 3))), (2, 3, 3), Fraction(1)),
]  # fmt: skip


@pytest.mark.parametrize("index", range(len(POOLS)))
def test_pools_have_their_exact_constant(index: int) -> None:
    module, shape, square = POOLS[index]
    total = Fraction(lf.certified_bound(module.double().eval(), shape).total)
    assert square <= total**2 <= square * (1 + Fraction(1, 10**9))


def test_unfold_counts_overlaps_or_is_refused() -> None:
    try:
        total = lf.certified_bound(nn.Unfold(3).eval(), (1, 5, 5)).total
    except UnsupportedLayerError:
        return
    assert total >= 3.0  # the middle pixel is in nine windows


# -- C19: nothing to bound -------------------------------------------------------------------------

EMPTY: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "no input": (lambda: nn.Linear(0, 3), (0,)),
    "no output": (lambda: nn.Linear(3, 0), (3,)),
    "no positions": (lambda: nn.Linear(3, 2), (0, 3)),
    "no rows": (lambda: nn.Conv1d(1, 1, 3, padding=1), (1, 0)),
    "no channels out": (lambda: nn.Conv1d(2, 0, 3, padding=1), (2, 4)),
    "zero matrix": (lambda: nn.Linear(4, 4), (4,)),
    "zero kernel": (lambda: nn.Conv2d(2, 2, 3, padding=1), (2, 3, 3)),
    "zero circular kernel": (
        lambda: nn.Conv1d(2, 2, 3, padding=1, padding_mode="circular"),
        (2, 4),
    ),
    "zero kernel, transposed": (lambda: nn.ConvTranspose1d(2, 2, 3), (2, 4)),
}


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
@pytest.mark.parametrize("name", EMPTY)
def test_nothing_is_bounded_by_exactly_zero_or_refused(name: str) -> None:
    build, shape = EMPTY[name]
    module = build().double().eval()
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    try:
        traced = Traced(module, shape)
    except LmtfastError:
        assert name.startswith("no ")
        return
    for method in METHODS:
        assert traced.bound(method=method).total == 0.0


@pytest.mark.parametrize("size", [1, 2])
def test_kernels_that_meet_only_padding_have_norm_zero(size: int) -> None:
    weight = np.ones((1, 1, size))
    case = conv("unread", weight, (1, 1), 0, stride=9, padding=4)
    assert not case.matrix().any()
    for method in METHODS:
        assert proved(case, method) == 0.0
