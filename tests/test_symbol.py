# SPDX-License-Identifier: MIT
"""The symbol engine against dense zero-padded operators and against fine grids of frequencies."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lmtfast.engines import polyphase, symbol
from lmtfast.engines.frequency import improve, response_phases
from lmtfast.graph import Conv, Linear, Region, RegionNode
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

# Alternation is a power method: a nearly double singular value takes thousands of steps.
STEPS = 3000


def symbols(region: Region, weight: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """A(w) from its definition, tap by tap. Shape ``(G, N, rows, P * C)``."""
    form = polyphase.conv_form(region)
    op = region.primitive
    assert form is not None
    assert isinstance(op, Conv)
    kernel = weight.reshape(form.groups, form.rows, form.channels, *form.kernel)
    blocks = torch.zeros(
        form.groups, len(w), form.rows, *form.stride, form.channels, dtype=torch.complex128
    )
    for t in np.ndindex(*form.kernel):
        reads = [d * i - p[0] for i, d, p in zip(t, form.dilation, form.padding, strict=True)]
        q = torch.tensor([e // s for e, s in zip(reads, form.stride, strict=True)])
        phase = tuple(e % s for e, s in zip(reads, form.stride, strict=True))
        factor = torch.exp(-1j * (w @ q.double()))
        blocks[(slice(None), slice(None), slice(None), *phase)] += (
            kernel[(slice(None), slice(None), slice(None), *t)][:, None] * factor[:, None, None]
        )
    return blocks.flatten(3)


def supremum(region: Region, weight: torch.Tensor, points: int = 129) -> float:
    """Maximum over ``points`` frequencies per axis; half of the first, since weights are real."""
    form = polyphase.conv_form(region)
    assert form is not None
    full = torch.linspace(-math.pi, math.pi, points, dtype=torch.float64)
    grid = torch.cartesian_prod(full[points // 2 :], *[full] * (form.axes - 1))
    grid = grid.reshape(-1, form.axes)
    best = 0.0
    for part in grid.split(512):
        a = symbols(region, weight, part)
        gram = a @ a.mH if a.shape[-2] <= a.shape[-1] else a.mH @ a
        best = max(best, torch.linalg.eigvalsh(gram)[..., -1].max().sqrt().item())
    return best


@pytest.mark.parametrize(("axes", "trials"), [(1, 60), (2, 70), (3, 8)])
def test_bounds_zero_padded_operators_after_a_rescan(axes: int, trials: int) -> None:
    rng = np.random.default_rng(axes)
    judged = 0
    for trial in range(trials):
        case = random_case(rng, axes)
        if case is None:
            continue
        judged += 1
        state = start(symbol, case.region, seed=trial)
        state = symbol.rescan(case.region, weights_of(case.weight), state)
        sigma, _ = symbol_reaches(case, state)
        assert sigma >= case.norm * (1 - 1e-6), (case.region, sigma, case.norm)
    assert judged > 0.7 * trials


def symbol_reaches(case, state: torch.Tensor) -> tuple[float, torch.Tensor]:
    """Steps until the dense norm is reached, or STEPS of them."""
    weights = weights_of(case.weight)
    for _ in range(STEPS):
        result = symbol.step(case.region, weights, state, update=True)
        if result.sigma >= case.norm * (1 - 1e-6):
            break
        state = result.state
    return result.sigma.item(), state


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("channels", [(8, 8), (16, 24)])
def test_converges_to_the_supremum_of_structured_kernels(channels, stride: int) -> None:
    weight = smooth_weight(np.random.default_rng(stride), *channels)
    region = conv_region(weight, (channels[1], 12, 12), stride=(stride, stride))
    sigma, _ = run(symbol, region, weight, start(symbol, region), 400)
    want = supremum(region, weight, 129 if stride == 1 else 65)
    assert sigma == pytest.approx(want, rel=1e-5)
    assert sigma >= want * (1 - 1e-9)


def test_rescan_reaches_the_supremum_of_noise() -> None:
    for seed in range(4):
        weight = torch.from_numpy(np.random.default_rng(seed).standard_normal((6, 5, 3, 3)))
        region = conv_region(weight, (5, 9, 9))
        state = symbol.rescan(region, weights_of(weight), start(symbol, region, seed=seed))
        sigma, _ = run(symbol, region, weight, state, 1000)
        assert sigma >= supremum(region, weight, 65) * (1 - 1e-9)


def test_never_exceeds_the_supremum() -> None:
    rng = np.random.default_rng(5)
    for _ in range(12):
        case = random_case(rng, 1)
        if case is None:
            continue
        sigma, _ = run(symbol, case.region, case.weight, start(symbol, case.region), 50)
        # Bernstein: samples at a spacing of 2 pi / N miss at most a fraction d pi / N.
        form = polyphase.conv_form(case.region)
        spread = 1 + sum(polyphase.degrees(form))
        assert sigma <= supremum(case.region, case.weight, 2001) / (1 - spread * math.pi / 2000)


@pytest.mark.parametrize("groups", [1, 2])
def test_alternation_is_monotone(groups: int) -> None:
    for seed in range(4):
        rng = np.random.default_rng(seed)
        weight = torch.from_numpy(rng.standard_normal((4, 6 // groups, 3, 3)))
        region = conv_region(weight, (6, 8, 8), groups=groups)
        state, last = start(symbol, region, seed=seed), 0.0
        for _ in range(40):
            result = symbol.step(region, weights_of(weight), state, update=True)
            assert result.sigma >= last * (1 - 1e-14)
            state, last = result.state, result.sigma


def test_improving_a_frequency_never_lowers_the_response() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.zeros(1, 1, 3, 4)
    form = polyphase.conv_form(conv_region(weight, (1, 9, 9), padding=((1, 1), (1, 2))))
    q = torch.randn(1, 500, 12, generator=generator, dtype=torch.complex128)
    w = torch.rand(1, 500, 2, generator=generator, dtype=torch.float64) * 6
    table = polyphase.tap_table(form, w.device)[0]
    value = lambda w: (q * response_phases(w, table)).sum(-1).abs()  # noqa: E731
    better = improve(form, q, w)
    assert (value(better) >= value(w) * (1 - 1e-14)).all()
    fine = torch.linspace(0, 2 * math.pi, 121, dtype=torch.float64)
    fine = torch.cartesian_prod(fine, fine)
    best = (response_phases(fine, table) @ q[0].T).abs().amax(0)
    for _ in range(3):
        better = improve(form, q, better)
    # Two peaks of nearly the same height may be ranked wrongly by the coarse grid.
    assert (value(better)[0] >= best * 0.97).all()
    assert (value(better)[0] >= best * (1 - 1e-6)).double().mean() > 0.9


def test_gradient_is_that_of_the_response_at_fixed_vectors() -> None:
    rng = np.random.default_rng(2)
    for stride, groups in ((1, 1), (2, 1), (1, 2), (3, 2)):
        weight = torch.from_numpy(rng.standard_normal((4, 6 // groups, 3, 3))).requires_grad_()
        region = conv_region(weight, (6, 9, 9), stride=(stride, stride), groups=groups)
        state = start(symbol, region)
        for _ in range(5):
            state = symbol.step(region, weights_of(weight.detach()), state, update=True).state
        result = symbol.step(region, weights_of(weight.detach()), state, update=False)
        form = polyphase.conv_form(region)
        w, x, _ = symbol._unpack(form, state)
        table, phase = polyphase.tap_table(form, w.device)
        z = symbol._tap_vectors(form, w, x, table, phase)
        matrix = weight.reshape(groups, form.rows, -1).to(torch.complex128)
        values = torch.linalg.vector_norm(torch.einsum("grn,gfn->gfr", matrix, z), dim=-1)
        (want,) = torch.autograd.grad(values.max(), weight)
        got = symbol.vjp(region, {REF: weight}, result.saved)[REF]
        torch.testing.assert_close(result.sigma, values.max().detach(), rtol=1e-12, atol=0)
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_gradient_is_that_of_the_supremum_once_converged() -> None:
    rng = np.random.default_rng(3)
    weight = smooth_weight(rng, 5, 4)
    region = conv_region(weight, (4, 8, 8))
    _, state = run(symbol, region, weight, start(symbol, region), 2000)
    result = symbol.step(region, weights_of(weight), state, update=False)
    gradient = symbol.vjp(region, {REF: weight}, result.saved)[REF]
    for _ in range(4):
        direction = torch.from_numpy(rng.standard_normal(weight.shape))
        h = 1e-5
        ends = [
            run(symbol, region, weight + s * h * direction, state, 2000)[0] for s in (1.0, -1.0)
        ]
        want = (gradient * direction).sum().item()
        assert (ends[0] - ends[1]) / (2 * h) == pytest.approx(want, rel=1e-6, abs=1e-8)


def two_peaks() -> tuple[Region, torch.Tensor]:
    """Two channels apart: a constant response 1, and 1.5 at the highest frequency alone."""
    weight = torch.zeros(2, 2, 3, 3, dtype=torch.float64)
    weight[0, 0, 1, 1] = 1.0
    high = torch.tensor([-1.0, 2.0, -1.0], dtype=torch.float64) / 4
    weight[1, 1] = 1.5 * high[:, None] * high
    return conv_region(weight, (2, 8, 8)), weight


def stuck(region: Region) -> torch.Tensor:
    """A state whose candidates all sit on the constant response."""
    form = polyphase.conv_form(region)
    x = torch.zeros(1, symbol.CANDIDATES, 2, dtype=torch.complex128)
    x[..., 0] = 1.0
    w = torch.zeros(1, symbol.CANDIDATES, 2, dtype=torch.float64)
    return symbol.pack(w, x, torch.zeros(1, form.axes, dtype=torch.float64))


def test_rescan_leaves_a_dominated_candidate() -> None:
    region, weight = two_peaks()
    state = stuck(region)
    assert symbol.step(region, weights_of(weight), state, update=False).sigma.item() == 1.0
    state = symbol.rescan(region, weights_of(weight), state)
    sigma = symbol.step(region, weights_of(weight), state, update=False).sigma.item()
    assert sigma == pytest.approx(1.5, rel=1e-9)


def test_the_explorer_finds_a_dominating_frequency_without_a_rescan() -> None:
    region, weight = two_peaks()
    sigma, _ = run(symbol, region, weight, stuck(region), 1)
    assert sigma == pytest.approx(1.0)
    state = stuck(region)
    for _ in range(100):
        state = symbol.step(region, weights_of(weight), state, update=True).state
    sigma = symbol.step(region, weights_of(weight), state, update=False).sigma.item()
    assert sigma == pytest.approx(1.5, rel=1e-6)


def test_rescan_never_lowers_sigma() -> None:
    rng = np.random.default_rng(8)
    for trial in range(8):
        case = random_case(rng, 2)
        if case is None:
            continue
        weights = weights_of(case.weight)
        before, state = run(symbol, case.region, case.weight, start(symbol, case.region), 60)
        state = symbol.rescan(case.region, weights, state)
        after = symbol.step(case.region, weights, state, update=False).sigma.item()
        assert after >= before * (1 - 1e-13), trial


@pytest.mark.parametrize(
    ("kernel", "want"),
    [
        (torch.ones(3, 3), 9.0),
        (torch.tensor([[1.0, -1.0], [-1.0, 1.0]]), 4.0),
        (torch.tensor([[0.0, 0, 0], [0, 3, 0], [0, 0, 0]]), 3.0),
        (torch.tensor([[1.0, 0, -1.0]]), 2.0),
    ],
)
def test_closed_forms(kernel: torch.Tensor, want: float) -> None:
    weight = kernel.double()[None, None]
    region = conv_region(weight, (1, 9, 9), padding=((1, 1), (1, 1)))
    state = symbol.rescan(region, weights_of(weight), start(symbol, region))
    assert run(symbol, region, weight, state, 200)[0] == pytest.approx(want, rel=1e-12)


def test_the_image_size_changes_nothing() -> None:
    weight = torch.from_numpy(np.random.default_rng(0).standard_normal((3, 4, 3, 3)))
    small, large = (conv_region(weight, (4, n, n)) for n in (5, 10_000))
    assert symbol.state_size(small) == symbol.state_size(large)
    state = start(symbol, small)
    a = symbol.step(small, weights_of(weight), state, update=True)
    b = symbol.step(large, weights_of(weight), state, update=True)
    assert torch.equal(a.sigma, b.sigma)
    assert torch.equal(a.state, b.state)


def test_identity_and_gain_join_the_kernel() -> None:
    weight = 0.1 * torch.from_numpy(np.random.default_rng(1).standard_normal((3, 3, 3, 3)))
    region = conv_region(weight, (3, 8, 8), gain=0.5, identity_gain=1.0)
    acting = 0.5 * weight
    for c in range(3):
        acting[c, c, 1, 1] += 1.0
    plain = conv_region(acting, (3, 8, 8))
    state = start(symbol, region)
    assert run(symbol, region, weight, state, 80)[0] == run(symbol, plain, acting, state, 80)[0]


def test_circular_convolutions_that_wrap_once() -> None:
    for seed, (n, s) in enumerate(((6, 1), (6, 2), (9, 3), (4, 1))):
        weight = torch.from_numpy(np.random.default_rng(seed).standard_normal((3, 2, 3, 3)))
        region = conv_region(weight, (2, n, n), stride=(s, s), padding_mode="circular")
        assert symbol.refusal(region) is None
        state = symbol.rescan(region, weights_of(weight), start(symbol, region))
        sigma, _ = run(symbol, region, weight, state, STEPS)
        assert sigma >= dense_norm(region, weight) * (1 - 1e-6)


def test_refuses_what_the_symbol_does_not_bound() -> None:
    weight = torch.zeros(2, 2, 3, 3)
    wider = conv_region(weight, (2, 6, 6), padding=((2, 2), (2, 2)), padding_mode="circular")
    uneven = conv_region(weight, (2, 7, 7), stride=(2, 2), padding_mode="circular")
    for region in (wider, uneven):
        assert "circular" in symbol.refusal(region)
    matrix = Region("fc", (2,), (2,), (RegionNode(Linear("fc", (2,), (2,), REF), (-1,)),))
    assert "convolution" in symbol.refusal(matrix)
    assert symbol.refusal(conv_region(weight, (2, 6, 6))) is None
