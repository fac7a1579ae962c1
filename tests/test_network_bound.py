# SPDX-License-Identifier: MIT
"""The training-time bound: convergence to dense oracles, gradients, batch statistics, state."""

from __future__ import annotations

import copy
import math
import sys
import types
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lmtfast as lf
from lmtfast import backends
from lmtfast.backends import reference
from lmtfast.backends.reference import Leaves
from lmtfast.engines.operator import OperatorEngine
from lmtfast.errors import ArgumentError, StalePlanError
from lmtfast.graph import ParameterRef, Region
from lmtfast.weights import Weights, named_tensors
from tests.cases import RANDOM_CONVS, Lambda, Parallel
from tests.networks import IMAGE, VGG, LiResNet, Nested, ResNet, WideResNet, randomised
from tests.oracles import svd_norm

# A lower estimate may exceed the truth by its own float64 rounding alone.
ROUNDING = 1e-12


def small() -> nn.Module:
    return randomised(
        nn.Sequential(
            nn.Conv2d(1, 2, 3, stride=2, padding=1), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(),
            nn.Linear(8, 4), nn.PReLU(), nn.Linear(4, 3),
        ), 2,
    )  # fmt: skip


SMALL = (1, 4, 4)


@pytest.mark.parametrize("start", range(0, 240, 40))
def test_the_operator_engine_converges_from_below(start: int) -> None:
    layers = list(RANDOM_CONVS[start : start + 40])
    net = Parallel(layers).eval()
    plan = lf.trace(net, (net.length,))
    weights = Weights(named_tensors(net), dtype=torch.float64)
    generator = torch.Generator().manual_seed(start)
    for region in plan.operators:
        assert isinstance(region, Region)
        truth = svd_norm(layers[int(region.name.split(".")[1])].matrix())
        state = torch.randn(
            OperatorEngine().state_size(region), generator=generator, dtype=torch.float64
        )
        sigma = 0.0
        for _ in range(3000):
            result = OperatorEngine().step(region, weights, state, update=True)
            previous, sigma, state = sigma, float(result.sigma.detach()), result.state
            assert sigma >= previous * (1 - ROUNDING)
            assert sigma <= truth * (1 + ROUNDING)
            if sigma >= truth * (1 - 1e-4):
                break
        assert sigma >= truth * (1 - 1e-4), region.name


def test_total_features_and_pairs_have_the_gradient_of_their_value() -> None:
    model = small()
    bound = lf.NetworkBound(model, SMALL, engine="operator")
    bound.converge(400)
    names = [n for n, _ in model.named_parameters()]

    def value(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with torch.nn.utils.stateless._reparametrize_module(
            model, dict(zip(names, tensors, strict=True))
        ):
            result = bound(update=False)
            # The zero diagonal has no derivative of its root.
            off = ~torch.eye(3, dtype=torch.bool)
            return result.total, result.features, result.pairs[off]

    leaves = tuple(p.detach().clone().requires_grad_() for p in model.parameters())
    # At the converged vectors the derivative with v fixed is that of the norm itself; finite
    # differences see the second order in v, hence the looser atol.
    assert torch.autograd.gradcheck(value, leaves, eps=1e-6, atol=1e-5, rtol=1e-4)


def test_the_gradient_at_a_fixed_vector_is_the_outer_product() -> None:
    # lmt.md checks 9 and 11: d sigma / dW = u v^T, with v as it stands, converged or not.
    model = nn.Sequential(nn.Linear(5, 4, bias=False)).double()
    bound = lf.NetworkBound(model, (5,), engine="operator")
    bound.state.reseed(3)
    v = bound.state.slice(0).double().clone()
    weight = model[0].weight
    sigma = bound(update=False).total
    sigma.backward()
    u = weight.detach() @ v / (weight.detach() @ v).norm()
    torch.testing.assert_close(weight.grad, torch.outer(u, v), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(sigma.detach(), (weight.detach() @ v).norm(), rtol=1e-12, atol=1e-12)


def test_power_steps_on_a_diagonal_are_those_of_the_paper() -> None:
    # lmt.md check 13: z = (0.5, -2, 1) from a uniform vector.
    model = nn.Sequential(nn.Linear(3, 3, bias=False)).double()
    model[0].weight.data = torch.diag(torch.tensor([0.5, -2.0, 1.0], dtype=torch.float64))
    bound = lf.NetworkBound(model, (3,), engine="operator")
    bound.state.iterates.fill_(1.0)
    read, ended = [], []
    for _ in range(5):
        read.append(round(bound(update=False).total.item(), 5))
        ended.append(bound().total.item())
    # The paper reads sigma before the step; at its end it lies between this reading and the next.
    assert read == [1.32288, 1.95203, 1.99707, 1.99982, 1.99999]
    assert all(a < b < c for a, b, c in zip(read, ended, [*read[1:], 2.0], strict=True))


def test_estimates_rise_at_frozen_weights_and_stay_below_the_truth() -> None:
    # lmt.md checks 9, 10 and 12.
    model = small()
    truth = lf.certified_bound(model, SMALL)
    before = copy.deepcopy(model.state_dict())
    bound = lf.NetworkBound(model, SMALL, engine="operator")
    bound.state.reseed(1)
    totals = [bound().total.item() for _ in range(201)]
    assert all(b >= a * (1 - ROUNDING) for a, b in zip(totals, totals[1:], strict=False))
    assert totals[-1] <= truth.total
    assert totals[-1] >= truth.total * (1 - 1e-3)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_batch_norm_folds_into_one_operator() -> None:
    # lmt.md check 7: the merged norm never exceeds the product of the two.
    conv, norm = nn.Conv2d(2, 3, 3, padding=1).double(), nn.BatchNorm2d(3).double()
    norm.weight.data.uniform_(-2, 2)
    norm.running_var.uniform_(0.1, 2)
    model = nn.Sequential(conv, norm).eval()
    merged = lf.certified_bound(model, (2, 5, 5)).total
    largest = (norm.weight / (norm.running_var + norm.eps).sqrt()).abs().max().item()
    assert merged <= lf.certified_bound(conv.eval(), (2, 5, 5)).total * largest * (1 + 1e-12)


def test_residuals_chains_and_factors_compose_as_the_paper_says() -> None:
    # lmt.md check 8.
    a, b = nn.Linear(3, 3).double(), nn.Linear(3, 3).double()
    norm_a, norm_b = (svd_norm(m.weight.detach().numpy()) for m in (a, b))
    for function, truth in (
        (lambda m, x: x + m.b(torch.relu(m.a(x))), 1 + norm_a * norm_b),
        (lambda m, x: m.b(torch.relu(m.a(x))), norm_a * norm_b),
        (lambda m, x: torch.sigmoid(m.a(x)), norm_a / 4),
        (lambda m, x: x / 255, 1 / 255),
        (lambda m, x: torch.cat([torch.relu(m.a(x)), x], 1), math.hypot(1, norm_a)),
    ):
        total = lf.certified_bound(Lambda(function, a=a, b=b).eval(), (3,)).total
        assert truth * (1 - 1e-13) <= total <= truth * (1 + 1e-9)


def test_the_coefficient_is_eps_times_the_product_of_the_layers() -> None:
    # lmt.md check 20.
    model = randomised(VGG(), 4)
    bound = lf.NetworkBound(model, IMAGE, engine="operator")(update=False)
    head = [n for n in bound.per_operator if n.startswith("12")]
    layers = [float(s) for n, s in bound.per_operator.items() if n not in head]
    assert float(bound.features) == pytest.approx(math.prod(layers), rel=1e-12)


def test_a_second_call_in_one_step_keeps_the_first_graph() -> None:
    model = small()
    bound = lf.NetworkBound(model, SMALL, engine="operator")
    first, second = bound(), bound()
    (first.total + second.total).backward()
    both = model[0].weight.grad.clone()
    assert bool(both.isfinite().all())
    assert both.any()
    with pytest.raises(ArgumentError):
        torch.autograd.grad(bound().total, model[0].weight, create_graph=True)


def test_without_update_nothing_moves() -> None:
    model = small()
    bound = lf.NetworkBound(model, SMALL, engine="operator")
    state = {n: t.clone() for n, t in bound.state_dict().items()}
    one, two = bound(update=False), bound(update=False)
    assert float(one.total) == float(two.total)
    assert all(torch.equal(t, state[n]) for n, t in bound.state_dict().items())
    bound()
    assert int(bound.state.steps) == int(state["state.steps"]) + 1


def test_the_state_dict_is_the_iterates_and_round_trips() -> None:
    model = small()
    bound = lf.NetworkBound(model, SMALL, engine="operator")
    assert set(bound.state_dict()) == {"state.iterates", "state.steps"}
    assert not list(bound.parameters())
    assert not {id(p) for p in model.parameters()} & {id(t) for t in bound.buffers()}
    fresh = lf.NetworkBound(model, SMALL, engine="operator")
    bound.converge(30)
    fresh.load_state_dict(bound.state_dict())
    assert float(fresh(update=False).total) == float(bound(update=False).total)


def test_a_structure_that_changed_is_stale() -> None:
    model = small()
    bound = lf.NetworkBound(model, SMALL, engine="operator")
    saved = model[4]
    for change in (nn.Linear(8, 4, dtype=torch.float64).requires_grad_(False), nn.Linear(8, 5),
                   nn.Identity()):  # fmt: skip
        model[4] = change
        if isinstance(change, nn.Linear) and change.out_features == 4:
            bound(update=False)
            continue
        with pytest.raises(StalePlanError):
            bound()
    model[4] = saved
    bound()
    model.append(nn.ReLU())
    with pytest.raises(StalePlanError):
        bound()


def test_a_model_in_training_mode_is_bounded_by_its_running_statistics() -> None:
    model = small()
    bound = lf.NetworkBound(model, SMALL, engine="operator")
    evaluated = float(bound(update=False).total)
    model.train()
    assert float(bound(update=False).total) == evaluated
    assert lf.NetworkBound(model, SMALL, engine="operator").plan.fingerprint
    assert all(m.training for m in model.modules())


def test_batch_statistics_are_those_of_the_latest_forward_and_carry_gradients() -> None:
    model = small().train()
    bound = lf.NetworkBound(model, SMALL, engine="operator", batch_norm="batch")
    with pytest.raises(StalePlanError, match="training mode"):
        bound()
    x = torch.randn(16, *SMALL, dtype=torch.float64)
    model(x)
    bound.converge(300)
    model(x)
    total = bound(update=False)
    hidden = model[0](x)
    gain = model[1].weight / (hidden.var((0, 2, 3), unbiased=False) + model[1].eps).sqrt()
    merged = Lambda(
        lambda m, v: F.conv2d(v, m.w, stride=2, padding=1),
        w=(model[0].weight * gain[:, None, None, None]).detach(),
    )
    truth = lf.certified_bound(merged.eval(), SMALL).total
    estimate = next(iter(total.per_operator.values()))
    assert float(estimate) == pytest.approx(truth, rel=1e-6)
    # The bias of the conv does not act on the bound with running statistics, nor does it here;
    # the weight acts through the variance too.
    (grad,) = torch.autograd.grad(estimate, model[0].weight, retain_graph=True)
    scaled = copy.deepcopy(model[0].weight.detach())
    # Scaling the conv scales its batch deviation as well: the folded norm hardly moves.
    assert abs(float((grad * scaled).sum())) < 0.05 * float(estimate)


def test_functional_batch_norms_have_no_batch_statistics_to_watch() -> None:
    model = Lambda(
        lambda m, x: F.batch_norm(m.a(x), m.mean, m.var), a=nn.Linear(3, 3), mean=torch.zeros(3),
        var=torch.ones(3),
    )  # fmt: skip
    for module in (model, nn.Sequential(model)):
        with pytest.raises(ArgumentError, match="running"):
            lf.NetworkBound(module, (3,), engine="operator", batch_norm="batch")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_narrow_weights_are_estimated_in_at_least_single_precision(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).to(dtype)
    bound = lf.NetworkBound(model, (6,), engine="operator").converge(200)
    assert bound.total.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    truth = lf.certified_bound(copy.deepcopy(model).eval(), (6,)).total
    assert float(bound.total) == pytest.approx(truth, rel=1e-4)
    network = lf.NetworkBound(model, (6,), engine="operator")
    network().total.backward()
    assert model[0].weight.grad.dtype == dtype


def test_weights_that_are_not_finite_are_seen_in_the_estimate_and_leave_the_state_alone() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
    bound = lf.NetworkBound(model, (3,), engine="operator")
    good = model[0].weight.detach().clone()
    model[0].weight.data[0, 0] = math.nan
    assert not math.isfinite(float(bound().total))
    assert bool(bound.state.iterates.isfinite().all())
    model[0].weight.data.copy_(good)
    assert math.isfinite(float(bound().total))


def test_zero_weights_give_zero_and_finite_gradients() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
    for parameter in model.parameters():
        parameter.data.zero_()
    result = lf.NetworkBound(model, (3,), engine="operator")()
    result.total.backward()
    assert float(result.total) == 0.0
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("build", [ResNet, WideResNet, LiResNet, Nested])
def test_converged_estimates_approach_the_rigorous_bound_from_below(build: type) -> None:
    model = randomised(build(), 6)
    truth = lf.certified_bound(model, IMAGE)
    estimate = lf.NetworkBound(model, IMAGE, engine="operator").converge(600)
    assert float(estimate.total) <= truth.total
    assert float(estimate.total) >= truth.total * (1 - 1e-2)
    assert float(estimate.features) <= truth.features


def test_leaves_resolve_what_they_are_given() -> None:
    ref = ParameterRef("w")
    assert float(Leaves({ref: torch.tensor(2.0)})[ref]) == 2.0


def test_a_registered_backend_runs_the_steps_it_was_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[str] = []

    def counted(name: str) -> Any:
        def call(*args: Any) -> Any:
            calls.append(name)
            return getattr(reference, name)(*args)

        return call

    module = types.ModuleType("counting_backend")
    for name in ("matvec", "rmatvec", "weight_vjp"):
        setattr(module, name, counted(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(backends, "_REGISTRY", dict(backends._REGISTRY))
    lf.register_backend(
        "counting", module=module.__name__, provides="power steps", probe=lambda: (True, "test")
    )
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3))
    bound = lf.NetworkBound(model, (1, 6, 6), engine="operator", backend="counting")
    assert bound.plan.backend == "counting"
    calls.clear()
    bound().total.backward()
    assert sorted(calls) == ["matvec"] * 2 + ["rmatvec"] * 2 + ["weight_vjp"] * 2
    other = lf.NetworkBound(model, (1, 6, 6), engine="operator", backend="reference")
    other.load_state_dict(bound.state_dict())
    assert torch.equal(other(update=False).total, bound(update=False).total)
