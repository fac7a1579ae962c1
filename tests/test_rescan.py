# SPDX-License-Identifier: MIT
"""Rescans of the symbol engine: the compiled power vectors, and the search of a whole network."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lmtfast.backends import native
from lmtfast.engines import frequency, polyphase, symbol
from lmtfast.errors import DtypeError, ShapeError
from lmtfast.estimation import NetworkBound
from tests.engine_cases import conv_region, random_case, start, weights_of

BACKENDS = ["reference", "native"]


def problem(
    groups: int, rows: int, channels: int, taps: int, phases: int, n: int, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Kernels, phases of taps, terms and a start, in float32."""
    generator = torch.Generator().manual_seed(seed)
    acting = 2 * torch.rand(groups, rows, channels, taps, generator=generator) - 1
    phase = torch.randint(0, phases, (taps,), generator=generator)
    angle = 6.3 * torch.rand(n, taps, generator=generator)
    terms = torch.polar(torch.ones_like(angle), angle)
    return acting, phase, terms, frequency.start_vector(phases * channels, acting)


@pytest.mark.parametrize(
    "sizes",
    [
        (1, 1, 1, 1, 1, 1), (1, 3, 5, 9, 1, 45), (3, 7, 2, 4, 4, 17), (2, 16, 16, 9, 1, 16),
        (1, 33, 10, 27, 8, 33), (4, 1, 6, 3, 2, 5), (1, 520, 512, 1, 1, 2),
    ],
)  # fmt: skip
@pytest.mark.parametrize("steps", [0, 1, 7])
def test_power_vectors_of_both_backends_agree(sizes: tuple[int, ...], steps: int) -> None:
    args = problem(*sizes)
    want_norm, want_x = frequency.power_vectors(*args, steps)
    norm, x = native.power_vectors(*args, steps)
    torch.testing.assert_close(norm, want_norm, rtol=2e-5, atol=0)
    torch.testing.assert_close(x, want_x, rtol=0, atol=5e-5)
    torch.testing.assert_close(
        torch.linalg.vector_norm(x, dim=-1), torch.ones_like(norm), rtol=1e-5, atol=0
    )


def test_power_vectors_are_those_of_the_dense_symbol() -> None:
    acting, phase, terms, first = problem(2, 4, 3, 6, 2, 3)
    symbols = torch.zeros(2, 3, 4, 2, 3, dtype=torch.complex128)
    for t in range(6):
        part = acting[:, None, :, :, t].double() * terms[:, t, None, None]
        symbols[:, :, :, phase[t]] += part
    symbols = symbols.flatten(3)
    x = first.to(torch.complex128).expand(2, 3, 6)[..., None]
    for _ in range(4):
        x = symbols.mH @ (symbols @ x)
        x = x / torch.linalg.vector_norm(x, dim=2, keepdim=True)
    want = torch.linalg.vector_norm(symbols @ x, dim=(2, 3))
    for power in (frequency.power_vectors, native.power_vectors):
        norm, vectors = power(acting, phase, terms, first, 4)
        torch.testing.assert_close(norm.double(), want, rtol=1e-5, atol=0)
        torch.testing.assert_close(vectors.to(x.dtype), x[..., 0], rtol=0, atol=1e-5)


def test_power_vectors_do_not_depend_on_threads_or_neighbours() -> None:
    args = problem(3, 20, 17, 9, 1, 45)
    norm, x = native.power_vectors(*args, 5)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if before > 1 else 2)
        again, y = native.power_vectors(*args, 5)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(norm, again)
    assert torch.equal(x, y)
    alone, z = native.power_vectors(args[0][1:2], args[1], args[2][40:41], args[3], 5)
    assert torch.equal(norm[1:2, 40:41], alone)
    assert torch.equal(x[1:2, 40:41], z)


@pytest.mark.parametrize("power", [frequency.power_vectors, native.power_vectors])
def test_a_symbol_that_vanishes_keeps_the_start(power) -> None:
    acting, phase, terms, first = problem(2, 4, 3, 5, 1, 6)
    acting[1] = 0.0
    norm, x = power(acting, phase, terms, first, 3)
    assert (norm[0] > 0).all()
    assert (norm[1] == 0).all()
    assert torch.equal(x[1], first.expand(6, 3))


@pytest.mark.parametrize("power", [frequency.power_vectors, native.power_vectors])
def test_what_is_not_a_number_shows_in_its_group_alone(power) -> None:
    acting, phase, terms, first = problem(2, 4, 3, 5, 1, 6)
    acting[1, 2, 1, 0] = math.nan
    norm, _ = power(acting, phase, terms, first, 3)
    assert norm[0].isfinite().all()
    assert norm[1].isnan().all()


def test_compiled_power_vectors_refuse_what_they_cannot_run() -> None:
    acting, phase, terms, first = problem(1, 2, 3, 4, 1, 5)
    with pytest.raises(DtypeError, match="float32 kernels"):
        native.power_vectors(acting.double(), phase, terms, first, 1)
    with pytest.raises(ShapeError, match="phase"):
        native.power_vectors(acting, phase[:3], terms, first, 1)
    with pytest.raises(ShapeError, match="start"):
        native.power_vectors(acting, phase, terms, first[:2], 1)
    with pytest.raises(Exception, match="a phase below phases"):
        native.power_vectors(acting, phase + 1, terms, first, 1)


def peaks(rng: np.random.Generator, channels: int) -> tuple[Tensor, float]:
    """Channels apart, each with one filter, all suprema within one percent but the last one's."""
    fine = np.linspace(-np.pi, np.pi, 241)
    waves = np.exp(-1j * np.outer(fine, np.arange(3)))
    weight = np.zeros((channels, channels, 3, 3))
    for i, c in enumerate(rng.permutation(channels)):
        tap = rng.standard_normal((3, 3))
        top = np.abs(np.einsum("ay,yx,bx->ab", waves, tap, waves)).max()
        weight[c, c] = tap / top * (0.99 + 0.01 * i / channels if i < channels - 1 else 1.02)
    return torch.from_numpy(weight), 1.02


@pytest.mark.parametrize("backend", BACKENDS)
def test_finds_the_leading_one_of_many_near_equal_peaks(backend: str) -> None:
    power = native.power_vectors if backend == "native" else None
    for seed in range(6):
        weight, want = peaks(np.random.default_rng(seed), 9)
        weight = weight.float()
        region = conv_region(weight, (9, 12, 12))
        state = start(symbol, region, seed=seed, dtype=torch.float32)
        (state,) = symbol.reseed([region], weights_of(weight), [state], power)
        for _ in range(40):
            result = symbol.step(region, weights_of(weight), state, update=True)
            state = result.state
        assert result.sigma >= want * (1 - 3e-3), seed


def test_regions_of_one_shape_are_searched_as_if_alone() -> None:
    rng = np.random.default_rng(4)
    for groups, stride in ((1, 1), (2, 1), (1, 2)):
        weights = [torch.from_numpy(rng.standard_normal((4, 6 // groups, 3, 3))) for _ in range(3)]
        regions = [
            conv_region(w, (6, n, n), stride=(stride,) * 2, groups=groups)
            for w, n in zip(weights, (8, 6, 9), strict=True)
        ]
        states = [start(symbol, r, seed=i) for i, r in enumerate(regions)]
        assert len({symbol.shape_key(r) for r in regions}) == 1
        alone = [
            symbol.reseed([r], weights_of(w), [s])[0]
            for r, w, s in zip(regions, weights, states, strict=True)
        ]
        # Regions read their weights by name, so three that share one are three equal ones.
        together = symbol.reseed([regions[0]] * 3, weights_of(weights[0]), states)
        torch.testing.assert_close(together[0], alone[0], rtol=0, atol=1e-10)
        for state, own in zip(together, states, strict=True):
            single = symbol.reseed([regions[0]], weights_of(weights[0]), [own])[0]
            torch.testing.assert_close(state, single, rtol=0, atol=1e-10)


def test_shapes_that_differ_are_not_searched_together() -> None:
    weight = torch.zeros(4, 4, 3, 3)
    keys = {
        symbol.shape_key(conv_region(weight, (4, 8, 8))),
        symbol.shape_key(conv_region(weight, (4, 8, 8), stride=(2, 2))),
        symbol.shape_key(conv_region(weight, (4, 9, 9), stride=(2, 2), padding=((0, 0), (0, 0)))),
        symbol.shape_key(conv_region(torch.zeros(4, 4, 1, 3), (4, 8, 8))),
        symbol.shape_key(conv_region(torch.zeros(4, 2, 3, 3), (4, 8, 8), groups=2)),
    }
    assert len(keys) == 5


class Stack(nn.Module):
    """Convolutions of one dimension, some of the same shape, and a head."""

    def __init__(self, axes: int) -> None:
        super().__init__()
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1]
        self.body = nn.Sequential(
            conv(2, 6, 3, padding=1), nn.ReLU(),
            conv(6, 6, 3, padding=1), nn.ReLU(),
            conv(6, 6, 3, padding=1, bias=False), nn.ReLU(),
            conv(6, 6, 3, padding=1, groups=3), nn.ReLU(),
            conv(6, 6, 3, padding=1, padding_mode="circular"), nn.ReLU(),
            conv(6, 8, 3, stride=2, padding=1), nn.ReLU(),
            conv(8, 4, 1), nn.Flatten(),
        )  # fmt: skip
        self.head = nn.Linear(4 * 3**axes, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def bounds(axes: int) -> list[NetworkBound]:
    """The same network and iterates on both backends."""
    torch.manual_seed(axes)
    model, made = Stack(axes), []
    for backend in BACKENDS:
        torch.manual_seed(1)
        made.append(NetworkBound(model, (2, *[6] * axes), engine="symbol", backend=backend))
    made[1].state.load_state_dict(made[0].state.state_dict())
    return made


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_networks_are_searched_alike_on_both_backends(axes: int) -> None:
    found = [dict(bound.rescan().per_operator) for bound in bounds(axes)]
    assert found[0].keys() == found[1].keys()
    for name, want in found[0].items():
        assert float(found[1][name]) == pytest.approx(float(want), rel=1e-4), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_rescan_never_lowers_a_sigma(backend: str) -> None:
    for seed in range(2):
        torch.manual_seed(seed)
        bound = NetworkBound(Stack(2), (2, 6, 6), engine="symbol", backend=backend)
        before = {n: float(s) for n, s in bound.converge(12 * seed).per_operator.items()}
        after = bound.rescan().per_operator
        for name, sigma in before.items():
            assert float(after[name]) >= sigma * (1 - 3e-6), name


def test_single_convolutions_keep_their_sigma_in_float64() -> None:
    rng = np.random.default_rng(11)
    for trial in range(12):
        case = random_case(rng, 1 + trial % 2)
        if case is None:
            continue
        weights, state = weights_of(case.weight), start(symbol, case.region)
        for _ in range(8):
            state = symbol.step(case.region, weights, state, update=True).state
        before = symbol.step(case.region, weights, state, update=False).sigma
        (fresh,) = symbol.reseed([case.region], weights, [state])
        after = symbol.step(case.region, weights, fresh, update=False).sigma
        assert after >= before * (1 - 1e-13), trial


@pytest.mark.parametrize("exponent", [-100, 100])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_scale_of_the_weights_does_not_matter(backend: str, exponent: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.Flatten())
    bound = NetworkBound(model, (3, 6, 6), engine="symbol", backend=backend)
    state = {k: v.clone() for k, v in bound.state.state_dict().items()}
    want = float(bound.rescan().per_operator["0"])
    bound.state.load_state_dict(state)
    with torch.no_grad():
        model[0].weight.mul_(2.0**exponent)
    assert float(bound.rescan().per_operator["0"]) == pytest.approx(
        math.ldexp(want, exponent), rel=1e-5
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_that_are_no_numbers_spoil_nothing(backend: str) -> None:
    torch.manual_seed(0)
    model = Stack(2)
    bound = NetworkBound(model, (2, 6, 6), engine="symbol", backend=backend)
    healthy = float(bound.rescan().per_operator["body.2"])
    weight = model.body[2].weight
    with torch.no_grad():
        lost = weight[0, 0, 0, 0].item()
        weight[0, 0, 0, 0] = math.nan
        assert math.isnan(float(bound.rescan().per_operator["body.2"]))
        assert bound.state.iterates.isfinite().all()
        weight[0, 0, 0, 0] = lost
    assert float(bound.rescan().per_operator["body.2"]) >= healthy * (1 - 3e-6)


def test_candidates_of_a_search_lie_on_separate_peaks() -> None:
    weight = torch.from_numpy(np.random.default_rng(0).standard_normal((6, 5, 3, 3)))
    region = conv_region(weight, (5, 9, 9))
    (state,) = symbol.reseed([region], weights_of(weight), [start(symbol, region)])
    w = symbol._unpack(polyphase.conv_form(region), state)[0][0]
    for i in range(symbol.CANDIDATES):
        for j in range(i):
            for sign in (1, -1):  # weights are real: a peak at w is one at -w
                gap = torch.remainder(w[i] - sign * w[j] + math.pi, 2 * math.pi) - math.pi
                assert gap.abs().max() >= math.pi / 3 - 1e-9, (i, j, sign)


def test_separate_peaks_ranks_by_value_and_falls_back_on_what_is_left() -> None:
    form = polyphase.conv_form(conv_region(torch.zeros(1, 1, 3), (1, 9)))
    w = torch.tensor([[[0.1], [0.0], [2.0], [-2.1], [3.0]]])
    for scale in (1e-30, 1.0, 1e30):
        value = scale * torch.tensor([[4.0, 5.0, 3.0, 3.5, 1.0]])
        # 0.1 shares the peak of 0, and 2 that of -2.1.
        assert frequency.separate_peaks(form, w, value, 5).tolist() == [[1, 3, 0, 2, 4]] or (
            frequency.separate_peaks(form, w, value, 5).tolist() == [[1, 3, 4, 0, 2]]
        )
