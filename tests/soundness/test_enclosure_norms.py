# SPDX-License-Identifier: MIT
"""By which norms an enclosure's lengths grow, from base to base and to the logits.

Every operator gets a prime for its norm, so that a product tells its factors.
"""

from __future__ import annotations

import math
from fractions import Fraction
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lmtfast.builder import Base, Expression, Origin, Value
from lmtfast.enclosure import LogitEnclosure, enclose
from lmtfast.enclosure.logits import _isometric
from lmtfast.enclosure.registry import Enclosed
from lmtfast.graph import INPUT, Call, Copy, ParameterRef, Scale
from lmtfast.tracing import trace_model
from tests.cases import Lambda
from tests.oracles import norm_is_at_most
from tests.soundness.error_calls import LOOSE, enclosed, fractions, fresh

PRIMES = (2.0, 3.0, 5.0, 7.0)


def step(call: Any) -> nn.Module:
    return Lambda(lambda m, x: call(x))


def sorted_halves(x: Tensor) -> Tensor:
    a, b = x[:, :2], x[:, 2:]
    return torch.cat([torch.maximum(a, b), torch.minimum(a, b)], 1)


# Layers, the shape of an input, norms at the ends of regions in the order in which they are asked
# for, and the norm from the last base to the logits.
NETWORKS: dict[str, tuple[list[nn.Module], tuple[int, ...], list[float], float]] = {
    "head alone": ([nn.Linear(4, 3)], (4,), [], 2.0),
    "layers": (
        [nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)],
        (4,), [2.0, 3.0], 5.0),
    "nothing behind": ([nn.Linear(4, 3), nn.Tanh()], (4,), [2.0], 1.0),
    "no head": (
        [nn.Linear(4, 4), nn.ReLU(), step(lambda x: x.mean(1, keepdim=True))], (4,), [2.0], 0.5),
    "copies before the head": (
        [nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)], (1, 4, 4), [2.0], 3.0),
    "averages before the head": (
        [nn.Conv2d(1, 2, 3), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(2, 3)],
        (1, 4, 4), [2.0], 1.5),
    "a layer before the head": (
        [nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 3)], (4,), [1.0], 6.0),
    "a factor behind the head": (
        [nn.ReLU(), nn.Linear(4, 3), step(lambda x: x * 0.5)], (4,), [1.0], 2.0),
    "a sign behind the head": (
        [nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(1, 3), step(lambda x: -x)],
        (1, 2, 2), [1.0], 1.0),
    "signs and turns": (
        [nn.Linear(4, 4), step(lambda x: -x.flip(1)), nn.ReLU(), nn.Linear(4, 3)],
        (4,), [2.0], 3.0),
    "a sum of bases": (
        [nn.Linear(4, 4), step(lambda x: x + x.relu()), nn.Linear(4, 3)],
        (4,), [2.0, 2.0, 1.0], 3.0),
    "sorted pairs": (
        [nn.Linear(4, 4), step(sorted_halves), nn.Linear(4, 3)],
        (4,), [2.0, 2.0, *(1.0,) * 6], 3.0),
}  # fmt: skip


class Watched(LogitEnclosure):
    """Notes every norm it is asked for, and counts the runs of the tape."""

    tapes = 0

    def _region_norm(self, value: Value) -> float:
        found = super()._region_norm(value)
        self.__dict__.setdefault("seen", []).append(found)
        return found

    def _tape_value(self, index: int) -> float:
        self.tapes += 1
        return super()._tape_value(index)


@pytest.mark.parametrize("name", NETWORKS)
def test_lengths_grow_by_the_norms_on_their_way(name: str) -> None:
    layers, shape, between, last = NETWORKS[name]
    model = nn.Sequential(*layers).double().eval()
    traced = trace_model(model, shape)
    norms = dict(zip((o.name for o in traced.graph.operators), PRIMES, strict=False))
    assert len(norms) == len(traced.graph.operators)
    watched = Watched(model, traced, norms=norms)
    before = watched.tapes
    logits = watched.run(torch.rand(2, *shape, dtype=torch.float64))
    assert watched.__dict__.get("seen", []) == between
    assert logits.traced is not None
    assert watched._output_norm(logits.traced) == last
    assert watched.tapes == before  # all of them were known
    # A norm that is known of the logits themselves needs no head.
    watched._known[id(logits.traced.expression)] = 0.25
    whole = logits.traced.expression is logits.traced.base
    assert watched._output_norm(logits.traced) == (1.0 if whole else 0.25)
    # From the first base on: the input itself.
    assert watched._region_norm(watched.builder.input) == 1.0


def test_what_nothing_closed_is_closed_when_it_is_asked_for() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)).double().eval()
    traced = trace_model(model, (4,))
    watched = Watched(model, traced, norms={"0": 2.0, "2": 3.0})
    scale = Scale("factor", (4,), (4,), gain=4.0)
    (value,) = (v for v in map(_value, watched.builder._closed.values())
                if v is not None and watched._known[id(v.expression)] == 2.0)  # fmt: skip
    grown = watched.builder.linear(value, scale)
    before = watched.tapes
    first = watched._region_norm(grown)
    assert watched._region_norm(grown) == first
    assert watched.tapes == before + 1
    # The region is another one, so its norm is proved, not taken from the names given.
    weight = model[0].weight.detach().numpy() * 4.0
    assert norm_is_at_most(weight, first)


def _value(closed: tuple[Any, int]) -> Value | None:
    expression = closed[0]
    below = expression
    while isinstance(below, Expression):
        below = below.inputs[0]
    return Value(below, expression) if isinstance(expression, Expression) else None


def test_norms_that_are_not_given_are_proved() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).double().eval()
    traced = trace_model(model, (4,))
    given = {"0": 7.0}
    found = Watched(model, traced, norms=given)
    assert given == {"0": 7.0}
    assert found._norms["0"] == 7.0
    assert norm_is_at_most(model[2].weight.detach().numpy(), found._norms["2"])
    logits = found.run(torch.rand(2, 4).double())
    assert found._output_norm(logits.traced) == found._norms["2"]


def test_only_what_keeps_lengths_passes_a_norm_on() -> None:
    call = Call("aten.flip.default", (INPUT, [1]))
    factor = Scale("factor", (3,), (3,))
    kinds: list[tuple[Any, bool]] = [
        (Copy("copy", (3,), (3,), call, 1, True, True), True),
        (Copy("copy", (3,), (3,), call, 1, False, True), False),
        (Copy("copy", (3,), (6,), call, 2, False, False), False),
        (factor, True),
        (Scale("factor", (3,), (3,), gain=-1.0), True),
        (Scale("factor", (3,), (3,), gain=0.5), False),
        (Scale("factor", (3,), (3,), gain=1.0 + 2.0**-52), False),
        (Scale("factor", (3,), (3,), ParameterRef("r"), (3,)), False),
        ("add", False),
    ]
    base = Base(Origin(), 0, (3,))
    for kind, kept in kinds:
        assert _isometric(Expression(kind, (base,), (3,))) is kept


@cache
def small() -> LogitEnclosure:
    model = nn.Linear(2, 2).eval()
    return LogitEnclosure(model, trace_model(model, (2,)))


def settled(value: list[float], local: list[float], base: float) -> Enclosed:
    result = enclosed(torch.tensor([value], dtype=torch.float64),
                      torch.tensor([local], dtype=torch.float64), base)  # fmt: skip
    found = small()._settled(result, traced := fresh(2))
    assert found.traced is traced
    assert torch.equal(found.value, result.value) or not all(map(math.isfinite, value))
    return found


def test_what_is_no_number_is_unknown() -> None:
    found = settled([1.0, 2.0], [0.5, 0.25], 3.0)
    assert found.local.tolist() == [[0.5, 0.25]]
    assert found.base.tolist() == [3.0]
    for bad in (math.nan, math.inf, -math.inf):
        assert settled([bad, 2.0], [0.5, 0.25], 3.0).local.tolist() == [[math.inf, 0.25]]
    for bad in (math.nan, math.inf):
        assert settled([1.0, 2.0], [0.5, bad], 3.0).local.tolist() == [[0.5, math.inf]]
        found = settled([1.0, 2.0], [0.5, 0.25], bad)
        assert found.base.tolist() == [math.inf]
        assert found.local.tolist() == [[0.5, 0.25]]


@cache
def headed(shape: tuple[int, ...]) -> tuple[LogitEnclosure, Enclosed]:
    model = nn.Sequential(nn.ReLU(), nn.Linear(4, 3)).double().eval()
    inputs = (*shape[:-1], 4)
    enclosure = LogitEnclosure(model, trace_model(model, inputs), norms={"1": 5.0})
    return enclosure, enclosure.run(torch.rand(2, *inputs).double())


@pytest.mark.parametrize("shape", [(3,), (2, 3)])
@pytest.mark.parametrize(("local", "base"), [(0.3, 0.7), (0.0, 0.1), (0.3, 0.0), (1e-320, 1e-320)])
def test_the_logits_err_by_both(shape: tuple[int, ...], local: float, base: float) -> None:
    """Of a head of norm 5 behind a tensor of two or three axes."""
    enclosure, logits = headed(shape)
    given = enclosed(torch.rand(2, *shape), local, base, logits.traced)
    given.base[1] *= 2.0
    value, error = enclosure._finish(given)
    assert torch.equal(value, given.value)
    assert error.shape == value.shape
    for sample, times in zip(error, (1, 2), strict=True):
        least = Fraction(local) + 5 * Fraction(base) * times
        assert all(least <= e <= least * LOOSE + Fraction(1, 2**900) for e in fractions(sample))


def test_unknown_lengths_leave_nothing_known() -> None:
    model = nn.Sequential(nn.ReLU(), nn.Linear(4, 3)).double().eval()
    traced = trace_model(model, (4,))
    enclosure = LogitEnclosure(model, traced, norms={"1": 0.0})
    logits = enclosure.run(torch.rand(1, 4).double())
    for local, base in ((0.0, math.inf), (math.inf, 0.0), (math.nan, 1.0), (0.0, math.nan)):
        _, error = enclosure._finish(enclosed(torch.rand(1, 3), local, base, logits.traced))
        assert bool((error == math.inf).all())
    plain = LogitEnclosure(model, traced)
    given = enclosed(torch.rand(1, 3), 0.3, 0.7, logits.traced)
    value, error = plain._finish(given)
    assert torch.equal(value, given.value)
    assert torch.equal(error, given.local)


def test_inputs_of_any_kind_are_taken_as_they_are() -> None:
    model = nn.Sequential(nn.Linear(4, 3)).eval()
    traced = trace_model(model, (4,))
    x = torch.rand(4, 2).requires_grad_()
    for chosen in (None, {"model": 2.0}):
        value, error = enclose(model, traced, x.mT, norms=chosen)
        assert value.dtype == error.dtype == torch.float64
        assert not value.requires_grad
        again, _ = enclose(model, traced, x.detach().double().mT.contiguous(), norms=chosen)
        assert torch.equal(value, again)


def test_other_tensors_than_the_models_own() -> None:
    model = nn.Linear(2, 2, bias=False).double().eval()
    traced = trace_model(model, (2,))
    other = {"weight": torch.eye(2, dtype=torch.float64)}
    value, _ = LogitEnclosure(model, traced, tensors=other)(torch.ones(1, 2))
    assert value.tolist() == [[1.0, 1.0]]
