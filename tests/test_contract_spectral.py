# SPDX-License-Identifier: MIT
"""What every backend that runs a network's spectral step promises: the reference engines' results.

A backend joins with one line in PROVIDERS; the engines it is held to are those of its ``STEPS``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from types import ModuleType
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from lmtfast import backends
from lmtfast.backends.reference import Leaves
from lmtfast.composing import compose_with_jacobian
from lmtfast.engines import ENGINES, get_engine, polyphase, separable, symbol
from lmtfast.errors import DtypeError, ShapeError
from lmtfast.graph import BoundGraph, Conv, Instruction, Linear, Region, RegionNode
from lmtfast.plan import BoundPlan, make_plan
from tests.conftest import TRITON_DEVICE
from tests.emulation import emulated
from tests.interpreter import swift
from tests.spectral_cases import CASES, Network, conv, randn, runnable, scaled


class Provider(NamedTuple):
    """A backend, the device of its tensors, what must hold while it runs, and whether it is so slow
    that only BRIEF cases are in the default run."""

    backend: str
    device: str
    using: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext
    slow: bool = False


PROVIDERS = (
    Provider("native", "cpu"), Provider("cuda", "cpu", emulated),
    Provider("triton", TRITON_DEVICE, swift, TRITON_DEVICE == "cpu"),
)  # fmt: skip
# Between them: odd sizes, strides, dilation, uneven padding, groups, depthwise, transposed,
# circular, scales and identity, tap-major bfloat16, a shared weight, a matrix, matrices beside
# convolutions.
BRIEF = frozenset({
    "uneven", "dilated", "identity_groups", "depthwise_pair", "transposed", "circular_strided",
    "wide, bfloat16, tap-major", "tied", "matrix_scaled", "heads, mixed dtypes",
})  # fmt: skip


def engines_of(provider: Provider) -> list[str]:
    with provider.using():
        usable = backends.available_backends()[provider.backend].available
    return [e for e in ENGINES if usable and e in backends.steps(provider.backend)]


PAIRS = [(p, e) for p in PROVIDERS for e in engines_of(p)]


def each(names: Iterable[str] | None = None, brief: frozenset[str] = BRIEF) -> pytest.MarkDecorator:
    """Every provider, its engines and the cases; all that an engine runs where none are named."""
    return pytest.mark.parametrize(
        ("provider", "engine", "case"),
        [
            pytest.param(
                p, e, c, id=f"{p.backend}-{e}-{c}",
                marks=[pytest.mark.slow] * (p.slow and c not in brief),
            )
            for p, e in PAIRS for c in (runnable(e) if names is None else names)
        ],
    )  # fmt: skip


def each_engine(*, long: bool = False) -> pytest.MarkDecorator:
    """Every provider and its engines; ``long``: not in the default run of a slow one."""
    return pytest.mark.parametrize(
        ("provider", "engine"),
        [
            pytest.param(
                p, e, id=f"{p.backend}-{e}", marks=[pytest.mark.slow] * (p.slow and long)
            )
            for p, e in PAIRS
        ],
    )  # fmt: skip


@pytest.fixture(autouse=True)
def _using(request: pytest.FixtureRequest) -> Iterator[None]:
    provider = request.node.callspec.params.get("provider") if _has_params(request) else None
    with provider.using() if provider else contextlib.nullcontext():
        yield


def _has_params(request: pytest.FixtureRequest) -> bool:
    return hasattr(request.node, "callspec")


class Run:
    """One network on one backend, beside the reference in float64."""

    def __init__(self, provider: Provider, engine: str, network: Network) -> None:
        self.plan: BoundPlan = network.plan(engine, provider.backend)
        self.module: ModuleType = backends.backend_module(provider.backend)
        self.network, self.device = network, provider.device
        self.tensors = [t.to(provider.device) for t in network.values(self.plan)]
        self.leaves = {r: t.double() for r, t in network.tensors.items()}
        assert len(self.plan.table.compiled) == len(network.regions)

    def start(self, seed: int = 0) -> Tensor:
        parts = [randn(n, seed=seed + i) for i, n in enumerate(self.plan.state_sizes)]
        return torch.cat([p / p.norm() for p in parts])

    def parts(self, state: Tensor) -> list[Tensor]:
        return list(state.split(list(self.plan.state_sizes)))

    def step(self, state: Tensor, *, update: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        given = state.to(self.device)
        sigmas, new, saved = self.module.spectral_step(
            self.plan.table, self.tensors, given, update=update
        )
        assert torch.equal(given.cpu(), state)
        assert sigmas.shape == (len(self.network.regions),)
        assert saved.shape == (self.plan.table.saved_size,)
        assert new.shape == ((self.plan.table.state_size,) if update else (0,))
        return sigmas.cpu(), new.cpu(), saved

    def vjp(self, saved: Tensor, grad: Tensor, wanted: list[bool] | None = None) -> list:
        wanted = wanted or [True] * len(self.tensors)
        found = self.module.spectral_vjp(
            self.plan.table, self.tensors, saved, grad.to(self.device), wanted
        )
        return [None if g is None else g.cpu() for g in found]

    def reference(self, state: Tensor, *, update: bool = True) -> list:
        weights = Leaves(self.leaves)
        parts = zip(self.plan.engines, self.network.regions, self.parts(state), strict=True)
        return [get_engine(e).step(r, weights, p.double(), update=update) for e, r, p in parts]

    def reference_vjp(self, state: Tensor, grad: Tensor, *, update: bool) -> list[Tensor]:
        """In the order of the slots, at the vectors that the reference saves."""
        variables = {r: t.requires_grad_() for r, t in self.leaves.items()}
        total = {r: torch.zeros_like(t) for r, t in self.leaves.items()}
        for i, result in enumerate(self.reference(state, update=update)):
            engine, region = get_engine(self.plan.engines[i]), self.network.regions[i]
            for ref, part in engine.vjp(region, variables, result.saved).items():
                total[ref] = total[ref] + grad[i].double() * part
        self.leaves = {r: t.detach() for r, t in self.leaves.items()}
        return [total[ref] for ref in self.plan.slots]

    def sigmas(self, state: Tensor) -> Tensor:
        return torch.stack([s.sigma for s in self.reference(state, update=False)])


def assert_same_iterate(name: str, region: Region, got: Tensor, want: Tensor) -> None:
    """Equality up to what the engine leaves free: scale, conjugation, a change of basis."""
    got, want = got.double(), want.double()
    if name == "operator" or isinstance(region.primitive, Linear):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
        return
    form = polyphase.conv_form(region)
    assert form is not None
    if name == "separable":
        images = [h @ a.mT for h, a in (separable._unpack(form, s) for s in (got, want))]
        images = [polyphase.polar(m.flatten(1))[1] for m in images]
        sign = (images[0] * images[1]).sum(-1, keepdim=True).sign()
        torch.testing.assert_close(images[0], sign * images[1], rtol=0, atol=2e-4)
        return
    (w, x, anchor), (want_w, want_x, want_anchor) = (symbol._unpack(form, s) for s in (got, want))
    circle, want_circle = (torch.polar(torch.ones_like(v), v) for v in (w, want_w))
    torch.testing.assert_close(anchor.cos(), want_anchor.cos(), rtol=0, atol=1e-5)
    torch.testing.assert_close(anchor.sin(), want_anchor.sin(), rtol=0, atol=1e-5)
    difference = torch.cat((circle - want_circle, x - want_x), -1).abs().amax(-1)
    if x.shape[-1] == form.rows == 1:
        # The response of one real tap vector is the same at w and -w, whatever the phase of x.
        mirrored = (circle - want_circle.conj()).abs().amax(-1)
        straight = (circle - want_circle).abs().amax(-1)
        difference = torch.minimum(straight, mirrored) + (x.abs() - want_x.abs()).abs().amax(-1)
    assert difference.max() < 2e-3


@each(brief=BRIEF - {"tied"})
def test_steps_are_those_of_the_reference(provider: Provider, engine: str, case: str) -> None:
    run = Run(provider, engine, CASES[case])
    state = run.start()
    for _ in range(1 if provider.slow else 3):
        want, (sigmas, new, _) = run.reference(state), run.step(state)
        torch.testing.assert_close(
            sigmas.double(), torch.stack([s.sigma for s in want]), rtol=1e-5, atol=0
        )
        for region, got, step in zip(run.network.regions, run.parts(new), want, strict=True):
            assert_same_iterate(engine, region, got, step.state)
        advanced = torch.cat([s.state for s in want]).float()
        torch.testing.assert_close(run.sigmas(new), run.sigmas(advanced), rtol=1e-4, atol=0)
        before = run.step(state, update=False)[0]
        torch.testing.assert_close(before.double(), run.sigmas(state), rtol=1e-5, atol=0)
        state = new


@each()
def test_gradients_are_those_of_the_reference(provider: Provider, engine: str, case: str) -> None:
    run = Run(provider, engine, CASES[case])
    state = run.step(run.start())[1]
    grad = randn(len(run.network.regions), seed=9)
    for update in (False, True):
        want = run.reference_vjp(state, grad, update=update)
        got = run.vjp(run.step(state, update=update)[2], grad)
        for tensor, a, b in zip(run.tensors, got, want, strict=True):
            assert a.dtype == tensor.dtype
            assert a.shape == tensor.shape
            coarse = {torch.bfloat16: 1e-2, torch.float16: 1e-3}.get(tensor.dtype, 1e-4)
            # Sums of many terms vanish; their error does not follow the sum.
            scale = b.abs().max().item() + grad.abs().max().item() * 1e-2
            torch.testing.assert_close(a.double(), b, rtol=coarse, atol=coarse * scale)


@each(brief=frozenset({"circular_strided"}))
def test_threads_and_repetition_change_no_bit(provider: Provider, engine: str, case: str) -> None:
    run = Run(provider, engine, CASES[case])
    state, grad = run.start(), torch.ones(len(run.network.regions))
    results = []
    for threads in (1, 3, 1):
        torch.set_num_threads(threads)
        sigmas, new, saved = run.step(state)
        results.append((sigmas, new, saved.cpu(), *run.vjp(saved, grad)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@each(["plain", "scaled_groups", "many", "tied", "heads"])
def test_only_wanted_gradients(provider: Provider, engine: str, case: str) -> None:
    run = Run(provider, engine, CASES[case])
    saved, grad = run.step(run.start())[2], torch.ones(len(run.network.regions))
    whole = run.vjp(saved, grad)
    for i in range(len(run.tensors)):
        wanted = [j != i for j in range(len(run.tensors))]
        some = run.vjp(saved, grad, wanted)
        assert some[i] is None
        assert all(torch.equal(a, b) for a, b in zip(some, whole, strict=True) if a is not None)
    assert run.vjp(saved, grad, [False] * len(run.tensors)) == [None] * len(run.tensors)


@each(["plain", "wide", "depthwise", "strided", "tall", "transposed", "head"])
@pytest.mark.parametrize("exponent", [-100, 90])
def test_tiny_and_huge_weights(provider: Provider, engine: str, case: str, exponent: int) -> None:
    network = CASES[case]
    plain, other = (
        Run(provider, engine, n) for n in (network, network.map(lambda w: w * 2.0**exponent))
    )
    state = plain.start()
    for _ in range(2):
        want, got = plain.step(state), other.step(state)
        torch.testing.assert_close(got[0].double() * 2.0**-exponent, want[0].double())
        for region, a, b in zip(
            network.regions, plain.parts(want[1]), other.parts(got[1]), strict=True
        ):
            assert_same_iterate(engine, region, b, a)
        grad = torch.ones(len(network.regions))
        torch.testing.assert_close(
            other.vjp(got[2], grad), plain.vjp(want[2], grad), rtol=1e-4, atol=1e-4
        )
        state = want[1]


@each_engine(long=True)
def test_rows_of_every_magnitude(provider: Provider, engine: str) -> None:
    """Rows far above and below one another, either first: none overflows, the large ones count."""
    powers = torch.logspace(-30, 30, 150).roll(40)
    for direction in (1, -1):
        factors = powers if direction == 1 else powers.flip(0)
        network = CASES["tall"].map(lambda w: w * factors[:, None, None, None])  # noqa: B023
        run = Run(provider, engine, network)
        state = run.start()
        for _ in range(3):
            sigmas, state, _ = run.step(state)
            want = run.sigmas(state)
            assert sigmas.isfinite().all()
            assert state.isfinite().all()
        assert (run.step(state, update=False)[0].double() / want - 1).abs().max() < 1e-5


@each(
    ["plain", "wide", "depthwise", "identity", "strided", "transposed", "head"], frozenset({"head"})
)
def test_zero_weights_and_zero_iterates(provider: Provider, engine: str, case: str) -> None:
    network = CASES[case].map(torch.zeros_like) if case != "identity" else CASES[case]
    run = Run(provider, engine, network)
    for state in (run.start(), torch.zeros_like(run.start())):
        want = run.sigmas(state)
        sigmas, new, saved = run.step(state)
        assert new.isfinite().all()
        if case != "identity":
            assert (sigmas == 0).all()
            assert (want == 0).all()
            for name, a, b in zip(run.plan.engines, run.parts(new), run.parts(state), strict=True):
                if name == "operator":
                    torch.testing.assert_close(a, b)
        grad = torch.ones(len(run.network.regions))
        assert all(g.isfinite().all() for g in run.vjp(saved, grad))


@each(["plain", "wide", "depthwise", "tall", "transposed", "line", "head"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_reaches_sigma(
    provider: Provider, engine: str, case: str, value: float
) -> None:
    def spoil(weight: Tensor) -> Tensor:
        spoilt = weight.clone()
        spoilt.view(-1)[weight.numel() // 2] = value
        return spoilt

    run = Run(provider, engine, CASES[case].map(spoil))
    state = run.start()
    sigmas, new, _ = run.step(state)
    assert not sigmas.isfinite().any()
    assert not run.step(state, update=False)[0].isfinite().any()
    assert new.isfinite().all()
    for region, a, b in zip(run.network.regions, run.parts(new), run.parts(state), strict=True):
        if getattr(region.primitive, "groups", 1) == 1:
            assert_same_iterate(engine, region, a, b / b.norm())


@each(["plain", "wide", "tall", "wide, bfloat16", "many", "line", "identity_groups", "heads"])
def test_reads_nothing_beside_its_tensors(provider: Provider, engine: str, case: str) -> None:
    """Every tensor lies between NaN, which would show in the results if it were read."""
    run = Run(provider, engine, CASES[case])
    state = run.start()
    want = run.step(state)
    grads = run.vjp(want[2], torch.ones(len(run.network.regions)))

    def fenced(t: Tensor) -> Tensor:
        room = torch.full((t.numel() + 64,), torch.nan, dtype=t.dtype, device=t.device)
        inner = room[32 : 32 + t.numel()].view(t.shape)
        return inner.copy_(t)

    run.tensors = [fenced(t) for t in run.tensors]
    got = run.step(state)
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(got, want, strict=True))
    again = run.vjp(got[2], torch.ones(len(run.network.regions)))
    assert all(torch.equal(a, b) for a, b in zip(again, grads, strict=True))


@each_engine(long=True)
def test_a_network_is_its_operators(provider: Provider, engine: str) -> None:
    """Operators of one call do not disturb each other, and those run elsewhere stay as they are."""
    weight = randn(3, 3, 3, 3, seed=4)
    op = conv("reflected", (3, 3, 3, 3), (6, 6)).regions[0].primitive
    assert isinstance(op, Conv)
    composite = Region("twice", op.in_shape, op.out_shape, (RegionNode(op, (-1,)),) * 2)
    network = CASES["many"]
    names = [region.name for region in network.regions]
    mixed = Network([*network.regions[:2], composite, *network.regions[2:]], network.tensors)
    mixed.tensors = mixed.tensors | {op.weight: weight}
    plan = mixed.plan(engine, provider.backend)
    assert 2 not in plan.table.compiled
    module = backends.backend_module(provider.backend)
    tensors = [t.to(provider.device) for t in mixed.values(plan)]
    parts = [randn(n, seed=i) for i, n in enumerate(plan.state_sizes)]
    state = torch.cat(parts)
    sigmas, new, saved = module.spectral_step(
        plan.table, tensors, state.to(provider.device), update=True
    )
    sigmas, new = sigmas.cpu(), new.cpu().split(list(plan.state_sizes))
    assert sigmas[2] == 0
    assert torch.equal(new[2], parts[2])
    for k, region in enumerate(network.regions):
        i = k if k < 2 else k + 1
        single = Run(provider, engine, Network([region], mixed.tensors))
        want = single.step(parts[i])
        assert torch.equal(sigmas[i], want[0][0]), names[k]
        assert torch.equal(new[i], want[1]), names[k]
    grad = torch.ones(len(plan.operators), device=provider.device)
    found = module.spectral_vjp(plan.table, tensors, saved, grad, [True] * len(tensors))
    assert (found[plan.slots.index(op.weight)] == 0).all()


@each_engine(long=True)
def test_many_steps_reach_what_the_reference_reaches(provider: Provider, engine: str) -> None:
    network = scaled(conv("long_run", (12, 10, 3, 3), (7, 7)), identity=0.0)
    run = Run(provider, engine, network)
    state, want = run.start(), run.start().double()
    weights = Leaves(run.leaves)
    for _ in range(60):
        state = run.step(state)[1]
        want = get_engine(engine).step(network.regions[0], weights, want, update=True).state
    reached = run.step(state, update=False)[0].item()
    goal = get_engine(engine).step(network.regions[0], weights, want, update=False).sigma.item()
    assert reached == pytest.approx(goal, rel=2e-2)


@each_engine()
def test_refuses_what_it_cannot_read(provider: Provider, engine: str) -> None:
    run = Run(provider, engine, CASES["plain"])
    state = run.start()
    for wrong, error in ((state.double(), DtypeError), (state[:-1], ShapeError)):
        with pytest.raises(error) as raised:
            run.module.spectral_step(
                run.plan.table, run.tensors, wrong.to(provider.device), update=True
            )
        assert "Do this" in str(raised.value)


def exact_vjp(provider: Provider, case: str) -> tuple[list[Tensor], list[Tensor]]:
    """The operator engine's gradient at small integer vectors, and its value in float64."""
    run = Run(provider, "operator", CASES[case])
    region, op = run.network.regions[0], run.network.regions[0].primitive
    assert isinstance(op, Conv)
    rng = np.random.default_rng(5)
    u, v = (
        torch.from_numpy(rng.integers(-3, 4, shape)).double()
        for shape in (region.out_shape, region.in_shape)
    )
    saved = torch.cat((u.flatten(), v.flatten())).float().to(provider.device)
    want = get_engine("operator").vjp(region, run.leaves, (u, v))
    return run.vjp(saved, torch.ones(1)), [want[ref] for ref in run.plan.slots]


@pytest.mark.parametrize(
    "provider", [p for p, e in PAIRS if e == "operator"], ids=lambda p: p.backend
)
@pytest.mark.parametrize(
    "case", ["plain", "strided", "uneven", "sparse", "grouped", "depthwise", "volume", "circular"]
)
def test_integer_gradients_of_the_operator_are_exact(provider: Provider, case: str) -> None:
    got, want = exact_vjp(provider, case)
    assert all(torch.equal(a.double(), b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize(
    "provider", list(dict.fromkeys(p for p, _ in PAIRS)), ids=lambda p: p.backend
)
def test_composition_is_that_of_the_reference(provider: Provider) -> None:
    steps = [
        ("sigma", (0,)), ("sigma", (1,)), ("constant", (0.5,)), ("mul", (0, 1)), ("add", (3, 2)),
        ("hypot", (4, 0)), ("sigma", (2,)), ("max", (5, 6)), ("max", (0, 0)), ("mul", (7, 8)),
        ("constant", (0.0,)), ("hypot", (10, 10)), ("add", (9, 11)),
    ]  # fmt: skip
    tape = tuple(Instruction(op, args) for op, args in steps)
    network = CASES["tied"]
    graph = BoundGraph((6, 7, 5), (6, 7, 5), tuple(network.regions), tape, 7, 12, None)
    plan = make_plan(torch.nn.Identity(), graph, engine="symbol", backend=provider.backend)
    module = backends.backend_module(provider.backend)
    for sigmas in (torch.tensor([0.3, 1.7, 2.0]), torch.tensor([0.3, 1.7, 0.1]), torch.zeros(3)):
        values, jacobian = module.compose(plan.table, sigmas.to(provider.device))
        want, slopes = compose_with_jacobian(tape, sigmas.double(), (7, 12))
        torch.testing.assert_close(values.cpu().double(), want, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(jacobian.cpu().double(), slopes, rtol=1e-6, atol=1e-7)
