# SPDX-License-Identifier: MIT
"""Whatever happens to a model after its bound was made, no answer speaks of the model before."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import lmtfast as lf
from lmtfast import reading
from lmtfast.errors import LmtfastError, NotCertifiedError, StalePlanError
from tests.soundness.routes import BODIES, NAMES, ROUTES, SHAPE, Net, Route, build, mapped

UNIT = (0.0, 1.0)
# Two converged estimates of one network; a stale one is off by more, because the change is large.
ESTIMATE = 1e-3


def close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=ESTIMATE, abs_tol=1e-6)


@dataclass
class Held:
    """What a user holds: a model, its bounds of both kinds, a certificate with its data."""

    model: Net
    bound: lf.NetworkBound
    rigorous: lf.LipschitzBound
    certificate: lf.Certificate
    x: Tensor
    y: Tensor


def hold(model: Net) -> Held:
    x, y = torch.rand(3, *SHAPE), torch.tensor([0, 1, 2])
    certificate = lf.certify(model, (x, y), input_shape=SHAPE, input_range=UNIT)
    bound = lf.NetworkBound(model, SHAPE, engine="operator")
    return Held(model, bound, lf.certified_bound(model, SHAPE), certificate, x, y)


@cache
def held_once(body: str) -> Held:
    return hold(build(body))


def prepared(body: str, route: Route) -> Held:
    if route.prepare is None:
        # One trace per body: bounds and plans are copied together with the model they belong to.
        return copy.deepcopy(held_once(body))
    model = build(body)
    route.prepare(model)
    return hold(model.eval())


def copied(model: Net) -> Net:
    """A deep copy whose weights are parameters, even where a call has put other tensors."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        for name, tensor in module._parameters.items():
            if tensor is not None:
                module._parameters[name] = torch.nn.Parameter(tensor.detach())
    return twin


def check(body: str, name: str, folder: Path) -> None:
    """One case: hold bounds and a certificate, change the model, ask again."""
    route = mapped(folder) if name not in ROUTES else ROUTES[name]
    held = prepared(body, route)
    model, x, y = held.model, held.x, held.y
    pairs, total = held.rigorous.pairs.clone(), held.rigorous.total
    # Of both signs, so that every piece of an activation takes part.
    probe = torch.cat((x, torch.randn(64, *SHAPE, generator=torch.Generator().manual_seed(0))))
    with torch.no_grad():
        before = model(probe)
    with route.enter(model):
        with torch.no_grad():
            after = model(probe.to(next(model.parameters()).dtype)).float()
        twin = copied(model)
        moved = (after - before).abs() > 1e-2 * before.abs()
        assert bool(moved.any()), "the change has no effect"
        # A bound is a value: it stays what it was when it was computed.
        assert torch.equal(held.rigorous.pairs, pairs)
        assert held.rigorous.total == total
        with pytest.raises(LmtfastError):
            held.certificate.verify(model, (x, y))
        try:
            answer = held.bound.rescan()
        except StalePlanError:
            # A refusal is not forgotten at the next call.
            with pytest.raises(StalePlanError):
                held.bound()
            return
        fresh = lf.NetworkBound(twin, SHAPE, engine="operator").rescan()
        assert close(float(answer.total), float(fresh.total))
        losses = [lf.margin_cross_entropy(after[: len(y)], y, b, eps=0.5) for b in (answer, fresh)]
        assert close(*(float(loss.detach()) for loss in losses))


# PyTorch computes no orthogonal weights in 16 bits: such a model has no outputs.
IMPOSSIBLE = {("orthogonal", "half"), ("orthogonal", "bfloat16")}
CASES = tuple(case for case in product(BODIES, NAMES) if case not in IMPOSSIBLE)
# A default run takes every second route on every fifth body.
QUICK = tuple((tuple(BODIES)[5 * (i % 4)], n) for i, n in enumerate(NAMES[::2]))


def test_there_are_thirty_routes_and_twenty_modules() -> None:
    assert len(BODIES) >= 20
    assert len(NAMES) >= 30
    assert len(CASES) >= 600


@pytest.mark.parametrize(("body", "name"), QUICK)
def test_no_answer_is_stale(body: str, name: str, tmp_path: Path) -> None:
    check(body, name, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("body", BODIES)
def test_no_answer_is_stale_whatever_the_module(body: str, tmp_path: Path) -> None:
    failures = {}
    for name in NAMES:
        if (body, name) not in CASES:
            continue
        try:
            check(body, name, tmp_path)
        except AssertionError as error:
            failures[name] = str(error)
    assert not failures


def test_a_cached_parametrization_is_no_weight() -> None:
    """Inside ``parametrize.cached()`` a module runs on weights that were computed earlier."""
    model = torch.nn.Sequential(parametrizations.weight_norm(torch.nn.Linear(3, 2))).eval()
    x = torch.rand(2, 3)
    with parametrize.cached():
        model(x)
        bound = lf.NetworkBound(model, (3,), engine="operator")
        old = lf.certified_bound(model, (3,)).total
        model[0].parametrizations.weight.original0.detach().mul_(8)
        assert lf.certified_bound(model, (3,)).total >= 7.9 * old
        # The module still computes with the old weight: it is not what its parameters say.
        with pytest.raises(NotCertifiedError):
            lf.certify(model, x, input_shape=(3,), input_range=UNIT)
    assert float(bound.rescan().total) >= 7.9 * old


def test_a_change_without_effect_on_the_bound_is_no_refusal() -> None:
    """A hook that only looks, another layer of the same settings, a longer dropout: traced again,
    found equal, and the bound goes on."""
    model = build("residual block")
    bound = lf.NetworkBound(model, SHAPE, engine="operator")
    before = float(bound.rescan().total)
    seen = []
    model.act.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    model.other = torch.nn.Tanh()
    model.remark = "a note"
    assert close(float(bound().total), before)
    # Found equal once, it is compared with the new state: no further trace.
    assert bound._reader._snapshot.unchanged()


class Counting(nn.Module):
    """Counts its calls, which no bound depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.linear(x)


def test_a_counter_is_traced_again_once_and_not_at_every_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = Counting()
    bound = lf.NetworkBound(model, (3,))
    trace_model, traced = reading.trace_model, []

    def counted(*arguments: object) -> object:
        traced.append(arguments)
        return trace_model(*arguments)

    monkeypatch.setattr(reading, "trace_model", counted)
    for _ in range(5):
        model(torch.rand(2, 3))
        bound()
    assert len(traced) == 1
    model.linear = nn.Sequential(model.linear, nn.Linear(2, 2))
    with pytest.raises(StalePlanError):
        bound()


class Asking(nn.Linear):
    """Scales by a parameter if it has one, and keeps its latest output."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        self.latest = y.detach()
        return y * getattr(self, "scale", 1.0)


def large() -> nn.Parameter:
    return nn.Parameter(torch.full((2,), 30.0))


def forward_for_tensor(layer: nn.Module) -> None:
    """As many attributes as before."""
    del layer.latest
    layer.forward = lambda x: 30 * nn.Linear.forward(layer, x)


def other_function(layer: nn.Module) -> None:
    """A hook of the same number."""
    (number,) = layer._forward_hooks
    layer._forward_hooks[number] = lambda module, inputs, output: 30 * output


def other_dictionary(layer: nn.Module) -> None:
    weight = nn.Parameter(30 * layer.weight.detach())
    layer._parameters = {**layer._parameters, "weight": weight}


HIDDEN = {
    "a weight where none was": lambda m: setattr(m[1], "weight", large()),
    "a parameter that is asked for": lambda m: m[0].register_parameter("scale", large()),
    "a tensor's place": lambda m: forward_for_tensor(m[0]),
    "a hook's function": lambda m: other_function(m[0]),
    "another dictionary": lambda m: other_dictionary(m[0]),
}


@pytest.mark.parametrize("name", HIDDEN)
@pytest.mark.parametrize("copy_first", [False, True])
def test_a_change_that_leaves_names_and_numbers_as_they_were(name: str, copy_first: bool) -> None:
    model = nn.Sequential(Asking(3, 2), nn.BatchNorm1d(2, affine=False)).eval()
    model[0].register_forward_hook(lambda module, inputs, output: 2 * output)
    model(torch.rand(2, 3))
    bound = lf.NetworkBound(model, (3,), engine="operator")
    bound()
    if copy_first:
        bound = copy.deepcopy(bound)
        (model,) = bound._model
    before = float(bound.rescan().total)
    HIDDEN[name](model)
    try:
        after = float(bound.rescan().total)
    except StalePlanError:
        with pytest.raises(StalePlanError):
            bound()
    else:
        assert after > 10 * before
        assert close(after, float(lf.NetworkBound(model, (3,), engine="operator").rescan().total))


def test_equal_settings_and_copies_are_not_traced_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("residual block")
    bound = lf.NetworkBound(model, SHAPE, engine="operator")
    monkeypatch.setattr(reading, "trace_model", None)
    before = float(bound.rescan().total)
    model.act.negative_slope = float("0.5")
    model.shift.gains = [*model.shift.gains]
    model.latest = torch.rand(3)
    assert close(float(bound().total), before)
    twin = copy.deepcopy(bound)
    assert close(float(twin().total), before)
    assert bound._reader._snapshot.unchanged()
    assert twin._reader._snapshot.unchanged()
    model.act.negative_slope = 4.0
    assert not bound._reader._snapshot.unchanged()
    assert twin._reader._snapshot.unchanged()
