# SPDX-License-Identifier: MIT
"""The bound inside compiled graphs, under autocast, with gradient accumulation and double use."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.library import opcheck

import lmtfast as lf
from lmtfast.backends import available_backends, steps
from lmtfast.backends.margin_step import MarginProblem
from lmtfast.errors import DtypeError, ShapeError, StalePlanError

SHAPE = (3, 8, 8)
ENGINES = {"reference": frozenset(("operator", "symbol", "separable"))}
if available_backends()["native"].available:
    # Scales have no engine of their own: they come with any.
    ENGINES["native"] = steps("native") - {"closed form"}
CASES = [(backend, engine) for backend, names in ENGINES.items() for engine in sorted(names)]


def network() -> nn.Module:
    """Two convolutions, one of them strided, a batch norm that stands still, and a head."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6).eval(), nn.ReLU(),
        nn.Conv2d(6, 4, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5),
    )  # fmt: skip


def gradients(model: nn.Module) -> list[torch.Tensor]:
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return found


def bound_of(model: nn.Module, backend: str, engine: str) -> lf.NetworkBound:
    return lf.NetworkBound(model, SHAPE, engine=engine, backend=backend)


def objective(model: nn.Module, bound: lf.NetworkBound):
    def run(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        norms = bound()
        loss = lf.margin_cross_entropy(model(x), y, norms, eps=36 / 255)
        return loss + 0.1 * norms.total + 0.01 * sum(norms.per_operator.values())

    return run


@pytest.mark.parametrize(
    "compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(("backend", "engine"), CASES)
def test_a_compiled_step_is_one_graph_and_gives_the_same_numbers(
    backend: str, engine: str, compiler: str
) -> None:
    model, x, y = network(), torch.randn(4, *SHAPE), torch.tensor([0, 1, 2, 3])
    bound = bound_of(model, backend, engine)
    again = copy.deepcopy(bound)
    want = objective(model, bound)(x, y)
    want.backward()
    grads = gradients(model)
    twin = again._model[0]
    step = torch.compile(objective(twin, again), fullgraph=True, backend=compiler)
    got = step(x, y)
    got.backward()
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    for a, b in zip(gradients(twin), grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    # The iterates advanced in place, by exactly one step.
    torch.testing.assert_close(again.state.iterates, bound.state.iterates, rtol=1e-5, atol=1e-6)
    assert int(again.state.steps) == int(bound.state.steps)


@pytest.mark.parametrize(("backend", "engine"), CASES)
@pytest.mark.parametrize("update", [True, False])
def test_the_step_is_a_lawful_operator(backend: str, engine: str, update: bool) -> None:
    bound = bound_of(network(), backend, engine)
    tensors = bound._reader.tensors(torch.float32)
    opcheck(
        torch.ops.lmtfast.spectral_step.default,
        (tensors, bound.state.iterates, bound.plan.fingerprint, update),
    )
    with torch.no_grad():
        out = torch.ops.lmtfast.spectral_step(
            tensors, bound.state.iterates, bound.plan.fingerprint, update
        )
    wanted = [t.requires_grad for t in tensors]
    detached = [t.detach() for t in tensors]
    opcheck(
        torch.ops.lmtfast.spectral_vjp.default,
        (detached, out[4], out[5], torch.ones_like(out[0]), bound.plan.fingerprint, wanted),
    )


@pytest.mark.parametrize("backend", ENGINES)
@pytest.mark.parametrize("member", ["lmt", "lmt++", "emma", "gloro"])
@pytest.mark.parametrize("head", [True, False])
def test_the_margin_loss_is_a_lawful_operator(backend: str, member: str, head: bool) -> None:
    n, k = 4, 3
    problem = MarginProblem(
        torch.randn(n, k, requires_grad=True), torch.randn(k, 5, requires_grad=True),
        torch.rand(n, requires_grad=True), torch.tensor([0, 1, 2, 0]), None,
        torch.tensor([0, 1, 2, 0]), None,
    )  # fmt: skip
    if not head:
        problem = problem._replace(head_weight=None, row_scale=torch.rand(k, k))
    opcheck(torch.ops.lmtfast.margin_cross_entropy.default, (*problem, member, backend))
    with torch.no_grad():
        loss, *saved = torch.ops.lmtfast.margin_cross_entropy(*problem, member, backend)
    detached = [t if t is None else t.detach() for t in problem]
    opcheck(
        torch.ops.lmtfast.margin_cross_entropy_vjp.default,
        (torch.ones_like(loss), *saved, *detached, member, backend),
    )


def test_an_operator_of_a_plan_that_is_gone_is_refused() -> None:
    with pytest.raises(StalePlanError, match="keep the NetworkBound"):
        torch.ops.lmtfast.spectral_step([torch.ones(1)], torch.ones(1), "no such plan", True)


@pytest.mark.parametrize("backend", ENGINES)
def test_autocast_does_not_reach_the_norms(backend: str) -> None:
    model = network()
    bound = lf.NetworkBound(model, SHAPE, backend=backend)
    want = bound(update=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = bound(update=False)
    assert got.total.dtype == torch.float32
    assert torch.equal(got.total, want.total)


@pytest.mark.parametrize(("backend", "engine"), CASES)
@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_around_backward_does_not_reach_the_gradient(
    backend: str, engine: str, compiled: bool
) -> None:
    model = network()
    bound = bound_of(model, backend, engine)

    def gradient(enabled: bool) -> list[torch.Tensor]:
        if compiled:
            state = bound.state.iterates
            tensors = bound._reader.tensors(torch.float32)
            step = torch.ops.lmtfast.spectral_step(tensors, state, bound.plan.fingerprint, False)
            total = step[1][1]
        else:
            total = bound(update=False).total
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            return list(torch.autograd.grad(total, list(model.parameters()), allow_unused=True))

    for got, want in zip(gradient(True), gradient(False), strict=True):
        assert got is want is None or torch.allclose(got, want, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("backend", ENGINES)
def test_accumulated_gradients_add_up(backend: str) -> None:
    model = network()
    bound = lf.NetworkBound(model, SHAPE, backend=backend)
    bound(update=False).total.backward()
    once = gradients(model)
    for _ in range(3):
        bound(update=False).total.backward()
    for a, b in zip(gradients(model), once, strict=True):
        torch.testing.assert_close(a, 3 * b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("backend", ENGINES)
def test_two_bounds_in_one_step_share_no_state(backend: str) -> None:
    model = network()
    bound = lf.NetworkBound(model, SHAPE, backend=backend)
    first = bound()
    alone = torch.autograd.grad(first.total, model[0].weight, retain_graph=True)[0]
    bound()
    torch.testing.assert_close(torch.autograd.grad(first.total, model[0].weight)[0], alone)


@pytest.mark.parametrize("backend", ENGINES)
@pytest.mark.parametrize("layout", ["channels_last", "transposed"])
def test_the_layout_of_the_weights_does_not_matter(backend: str, layout: str) -> None:
    model = network()
    bound = lf.NetworkBound(model, SHAPE, backend=backend)
    want = bound(update=False)
    want.total.backward()
    grads = gradients(model)
    for parameter in model.parameters():
        if parameter.ndim == 4 and layout == "channels_last":
            parameter.data = parameter.data.to(memory_format=torch.channels_last)
        elif parameter.ndim > 1 and layout == "transposed":
            parameter.data = parameter.data.transpose(0, 1).contiguous().transpose(0, 1)
    got = bound(update=False)
    got.total.backward()
    torch.testing.assert_close(got.total, want.total, rtol=1e-6, atol=0)
    for a, b in zip(gradients(model), grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ENGINES)
def test_bfloat16_weights_give_float32_norms_and_bfloat16_gradients(backend: str) -> None:
    model = network().bfloat16()
    bound = lf.NetworkBound(model, SHAPE, backend=backend)
    result = bound(update=False)
    wide = copy.deepcopy(bound)
    wide._model[0].float()
    assert result.total.dtype == torch.float32
    torch.testing.assert_close(result.total, wide(update=False).total, rtol=1e-5, atol=0)
    result.total.backward()
    assert model[0].weight.grad.dtype == torch.bfloat16


class Scaled(nn.Module):
    """A convolution, and a factor per channel in the shape of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.gain = nn.Parameter(torch.tensor([0.5, -2.0, 3.0, 1.0]).reshape(4, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x) * self.gain


@pytest.mark.parametrize("backend", ENGINES)
def test_narrow_factors_of_any_shape(backend: str) -> None:
    model = Scaled().bfloat16()
    bound = lf.NetworkBound(model, SHAPE, backend=backend)
    result = bound(update=False)
    wide = copy.deepcopy(bound)
    wide._model[0].float()
    torch.testing.assert_close(result.total, wide(update=False).total, rtol=1e-5, atol=0)
    result.total.backward()
    assert model.gain.grad.shape == (4, 1, 1)
    assert model.gain.grad.abs().sum() > 0


@pytest.mark.parametrize("backend", ENGINES)
@pytest.mark.parametrize("engine", ["operator", "separable"])
def test_the_default_device_does_not_matter(backend: str, engine: str) -> None:
    """Memory beside the model's would be a wild address to a compiled kernel."""
    model, x, y = network(), torch.randn(4, *SHAPE), torch.tensor([0, 1, 2, 3])
    results = []
    for device in ("meta", "cpu"):
        with torch.device(device):
            bound = bound_of(model, backend, engine)
            norms = bound()
            loss = lf.margin_cross_entropy(model(x), y, norms, eps=36 / 255)
            loss.backward()
            results.append([loss, norms.pairs, *gradients(model)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("backend", ENGINES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_bound_inside_a_module_follows_it_to_half_precision(
    backend: str, dtype: torch.dtype
) -> None:
    model = network()
    both = nn.ModuleDict({"model": model, "bound": lf.NetworkBound(model, SHAPE, backend=backend)})
    want = both["bound"](update=False).total.item()
    got = both.to(dtype)["bound"]()
    assert got.total.dtype == torch.float32
    assert got.total.item() == pytest.approx(want, rel=3e-2)


@pytest.mark.skipif("native" not in ENGINES, reason="no compiled core")
def test_lazily_negated_tensors_are_read_with_their_sign() -> None:
    from lmtfast.backends import native

    weight, logits = torch.randn(3, 4), torch.randn(2, 3)
    target, rows, factor = torch.tensor([0, 2]), torch.rand(3, 3), torch.ones(2)
    want, got = (
        native.margin_forward("lmt", z, target, target, rows, factor)[0]
        for z in (-logits, torch._neg_view(logits))
    )
    assert torch.equal(want, got)
    layer = nn.Linear(4, 3)
    bound = lf.NetworkBound(layer, (4,), backend="native")
    grads = []
    for w in (-weight, torch._neg_view(weight)):
        layer.weight = nn.Parameter(w)
        grads += torch.autograd.grad(bound(update=False).total, layer.weight)
    assert torch.equal(*grads)


@pytest.mark.skipif("native" not in ENGINES, reason="no compiled core")
def test_a_gradient_of_other_vectors_is_refused() -> None:
    bound = lf.NetworkBound(network(), SHAPE, backend="native")
    tensors = [t.detach() for t in bound._reader.tensors(torch.float32)]
    arguments = tensors, bound.state.iterates, bound.plan.fingerprint, False
    sigmas, *_, saved, rest = torch.ops.lmtfast.spectral_step(*arguments)
    for wrong in ((saved[1:], sigmas), (saved, sigmas[1:]), (saved, sigmas.double())):
        with pytest.raises((ShapeError, DtypeError), match="Do this"):
            torch.ops.lmtfast.spectral_vjp(
                tensors, wrong[0], rest, wrong[1], bound.plan.fingerprint, [True] * len(tensors)
            )


@pytest.mark.skipif("native" not in ENGINES, reason="no compiled core")
def test_weights_without_dense_data_are_refused() -> None:
    layer = nn.Linear(4, 3)
    bound = lf.NetworkBound(layer, (4,), backend="native")
    sparse, freed = layer.weight.detach().to_sparse(), layer.weight.detach().clone()
    freed.untyped_storage().resize_(0)
    for weight, error in ((sparse, DtypeError), (freed, ShapeError)):
        layer.weight = nn.Parameter(weight)
        with pytest.raises(error, match="Do this"):
            bound()


def test_a_model_on_the_meta_device_is_traced_and_bounded_after_it_has_weights() -> None:
    model = network().to("meta")
    bound = lf.NetworkBound(model, SHAPE)
    assert bound.plan.backend == "reference"
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    model[1].running_var.fill_(1.0)
    bound.state.to_empty(device="cpu")
    bound.state.reseed(0)
    assert float(bound.converge(5).total.detach()) > 0


def test_a_bound_that_is_pickled_keeps_its_plan() -> None:
    bound = lf.NetworkBound(network(), SHAPE)
    loaded = pickle.loads(pickle.dumps(bound))
    assert loaded.plan is bound.plan
    assert torch.equal(loaded(update=False).total, bound(update=False).total)
