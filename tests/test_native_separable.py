# SPDX-License-Identifier: MIT
"""The compiled separable engine where the contract suite does not reach: sizes that need several
units of work, ranks and taps of every kind, degenerate states, and what a step may not lose.

Patterns and channel vectors are fixed only up to a common change of basis, so states are compared
as ``v = sum_k h_k a_k^T``, and what is saved as v, the image's factors and the gradient they give.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from lmtfast import backends
from lmtfast.backends import native_spectral
from lmtfast.backends.reference import Leaves
from lmtfast.engines import polyphase, separable
from lmtfast.graph import Region
from lmtfast.plan import BoundPlan
from tests.engine_cases import random_case
from tests.spectral_cases import Network, conv, matrix, randn, scaled, tap_major

if (
    "separable" not in native_spectral.STEPS
    or not backends.available_backends()["native"].available
):
    pytest.skip("the compiled core does not run the engine", allow_module_level=True)

CASES = {
    # More points, rows and channels than one unit, tile or register run holds.
    "large map": conv("c", (5, 6, 3, 3), (37, 23)),
    "many rows": conv("c", (201, 9, 3, 3), (6, 5)),
    "many channels": conv("c", (9, 300, 3, 3), (5, 6)),
    "pointwise": conv("c", (23, 150, 1, 1), (6, 7)),
    # More taps than are walked together, in both layouts, and fewer than three.
    "25 taps": conv("c", (7, 20, 5, 5), (9, 8)),
    "49 taps, low rank": conv("c", (6, 3, 7, 7), (12, 13), stride=(2, 2)),
    "two taps": conv("c", (21, 11, 2), (30,)),
    "27 taps": conv("c", (5, 9, 3, 3, 3), (4, 5, 3)),
    # Every width of the low-rank vectors.
    **{f"rank {r}": conv("c", (6, r, 3, 3), (5, 4)) for r in range(1, 9)},
    "rank of the grid": conv("c", (6, 12, 3, 3), (2, 3)),
    "circular": conv("c", (7, 10, 3, 3), (6, 5), padding=((2, 3), (1, 4)), padding_mode="circular"),
    "no padding": conv("c", (5, 9, 3, 3), (9, 8), padding=((0, 0), (0, 0))),
    "wide padding": conv("c", (5, 9, 3, 3), (4, 5), padding=((4, 2), (3, 5))),
    "unread inputs": conv("c", (5, 9, 2, 2), (11, 12), stride=(4, 5), padding=((0, 0), (0, 0))),
    "scaled": scaled(conv("c", (30, 20, 3, 3), (6, 7)), gain=-1.5),
    "identity": scaled(conv("c", (18, 9, 3, 5), (6, 7), groups=2, dilation=(1, 2)), identity=0.8),
    "transposed": conv("c", (12, 5, 3, 3), (9, 8), stride=(2, 2), transposed=True, groups=2),
}
for _name in ("25 taps", "many channels", "rank 3", "identity"):
    CASES[f"{_name}, tap-major"] = CASES[_name].map(tap_major)
for _name in ("25 taps", "many rows", "two taps", "25 taps, tap-major"):
    CASES[f"{_name}, bfloat16"] = CASES[_name].map(torch.Tensor.bfloat16)


class Compiled:
    """One network's compiled steps, and the reference in float64."""

    def __init__(self, network: Network) -> None:
        self.network, self.plan = network, network.plan("separable", "native")
        self.tensors = network.values(self.plan)
        self.leaves = {r: t.double() for r, t in network.tensors.items()}

    def start(self, seed: int = 0) -> Tensor:
        return randn(self.plan.table.state_size, seed=seed)

    def step(self, state: Tensor, *, update: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        return native_spectral.spectral_step(self.plan.table, self.tensors, state, update=update)

    def vjp(self, saved: Tensor) -> list[Tensor | None]:
        return native_spectral.spectral_vjp(
            self.plan.table, self.tensors, saved, torch.ones(len(self.plan.operators)),
            [True] * len(self.tensors),
        )  # fmt: skip

    def reference(self, state: Tensor) -> separable.Step:
        (region,) = self.network.regions
        return separable.step(region, Leaves(self.leaves), state.double(), update=True)


def iterate(region: Region, state: Tensor) -> Tensor:
    """v of every group, ``(G, n, C)``, of length one."""
    form = polyphase.conv_form(region)
    assert form is not None
    h, a = separable._unpack(form, state.double())
    return h @ a.mT


def one_conv_plan(region: Region, weight: Tensor) -> Compiled:
    assert region.primitive is not None
    return Compiled(Network([region], {region.primitive.weight: weight}))  # type: ignore[union-attr]


@pytest.mark.parametrize("name", CASES)
def test_a_step_moves_v_as_the_reference_does(name: str) -> None:
    compiled = Compiled(CASES[name])
    (region,) = compiled.network.regions
    state = compiled.start()
    for _ in range(3):
        want = compiled.reference(state)
        sigmas, new, saved = compiled.step(state)
        torch.testing.assert_close(sigmas[0].double(), want.sigma, rtol=3e-6, atol=0)
        got, goal = iterate(region, new), iterate(region, want.state)
        # Both orthonormal bases come from the same reflections, so that not even signs differ.
        torch.testing.assert_close(got, goal, rtol=0, atol=5e-5)
        compare_saved(compiled, saved, want)
        state = new


def compare_saved(compiled: Compiled, saved: Tensor, want: separable.Step) -> None:
    """The winner's group, v, and image factors in its basis; sigma over the scale of the image."""
    (region,) = compiled.network.regions
    form = polyphase.conv_form(region)
    assert form is not None
    saved = saved[compiled.plan.table.scale_size :].double()
    h, a, y, relative, group = want.saved
    sizes = [1, 1, *(t.numel() for t in (h, a, y))]
    parts = saved.split(sizes)
    assert int(parts[0]) == int(group.argmax())
    torch.testing.assert_close(parts[1][0], relative, rtol=1e-5, atol=0)
    got_h, got_a, got_y = (p.reshape(t.shape) for p, t in zip(parts[2:], (h, a, y), strict=True))
    torch.testing.assert_close(got_h @ got_a.T, h @ a.T, rtol=0, atol=1e-6)
    images = [
        torch.einsum("otk,ck->otc", part.unflatten(-1, (form.taps, -1)), basis)
        for part, basis in ((got_y, got_a), (y, a))
    ]
    torch.testing.assert_close(*images, rtol=0, atol=2e-6)


def test_sigma_never_falls() -> None:
    rng, judged = np.random.default_rng(5), 0
    for trial in range(24):
        case = random_case(rng, 1 + trial % 3)
        if case is None or separable.refusal(case.region) is not None:
            continue
        compiled = one_conv_plan(case.region, case.weight.float())
        state, last = compiled.start(trial), 0.0
        for _ in range(15):
            sigmas, state, _ = compiled.step(state)
            assert sigmas[0] >= last * (1 - 3e-6)
            assert sigmas[0] <= case.norm * (1 + 1e-5)
            last = sigmas[0].item()
        judged += 1
    assert judged > 12


def team(width: int) -> Network:
    """One large convolution that all threads share, several small ones, one of many groups."""
    network = scaled(conv("large", (width, width, 3, 3), (12, 12)))
    for i in range(5):
        network = network + conv(f"small{i}", (8 + i, 9, 3, 3), (9, 7))
    network = network + conv("grouped", (64, 1, 3, 3), (8, 8), groups=64)
    return network + conv("mixed", (40, 16, 3, 3), (16, 16), stride=(2, 2), groups=2)


def test_shares_of_threads_change_no_bit() -> None:
    compiled = Compiled(team(96))
    state, results = compiled.start(), []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        sigmas, new, saved = compiled.step(state)
        results.append((sigmas, new, saved, *compiled.vjp(saved)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_what_a_team_computes_is_what_each_computes_alone() -> None:
    network = team(24)
    compiled = Compiled(network)
    state = compiled.start()
    sigmas, new, _ = compiled.step(state)
    parts = list(zip(state.split(list(compiled.plan.state_sizes)),
                     new.split(list(compiled.plan.state_sizes)), strict=True))  # fmt: skip
    for i, region in enumerate(network.regions):
        single = Compiled(Network([region], network.tensors))
        want = single.step(parts[i][0])
        assert torch.equal(sigmas[i], want[0][0])
        assert torch.equal(parts[i][1], want[1])


def degenerate(compiled: Compiled, kind: str) -> Tensor:
    """A state whose channel vectors or patterns do not have full rank."""
    (region,) = compiled.network.regions
    form = polyphase.conv_form(region)
    assert form is not None
    state = compiled.start().reshape(form.groups, -1).clone()
    cut = form.rank * form.in_points
    h, a = (
        state[:, :cut].unflatten(1, (-1, form.rank)),
        state[:, cut:].unflatten(1, (-1, form.rank)),
    )
    if kind == "zero channel vector":
        a[..., 2] = 0
    elif kind == "zero pattern":
        h[..., 0] = 0
    elif kind == "first channel vectors are axes":
        a.zero_()
        a[:, : form.rank] = torch.eye(form.rank)
    elif kind == "one pattern":
        h[..., 1:] = 0
    elif kind == "huge":
        state *= 1e30
    elif kind == "tiny":
        state *= 1e-30
    return state.reshape(-1)


@pytest.mark.parametrize(
    "kind",
    ["zero channel vector", "zero pattern", "first channel vectors are axes", "one pattern", "huge",
     "tiny"],
)  # fmt: skip
def test_degenerate_states(kind: str) -> None:
    compiled = Compiled(conv("c", (7, 12, 3, 3), (6, 5)))
    (region,) = compiled.network.regions
    state = degenerate(compiled, kind)
    want, (sigmas, new, _) = compiled.reference(state), compiled.step(state)
    torch.testing.assert_close(sigmas[0].double(), want.sigma, rtol=3e-6, atol=0)
    assert new.isfinite().all()
    # Where a basis has to be completed, LAPACK's reflections say how, and ours are the same.
    torch.testing.assert_close(iterate(region, new), iterate(region, want.state), rtol=0, atol=5e-5)


def test_states_that_say_nothing_stay() -> None:
    compiled = Compiled(conv("c", (7, 12, 3, 3), (6, 5)))
    for value in (0.0, torch.nan, torch.inf):
        state = torch.full_like(compiled.start(), value)
        sigmas, new, _ = compiled.step(state)
        assert sigmas[0] == 0 if value == 0.0 else sigmas[0].isnan()
        torch.testing.assert_close(new, state, rtol=0, atol=0, equal_nan=True)


def test_a_group_without_weights_keeps_its_iterate() -> None:
    network = conv("c", (6, 4, 3, 3), (5, 5), groups=3)
    network = network.map(lambda w: torch.cat((w[:2], torch.zeros_like(w[2:4]), w[4:])))
    compiled = Compiled(network)
    state = compiled.start()
    sigmas, new, saved = compiled.step(state)
    old, fresh = (s.reshape(3, -1) for s in (state, new))
    assert torch.equal(fresh[1], old[1])
    assert not torch.equal(fresh[0], old[0])
    assert not torch.equal(fresh[2], old[2])
    (grad,) = compiled.vjp(saved)
    assert grad is not None
    winner = int(saved[0])
    others = [g for g in range(3) if g != winner]
    assert grad.reshape(3, -1)[others].eq(0).all()
    assert sigmas[0] > 0


def test_a_matrix_is_left_to_the_operator_engine() -> None:
    plan: BoundPlan = (conv("c", (4, 4, 3, 3), (5, 5)) + matrix("m", 5, 100)).plan(
        "separable", "native"
    )
    assert plan.engines == ("separable", "operator")
    assert len(plan.table.compiled) == 2


def test_long_sums_keep_float32_accuracy() -> None:
    """Sigma and gradient of 2000 channels with a common mean, the worst case of a running sum."""
    weight = randn(5, 2000, 3, 3, seed=0) * 0.01 + 1.0
    network = conv("c", (5, 2000, 3, 3), (5, 5)).map(lambda w: weight)
    compiled = Compiled(network)
    state = compiled.step(compiled.start())[1]
    want = compiled.reference(state)
    sigmas, _, saved = compiled.step(state)
    assert abs(sigmas[0].double() / want.sigma - 1) < 1e-6
    (region,) = network.regions
    (goal,) = separable.vjp(region, compiled.leaves, want.saved).values()
    (grad,) = compiled.vjp(saved)
    assert grad is not None
    torch.testing.assert_close(grad.double(), goal, rtol=1e-4, atol=2e-6 * goal.abs().max().item())


@pytest.mark.parametrize("engine", sorted(native_spectral.STEPS - {"closed form"}))
@pytest.mark.parametrize("spoilt", [False, True])
def test_the_new_iterates_are_written_whole(engine: str, spoilt: bool) -> None:
    """Also where a step keeps the old ones: a caller's buffer may hold anything."""
    network = conv("c", (6, 4, 3, 3), (5, 6), groups=2) + scaled(conv("d", (5, 7, 3, 3), (6, 5)))
    if spoilt:
        network = network.map(lambda w: torch.full_like(w, torch.nan))
    plan = network.plan(engine, "native")
    tensors, table = network.values(plan), plan.table
    state = randn(table.state_size, seed=1)
    found = []
    for new in (state.clone(), torch.full_like(state, torch.nan)):
        sigmas, saved = torch.zeros(len(table.rows)), torch.zeros(table.saved_size)
        native_spectral.prepared(table).network.step(
            native_spectral._described(tensors), state.data_ptr(), new.data_ptr(),
            sigmas.data_ptr(), saved.data_ptr(), 2,
        )  # fmt: skip
        found.append(new)
    assert found[1].isfinite().all()
    assert torch.equal(*found)
