# SPDX-License-Identifier: MIT
"""The separable engine against dense operators: never above, close on trained kernels."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lmtfast as lf
from lmtfast.backends import reference
from lmtfast.engines import polyphase, separable
from lmtfast.engines.operator import OperatorEngine
from lmtfast.graph import Region
from lmtfast.weights import Weights, named_tensors
from tests.engine_cases import (
    REF,
    conv_region,
    dense_norm,
    random_case,
    run,
    smooth_weight,
    start,
    weights_of,
)

# Float64 rounding of a Rayleigh quotient, not slack of the method.
ROUNDING = 1e-12
STEPS = 150


@pytest.mark.parametrize(("axes", "trials"), [(1, 20), (2, 24), (3, 5)])
def test_is_a_lower_estimate_in_every_step(axes: int, trials: int) -> None:
    rng = np.random.default_rng(axes)
    near = judged = 0
    for trial in range(trials):
        case = random_case(rng, axes)
        if case is None:
            continue
        state, weights = start(separable, case.region, seed=trial), weights_of(case.weight)
        for _ in range(60):
            result = separable.step(case.region, weights, state, update=True)
            assert result.sigma <= case.norm * (1 + ROUNDING), case.region
            state = result.state
        judged += 1
        near += int(result.sigma >= case.norm * (1 - 1e-2))
    # At most three channels per group: the low-rank iterate is general, power iteration slow.
    assert near >= 0.9 * judged
    assert judged >= trials // 2


def test_never_lowers_sigma() -> None:
    rng = np.random.default_rng(11)
    for trial in range(12):
        case = random_case(rng, 2)
        if case is None:
            continue
        state, last = start(separable, case.region, seed=trial), 0.0
        for _ in range(30):
            result = separable.step(case.region, weights_of(case.weight), state, update=True)
            assert result.sigma >= last * (1 - ROUNDING)
            state, last = result.state, result.sigma


@pytest.mark.parametrize("extent", [8, 12])
@pytest.mark.parametrize("stride", [1, 2])
def test_within_two_percent_on_low_frequency_kernels(extent: int, stride: int) -> None:
    weight = smooth_weight(np.random.default_rng(stride), 20, 16)
    region = conv_region(weight, (16, extent, extent), stride=(stride, stride))
    sigma, _ = run(separable, region, weight, start(separable, region), STEPS)
    operator = OperatorEngine()
    want, _ = run(operator, region, weight, start(operator, region), 3000)
    assert want * 0.98 <= sigma <= want * (1 + ROUNDING)


def trained_network() -> nn.Module:
    """A small network with batch norm, trained on enlarged digits for a minute."""
    from sklearn.datasets import load_digits

    data = load_digits()
    x = torch.tensor(data.images / 16, dtype=torch.float32)[:, None]
    y = torch.tensor(data.target)
    x = F.interpolate(x, size=(32, 32), mode="bilinear")
    x = x + 0.1 * torch.randn(x.shape)
    layers, last = [], 1
    for width, stride in ((16, 1), (16, 2), (32, 1), (32, 2), (64, 1)):
        layers += [nn.Conv2d(last, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)]
        layers += [nn.ReLU()]
        last = width
    model = nn.Sequential(*layers, nn.AvgPool2d(8), nn.Flatten(), nn.Linear(last, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    for _ in range(3):
        for batch in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
    return model.double().eval()


@pytest.mark.slow
def test_within_two_percent_on_a_trained_network() -> None:
    torch.manual_seed(0)
    model = trained_network()
    weights = Weights(named_tensors(model), dtype=torch.float64)
    regions = [r for r in lf.trace(model, (1, 32, 32)).operators if r.kind == "conv"]
    assert len(regions) == 5
    for region in regions:
        assert isinstance(region, Region)
        assert separable.refusal(region) is None
        values, operator = {}, OperatorEngine()
        for engine, steps in ((separable, STEPS), (operator, 1500)):
            state = start(engine, region)
            for _ in range(steps):
                state = engine.step(region, weights, state, update=True).state
            values[engine] = engine.step(region, weights, state, update=False).sigma.item()
        truth = values[operator]
        assert truth * 0.98 <= values[separable] <= truth * 1.0005, region.name


def test_windows_and_fold_are_adjoint() -> None:
    generator = torch.Generator().manual_seed(0)
    options = itertools.product(((1, 1), (2, 3)), ((1, 1), (2, 1)), ("zeros", "circular"))
    for stride, dilation, mode in options:
        weight = torch.zeros(1, 2, 3, 2)
        region = conv_region(
            weight, (2, 7, 6), stride=stride, dilation=dilation, padding=((2, 1), (0, 3)),
            padding_mode=mode,
        )  # fmt: skip
        form = polyphase.conv_form(region)
        h = torch.randn(1, 42, 2, generator=generator, dtype=torch.float64)
        windows = separable._windows(form, h)
        other = torch.randn(windows.shape, generator=generator, dtype=torch.float64)
        left = (windows * other).sum()
        right = (h * separable._fold(form, other, 2)).sum()
        torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", ["zeros", "circular"])
@pytest.mark.parametrize("transposed", [False, True])
def test_sigma_is_the_image_norm_of_its_iterate(transposed: bool, mode: str) -> None:
    if transposed and mode == "circular":
        mode = "zeros"
    rng = np.random.default_rng(4)
    for groups, stride in ((1, 1), (2, 2)):
        weight = torch.from_numpy(rng.standard_normal((4, 6 // groups, 3, 3))).requires_grad_()
        if transposed:
            weight = torch.from_numpy(rng.standard_normal((6, 4 // groups, 3, 3))).requires_grad_()
        region = conv_region(
            weight, (6, 7, 8), stride=(stride, stride), groups=groups, transposed=transposed,
            padding_mode=mode,
        )  # fmt: skip
        state = start(separable, region)
        for _ in range(3):
            state = separable.step(region, weights_of(weight.detach()), state, update=True).state
        result = separable.step(region, weights_of(weight.detach()), state, update=False)
        form = polyphase.conv_form(region)
        h, a = separable._unpack(form, state)
        values = []
        for g in range(groups):
            v = torch.zeros(groups, form.channels, h.shape[1], dtype=torch.float64)
            v[g] = a[g] @ h[g].mT
            torch.testing.assert_close(v.norm().item(), 1.0, rtol=1e-12, atol=0)
            v = v.reshape(-1, *form.in_extent)
            if transposed:
                image = reference.rmatvec(region, weights_of(weight.detach()), v)
                # The gradient of |A^T v| is that of <v, A u> with u = A^T v / |A^T v|.
                values.append((image.norm(), v, image))
            else:
                values.append((reference.matvec(region, weights_of(weight), v).norm(), v, None))
        norms = torch.stack([v[0] for v in values])
        torch.testing.assert_close(result.sigma, norms.max().detach(), rtol=1e-12, atol=0)
        got = separable.vjp(region, {REF: weight}, result.saved)[REF]
        if transposed:
            norm, v, image = values[int(norms.argmax())]
            want = reference.weight_vjp(region, {REF: weight}, v, image / norm)[REF]
        else:
            (want,) = torch.autograd.grad(norms.max(), weight)
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_depthwise_convolutions_need_one_pattern_per_group() -> None:
    weight = torch.from_numpy(np.random.default_rng(0).standard_normal((6, 1, 3, 3)))
    region = conv_region(weight, (6, 6, 6), groups=6)
    assert separable.state_size(region) == 6 * (36 + 1)
    sigma, _ = run(separable, region, weight, start(separable, region), 2000)
    assert sigma == pytest.approx(dense_norm(region, weight), rel=1e-6)


def test_circular_convolutions_are_exact_too() -> None:
    weight = smooth_weight(np.random.default_rng(2), 4, 3)
    for stride, extent in ((1, 6), (2, 7)):
        region = conv_region(
            weight, (3, extent, extent), stride=(stride, stride), padding_mode="circular"
        )
        sigma, _ = run(separable, region, weight, start(separable, region), 3000)
        want = dense_norm(region, weight)
        assert want * 0.999 <= sigma <= want * (1 + ROUNDING)


def test_rescan_starts_from_the_leading_vector() -> None:
    rng = np.random.default_rng(6)
    for groups, transposed in ((1, False), (2, False), (1, True)):
        weight = torch.from_numpy(rng.standard_normal((8, 8 // groups, 3, 3)))
        region = conv_region(weight, (8, 7, 7), groups=groups, transposed=transposed)
        before, state = run(separable, region, weight, start(separable, region), 5)
        state = separable.rescan(region, weights_of(weight), state)
        after = separable.step(region, weights_of(weight), state, update=False).sigma.item()
        want = dense_norm(region, weight)
        assert before < after <= want * (1 + ROUNDING)
        assert after >= want * (1 - 1e-6)


def test_refuses_odd_geometry() -> None:
    weight = torch.zeros(2, 2, 2, 2)
    long = conv_region(weight, (2, 2, 2), padding=((3, 3), (3, 3)), padding_mode="circular")
    assert "circular" in separable.refusal(long)
    negative = conv_region(weight, (2, 6, 6), padding=((-1, 0), (0, 0)))
    assert "negative" in separable.refusal(negative)
