# SPDX-License-Identifier: MIT
"""Certification end to end: radii against exact oracles and attacks, refusals, changing models."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lmtfast as lf
from lmtfast import certification
from lmtfast.bound import LipschitzBound
from lmtfast.errors import (
    ArgumentError,
    DtypeError,
    InputDomainError,
    NonFiniteError,
    NotCertifiedError,
    ShapeError,
    StalePlanError,
    TrainModeError,
    UnsupportedLayerError,
)
from lmtfast.models import build_model
from lmtfast.radius import canonical_up, radius_lower
from lmtfast.samples import Samples

UNIT = (0.0, 1.0)


def linear(weight: list[list[float]], bias: list[float] | None = None) -> nn.Module:
    matrix = torch.tensor(weight, dtype=torch.float64)
    layer = nn.Linear(matrix.shape[1], matrix.shape[0], bias=bias is not None).double()
    with torch.no_grad():
        layer.weight.copy_(matrix)
        if bias is not None:
            layer.bias.copy_(torch.tensor(bias, dtype=torch.float64))
    return layer.eval()


def certified(model: nn.Module, x: Any, y: Any = None, low_high: Any = UNIT, **options: Any) -> Any:
    shape = tuple(x.shape[1:])
    return lf.certify(model, (x, y), input_shape=shape, input_range=low_high, **options)


def hand_made(weight: Tensor, features: float = 1.0, **fields: Any) -> LipschitzBound:
    values: dict[str, Any] = {
        "total": features, "features": features, "per_operator": {}, "level": "rigorous", "delta": 0.0,
        "slack": 0.0, "method": "by hand", "head_weight": weight, "classes": weight.shape[0],
    }  # fmt: skip
    return LipschitzBound(**{**values, **fields})


def exact_radius_squared(weight: Tensor, bias: Tensor, x: Tensor) -> tuple[int, Fraction]:
    """Of a linear classifier: predicted class and squared distance to the nearest other class."""
    rows = [[Fraction(v) for v in row] for row in weight.tolist()]
    point = [Fraction(v) for v in x.tolist()]
    logits = [
        sum((a * b for a, b in zip(row, point, strict=True)), Fraction(v))
        for row, v in zip(rows, bias.tolist(), strict=True)
    ]
    best = max(range(len(rows)), key=lambda k: logits[k])
    squares = []
    for j, row in enumerate(rows):
        if j != best:
            length = sum((a - b) ** 2 for a, b in zip(rows[best], row, strict=True))
            squares.append((logits[best] - logits[j]) ** 2 / length)
    return best, min(squares)


# -- the radius itself
# -------------------------------------------------------------------------------


def test_the_worked_example_of_the_specification() -> None:
    """W = [[1, 0], [0, 1], [-1, 0]], x = (0.6, 0.1): Prop. 2 gives 0.353553, Prop. 1 only 0.25."""
    model = linear([[1, 0], [0, 1], [-1, 0]])
    x = torch.tensor([[0.6, 0.1]], dtype=torch.float64)
    result = certified(model, x, torch.tensor([0]))
    truth = 0.5 / math.sqrt(2)
    assert truth * (1 - 1e-6) < result.radius[0] <= truth
    prop1 = 0.5 / (math.sqrt(2) * result.total)
    assert math.isclose(prop1, 0.25, rel_tol=1e-6)
    assert result.radius[0] >= prop1


def test_misclassified_inputs_have_radius_zero() -> None:
    model = linear([[1, 0], [0, 1], [-1, 0]])
    x = torch.tensor([[0.6, 0.1], [0.6, 0.1]], dtype=torch.float64)
    result = certified(model, x, torch.tensor([1, 0]))
    assert result.radius[0] == 0.0 < result.radius[1]
    assert result.prediction_radius[0] == result.prediction_radius[1]
    assert result.correct.tolist() == [False, True]
    assert result.median_radius == result.radius[1] / 2


def test_scaling_or_shifting_all_logits_changes_no_radius() -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(4, 5).double(), torch.randn(4).double()
    x = torch.rand(30, 5).double()
    base = certified(linear(weight.tolist(), bias.tolist()), x).prediction_radius
    for scale, shift in ((2.0**20, 0.0), (2.0**-30, 0.0), (3.0, 0.0), (1.0, 7.0)):
        other = linear((weight * scale).tolist(), (bias * scale + shift).tolist())
        radius = certified(other, x).prediction_radius
        assert np.allclose(radius, base, rtol=1e-6, atol=1e-12)


def test_linear_radii_are_below_the_exact_ones_and_close() -> None:
    """Perturbations of 0.999 r along the worst direction never flip, of 1.001 r always."""
    torch.manual_seed(1)
    for dimension, classes in ((2, 2), (10, 3), (40, 7)):
        weight, bias = torch.randn(classes, dimension).double(), torch.randn(classes).double() / 4
        model = linear(weight.tolist(), bias.tolist())
        x = torch.rand(60, dimension).double()
        result = certified(model, x)
        for point, r, c in zip(x, result.prediction_radius, result.prediction, strict=True):
            best, square = exact_radius_squared(weight, bias, point)
            assert best == c
            assert Fraction(float(r)) ** 2 < square
            assert Fraction(float(r)) ** 2 > square * (1 - Fraction(1, 10**6))
            logits = model(point)
            gaps = (logits[c] - logits) / (weight[c] - weight).norm(dim=1)
            j = int(gaps.nan_to_num(math.inf).argmin())
            direction = (weight[j] - weight[c]) / (weight[j] - weight[c]).norm()
            assert int(model(point + 0.999 * r * direction).argmax()) == c
            assert int(model(point + 1.001 * r * direction).argmax()) != c


def test_no_perturbation_inside_the_radius_flips_a_trained_network() -> None:
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
    x = torch.rand(40, 6)
    y = (x[:, :2].sum(1) * 1.5).long().clamp_max(2)
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(100):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    model.eval()
    result = certified(model, x)
    double = model.double()
    r = torch.tensor(result.prediction_radius)[:, None]
    c = torch.tensor(result.prediction)
    assert bool((r > 0).any())
    for restart in range(5):
        d = torch.randn(40, 6, dtype=torch.float64)
        for _ in range(40):
            d = (d / d.norm(dim=1, keepdim=True) * r).requires_grad_(restart < 4)
            logits = double(x.double() + d)
            if restart == 4:
                break
            gap = logits.gather(1, c[:, None])[:, 0] - logits.scatter(
                1, c[:, None], -math.inf
            ).amax(1)
            (g,) = torch.autograd.grad(gap.sum(), d)
            d = (d - 0.3 * r * g / g.norm(dim=1, keepdim=True).clamp_min(1e-30)).detach()
        d = d.detach() / d.detach().norm(dim=1, keepdim=True) * r
        flipped = double(x.double() + d).argmax(1) != c
        assert not bool((flipped & (r[:, 0] > 0)).any())


def test_prop_2_is_never_below_prop_1() -> None:
    torch.manual_seed(3)
    for seed in range(5):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
        result = certified(model, torch.rand(20, 5))
        prop1 = result.margin_lower / (math.sqrt(2) * result.total)
        assert bool((result.prediction_radius >= prop1 * (1 - 1e-6)).all())


def test_planted_flip_outside_every_radius() -> None:
    """A network whose class is known to change at distance d: no certified radius reaches d."""
    for exponent in range(-18, 1, 3):
        d = 2.0**exponent
        model = linear([[-1.0, 0.0], [0.0, 0.0]], [0.5 + d, 0.0])
        result = certified(model, torch.tensor([[0.5, 0.25]], dtype=torch.float64))
        assert result.prediction[0] == 0
        assert d * (1 - 1e-6) < result.prediction_radius[0] < d


def test_a_normalisation_layer_belongs_to_the_network() -> None:
    """Radii are in input units: with standard deviations (0.2, 0.5), the smaller one counts."""
    head = nn.Linear(2, 2, bias=False).double()
    with torch.no_grad():
        head.weight.copy_(torch.eye(2))

    class Normalised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("std", torch.tensor([0.2, 0.5], dtype=torch.float64))
            self.head = head

        def forward(self, x: Tensor) -> Tensor:
            return self.head((x - 0.5) / self.std)

    x = torch.tensor([[0.9, 0.5]], dtype=torch.float64)
    result = certified(Normalised().eval(), x, torch.tensor([0]))
    # f_0 - f_1 has the exact slope sqrt(25 + 4); the product bound is 5 sqrt(2).
    margin = 0.4 / 0.2
    assert result.radius[0] <= margin / math.sqrt(29)
    assert result.radius[0] > margin / (5 * math.sqrt(2)) * (1 - 1e-6)


# -- ties, NaN, infinity, degenerate networks
# ---------------------------------------------------------


def test_ties_are_never_certified() -> None:
    torch.manual_seed(4)
    weight = torch.randn(5, 6).double()
    weight[3] = weight[1]
    result = certified(linear(weight.tolist()), torch.rand(1000, 6).double())
    tied = np.isin(result.prediction, [1, 3])
    assert tied.any()
    assert (result.prediction_radius[tied] == 0).all()
    assert (result.prediction_radius[~tied] > 0).any()
    zero = certified(linear([[0.0, 0.0]] * 3), torch.rand(5, 2).double())
    assert (zero.prediction_radius == 0).all()
    assert zero.n_constant == 0


def test_random_ties_in_the_radius_formula() -> None:
    generator = torch.Generator().manual_seed(5)
    values = torch.randn(100_000, 4, generator=generator, dtype=torch.float64)
    top = values.amax(1, keepdim=True)
    column = torch.randint(0, 4, (100_000, 1), generator=generator)
    other = (values.argmax(1, keepdim=True) + 1 + column % 3) % 4
    values.scatter_(1, other, top)
    bound = hand_made(torch.randn(4, 3, generator=generator, dtype=torch.float64))
    _, radius, margin = radius_lower(values, torch.zeros_like(values), bound)
    assert bool((radius == 0).all())
    assert bool((margin == 0).all())


def test_near_ties_are_sound_against_exact_rationals() -> None:
    generator = torch.Generator().manual_seed(6)
    for _ in range(300):
        weight = torch.randn(3, 2, generator=generator, dtype=torch.float64)
        value = torch.randn(1, 3, generator=generator, dtype=torch.float64)
        best = int(value.argmax())
        rival = (best + 1) % 3
        step = float(torch.randint(1, 5, (), generator=generator)) * 2.0**-52
        value[0, rival] = value[0, best] * (1 - step)
        error = torch.full_like(value, 2.0**-60)
        lipschitz = float(torch.rand((), generator=generator, dtype=torch.float64)) + 0.1
        prediction, radius, _ = radius_lower(value, error, hand_made(weight, lipschitz))
        r, c = Fraction(float(radius[0])), int(prediction[0])
        if r == 0:
            continue
        logits = [Fraction(v) for v in value[0].tolist()]
        for j in range(3):
            if j != c:
                gap = logits[c] - logits[j] - 2 * Fraction(2.0**-60)
                pairs = zip(weight[c].tolist(), weight[j].tolist(), strict=True)
                square = sum((Fraction(a) - Fraction(b)) ** 2 for a, b in pairs)
                assert gap > 0
                assert r * r * Fraction(lipschitz) ** 2 * square < gap * gap


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_logits_or_errors_that_are_not_finite_have_radius_zero(bad: float) -> None:
    bound = hand_made(torch.eye(3, dtype=torch.float64))
    value = torch.tensor([[3.0, 1.0, 0.0]] * 3, dtype=torch.float64)
    for column in range(3):
        broken, error = value.clone(), torch.zeros_like(value)
        broken[column, column] = bad
        radius = radius_lower(broken, torch.zeros_like(value), bound)[1]
        assert radius[column] == 0.0
        assert int((radius > 0).sum()) == 2
        error[column, column] = bad
        assert radius_lower(value, error, bound)[1][column] == 0.0
    negative = torch.full_like(value, -1.0)
    assert bool((radius_lower(value, negative, bound)[1] == 0).all())


@pytest.mark.parametrize("features", [0.0, 5e-324, 1e-300, 1e300, math.inf])
def test_extreme_bounds(features: float) -> None:
    bound = hand_made(torch.eye(2, dtype=torch.float64), features)
    value = torch.tensor([[1.0, 0.0], [1e-320, 0.0], [1e308, -1e308]], dtype=torch.float64)
    _, radius, margin = radius_lower(value, torch.zeros_like(value), bound)
    assert not bool(radius.isnan().any())
    for r, m in zip(radius.tolist(), margin.tolist(), strict=True):
        if features == 0.0:
            assert r == math.inf
        elif math.isinf(features):
            assert r == 0.0
        else:
            assert 0.0 <= r < math.inf
            assert Fraction(r) ** 2 * Fraction(features) ** 2 * 2 < Fraction(m) ** 2


def test_one_class_can_never_change() -> None:
    result = certified(linear([[1.0, 2.0]]), torch.rand(3, 2).double(), torch.zeros(3).long())
    assert (result.radius == math.inf).all()
    assert result.n_constant == 3


def test_a_constant_network_is_flagged() -> None:
    model = linear([[0.0, 0.0], [0.0, 0.0]], [0.25, 1.0])
    result = certified(model, torch.rand(4, 2).double())
    assert (result.prediction_radius == math.inf).all()
    assert result.n_constant == 4
    tiny = linear([[1e-300, 0.0], [0.0, 1e-300]], [0.25, 1.0])
    result = certified(tiny, torch.rand(4, 2).double())
    assert result.n_constant == 0
    assert np.isfinite(result.prediction_radius).all()


def test_a_network_without_a_linear_head() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Tanh()).double().eval()
    result = certified(model, torch.rand(10, 3).double())
    assert result.head_sha256 == "none"
    with torch.no_grad():
        logits = model(torch.rand(1, 3).double())
    assert logits.shape == (1, 2)
    assert (result.prediction_radius * math.sqrt(2) * result.total <= result.margin_lower).all()


def test_canonical_bounds_are_never_below() -> None:
    generator = np.random.default_rng(0)
    values = [*generator.lognormal(0, 40, 2000).tolist(), 5e-324, 1e-310, 1.7e308, 1.0, 3.0]
    for value in values:
        raised = canonical_up(value)
        assert raised >= value
        assert value < 1e-300 or raised <= value * (1 + 2e-7) or raised == math.inf
    assert canonical_up(0.0) == 0.0
    assert canonical_up(math.inf) == math.inf


# -- refusals
# ------------------------------------------------------------------------------------------


class Any2d(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(-1, 2, 2)


def test_estimates_are_refused() -> None:
    model, x = linear([[1.0, 0.0], [0.0, 1.0]]), torch.rand(2, 2).double()
    with pytest.raises(NotCertifiedError, match="estimate"):
        certified(model, x, level="estimate")
    with pytest.raises(NotCertifiedError, match="estimate"):
        radius_lower(x, torch.zeros_like(x), hand_made(torch.eye(2), level="estimate"))
    with pytest.raises(ArgumentError):
        certified(model, x, level="certain")
    with pytest.raises(ArgumentError):
        certified(model, x, method="magic")


def test_hand_made_bounds_that_do_not_fit_are_refused() -> None:
    value = torch.zeros(2, 3, dtype=torch.float64)
    with pytest.raises(ShapeError):
        radius_lower(value, torch.zeros(2, 2), hand_made(torch.eye(3)))
    with pytest.raises(ShapeError):
        radius_lower(value, value, hand_made(torch.eye(2)))
    with pytest.raises(ArgumentError):
        radius_lower(value, value, hand_made(torch.eye(3), norm="linf"))
    with pytest.raises(NotCertifiedError):
        radius_lower(value, value, hand_made(torch.eye(3), math.nan))


def test_training_mode_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).eval()
    model[1].train()
    with pytest.raises(TrainModeError, match="'1'"):
        certified(model, torch.rand(2, 3))
    model.eval()
    model[1].track_running_stats = False
    model[1].running_mean = model[1].running_var = None
    with pytest.raises(UnsupportedLayerError):
        certified(model, torch.rand(2, 3))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_weights_and_buffers_that_are_not_finite_are_refused(bad: float) -> None:
    for where in ("0.weight", "0.bias", "1.running_var", "1.running_mean"):
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).eval()
        tensor = model.state_dict()[where]
        tensor.reshape(-1)[1] = bad
        with pytest.raises(NonFiniteError, match=where):
            certified(model, torch.rand(2, 3))


@pytest.mark.parametrize("low_high", [None, 1.0, (0,), (0, 1, 2), (1, 0), (0, 0), (0, math.inf),
                                      (math.nan, 1), ("a", "b")])  # fmt: skip
def test_an_input_range_that_is_none_is_refused(low_high: Any) -> None:
    with pytest.raises(InputDomainError):
        certified(linear([[1.0, 0.0], [0.0, 1.0]]), torch.rand(2, 2).double(), low_high=low_high)


def test_the_input_range_has_no_default() -> None:
    with pytest.raises(TypeError, match="input_range"):
        lf.certify(nn.Linear(2, 2).eval(), torch.rand(1, 2), input_shape=(2,))  # type: ignore[call-arg]


def chunked(data: Any, shape: tuple[int, ...] = (2,), classes: int = 3, size: int = 4) -> list[Any]:
    return list(Samples(data, shape, UNIT, classes).chunks(size))


def test_inputs_outside_the_range_are_counted() -> None:
    x = torch.full((3, 2), 0.5)
    x[0, 0], x[1, 1], x[2, 0] = 1.25, -4.0, 1.0
    with pytest.raises(
        InputDomainError, match=r"2 values outside, 0 of them NaN; the worst is -4.0"
    ):
        chunked(x)
    x[0, 0], x[1, 1] = 1.0, math.nan
    with pytest.raises(InputDomainError, match="1 values outside, 1 of them NaN"):
        chunked(x)
    with pytest.raises(InputDomainError):
        chunked(torch.full((1, 2), math.inf))


def test_integer_inputs_are_refused_with_the_remedy() -> None:
    for dtype in (torch.uint8, torch.int64, torch.bool):
        with pytest.raises(DtypeError, match="/ 255"):
            chunked(torch.zeros(2, 2, dtype=dtype))
    with pytest.raises(DtypeError):
        chunked(np.array([["a", "b"]]))


def test_data_of_another_form_is_refused() -> None:
    x = torch.rand(3, 2)
    y = torch.tensor([0, 1, 2])
    shape_errors = [(torch.rand(3, 3), y), (torch.rand(2), None), (x, y[:2]), (x, y[:, None])]
    for data in shape_errors:
        with pytest.raises(ShapeError):
            chunked(data)
    for labels in (y.float(), y > 0):
        with pytest.raises(DtypeError):
            chunked((x, labels))
    for data in ((x, y + 1), (x, y - 1), [(x, y), x], [(x, y, y)], 7, "data", {"x": x}):
        with pytest.raises(ArgumentError):
            chunked(data)


def test_an_output_that_is_no_vector_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Any2d()).eval()
    with pytest.raises(ShapeError, match="one vector of logits"):
        certified(model, torch.rand(2, 4))


# -- data in several forms -------------------------------------------------------------------------


def test_chunks_do_not_depend_on_batches() -> None:
    x, y = torch.rand(23, 2), torch.randint(0, 3, (23,))
    whole = chunked((x, y))
    assert [len(a) for a, _ in whole] == [4, 4, 4, 4, 4, 3]
    forms = [
        (x.numpy(), y.numpy()),
        DataLoader(TensorDataset(x, y), batch_size=5),
        [(x[i : i + 9], y[i : i + 9]) for i in range(0, 23, 9)],
        [[x[:0], y[:0]], [x, y]],
        (x.double(), y.int()),
    ]
    for form in forms:
        for (a, b), (c, d) in zip(chunked(form), whole, strict=True):
            assert torch.equal(a, c)
            assert torch.equal(b, d)
    assert torch.equal(torch.cat([a for a, _ in chunked(x)]), x.double())
    assert chunked([(x[:3],), (x[3:],)], size=30)[0][1] is None


def test_a_loader_gives_the_identical_certificate(tmp_path: Any) -> None:
    torch.manual_seed(7)
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 3)).eval()
    x, y = torch.rand(25, 3), torch.randint(0, 3, (25,))
    seen: list[tuple[int, int | None]] = []
    whole = certified(model, x, y, progress=lambda done, total: seen.append((done, total)))
    loader = DataLoader(TensorDataset(x, y), batch_size=4)
    streamed = lf.certify(model, loader, input_shape=(3,), input_range=UNIT)
    first, second = whole.save(tmp_path / "a.npz"), streamed.save(tmp_path / "b.npz")
    assert first.read_bytes() == second.read_bytes()
    assert seen[-1] == (25, 25)


def test_empty_data() -> None:
    model = linear([[1.0, 0.0], [0.0, 1.0]])
    for data in (torch.rand(0, 2), (torch.rand(0, 2), torch.zeros(0).long()), []):
        result = lf.certify(model, data, input_shape=(2,), input_range=UNIT)
        assert result.n_total == 0
        assert result.prediction_radius.shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_narrow_inputs_and_weights_are_taken_exactly(dtype: torch.dtype) -> None:
    torch.manual_seed(8)
    model = nn.Linear(4, 3).to(dtype).eval()
    x = torch.rand(10, 4).to(dtype)
    result = certified(model, x)
    for point, r, c in zip(x.double(), result.prediction_radius, result.prediction, strict=True):
        best, square = exact_radius_squared(model.weight.double(), model.bias.double(), point)
        assert best == c
        assert Fraction(float(r)) ** 2 < square


def test_probabilistic_certificates_carry_delta() -> None:
    torch.manual_seed(9)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    x = torch.rand(6, 3)
    result = certified(model, x, level="probabilistic", delta=1e-6)
    assert (result.level, result.delta) == ("probabilistic", 1e-6)
    assert certified(model, x).delta == 0.0


# -- models that change or pretend -----------------------------------------------------------------


class Changing:
    """Data that edits the model while it is read."""

    def __init__(self, model: nn.Module, x: Tensor, edit: Callable[[nn.Module], Any]) -> None:
        self.model, self.x, self.edit = model, x, edit

    def __iter__(self) -> Iterator[Tensor]:
        yield self.x
        self.edit(self.model)
        yield self.x


EDITS: dict[str, Callable[[nn.Module], Any]] = {
    "in place": lambda m: m[0].weight.data.mul_(2),
    "one ulp": lambda m: m[0].weight.data.copy_(
        torch.nextafter(m[0].weight.data, torch.tensor(9.0))
    ),
    "bias": lambda m: m[2].bias.data.add_(1),
    "load_state_dict": lambda m: m.load_state_dict({k: v + 1 for k, v in m.state_dict().items()}),
    "new parameter": lambda m: setattr(m[0], "weight", nn.Parameter(torch.zeros(4, 3))),
    "dtype": lambda m: m.double(),
    "buffer": lambda m: m.register_buffer("extra", torch.zeros(1)),
}


@pytest.mark.parametrize("name", EDITS)
def test_weights_that_change_while_certifying_are_noticed(name: str) -> None:
    torch.manual_seed(10)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    data = Changing(model, torch.rand(3, 3), EDITS[name])
    with pytest.raises(StalePlanError, match="weights"):
        lf.certify(model, data, input_shape=(3,), input_range=UNIT)


def test_weights_changed_between_bound_and_use_do_not_enter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Logits come from the weights the bound was computed for, whatever happens in between."""
    torch.manual_seed(11)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double().eval()
    x = torch.rand(4, 3).double()
    honest = certified(model, x)
    original, logits = certification.sample_radii, []

    def meddling(subject: Any, *rest: Any) -> Any:
        with torch.no_grad():
            model[0].weight.mul_(100.0)
        columns = original(subject, *rest)
        logits.append(columns["prediction_radius"])
        return columns

    monkeypatch.setattr(certification, "sample_radii", meddling)
    with pytest.raises(StalePlanError):
        certified(model, x)
    assert np.array_equal(logits[0], honest.prediction_radius)


def test_every_certificate_is_computed_afresh() -> None:
    torch.manual_seed(12)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    x = torch.rand(4, 3)
    first = certified(model, x)
    with torch.no_grad():
        model[0].weight.mul_(4.0)
        model[0].bias.mul_(4.0)
    second = certified(model, x)
    assert second.weights_sha256 != first.weights_sha256
    assert math.isclose(second.features, 4 * first.features, rel_tol=1e-6)


class Overridden(nn.Linear):
    """Exports as a linear layer, runs as something steeper."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if torch.compiler.is_compiling() else 3.0 * y


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.calls = nn.Linear(3, 2), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.layer(x) * (1.0 if self.calls < 3 else 1.5)


def test_a_module_that_does_not_compute_what_it_exports_is_refused() -> None:
    for model in (Overridden(3, 2), Counting()):
        with pytest.raises((NotCertifiedError, UnsupportedLayerError)):
            certified(model.eval(), torch.rand(2, 3))


def test_a_patched_call_is_refused() -> None:
    class Patched(nn.Sequential):
        def __call__(self, x: Tensor) -> Tensor:
            y = super().__call__(x)
            return y if torch.compiler.is_exporting() else y.flip(1)

    with pytest.raises((NotCertifiedError, UnsupportedLayerError)):
        certified(Patched(nn.Linear(3, 2)).eval(), torch.rand(2, 3))


def test_a_patched_forward_is_what_gets_certified() -> None:
    """An instance attribute that replaces forward is the module as it is called."""
    model = linear([[1.0, 0.0], [0.0, 1.0]])
    model.forward = lambda x: nn.functional.linear(4.0 * x, model.weight)  # type: ignore[method-assign]
    result = certified(model, torch.tensor([[0.75, 0.25]], dtype=torch.float64))
    assert result.total >= 4.0


def test_hooks_are_part_of_the_model() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).eval()
    plain = certified(model, torch.rand(1, 2)).features
    model[0].register_forward_hook(lambda module, inputs, output: 5.0 * output)
    assert certified(model, torch.rand(1, 2)).features >= 4.9 * plain


def test_dropout_in_eval_mode_is_the_identity() -> None:
    torch.manual_seed(13)
    layers = [nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)]
    plain = nn.Sequential(*layers).eval()
    dropped = nn.Sequential(layers[0], nn.Dropout(0.5), *layers[1:]).eval()
    x = torch.rand(5, 3)
    assert np.array_equal(
        certified(plain, x).prediction_radius, certified(dropped, x).prediction_radius
    )


def test_a_small_residual_network_end_to_end() -> None:
    torch.manual_seed(14)
    shape = (1, 8, 8)
    model = build_model("wide-resnet", input_shape=shape, classes=4,
                        options={"depth": 10, "width": 1}).eval()  # fmt: skip
    x = torch.rand(3, *shape)
    result = lf.certify(model, x, input_shape=shape, input_range=UNIT, method="torus")
    assert result.prediction.tolist() == model(x).argmax(1).tolist()
    assert (result.prediction_radius > 0).all()
