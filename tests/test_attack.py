# SPDX-License-Identifier: MIT
"""The attack cross-check: exact verdicts, the polish, and its power on nets of known radius."""

from __future__ import annotations

import csv
import dataclasses
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

import lmtfast as lf
from lmtfast.errors import ArgumentError, ViolationError
from lmtfast.judgement import CHANGED, KEPT, UNDECIDED, Judge, inside, squared_distance
from lmtfast.polish import shorten
from tests.attack_cases import (
    MIRROR,
    NEWTON,
    attacked_net,
    certified,
    exact_squared_radius,
    linear_net,
    needs,
    seeded,
    signs,
)

# -- verdicts ----------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 1e-310, 1e150, 5e-324])
def test_distances_are_rational_numbers(scale):
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(3, 4, generator=generator).double() * scale for _ in range(2))
    b[0], a[1] = a[0], 0.0
    a[2, 0] = torch.pi * 1e3
    pairs = zip(a.flatten().tolist(), b.flatten().tolist(), strict=True)
    want = sum((Fraction(p) - Fraction(q)) ** 2 for p, q in pairs)
    assert squared_distance(a, b) == want
    assert squared_distance(b, a) == want
    assert squared_distance(a, a) == 0


def test_a_radius_is_a_closed_ball_and_zero_claims_nothing():
    x, p = torch.zeros(2).double(), torch.tensor([3.0, 4.0]).double()
    assert inside(p, x, 5.0)
    assert not inside(p, x, math.nextafter(5.0, 0.0))
    assert not inside(x, x, 0.0)
    assert inside(p, x, math.inf)
    # 1 + 2^-60 is no float64: only exact arithmetic tells it from 1
    q = torch.tensor([1.0, 2.0**-30]).double()
    assert not inside(q, x, 1.0)
    assert inside(q, x, math.nextafter(1.0, 2.0))


def test_a_judge_proves_a_class_or_says_so():
    judge = Judge(signs(), (1,), {})
    values = [[1e-100], [0.0], [-1e-100], [math.inf], [math.nan]]
    points = torch.tensor(values, dtype=torch.float64)
    verdict = judge(points, torch.zeros(5, dtype=torch.int64))
    assert verdict.status.tolist() == [KEPT, UNDECIDED, CHANGED, UNDECIDED, UNDECIDED]
    assert verdict.rival[:3].tolist() == [1, 1, 1]
    assert len(judge(points[:0], torch.zeros(0, dtype=torch.int64)).status) == 0


def test_a_bracket_that_touches_the_radius_ends_at_neighbouring_floats():
    judge, own = Judge(signs(), (1,), {}), torch.tensor([0])
    x, far = torch.tensor([[0.7]]).double(), torch.tensor([[-3.0]]).double()
    fine = shorten(judge, x, far, own, torch.tensor([0.7]).double())
    assert -1e-15 < fine.points.item() < 0.0 <= fine.last.item() < 1e-15
    coarse = shorten(judge, x, far, own, torch.tensor([0.3]).double())
    assert -2e-6 < coarse.points.item() < 0.0


# -- the harness on nets whose radius is known -------------------------------------------------


def test_a_tie_inside_the_radius_is_undecided_and_one_float_more_is_proved():
    net, x = signs(), torch.ones(1, 1)
    certificate = certified(net, x)
    honest = lf.attack(net, certificate, x, attacks=[MIRROR])
    assert (honest.violations, honest.undecided) == ((), ())
    assert honest.gap[0] == pytest.approx(1.0, abs=1e-6)
    tie = lf.attack(net, seeded(certificate, [1.0]), x, attacks=[MIRROR])
    assert (tie.violations, tie.undecided) == ((), (0,))
    wrong = lf.attack(net, seeded(certificate, [1.0 + 2.0**-52]), x, attacks=[MIRROR])
    (violation,) = wrong.violations
    assert wrong.undecided == ()
    # bisection ends at -2^-52; one float closer the class is still proved to differ
    assert violation.point.tolist() == [math.nextafter(-(2.0**-52), 1.0)]
    assert (violation.prediction, violation.rival, violation.attack) == (0, 1, "mirror")


def broken_share(cases, attacks, depth=2):
    """Shares of inputs whose radius is broken when 1 % too large, and when as certified."""
    broken = total = 0
    for seed in range(cases):
        net = linear_net(seed, depth)
        x = 2 * torch.rand(8, 9) - 1
        certificate = certified(net, x)
        squares = [exact_squared_radius(net, row) for row in x]
        assert certificate.prediction.tolist() == [own for _, own in squares]
        truth = np.array([math.sqrt(square) for square, _ in squares])
        forged = seeded(certificate, 1.01 * truth)
        report = lf.attack(net, forged, x, attacks=attacks, slow_inputs=0)
        for violation in report.violations:
            square = squares[violation.index][0]
            point = torch.from_numpy(violation.point)
            assert square <= squared_distance(point, x[violation.index].double())
        broken, total = broken + len(report.violations), total + len(x)
        honest = lf.attack(net, certificate, x, attacks=attacks, slow_inputs=0)
        assert honest.violations == ()
        assert (honest.distance >= truth * (1 - 1e-12)).all()
    return broken / total


@pytest.mark.parametrize("depth", [1, 3])
def test_a_radius_one_percent_too_large_is_broken(depth):
    assert broken_share(3, [NEWTON], depth) >= 0.99


def test_a_radius_one_percent_too_large_is_broken_by_the_libraries():
    needs("foolbox")
    assert broken_share(2, ["deepfool", "ddn", "pgd"]) >= 0.99


@pytest.mark.slow
def test_power_on_many_linear_nets():
    needs("foolbox")
    assert broken_share(60, ["deepfool", "ddn", "pgd"]) >= 0.99


@pytest.fixture(scope="module")
def example():
    return attacked_net()


def test_the_report_counts_what_was_found(example):
    _, _, _, certificate, report = example
    (row,) = report.rows
    assert (row.name, row.inputs) == ("newton", 12)
    assert row.closest == report.found_by.count("newton") == int(np.isfinite(report.distance).sum())
    assert row.changed >= row.closest > 6
    assert 0 < report.gap.max() <= 1.0
    assert report.gap_quantiles([0.5])[0.5] == np.median(report.gap)
    radii, accuracy = report.curve()
    for eps in [0.0, *radii, 0.05, 1.0]:
        step = np.searchsorted(radii, eps, side="right") - 1
        assert report.attacked_accuracy(eps) == pytest.approx(accuracy[step])
        assert report.attacked_accuracy(eps) >= certificate.certified_accuracy(eps)
    report.check()
    with pytest.raises(ArgumentError):
        report.attacked_accuracy(-1.0)


def test_a_violation_is_raised_shown_and_kept(example, tmp_path):
    net, x, y, certificate, found = example
    forged = seeded(certificate, 1.001 * np.minimum(found.distance, 1e6))
    report = lf.attack(net, forged, (x, y), attacks=[NEWTON])
    # the closed ball may also hold an even closer point, so all of them break
    assert len(report.violations) == found.rows[0].closest
    with pytest.raises(ViolationError, match="do not use this certificate") as caught:
        report.check()
    first = report.violations[0]
    assert repr(first.radius) in caught.value.got
    rows = list(csv.DictReader(report.to_csv(tmp_path / "attacks.csv").open()))
    assert len(rows) == 12
    assert sum("VIOLATION" in row["by"] for row in rows) == len(report.violations)
    assert float(rows[first.index]["attacked"]) == first.distance
    with np.load(report.save_violations(tmp_path / "points.npz")) as saved:
        point = torch.from_numpy(saved["point"][0])
        assert inside(point, x[first.index].double(), float(saved["radius"][0]))
        assert net(point[None].float()).argmax().item() == saved["rival"][0]


def test_a_report_without_labels_has_no_accuracy(example):
    net, x, *_ = example
    report = lf.attack(net, certified(net, x), x, attacks=[NEWTON])
    assert report.correct is None
    with pytest.raises(ArgumentError, match="labels"):
        report.attacked_accuracy(0.1)


def test_constant_and_tied_inputs():
    net = nn.Linear(3, 2).eval()
    nn.init.zeros_(net.weight)
    net.bias.data.copy_(torch.tensor([1.0, 0.0]))
    x = torch.zeros(2, 3)
    certificate = certified(net, x)
    assert np.isinf(certificate.prediction_radius).all()
    report = lf.attack(net, certificate, x, attacks=[NEWTON])
    assert np.isinf(report.distance).all()
    assert len(report.gap) == 0
    assert math.isnan(report.gap_quantiles()[0.5])
    tied = lf.attack(signs(), certified(signs(), torch.zeros(1, 1)), torch.zeros(1, 1),
                     attacks=[MIRROR])  # fmt: skip
    assert tied.unattacked == (0,)
    assert tied.undecided == ()  # its radius is 0


def test_a_wrong_prediction_breaks_at_the_input_itself():
    certificate = certified(signs(), torch.ones(1, 1))
    forged = dataclasses.replace(certificate, prediction=np.array([1]))
    report = lf.attack(signs(), forged, torch.ones(1, 1), attacks=[MIRROR])
    (violation,) = report.violations
    assert (violation.distance, violation.attack) == (0.0, "the input itself")


def test_no_input_at_all():
    net = signs()
    report = lf.attack(net, certified(net, torch.ones(0, 1)), torch.ones(0, 1), attacks=[MIRROR])
    assert report.violations == ()
    assert report.distance.shape == (0,)


def test_the_model_is_left_as_it_is():
    """Also one that no deepcopy takes, with a derived weight and layers that share weights."""
    torch.manual_seed(5)
    twice = nn.Linear(6, 6)
    first = nn.utils.parametrizations.weight_norm(nn.Linear(4, 6))
    tied = nn.Linear(6, 6)
    tied.weight = twice.weight
    net = nn.Sequential(first, twice, twice, tied, nn.Linear(6, 3))
    x = torch.rand(3, 4)
    net(x).sum().backward()
    net.note = net[0].weight  # a derived tensor with a history
    grads = [p.grad.clone() for p in net.parameters()]
    parameters = [id(p) for p in net.parameters()]
    certificate = certified(net.eval(), x)
    report = lf.attack(net, certificate, x, attacks=[NEWTON])
    assert np.isfinite(report.distance).any()
    assert report.violations == ()
    assert [id(p) for p in net.parameters()] == parameters
    assert all(torch.equal(p.grad, g) for p, g in zip(net.parameters(), grads, strict=True))
    assert all(p.requires_grad for p in net.parameters())
