# SPDX-License-Identifier: MIT
"""Executed radii: no execution that conforms to the profile leaves its class inside one.

Beside the library's own runs stands an execution written here, which sums in orders of its own.
Distances are judged in rational numbers, and nothing has a tolerance. The same search breaks radii
that speak of the exact function alone, and those of a recursion from which a term was dropped.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mpmath import mpf
from torch import Tensor, nn

import lmtfast as lf
from lmtfast import check, profiles
from lmtfast.certificate import Certificate
from lmtfast.composing import SQRT2_UP, compose_up
from lmtfast.description import describe, save_weights
from lmtfast.execution import Execution, recursion
from lmtfast.execution.recursion import Affine, ExecutionError, execution_error
from lmtfast.execution.steps import executed_program
from lmtfast.guarantee import plan_bound
from lmtfast.level import RIGOROUS
from lmtfast.plan import make_plan
from lmtfast.profiles import PROFILES
from lmtfast.tracing import trace_model
from lmtfast.weights import named_tensors
from tests.exact_networks import NETWORKS, evaluate, exact
from tests.soundness.executions import ORDERS, executed, keeps, margin_slope, polished, within

DTYPES = {"fp32a64": torch.float32, "fp64": torch.float64}
STORAGES: Mapping[str, Any] = {"fp32a64": np.float32, "fp64": np.float64}


def certified(model: nn.Module, x: Tensor, semantics: str, high: float = 1.0) -> Certificate:
    shape = tuple(x.shape[1:])
    return lf.certify(
        model, x, input_shape=shape, input_range=(-high, high), semantics=semantics
    )  # fmt: skip


def sequential(*layers: tuple[list[list[float]], list[float]], relu: bool = True) -> nn.Sequential:
    """Linear layers with these weights and biases, ReLU between them."""
    modules: list[nn.Module] = []
    for weight, bias in layers:
        layer = nn.Linear(len(weight[0]), len(weight))
        with torch.no_grad():
            layer.weight.copy_(torch.tensor(weight))
            layer.bias.copy_(torch.tensor(bias))
        modules += [layer, nn.ReLU()] if relu else [layer]
    return nn.Sequential(*(modules[:-1] if relu else modules)).eval()


class Prepared:
    """A model traced and bounded once."""

    def __init__(self, model: nn.Module, shape: tuple[int, ...]) -> None:
        self.model, self.shape, self.traced = model, shape, trace_model(model, shape)
        plan = make_plan(model, self.traced.graph, engine="operator", backend="reference")
        self.bound = plan_bound(plan, model, level=RIGOROUS)

    def execution(self, profile: str) -> Execution:
        return Execution(self.model, self.traced, PROFILES[profile])

    def error(self, profile: str) -> ExecutionError:
        """The execution's error on inputs in [-1, 1]."""
        graph, program = self.traced.graph, executed_program(self.execution(profile))
        description = describe(graph, named_tensors(self.model), program)
        norms = [float(self.bound.per_operator[o.name]) for o in graph.operators]
        return execution_error(
            json.loads(description.text)["executed"], description.arrays,
            compose_up(graph.tape, norms), PROFILES[profile],
            entries=math.prod(self.shape), input_range=(-1.0, 1.0),
        )  # fmt: skip

    def apart(self, c: int, j: int) -> float:
        """Distance of two of the head's rows, rounded up."""
        return float(self.bound.pair_norms(torch.tensor([c]))[0, j])


def violations(
    ready: Prepared, x: Tensor, certificate: Certificate, profile: str
) -> list[tuple[int, str]]:
    """Inputs whose class some execution leaves at an exact distance within the radius."""
    dtype, storage = DTYPES[profile], STORAGES[profile]
    model: Any = ready.model
    wide, points, centres = copy.deepcopy(model).double(), [], []
    for i, centre in enumerate(x.double()):
        radius, own = float(certificate.prediction_radius[i]), int(certificate.prediction[i])
        if radius == 0.0:
            continue
        found = [centre]
        slope = margin_slope(wide, centre, own)
        if bool(slope.any()) and math.isfinite(radius):
            edge = within(centre, -slope, radius, dtype)
            found += polished(centre, edge, slope, radius, dtype)
            found.append(within(centre, slope, radius, dtype))
        points += found
        centres += [i] * len(found)
    if not points:
        return []
    batch = torch.stack(points).to(dtype)
    execution = ready.execution(profile)
    logits = {
        f"batches of {size}": torch.cat([execution(part) for part in batch.split(size)]).numpy()
        for size in (1, 7, 256)
    }
    for name, order in ORDERS.items():
        logits[name] = np.stack([executed(model, point, order, storage) for point in batch])
    return [
        (i, name)
        for name, rows in logits.items()
        for i, row in zip(centres, rows, strict=True)
        if not keeps(row, int(certificate.prediction[i]))
    ]


# -- random networks: the radius holds, and a radius of the exact function does not ----------------


@cache
def random_network(seed: int, hidden: tuple[int, ...], common: float = 0.0) -> Prepared:
    """Random layers; ``common`` is added to every logit, whose storage is coarse then."""
    generator = torch.Generator().manual_seed(seed)
    sizes = (6, *hidden, 3)
    layers = []
    for a, b in zip(sizes, sizes[1:], strict=False):
        weight = torch.randn(b, a, generator=generator)
        layers.append((weight.tolist(), (100 * torch.randn(b, generator=generator)).tolist()))
    weight, bias = layers[-1]
    layers[-1] = (weight, [b + common for b in bias])
    return Prepared(sequential(*layers), (6,))


def inputs(seed: int, count: int = 6) -> Tensor:
    return torch.rand((count, 6), generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize(("seed", "hidden"), [(0, ()), (2, (5,))])
def test_no_execution_leaves_its_class(seed: int, hidden: tuple[int, ...], profile: str) -> None:
    ready, x = random_network(seed, hidden), inputs(seed)
    certificate = certified(ready.model, x, f"executed({profile})")
    assert (certificate.prediction_radius > 0).all()
    assert not violations(ready, x, certificate, profile)


def test_the_search_breaks_radii_that_ignore_the_execution() -> None:
    ready, x = random_network(0, (), 1e6), inputs(0, 20)
    broken = {i for i, _ in violations(ready, x, certified(ready.model, x, "ideal"), "fp32a64")}
    assert len(broken) >= 3


def test_thread_counts_and_batches_stay_inside() -> None:
    ready, x = random_network(3, (64, 64)), inputs(3, 9)
    execution, before = ready.execution("fp32a64"), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found += [torch.cat([execution(p) for p in x.split(size)]) for size in (1, 4, 9)]
    finally:
        torch.set_num_threads(before)
    limit = 2 * ready.error("fp32a64").whole.constant
    assert all(bool(((other - found[0]).abs() <= limit).all()) for other in found)


# -- every kind of call: logits against 60-digit arithmetic ----------------------------------------


def settled(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
                module.running_mean.normal_(generator=generator)
                module.running_var.uniform_(0.01, 3.0, generator=generator)
                module.weight.normal_(generator=generator)
    return model.eval().float()


USUAL = (
    "batch norm", "linear residual", "concatenation", "slices", "constants", "average pool", "gelu",
)  # fmt: skip
KINDS = [pytest.param(n, marks=() if n in USUAL else pytest.mark.slow) for n in NETWORKS]


@pytest.mark.parametrize("name", KINDS)
def test_differences_of_logits_stay_within_the_bound(name: str) -> None:
    shape, build = NETWORKS[name]
    torch.manual_seed(len(name))
    model = settled(build())
    generator = torch.Generator().manual_seed(len(name))
    x = torch.rand((2, *shape), generator=generator) * 2 - 1
    moved = x + torch.randn(x.shape, generator=generator)
    ready = Prepared(model, shape)
    for profile, dtype in DTYPES.items():
        error, logits = ready.error(profile), ready.execution(profile)(moved.to(dtype)).double()
        for centre, point, row in zip(x, moved, logits, strict=True):
            truth = [mpf(v) for v in evaluate(model, exact(point)).reshape(-1)]
            radius = float((point.double() - centre.double()).norm()) * (1 + 2.0**-40)
            e, rest = (a.constant + a.slope * radius for a in (error.features, error.logits))
            for c in range(len(truth)):
                for j in range(len(truth)):
                    off = abs((mpf(float(row[c])) - mpf(float(row[j]))) - (truth[c] - truth[j]))
                    limit = (e * ready.apart(c, j) + rest * SQRT2_UP) * (1 + 2.0**-40)
                    assert off <= mpf(limit if c != j else 0.0)


# -- constructions that only their execution betrays -----------------------------------------------


def murray() -> tuple[nn.Sequential, Tensor]:
    """Biases of a million on both logits: float32 storage has steps of 1/16 there."""
    model = sequential(([[0.25, 0.0], [0.0, 0.25]], [1e6 + 0.0625, 1e6]))
    return model, torch.tensor([[0.02, 0.0], [0.0, 0.03]])


def cancelling() -> tuple[nn.Sequential, Tensor]:
    """w x + c - w x, whose constant is lost once it is stored beside w x: Zombori et al. (2021)."""
    model = sequential(
        ([[2.0**30], [2.0**30]], [1.0, 0.0]), ([[1.0, -1.0], [0.0, 0.0]], [0.0, 0.5]), relu=False
    )
    return model, torch.tensor([[0.75], [0.5]])


def vanishing() -> tuple[nn.Sequential, Tensor]:
    """A layer scaled to where float32 has two bits left, and the next one scaled back."""
    model = sequential(
        ([[2.0**-75, 0.0], [0.0, 2.0**-75]], [0.0, 0.0]),
        ([[2.0**-74, 0.0], [0.0, 2.0**-74]], [0.0, 0.0]),
        ([[2.0**120, 0.0], [0.0, 2.0**120]], [0.0, 0.0]),
    )
    return model, torch.tensor([[1.0, 0.9], [0.3, 0.45]])


def overflowing() -> tuple[nn.Sequential, Tensor]:
    """A layer scaled beyond what float32 holds within the radius, and the next scaled back."""
    model = sequential(
        ([[2.0**127, 0.0], [0.0, 2.0**127]], [0.0, 0.0]),
        ([[2.0**-126, 0.0], [0.0, 2.0**-126]], [0.0, 0.0]),
    )
    return model, torch.tensor([[1.5, 0.25], [0.25, 1.75]])


BETRAYED: dict[str, Callable[[], tuple[nn.Sequential, Tensor]]] = {
    "murray": murray,
    "cancelling": cancelling,
    "vanishing": vanishing,
    "overflowing": overflowing,
}


@cache
def prepared(name: str) -> tuple[Prepared, Tensor]:
    model, x = {**BETRAYED, "ordering": ordering, "drifting": drifting}[name]()
    return Prepared(model, tuple(x.shape[1:])), x


@pytest.mark.parametrize("name", BETRAYED)
def test_what_only_the_execution_betrays(name: str) -> None:
    ready, x = prepared(name)
    model = ready.model
    ideal = certified(model, x, "ideal", 2.0)
    assert (ideal.prediction_radius > 0).all()
    assert violations(ready, x, ideal, "fp32a64"), "the construction betrays nothing"
    found = certified(model, x, "executed(fp32a64)", 2.0)
    assert (found.prediction_radius < ideal.prediction_radius).all()
    assert not violations(ready, x, found, "fp32a64")


@pytest.mark.parametrize("power", [20, 100])
def test_powers_of_two_between_layers_cost_nothing_in_range(power: int) -> None:
    k = 2.0**power
    model = sequential(([[k, 0.0], [0.0, k]], [0.0, 0.0]), ([[1 / k, 0.0], [0.0, 1 / k]], [0, 0]))
    x = torch.tensor([[0.75, 0.25]])
    found = certified(model, x, "executed(fp32a64)").prediction_radius
    ideal = certified(model, x, "ideal").prediction_radius
    assert (found > 0.999 * ideal).all()


# -- the bound itself, and canaries: without any one of its terms some execution exceeds it --------


def ordering() -> tuple[nn.Sequential, Tensor]:
    """2^70 x + x - 2^70 x: the middle term survives in some orders of summation only."""
    model = sequential(([[2.0**70, 1.0, -(2.0**70)], [0.0, 0.0, 0.0]], [0.0, 0.5]))
    return model, torch.tensor([[0.75, 1.0, 0.75], [0.5, 0.9, 0.5]])


def drifting() -> tuple[nn.Sequential, Tensor]:
    """Six layers that each round at the same size: their errors add up."""
    first = ([[2.0**12]], [2.0**20])
    layers = [([[1.0003]], [0.0])] * 5
    x = torch.rand((300, 1), generator=torch.Generator().manual_seed(4))
    return sequential(first, *layers, ([[1.0], [0.0]], [0.0, 0.0])), x


CASES = ["murray", "cancelling", "vanishing", "ordering", "drifting"]


def exact_logits(model: nn.Sequential, x: Tensor) -> list[Fraction]:
    values = [Fraction(v) for v in x.tolist()]
    for layer in model:
        if isinstance(layer, nn.Linear):
            rows = zip(layer.weight.tolist(), layer.bias.tolist(), strict=True)
            values = [
                Fraction(b) + sum(Fraction(w) * v for w, v in zip(row, values, strict=True))
                for row, b in rows
            ]
        else:
            values = [max(v, Fraction(0)) for v in values]
    return values


def exceeded(name: str, profile: str) -> bool:
    """Whether the logits of some execution are farther from the exact ones than the bound."""
    ready, x = prepared(name)
    model: Any = ready.model
    limit = Fraction(ready.error(profile).whole.constant) ** 2
    for point in x.to(DTYPES[profile]):
        truth = exact_logits(model, point)
        for order in ORDERS.values():
            logits = executed(model, point, order, STORAGES[profile])
            off = [Fraction(float(a)) - b for a, b in zip(logits, truth, strict=True)]
            if sum(o * o for o in off) > limit:
                return True
    return False


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("name", CASES)
def test_no_order_of_summation_exceeds_the_bound(name: str, profile: str) -> None:
    assert not exceeded(name, profile)


def without_storage(patch: pytest.MonkeyPatch) -> None:
    forge(patch, unit=0.0)


def without_denormals(patch: pytest.MonkeyPatch) -> None:
    forge(patch, underflow=0.0)


def without_sums(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(recursion, "gamma_up", lambda n: 0.0)


def without_biases(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(recursion._Recursion, "_shift", lambda self, step: 0.0)


def without_earlier_layers(patch: pytest.MonkeyPatch) -> None:
    own = recursion.Lengths.__rmul__

    def forgetful(self: recursion.Lengths, factor: float) -> recursion.Lengths:
        return dataclasses.replace(own(self, factor), error=Affine())

    patch.setattr(recursion.Lengths, "__rmul__", forgetful)


def forge(patch: pytest.MonkeyPatch, **fields: float) -> None:
    """Another fp32a64 than the profile's."""
    forged = dict(PROFILES) | {"fp32a64": dataclasses.replace(PROFILES["fp32a64"], **fields)}
    patch.setitem(globals(), "PROFILES", forged)
    patch.setattr(profiles, "PROFILES", forged)


CANARIES: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], str, str]] = {
    "storage": (without_storage, "murray", "fp32a64"),
    "denormals": (without_denormals, "vanishing", "fp32a64"),
    "sums": (without_sums, "ordering", "fp64"),
    "biases": (without_biases, "murray", "fp32a64"),
    "earlier layers": (without_earlier_layers, "drifting", "fp32a64"),
}


@pytest.mark.parametrize("canary", CANARIES)
def test_without_a_term_the_bound_is_exceeded(canary: str, monkeypatch: pytest.MonkeyPatch) -> None:
    drop, name, profile = CANARIES[canary]
    drop(monkeypatch)
    assert exceeded(name, profile)


@pytest.mark.parametrize("canary", ["storage", "biases"])
def test_without_a_term_a_class_is_left(canary: str, monkeypatch: pytest.MonkeyPatch) -> None:
    drop, _, profile = CANARIES[canary]
    ready, x = random_network(0, (), 1e6), inputs(0, 20)
    with monkeypatch.context() as patch:
        drop(patch)
        found = certified(ready.model, x, f"executed({profile})", 2.0)
    assert violations(ready, x, found, profile)


def test_without_a_range_an_execution_overflows(monkeypatch: pytest.MonkeyPatch) -> None:
    def endless(*args: Any, **options: Any) -> ExecutionError:
        return dataclasses.replace(execution_error(*args, **options), largest_radius=math.inf)

    ready, x = prepared("overflowing")
    with monkeypatch.context() as patch:
        patch.setattr("lmtfast.subject.execution_error", endless)
        found = certified(ready.model, x, "executed(fp32a64)", 2.0)
    assert violations(ready, x, found, "fp32a64")


# What denormals and float64 sums lose is below the checker's own slack at radii near one.
@pytest.mark.parametrize("canary", ["storage", "biases", "earlier layers"])
def test_the_checker_notices_a_dropped_term(
    canary: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    drop, _, profile = CANARIES[canary]
    model, x = random_network(2, (5,)).model, torch.full((1, 6), 0.25)
    semantics = f"executed({profile})"
    weights = save_weights(model, tmp_path / "w.npz", input_shape=(6,), semantics=semantics)
    honest = certified(model, x, semantics).save(tmp_path / "honest.npz")
    assert check.check(honest, weights) == []
    with monkeypatch.context() as patch:
        drop(patch)
        forged = certified(model, x, semantics).save(tmp_path / "forged.npz")
    assert [f.kind for f in check.check(forged, weights)] == ["claim"]
