# SPDX-License-Identifier: MIT
"""The contract of every engine: scale, warm start, state, gradients, zero, NaN, extreme weights."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

import lmtfast as lf
from lmtfast.engines import ENGINES, choose_engine, get_engine
from lmtfast.errors import ArgumentError
from lmtfast.graph import Region
from tests.conftest import TOLERANCE
from tests.engine_cases import REF, conv_region, dense_norm, run, start, weights_of

GEOMETRIES = {
    "same": {},
    "stride": {"stride": (2, 2)},
    "dilation": {"dilation": (2, 1)},
    "groups": {"groups": 2},
    "transposed": {"transposed": True, "stride": (2, 2), "output_padding": (1, 0)},
    "uneven": {"padding": ((0, 2), (1, 0)), "stride": (1, 3)},
}
# Estimates that no state can push above the true norm.
LOWER = ("operator", "separable")
ALL = [(e, g) for e in ENGINES for g in GEOMETRIES]


def case(geometry: str, dtype: torch.dtype = torch.float64) -> tuple[Region, torch.Tensor]:
    options = GEOMETRIES[geometry]
    generator = torch.Generator().manual_seed(3)
    shape = (4, 4 // options.get("groups", 1), 3, 3)
    weight = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    return conv_region(weight, (4, 6, 5), **options), weight


def sigma_of(engine, region: Region, weight: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    return engine.step(region, weights_of(weight), state, update=False).sigma


@pytest.mark.parametrize(("name", "geometry"), ALL)
def test_estimates_stand_on_the_promised_side(name: str, geometry: str) -> None:
    engine, (region, weight) = get_engine(name), case(geometry)
    assert engine.refusal(region) is None
    norm, weights = dense_norm(region, weight), weights_of(weight)
    if name in LOWER:
        for seed in range(2):
            state = start(engine, region, seed=seed)
            for _ in range(10):
                result = engine.step(region, weights, state, update=True)
                assert result.sigma <= norm * (1 + 1e-12)
                state = result.state
    state = engine.rescan(region, weights, start(engine, region))
    sigma, _ = run(engine, region, weight, state, 500)
    assert sigma >= norm * (1 - 1e-6)
    assert sigma <= norm * (1.6 if name == "symbol" else 1 + 1e-12)


@pytest.mark.parametrize(("name", "geometry"), ALL)
def test_homogeneous(name: str, geometry: str) -> None:
    engine, (region, weight) = get_engine(name), case(geometry)
    state = start(engine, region)
    sigma = sigma_of(engine, region, weight, state)
    assert sigma > 0
    assert torch.equal(sigma_of(engine, region, 2.0**-7 * weight, state), 2.0**-7 * sigma)
    assert torch.equal(sigma_of(engine, region, -weight, state), sigma)
    scaled = sigma_of(engine, region, -3.1 * weight, state)
    torch.testing.assert_close(scaled, 3.1 * sigma, rtol=1e-13, atol=0)
    after = [run(engine, region, c * weight, state, 5)[0] / c for c in (1.0, 0.3)]
    assert after[0] == pytest.approx(after[1], rel=1e-10)


@pytest.mark.parametrize(("name", "geometry"), ALL)
def test_a_warm_start_never_lowers_sigma(name: str, geometry: str) -> None:
    engine, (region, weight) = get_engine(name), case(geometry)
    state, last = start(engine, region), 0.0
    for _ in range(25):
        result = engine.step(region, weights_of(weight), state, update=True)
        assert result.sigma >= last * (1 - 1e-13)
        state, last = result.state, result.sigma.item()
    # Following a small change of the weights starts close to where it ends.
    moved = weight + 1e-3 * torch.ones_like(weight)
    assert sigma_of(engine, region, moved, state) >= last * (1 - 1e-2)


@pytest.mark.parametrize(("name", "geometry"), ALL)
def test_state_changes_only_when_asked(name: str, geometry: str) -> None:
    engine, (region, weight) = get_engine(name), case(geometry)
    state = start(engine, region)
    assert state.shape == (engine.state_size(region),)
    before, kernel = state.clone(), weight.clone()
    still = engine.step(region, weights_of(weight), state, update=False)
    assert torch.equal(still.state, before)
    moved = engine.step(region, weights_of(weight), state, update=True)
    if name == "operator":  # reads sigma at the end of a step, which only raises it
        assert moved.sigma >= still.sigma
    else:
        assert torch.equal(still.sigma, moved.sigma)
    assert torch.equal(state, before)
    assert moved.state.shape == state.shape
    assert moved.state.dtype == state.dtype
    assert not torch.equal(moved.state, before)
    assert moved.sigma.shape == ()
    kept = [t.clone() for t in moved.saved]
    engine.vjp(region, {REF: weight}, moved.saved)
    assert all(torch.equal(a, b) for a, b in zip(moved.saved, kept, strict=True))
    assert torch.equal(state, before)
    assert torch.equal(weight, kernel)


@pytest.mark.parametrize(("name", "geometry"), ALL)
def test_the_scale_of_the_state_is_irrelevant(name: str, geometry: str) -> None:
    engine, (region, weight) = get_engine(name), case(geometry)
    state = start(engine, region)
    a, b = (engine.step(region, weights_of(weight), c * state, update=True) for c in (1.0, 1e-12))
    torch.testing.assert_close(a.sigma, b.sigma, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("name", "geometry"), ALL)
def test_gradient_at_a_fixed_state(name: str, geometry: str) -> None:
    engine, (region, weight) = get_engine(name), case(geometry)
    _, state = run(engine, region, weight, start(engine, region), 3)
    result = engine.step(region, weights_of(weight), state, update=False)
    gradient = engine.vjp(region, {REF: weight}, result.saved)[REF]
    # Sigma is the length of a fixed linear image of the weight, so Euler's identity is exact ...
    torch.testing.assert_close((gradient * weight).sum(), result.sigma, rtol=1e-12, atol=0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        direction = torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
        h = 1e-6
        ends = [sigma_of(engine, region, weight + s * h * direction, state) for s in (1.0, -1.0)]
        # ... and central differences agree to the third order.
        want = ((ends[0] - ends[1]) / (2 * h)).item()
        assert (gradient * direction).sum().item() == pytest.approx(want, rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("name", ENGINES)
def test_gradcheck_through_the_network_bound(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 2, 3, stride=2),
        nn.Flatten(), nn.Linear(8, 2),
    )  # fmt: skip
    model = model.double().eval()
    model[1].running_var.uniform_(0.5, 2.0)
    bound = lf.NetworkBound(model, (1, 5, 5), engine=name)
    assert name in bound.plan.engines
    parameters = [p for n, p in model.named_parameters() if "bias" not in n]

    def total(*_: torch.Tensor) -> torch.Tensor:
        return bound(update=False).total

    assert torch.autograd.gradcheck(total, parameters)


@pytest.mark.parametrize(("name", "geometry"), ALL)
def test_zero_weights(name: str, geometry: str) -> None:
    engine, (region, weight) = get_engine(name), case(geometry, torch.float32)
    state, zero = start(engine, region, dtype=torch.float32), torch.zeros_like(weight)
    result = engine.step(region, weights_of(zero), state, update=True)
    assert result.sigma.item() == 0.0
    assert result.state.isfinite().all()
    gradient = engine.vjp(region, {REF: zero}, result.saved)[REF]
    assert gradient.isfinite().all()


@pytest.mark.parametrize("name", ENGINES)
def test_recovers_from_zero_weights(name: str) -> None:
    # Residual branches are often initialised to zero: the iterate must survive it.
    engine, (region, weight) = get_engine(name), case("groups")
    _, state = run(engine, region, torch.zeros_like(weight), start(engine, region), 5)
    assert run(engine, region, weight, state, 300)[0] >= 0.99 * dense_norm(region, weight)


@pytest.mark.parametrize("name", ENGINES)
def test_weights_that_are_not_finite_show(name: str) -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, groups=2), nn.ReLU(), nn.Flatten())
    bound = lf.NetworkBound(model, (4, 6, 6), engine=name)
    good = bound.converge(20).total.item()
    kept = model[0].weight.detach().clone()
    for bad in (math.nan, math.inf):
        with torch.no_grad():
            model[0].weight[0, 0, 1, 1] = bad
        total = bound().total.item()
        assert math.isnan(total) or total == bad
        assert bound.state.iterates.isfinite().all()
        with torch.no_grad():
            model[0].weight.copy_(kept)
        assert bound.converge(60).total.item() >= good * (1 - 1e-4)


@pytest.mark.parametrize(("name", "geometry"), ALL)
def test_float32_follows_float64(name: str, geometry: str) -> None:
    engine, (region, weight) = get_engine(name), case(geometry)
    state = start(engine, region)
    for steps in (0, 3):
        wide = run(engine, region, weight, state, steps)[0]
        narrow = run(engine, region, weight.float(), state.float(), steps)[0]
        assert narrow == pytest.approx(wide, rel=TOLERANCE[torch.float32].rtol * 10 ** (steps > 0))
    # Where they end does not depend on the precision of the way.
    ends = []
    for dtype in (torch.float64, torch.float32):
        fresh = engine.rescan(region, weights_of(weight.to(dtype)), state.to(dtype))
        ends.append(run(engine, region, weight.to(dtype), fresh, 100)[0])
    assert ends[1] == pytest.approx(ends[0], rel=1e-4)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize(("name", "geometry"), ALL)
def test_extreme_scales_in_float32(name: str, geometry: str, scale: float) -> None:
    engine, (region, weight) = get_engine(name), case(geometry, torch.float32)
    state = start(engine, region, dtype=torch.float32)
    plain = run(engine, region, weight, state, 30)[0]
    extreme, end = run(engine, region, scale * weight, state, 30)
    assert extreme / scale == pytest.approx(plain, rel=1e-4)
    result = engine.step(region, weights_of(scale * weight), end, update=False)
    gradient = engine.vjp(region, {REF: scale * weight}, result.saved)[REF]
    assert gradient.isfinite().all()
    assert gradient.norm() > 0.1


@pytest.mark.parametrize(("name", "geometry"), ALL)
def test_steps_never_wait_for_the_host(name: str, geometry: str) -> None:
    # A tensor without data cannot be read: any synchronisation or data-dependent shape raises.
    engine, (region, weight) = get_engine(name), case(geometry, torch.float32)
    state = torch.empty(engine.state_size(region), device="meta")
    result = engine.step(region, weights_of(weight.to("meta")), state, update=True)
    gradient = engine.vjp(region, {REF: weight.to("meta")}, result.saved)[REF]
    assert gradient.shape == weight.shape
    assert result.state.shape == state.shape


def test_choice_of_engine() -> None:
    def choice(weight: torch.Tensor, n: int, engine: str = "auto", **geometry) -> tuple[str, str]:
        return choose_engine(conv_region(weight, (weight.shape[1], n, n), **geometry), engine)

    narrow, wide = (torch.zeros(c, c, 3, 3, device="meta") for c in (16, 512))
    assert [choice(wide, n)[0] for n in (4, 8, 9, 32)] == ["operator"] * 2 + ["symbol"] * 2
    # A stride shrinks the map, and a step on few channels is cheap on any.
    assert choice(wide, 16, stride=(2, 2)) == ("operator", "64 positions")
    assert choice(narrow, 32) == ("operator", "4.72 million products")
    assert choice(narrow, 9, "separable")[0] == "separable"
    name, reason = choice(wide, 9, padding_mode="reflect")
    assert name == "operator"
    assert reason.startswith("symbol: reflect")
    name, reason = choice(narrow, 9, "symbol", stride=(2, 2), padding_mode="circular")
    assert name == "operator"
    assert reason.startswith("symbol: circular")
    with pytest.raises(ArgumentError, match="an engine, one of auto, operator, symbol, separable"):
        get_engine("fourier")


def test_all_engines_agree_on_pointwise_convolutions() -> None:
    weight = torch.from_numpy(np.random.default_rng(0).standard_normal((5, 7, 1, 1)))
    region = conv_region(weight, (7, 4, 4))
    want = np.linalg.norm(weight.numpy()[:, :, 0, 0], 2)
    for name in ENGINES:
        engine = get_engine(name)
        sigma, _ = run(engine, region, weight, start(engine, region), 1500)
        assert sigma == pytest.approx(want, rel=1e-8)
