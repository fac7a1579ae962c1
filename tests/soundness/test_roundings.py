# SPDX-License-Identifier: MIT
"""Attacks on executed semantics: the worst roundings, ranges, casts, names, and forged steps."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lmtfast as lf
from lmtfast import check, check_execution
from lmtfast.certificate import Certificate
from lmtfast.certificate_file import canonical_json
from lmtfast.composing import SQRT2_UP, compose_up
from lmtfast.description import describe, save_weights
from lmtfast.errors import CertificateError, NotCertifiedError
from lmtfast.execution.steps import executed_program
from lmtfast.judgement import squared_distance
from lmtfast.models import run
from lmtfast.profiles import PROFILES
from lmtfast.weights import named_tensors
from tests.cases import Lambda
from tests.exact_networks import NETWORKS
from tests.random_networks import RandomNetwork
from tests.soundness.executions import keeps
from tests.soundness.roundings import Chain, WorstExecution
from tests.soundness.test_executed import Prepared, settled

STORED, WIDE = "executed(fp32a64)", "executed(fp64)"


def certified(model: nn.Module, x: Tensor, semantics: str = STORED) -> Certificate:
    return lf.certify(
        model.eval(), x, input_shape=tuple(x.shape[1:]), input_range=(-1.0, 1.0),
        semantics=semantics,
    )  # fmt: skip


def affine(weight: list[list[float]], bias: list[float], dtype: Any = torch.float32) -> nn.Linear:
    layer = nn.Linear(len(weight[0]), len(weight), dtype=dtype)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(weight, dtype=dtype))
        layer.bias.copy_(torch.tensor(bias, dtype=dtype))
    return layer


# -- every call rounded in the worst direction -----------------------------------------------------


def network(name: str) -> Prepared:
    kind, _, seed = name.partition(" ")
    if kind == "chain":
        return Prepared(Chain(int(seed)).eval(), (1,))
    if kind == "random":
        steps = RandomNetwork(int(seed)).float()
        return Prepared(nn.Sequential(steps, nn.Flatten()).eval(), steps.shape)
    shape, build = NETWORKS[name]
    torch.manual_seed(len(name))
    return Prepared(settled(build()), shape)


def share(ready: Prepared) -> float:
    """The largest part of the bound that roundings reach, over centres at the corners of the range
    and points away from them."""
    worst = WorstExecution(ready.model, ready.traced, PROFILES["fp32a64"])
    error, found = ready.error("fp32a64"), 0.0
    generator = torch.Generator().manual_seed(0)
    for radius in (0.0, 100.0):
        x = torch.randn(ready.shape, generator=generator, dtype=torch.float64).sign()
        x = x * (1.0 + radius / math.sqrt(x.numel()))
        e, rest = (a.constant + a.slope * radius for a in (error.features, error.logits))
        classes = ready.traced.graph.output_shape[0]
        for c, j in ((0, classes - 1), (1, 0)):
            limit = e * ready.apart(c, j) + rest * SQRT2_UP
            moved = worst.moved(x, c, j)
            found = max(found, moved / limit if limit > 0.0 else math.inf * bool(moved))
    return found


CHAINS = [f"chain {i}" for i in range(30)]
RANDOM = [f"random {i}" for i in range(20)]
DEFAULT = {*CHAINS[:2], *RANDOM[:2], "difference", "conv stride"}
KINDS = [
    pytest.param(n, marks=() if n in DEFAULT else pytest.mark.slow)
    for n in (*CHAINS, *RANDOM, *NETWORKS)
]


@pytest.mark.parametrize("name", KINDS)
def test_the_worst_roundings_stay_within_the_bound(name: str) -> None:
    assert share(network(name)) <= 1.0


def test_the_worst_roundings_come_close_to_the_bound() -> None:
    layer = affine([[1.0], [-1.0]], [7.0, -7.0])
    assert share(Prepared(nn.Sequential(layer).eval(), (1,))) > 0.99


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("name", ["chain 13", "difference"])
def test_the_checker_asks_for_little_more_than_the_library(name: str, profile: str) -> None:
    ready = network(name)
    graph, program = ready.traced.graph, executed_program(ready.execution(profile))
    description = describe(graph, named_tensors(ready.model), program)
    tape = compose_up(
        graph.tape, [float(ready.bound.per_operator[o.name]) for o in graph.operators]
    )
    recursion = check_execution.Recursion(
        check_execution.PROFILES[PROFILES[profile].semantics],
        check.Weights(dict(description.arrays)).get, tape, check.length,
    )  # fmt: skip
    steps, reach = json.loads(description.text)["executed"], math.sqrt(math.prod(ready.shape))
    found = recursion.run(steps, reach, graph.head is not None)
    error = ready.error(profile)
    for own, other in zip((error.features, error.logits), found, strict=True):
        for a, b in zip((own.constant, own.slope), other.tolist(), strict=True):
            assert a <= b * check_execution.SAFE
            assert b <= a * (1.0 + 2.0**-13) + 2.0**-400


# -- ranges: what a call forms in between ----------------------------------------------------------


def average(m: nn.Module, x: Tensor) -> Tensor:
    return m.head(F.adaptive_avg_pool1d(x[:, None], 1)[:, 0])  # type: ignore[operator, no-any-return]


BETWEEN: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "average": average,
    "hardswish": lambda m, x: m.head(F.hardswish(x[:, :1])),
}


@pytest.mark.parametrize("name", BETWEEN)
def test_what_a_call_forms_in_between_overflows_nowhere(name: str) -> None:
    head = affine([[2.0**-60], [0.0]], [1e300, 0.0], torch.float64)
    model, centre = Lambda(BETWEEN[name], head=head).eval(), torch.zeros(1, 100).double()
    found = certified(model, centre, WIDE)
    sizes = torch.tensor([1e100, 2.0**900, 1e300, 1e307, 1.79e307, 1e308], dtype=torch.float64)
    wide = 1 if name == "hardswish" else 100
    points = F.pad(sizes[:, None].expand(-1, wide), (0, 100 - wide))
    broken = []
    for size, logits in zip(sizes.tolist(), run(model, points, profile="fp64"), strict=True):
        broken += [size] if not keeps(logits.numpy(), int(found.prediction[0])) else []
    assert broken
    assert min(broken) * math.sqrt(wide) > found.prediction_radius[0]


# -- casts and constants ---------------------------------------------------------------------------


CASTS: dict[str, tuple[str, Callable[[Any, Tensor], Tensor]]] = {
    "float8": (STORED, lambda m, x: m.head(x.to(torch.float8_e4m3fn).float())),
    "mean": (STORED, lambda m, x: m.head(x[:, :, None].mean(2, dtype=torch.float16).float())),
    "float32 in float64": (WIDE, lambda m, x: m.head(x.double().float())),
    "integer": (STORED, lambda m, x: m.head(x) + torch.tensor([2**24 + 1, 0])),
}


@pytest.mark.parametrize("name", CASTS)
def test_narrower_numbers_are_refused_wherever_they_stand(name: str) -> None:
    semantics, forward = CASTS[name]
    model = Lambda(forward, head=affine([[1.0, 0.0], [0.0, 1.0]], [0.0, 0.0])).eval()
    with pytest.raises(NotCertifiedError, match=r"represents|stays in"):
        certified(model, torch.tensor([[0.5, 0.25]]), semantics)


# -- names -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["derived/0", "constant/0"])
def test_a_buffer_takes_no_constants_place(name: str) -> None:
    """Storage has steps of 1/16 at a million; (0, 0.04) is a tie."""
    model = Lambda(
        lambda m, x: m.head(x) + torch.tensor([1e6 + 0.0625, 1e6]) + m.get_buffer(name) + 0.0,
        head=affine([[1.0, 0.0], [0.0, 1.0]], [0.0, 0.0]), **{name: torch.zeros(2)},
    )  # fmt: skip
    centre, point = torch.zeros(1, 2), torch.tensor([[0.0, 0.04]])
    found = certified(model, centre)
    assert not keeps(run(model, point)[0].numpy(), 0)
    assert squared_distance(centre[0], point[0]) > found.prediction_radius[0] ** 2


def test_a_modules_name_is_no_other_operators() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = affine([[3.0]], [0.0])
            self.add_module("a#2", affine([[1.0]], [0.0]))

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.a(torch.relu(self.a(x) * 2.0)))
            x = self.get_submodule("a#2")(x)
            return torch.cat([x, x * 0.5], 1)

    found = certified(Shared(), torch.ones(1, 1), "ideal")
    assert len({name for name, _, _ in found.operators}) == 3
    assert 0.0 < found.prediction_radius[0] <= 0.5


# -- pairs that a constant parts -------------------------------------------------------------------


@pytest.mark.parametrize("semantics", ["ideal", STORED])
def test_a_constant_parts_a_sorted_pair(semantics: str) -> None:
    """(max(a, b + 5), min(a, b)) is (b + 5, b) where b < a < b + 5: sqrt(2) in b, not 1."""

    def forward(m: Any, x: Tensor) -> Tensor:
        a, b = x.chunk(2, 1)
        return m.head(torch.cat([torch.maximum(a, b + 5.0), torch.minimum(a, b)], 1))  # type: ignore[no-any-return]

    model = Lambda(forward, head=affine([[1.0, 1.0], [-1.0, -1.0]], [0.0, 0.0])).eval()
    centre, tie = torch.tensor([[1.0, -1.0]]), torch.tensor([[1.0, -2.5]])
    assert model(tie)[0].tolist() == [0.0, 0.0]
    found = certified(model, centre, semantics)
    assert 1.49 < found.prediction_radius[0] < 1.5 == float((centre - tie).norm())


# -- forged steps ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return nn.Sequential(
        affine([[1.0, 0.5], [0.25, 1.0]], [900.0, 0.0]), nn.ReLU(),
        affine([[1.0, -1.0], [-1.0, 1.0]], [0.0, 900.0]),
    ).eval()  # fmt: skip


@pytest.fixture(scope="module")
def honest(model: nn.Module) -> Certificate:
    return certified(model, torch.tensor([[0.5, 0.25]]))


def resealed(honest: Certificate, forge: Callable[[Any], None]) -> Certificate:
    """A radius near the exact function's, with steps that would allow it and hashes that fit."""
    assert honest.network is not None
    network = json.loads(honest.network)
    forge(network["executed"])
    text = canonical_json(network)
    identity = canonical_json([honest.program_sha256, network, honest.weights_sha256])
    return dataclasses.replace(
        honest, network=text, fingerprint=hashlib.sha256(identity.encode()).hexdigest(),
        prediction_radius=honest.prediction_radius * (1.0 + 2.0**-16),
    )  # fmt: skip


def field(name: str, value: Any) -> Callable[[Any], None]:
    def forge(program: Any) -> None:
        for step in program["steps"][1:]:
            if name in step:
                step[name] = value

    return forge


def unshifted(program: Any) -> None:
    for step in program["steps"][1:]:
        step["shifts"] = [[ref, "-0x1.0000000000000p+0"] for ref, _ in step.get("shifts", ())]


NONSENSE: dict[str, Callable[[Any], None]] = {
    "terms": field("terms", -(10**9)),
    "rounded": field("rounded", -1),
    "norm": field("norm", -1),
    "shifts": unshifted,
    "zero": field("zero", "-0x1.0000000000000p+20"),
    "constant": field("constant", "-0x1.0000000000000p+0"),
    "value": field("value", "-0x1.0000000000000p+40"),
    "no head": lambda program: program.update(head=None),
    "a head beyond": lambda program: program.update(head=99),
}


@pytest.mark.parametrize("name", NONSENSE)
def test_the_checker_refuses_steps_that_count_below_zero(
    name: str, honest: Certificate, model: nn.Module, tmp_path: Path
) -> None:
    weights = save_weights(model, tmp_path / "w.npz", input_shape=(2,), semantics=STORED)
    assert check.check(honest.save(tmp_path / "honest.npz"), weights) == []
    forged = resealed(honest, NONSENSE[name]).save(tmp_path / "forged.npz")
    assert [f.kind for f in check.check(forged, weights)] == ["file"]


def shorter(program: Any) -> None:
    """Every rounding to storage left out."""
    field("rounded", 0)(program)


def test_verification_takes_no_other_steps_than_the_networks(
    honest: Certificate, model: nn.Module
) -> None:
    x = torch.tensor([[0.5, 0.25]])
    honest.verify(model, x)
    with pytest.raises(CertificateError, match="fingerprint"):
        resealed(honest, shorter).verify(model, x)
