# SPDX-License-Identifier: MIT
"""Certified radii against exact rationals, attacks and degenerate networks. No tolerances."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lmtfast.radius import canonical_up, radius_lower
from tests.classifiers import certified, exact_radius_squared, hand_made, linear


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
