# SPDX-License-Identifier: MIT
"""spectral_norm, conv_spectral_norm and certified_bound: levels, closed forms, refusals."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from torch import nn

import lmtfast as lf
from lmtfast.errors import (
    ArgumentError,
    LmtfastError,
    NonFiniteError,
    ShapeError,
    TrainModeError,
    UnsupportedLayerError,
)  # fmt: skip
from tests.cases import dyadic
from tests.networks import IMAGE, Nested, WideResNet, randomised, steepest
from tests.oracles import conv_matrix, rayleigh_exceeds, svd_norm


@pytest.mark.parametrize(("size", "truth"), [(4, 3.618033988749895), (8, None), (16, None)])
def test_a_strided_conv_on_an_even_map_keeps_its_last_row(size: int, truth: float | None) -> None:
    # lmt.md check 23: an adjoint without output padding gives 3.0 on the 4 x 4 map.
    weight = torch.ones(1, 1, 3, 3, dtype=torch.float64)
    total = lf.conv_spectral_norm(weight, (1, size, size), stride=2, padding=1).total
    matrix = conv_matrix(weight.numpy(), (1, size, size), stride=2, padding=1)
    assert not rayleigh_exceeds(matrix, total)
    assert total <= svd_norm(matrix) * (1 + 1e-9)
    assert truth is None or total >= truth


@pytest.mark.parametrize("mode", ["zeros", "circular", "reflect", "replicate"])
def test_random_convolutions_in_functional_form(mode: str) -> None:
    # lmt.md check 24, without any slack on the bound's side.
    rng = random.Random(mode)
    for _ in range(15):
        axes = rng.choice((1, 2))
        n = [rng.randint(2, 5) for _ in range(axes)]
        k, s, p = rng.randint(1, 3), rng.randint(1, 3), rng.randint(0, 1)
        if any(size + 2 * p < k for size in n):
            continue
        groups = rng.choice((1, 2))
        weight = dyadic((2 * groups, 2, *(k,) * axes), rng)
        shape = (2 * groups, *n)
        options = {"stride": s, "padding": p, "groups": groups, "padding_mode": mode}
        total = lf.conv_spectral_norm(weight, shape, **options).total
        matrix = conv_matrix(weight.numpy(), shape, **options)
        assert not rayleigh_exceeds(matrix, total)
        assert total <= svd_norm(matrix) * (1 + 1e-9)


def test_circular_convolutions_too_large_to_materialise_stay_bounds() -> None:
    # Stride that does not divide, and output longer than the input: design 4.2.
    rng = random.Random(5)
    from lmtfast.backends.reference import Leaves
    from lmtfast.graph import Conv, ParameterRef, Region, RegionNode
    from lmtfast.verified.region import operator_norm_upper

    for _ in range(30):
        n, k = rng.randint(3, 7), rng.randint(1, 4)
        s, d, low, high = rng.randint(1, 3), rng.randint(1, 2), rng.randint(0, 3), rng.randint(0, 3)
        full = n + low + high - d * (k - 1)
        if max(low, high) > n or full < 1:
            continue
        out = (full - 1) // s + 1
        weight = dyadic((2, 2, k), rng)
        ref = ParameterRef("w")
        op = Conv("c", (2, n), (2, out), ref, (k,), (s,), ((low, high),), (d,), 1,
                  padding_mode="circular")  # fmt: skip
        region = Region("c", op.in_shape, op.out_shape, (RegionNode(op, (-1,)),))
        matrix = conv_matrix(weight.numpy(), (2, n), s, [(low, high)], d, padding_mode="circular")
        assert matrix.shape[0] == 2 * out
        for method in ("dense", "torus"):
            upper = operator_norm_upper(region, Leaves({ref: weight}), method=method).upper
            assert not rayleigh_exceeds(matrix, upper), (method, n, k, s, d, low, high)


def test_a_circular_stride_one_conv_is_tight_on_its_grid() -> None:
    weight = dyadic((3, 2, 3, 3), random.Random(1))
    matrix = conv_matrix(weight.numpy(), (2, 5, 4), padding=1, padding_mode="circular")
    module = nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular", bias=False).double().eval()
    module.weight.data = weight
    total = lf.certified_bound(module, (2, 5, 4), method="torus").total
    assert not rayleigh_exceeds(matrix, total)
    assert total <= svd_norm(matrix) * (1 + 1e-7)


def test_the_torus_is_a_looser_bound_and_never_a_smaller_one() -> None:
    rng = random.Random(2)
    for stride, dilation, groups in ((1, 1, 1), (2, 1, 1), (1, 2, 2), (3, 2, 1)):
        weight = dyadic((2 * groups, 2, 3, 3), rng)
        shape = (2 * groups, 6, 5)
        module = nn.Conv2d(2 * groups, 2 * groups, 3, stride, 1, dilation, groups, bias=False)
        module = module.double().eval()
        module.weight.data = weight
        matrix = conv_matrix(weight.numpy(), shape, stride, 1, dilation, groups)
        torus = lf.certified_bound(module, shape, method="torus").total
        assert not rayleigh_exceeds(matrix, torus)
        assert torus <= 2.0 * svd_norm(matrix)


@pytest.mark.parametrize("level", ["rigorous", "probabilistic", "estimate"])
def test_levels_say_what_they_are(level: str) -> None:
    weight = dyadic((3, 2, 3), random.Random(0))
    truth = svd_norm(conv_matrix(weight.numpy(), (2, 6), padding=1))
    bound = lf.conv_spectral_norm(weight, (2, 6), padding=1, level=level)
    assert bound.level == level
    assert bound.delta == {"rigorous": 0.0, "probabilistic": 2.0**-100, "estimate": 1.0}[level]
    assert isinstance(bound.total, torch.Tensor) == (level == "estimate")
    if level == "estimate":
        assert float(bound.total) <= truth * (1 + 1e-6)
    else:
        assert bound.total >= truth * (1 - 1e-13)
    assert float(bound.total) == pytest.approx(truth, rel=0.1)


def test_the_estimate_is_differentiable_in_a_weight_that_is_no_leaf() -> None:
    raw = nn.Parameter(dyadic((2, 2, 3, 3), random.Random(3)))
    total = lf.conv_spectral_norm(raw * 2, (2, 4, 4), padding=1, level="estimate").total
    total.backward()
    assert raw.grad is not None
    # sigma is homogeneous of degree one.
    assert float((raw.grad * raw.detach()).sum()) == pytest.approx(total.item(), rel=1e-6)


def test_spectral_norm_takes_linear_modules_only() -> None:
    folded = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.AvgPool2d(2)).eval()
    assert lf.spectral_norm(folded, (2, 6, 6)).total > 0
    for module in (nn.ReLU(), nn.Sequential(nn.Linear(3, 3), nn.ReLU()), nn.PReLU(),
                   nn.Sequential(nn.Linear(3, 3), nn.Sigmoid(), nn.Linear(3, 3)),
                   nn.MaxPool1d(2)):  # fmt: skip
        with pytest.raises(UnsupportedLayerError):
            lf.spectral_norm(module.eval(), (1, 3) if isinstance(module, nn.MaxPool1d) else (3,))


def test_wrong_arguments_are_refused() -> None:
    weight = torch.ones(1, 1, 3, 3)
    for error, call in (
        (ShapeError, lambda: lf.conv_spectral_norm(torch.ones(3, 3), (3,))),
        (ArgumentError, lambda: lf.conv_spectral_norm(weight, (1, 4, 4), padding_mode="same")),
        (ArgumentError, lambda: lf.conv_spectral_norm(
            weight, (1, 4, 4), padding_mode="circular", transposed=True)),
        (ArgumentError, lambda: lf.conv_spectral_norm(weight, (1, 4, 4), level="exact")),
        (UnsupportedLayerError, lambda: lf.conv_spectral_norm(weight, (1, 2, 2))),
        (UnsupportedLayerError, lambda: lf.conv_spectral_norm(weight, (2, 4, 4))),
        (NonFiniteError, lambda: lf.conv_spectral_norm(weight * math.nan, (1, 4, 4))),
        (TrainModeError, lambda: lf.spectral_norm(nn.Linear(2, 2), (2,))),
        (ArgumentError, lambda: lf.certified_bound(nn.Linear(2, 2).eval(), (2,), method="svd")),
        (ArgumentError, lambda: lf.certified_bound(
            nn.Linear(2, 2).eval(), (2,), level="probabilistic", delta=0.0)),
        (LmtfastError, lambda: lf.conv_spectral_norm(weight.int(), (1, 4, 4))),
    ):  # fmt: skip
        with pytest.raises(error):
            call()


@pytest.mark.parametrize("build", [WideResNet, Nested])
def test_probabilistic_bounds_hold_and_are_near_the_rigorous_ones(build: type) -> None:
    model = randomised(build(), 8)
    rigorous = lf.certified_bound(model, IMAGE)
    bound = lf.certified_bound(model, IMAGE, level="probabilistic")
    best, pairs = steepest(model, IMAGE)
    assert best * (1 - 1e-12) <= bound.total
    assert bool((pairs * (1 - 1e-12) <= bound.pairs).all())
    assert bound.total <= rigorous.total * 1.5
    for name, value in bound.per_operator.items():
        assert value >= rigorous.per_operator[name] * (1 - 1e-6)


def test_pairs_are_rounded_up() -> None:
    rng = np.random.default_rng(0)
    model = nn.Sequential(nn.Linear(3, 40, bias=False)).double().eval()
    model[0].weight.data = torch.from_numpy(rng.standard_normal((40, 3)))
    bound = lf.certified_bound(model, (3,))
    from fractions import Fraction

    pairs = bound.pairs.tolist()
    rows = [[Fraction(float(v)) for v in row] for row in model[0].weight.detach().numpy()]
    for i in range(40):
        for j in range(40):
            exact = sum(((a - b) ** 2 for a, b in zip(rows[i], rows[j], strict=True)), Fraction())
            assert Fraction(pairs[i][j]) ** 2 >= exact
    assert all(pairs[i][i] == 0.0 for i in range(40))


@pytest.mark.parametrize("exponent", [0, -600])
def test_rounding_of_folded_head_rows_is_bounded_at_every_scale(exponent: int) -> None:
    torch.manual_seed(1)
    norm = nn.BatchNorm1d(3)
    layers = (nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3), norm)
    model = nn.Sequential(*layers).double().eval()
    with torch.no_grad():
        norm.weight.uniform_(1.0, 2.0).mul_(2.0**exponent)
    bound = lf.certified_bound(model, (4,))
    assert bound.head_weight is not None
    assert bound.head_row_error is not None
    for row, error in zip(bound.head_weight.tolist(), bound.head_row_error.tolist(), strict=True):
        # A gain goes through four roundings, the folded entry through one more.
        assert error >= 5 * 2.0**-53 * math.hypot(*row) > 0.0
