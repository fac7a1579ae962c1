# SPDX-License-Identifier: MIT
"""NaN, infinities, negative zeros, denormals and every power of two in every tensor: refused by
name, or bounded as any other number."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import lmtfast as lf
from lmtfast.enclosure import LogitEnclosure
from lmtfast.errors import InputDomainError, LmtfastError, NonFiniteError
from lmtfast.guarantee import check_certifiable, plan_bound
from lmtfast.level import Level
from lmtfast.nn import Normalize
from lmtfast.plan import BoundPlan, make_plan
from lmtfast.samples import Samples
from lmtfast.tracing import TracedModel, trace_model
from tests.cases import Lambda, dyadic
from tests.classifiers import UNIT
from tests.oracles import conv_matrix, norm_is_at_most, rayleigh_exceeds, svd_norm


def _with(
    function: Callable[..., Tensor], **members: nn.Module | Tensor
) -> Callable[[], nn.Module]:
    return lambda: Lambda(function, **members)


VECTOR, IMAGE = (4,), (2, 3, 3)
KINDS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(4, 4), VECTOR),
    "matrix product": (_with(lambda m, x: x @ m.w, w=nn.Parameter(torch.ones(4, 4))), VECTOR),
    "conv": (lambda: nn.Conv2d(2, 2, 3, padding=1), IMAGE),
    "conv, circular": (lambda: nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"), IMAGE),
    "conv, grouped": (lambda: nn.Conv2d(2, 2, 2, groups=2), IMAGE),
    "conv, transposed": (lambda: nn.ConvTranspose2d(2, 1, 2, stride=2), IMAGE),
    "batch norm": (lambda: nn.BatchNorm2d(2), IMAGE),
    "conv and batch norm": (lambda: nn.Sequential(nn.Conv2d(2, 2, 2), nn.BatchNorm2d(2)), IMAGE),
    "residual": (_with(lambda m, x: x + m.a(x), a=nn.Linear(4, 4)), VECTOR),
    "slopes": (lambda: nn.PReLU(4), VECTOR),
    "factor": (_with(lambda m, x: x * m.s, s=nn.Parameter(torch.ones(4))), VECTOR),
    "divisor": (_with(lambda m, x: x / m.s, s=nn.Parameter(torch.ones(4))), VECTOR),
    "summand": (_with(lambda m, x: x + m.s, s=nn.Parameter(torch.ones(4))), VECTOR),
    "weight norm": (lambda: weight_norm(nn.Linear(4, 4)), VECTOR),
    "normalisation": (lambda: Normalize([0.5, 0.5], [0.25, 0.5]), IMAGE),
}
DENORMAL = {torch.float32: 2.0**-149, torch.float64: 5e-324}


@dataclass(frozen=True)
class Traced:
    model: nn.Module
    shape: tuple[int, ...]
    traced: TracedModel
    plan: BoundPlan


@cache
def traced_once(kind: str) -> Traced:
    """One trace for all values: a program does not depend on them."""
    build, shape = KINDS[kind]
    torch.manual_seed(3)
    model = nn.Sequential(build(), nn.Flatten()).eval()
    # A program that is no vector of logits, or any layer of the library, is bounded all the same.
    traced = trace_model(model, shape)
    plan = make_plan(model, traced.graph, engine="operator", backend="reference")
    return Traced(model, shape, traced, plan)


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    named = dict(model.named_parameters()) | dict(model.named_buffers())
    return {name: t for name, t in named.items() if t.is_floating_point()}


def answer(case: Traced, x: Tensor) -> tuple[lf.LipschitzBound, Tensor, Tensor]:
    check_certifiable(case.model)
    bound = plan_bound(case.plan, case.model, level=Level("rigorous"))
    norms = {name: float(norm) for name, norm in bound.per_operator.items()}
    return bound, *LogitEnclosure(case.model, case.traced, norms=norms)(x)


PLACES = tuple((kind, name) for kind in KINDS for name in tensors_of(traced_once(kind).model))


def test_the_table_covers_every_tensor_of_twelve_kinds() -> None:
    assert len(KINDS) >= 12
    assert {kind for kind, _ in PLACES} == set(KINDS)
    assert len(PLACES) * 6 >= 150


@pytest.fixture
def entry(request: pytest.FixtureRequest) -> Iterator[tuple[Traced, str, Tensor]]:
    """A tensor whose first entry may be overwritten; restored afterwards."""
    kind, name = request.param
    case = traced_once(kind)
    tensor = tensors_of(case.model)[name].data
    saved = tensor.clone()
    yield case, name, tensor.reshape(-1)
    tensor.copy_(saved)


@pytest.mark.parametrize("entry", PLACES, indirect=True, ids=" ".join)
def test_no_value_is_taken_for_another(entry: tuple[Traced, str, Tensor]) -> None:
    case, name, flat = entry
    x = torch.rand(3, *case.shape)
    for value in (math.nan, math.inf, -math.inf):
        flat[0] = value
        with pytest.raises(NonFiniteError) as caught:
            lf.certified_bound(case.model, case.shape)
        assert name in caught.value.where
        with pytest.raises(NonFiniteError):
            lf.certify(case.model, x, input_shape=case.shape, input_range=UNIT)
    results = []
    for value in (0.0, -0.0, DENORMAL[flat.dtype], -DENORMAL[flat.dtype]):
        flat[0] = value
        try:
            bound, logits, error = answer(case, x)
        except LmtfastError as refusal:
            results.append(str(refusal))
            continue
        results.append((bound.total, logits.tolist(), error.tolist()))
        assert not math.isnan(bound.total)
        with torch.no_grad():
            exact = case.model.double()(x.double())
            quotients = differences(case.model, case.shape)
            case.model.float()
        # Where nothing is known the error is infinite; elsewhere float64 lies within twice of it.
        assert (
            bool(((exact - logits).abs() <= 2 * error + 1e-300).all()) or not exact.isfinite().all()
        )
        assert quotients <= bound.total
    assert repr(results[0]).replace("-0.0", "0.0") == repr(results[1]).replace("-0.0", "0.0")


def differences(model: nn.Module, shape: tuple[int, ...]) -> float:
    """Largest difference quotient over pairs whose distance and images are exact enough: rounded
    down by far more than their own rounding."""
    a, b = (torch.randn(64, *shape, dtype=torch.float64) for _ in range(2))
    moved = (model(a) - model(b)).flatten(1).norm(dim=1) / (a - b).flatten(1).norm(dim=1)
    return float(moved[moved.isfinite()].max() * (1 - 1e-6)) if moved.isfinite().any() else 0.0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_inputs_that_are_not_finite_are_refused(value: float) -> None:
    x = torch.rand(2, 4)
    x[1, 2] = value
    with pytest.raises(InputDomainError):
        list(Samples(x, (4,), UNIT, 3).chunks(8))


def test_zeros_and_denormals_in_the_input_are_exact() -> None:
    model = nn.Linear(4, 3).double().eval()
    radii = []
    for value in (0.0, -0.0, 5e-324):
        x = torch.full((1, 4), 0.5, dtype=torch.float64)
        x[0, 0] = value
        c = lf.certify(model, x, input_shape=(4,), input_range=UNIT)
        radii.append(c.prediction_radius[0])
    assert radii[0] == radii[1]
    assert abs(radii[0] - radii[2]) <= 1e-12 * radii[2]


@pytest.mark.parametrize("label", [-1, 3, 10**9, math.nan, math.inf, -math.inf])
def test_labels_that_are_no_class_are_refused(label: float) -> None:
    samples = Samples((torch.rand(1, 4), torch.tensor([label])), (4,), UNIT, 3)
    with pytest.raises(LmtfastError):
        list(samples.chunks(8))


# -- scales ----------------------------------------------------------------------------------------

SCALES = tuple(range(-149, 128))
BASE = torch.tensor([[1.0, 1.5, 0.0], [1.5, -1.0, 1.0]])
KERNEL = torch.tensor([[[1.0, 0.0, 1.5], [0.0, -1.0, 1.0]]])


def scaled_up(base: Tensor, exponent: int) -> Tensor:
    """The base times a power of two as float32 holds it, denormals included."""
    return torch.ldexp(base.double(), torch.tensor(exponent)).float()


def bounds(model: nn.Module, shape: tuple[int, ...], change: Callable[[int], None]) -> list[float]:
    traced = trace_model(model, shape)
    plan = make_plan(model, traced.graph, engine="operator", backend="reference")
    found = []
    for k in SCALES:
        change(k)
        check_certifiable(model)
        found.append(float(plan_bound(plan, model, level=Level("rigorous")).total))
    return found


def test_every_power_of_two_on_a_matrix() -> None:
    layer = nn.Linear(3, 2, bias=False).eval()
    matrices = [scaled_up(BASE, k) for k in SCALES]
    totals = bounds(layer, (3,), lambda k: layer.weight.data.copy_(scaled_up(BASE, k)))
    for matrix, total in zip(matrices, totals, strict=True):
        assert norm_is_at_most(matrix.double().numpy(), total)
        assert total > 0.0
        # Scaled by a power of two NumPy's norm is far from the ends of the range.
        top = 2.0 ** -math.frexp(float(matrix.abs().max()))[1]
        assert total * top <= svd_norm(matrix.double().numpy() * top) * (1 + 1e-9)


def test_every_power_of_two_on_a_convolution() -> None:
    layer = nn.Conv1d(2, 1, 3, padding=1, bias=False).eval()
    matrix = conv_matrix(KERNEL.double().numpy(), (2, 4), padding=1)
    totals = bounds(layer, (2, 4), lambda k: layer.weight.data.copy_(scaled_up(KERNEL, k)))
    for k, total in zip(SCALES, totals, strict=True):
        # Below 2^-148 a factor of 1.5 is not held by float32.
        if k >= -148:
            assert norm_is_at_most(matrix, math.ldexp(total, -k))
            assert math.ldexp(total, -k) <= svd_norm(matrix) * (1 + 1e-9)
        assert total > 0.0


def test_every_power_of_two_and_its_inverse() -> None:
    first, second = nn.Linear(3, 2, bias=False), nn.Linear(2, 2, bias=False)
    model = nn.Sequential(first, nn.ReLU(), second).eval()
    square = torch.tensor([[1.0, 1.0], [0.0, 1.5]])

    def change(k: int) -> None:
        k = max(-127, k)
        first.weight.data.copy_(scaled_up(BASE, k))
        second.weight.data.copy_(scaled_up(square, -k))

    truth = svd_norm(BASE.double().numpy()) * svd_norm(square.double().numpy())
    totals = bounds(model, (3,), change)
    assert min(totals) > 0.0
    assert all(abs(total / truth - 1) <= 1e-9 for total in totals)
    assert not any(rayleigh_exceeds((square @ BASE).double().numpy(), t) for t in totals)


def test_rows_of_very_different_scale() -> None:
    rng = random.Random(5)
    layer = nn.Linear(3, 2, bias=False).eval()
    traced = trace_model(layer, (3,))
    plan = make_plan(layer, traced.graph, engine="operator", backend="reference")
    for a, b in product((-149, -120, -1, 60, 120), (-140, -20, 0, 100)):
        weight = dyadic((2, 3), rng)
        rows = torch.stack([scaled_up(weight[0], a), scaled_up(weight[1], b)])
        layer.weight.data.copy_(rows)
        total = float(plan_bound(plan, layer, level=Level("rigorous")).total)
        assert norm_is_at_most(rows.double().numpy(), total)
        assert total > 0.0 or not rows.any()
