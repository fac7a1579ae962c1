# SPDX-License-Identifier: MIT
"""Enclosures whose calls err by far more than rounding, in the worst direction, and say so.

Rounding is so small beside its bounds that an enclosure can forget half of what it carries and
still contain the truth. Here one call of the program is wrong by a thousandth in every entry, its
error bound says as much, and every sign is the one that moves a logit most.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from mpmath import mpf, sqrt
from torch import Tensor, nn

from lmtfast.builder import Value
from lmtfast.enclosure import LogitEnclosure
from lmtfast.enclosure.registry import Enclosed, ErrorCall, length_up, outward, rounded
from lmtfast.tracing import trace_model
from lmtfast.verified.rounding import UNDERFLOW
from tests.cases import Lambda
from tests.exact_networks import NETWORKS, evaluate, exact
from tests.soundness.hostile import HostileSums
from tests.test_enclosure import network

SIZE = 2.0**-10
LEFT_TO_ROUNDING = 1.0 + 2.0**-40


class Wrong(LogitEnclosure):
    """An enclosure one of whose calls is off.

    Attributes:
        at: Which result, by its number.
        shift: What is added to it, ``(N, ...)``.
        whole: State the shift as a length at a base, not entry by entry.
    """

    at, count, whole = -1, 0, False
    shift: Tensor | None = None
    places: list[tuple[torch.Size, bool]]

    def start(self, at: int, shift: Tensor | None, whole: bool = False) -> Wrong:
        self.at, self.shift, self.whole, self.count, self.places = at, shift, whole, 0, []
        return self

    def _settled(self, result: Enclosed, traced: Value) -> Enclosed:
        found = super()._settled(result, traced)
        self.count += 1
        self.places.append((found.value.shape, traced.expression is traced.base))
        if self.count - 1 != self.at or self.shift is None:
            return found
        shift, local, base = self.shift.reshape(found.value.shape), found.local, found.base
        if not found.value.any():  # nothing rounds
            return Enclosed(shift, shift.abs(), base, traced)
        value = found.value + shift
        local = (local + value.abs() * 2.0**-50) * LEFT_TO_ROUNDING
        if self.whole:
            return Enclosed(value, local, (base + length_up(shift)) * LEFT_TO_ROUNDING, traced)
        return Enclosed(value, (local + shift.abs()) * LEFT_TO_ROUNDING, base, traced)


@pytest.mark.parametrize("shape", [(1,), (3,), (2, 5), (7000,)])
@pytest.mark.parametrize("power", [-1070, -540, 0, 400])
def test_lengths_may_lose_what_their_sum_may(shape: tuple[int, ...], power: int) -> None:
    for entry in (0.75, 0.3):
        errors = torch.full((2, *shape), entry * 2.0**power, dtype=torch.float64)
        errors[1] = 0.0
        with HostileSums():
            found = length_up(errors).tolist()
        least = math.prod(shape) * Fraction(float(errors.max())) ** 2
        assert least <= Fraction(found[0]) ** 2
        assert power < -300 or Fraction(found[0]) ** 2 <= least * (1 + Fraction(1, 10**9))
        assert 0.0 < found[1] < 1e-140


def test_few_operations_may_round_thirty_times() -> None:
    unit = Fraction(1, 2**53)
    values = [0.0, 5e-324, 2.0**-1000, 0.1, 1.0 - 2.0**-53, 1.0, 3.0, 1e300]
    tensor = torch.tensor(values, dtype=torch.float64)
    for value, found in zip(values, outward(tensor).tolist(), strict=True):
        exact = Fraction(value)
        assert exact / (1 - unit) ** 30 <= Fraction(found)
        assert Fraction(found) <= exact * (1 + 40 * unit) + 2 * Fraction(UNDERFLOW)
        assert found >= UNDERFLOW
    assert torch.equal(rounded(tensor), rounded(tensor, 1.0))
    for ulps in (1.0, 8.0):
        for value, found in zip(values, rounded(-tensor, ulps).tolist(), strict=True):
            least = Fraction(ulps) * unit * Fraction(value)
            assert least <= Fraction(found) <= 4 * least + 2 * Fraction(UNDERFLOW)
            assert found >= UNDERFLOW


def inside(truth: np.ndarray, value: Tensor, error: Tensor) -> bool:
    flat = [mpf(v) for v in truth.reshape(-1)]
    return all(abs(t - mpf(v)) <= mpf(e)
               for row, errors in zip(value.tolist(), error.tolist(), strict=True)
               for t, v, e in zip(flat, row, errors, strict=True))  # fmt: skip


def slopes(wrong: Wrong, x: Tensor, at: int, entries: int) -> Tensor:
    """How every logit moves with every entry of a result, ``(entries, K)``."""
    shifts = torch.cat((torch.zeros(1, entries), SIZE * torch.eye(entries))).double()
    value, _ = wrong.start(at, shifts)(x.expand(entries + 1, *x.shape[1:]))
    return value[1:] - value[:1]


@pytest.mark.parametrize("name", NETWORKS)
def test_errors_of_a_call_reach_the_logits(name: str) -> None:
    model, traced, norms = network(name)
    shape = NETWORKS[name][0]
    x = torch.randn(1, *shape, dtype=torch.float64)
    truth = evaluate(model, exact(x[0]))
    plain = Wrong(model, traced)
    carried = Wrong(model, traced, norms=norms)
    plain.start(-1, None)(x)
    for at, (found, base) in enumerate(list(plain.places)):
        entries = found[1:].numel()
        moves = slopes(plain, x, at, entries)
        signs = torch.where(moves >= 0, SIZE, -SIZE).mT
        shifts = torch.cat((signs, -signs))
        many = x.expand(len(shifts), *shape)
        assert inside(truth, *plain.start(at, shifts)(many)), (at, found)
        assert inside(truth, *carried.start(at, shifts)(many)), (at, found)
        if base:
            along = (SIZE * moves / moves.norm(dim=0).clamp_min(1e-300)).mT
            shifts = torch.cat((along, -along))
            assert inside(truth, *carried.start(at, shifts, whole=True)(many)), (at, found)


@pytest.mark.parametrize("width", [1, 3, 64, 1000])
def test_the_sum_of_carried_errors_is_itself_rounded(width: int) -> None:
    """From 0 to 1 in every entry: the logits move by the sums of rows, to the last digit."""
    torch.manual_seed(width)
    model = nn.Sequential(nn.ReLU(), nn.Linear(width, 100, bias=False)).double().eval()
    with torch.no_grad():
        model[1].weight.abs_()
    wrong = Wrong(model, trace_model(model, (width,)))
    x = torch.zeros(1, width, dtype=torch.float64)
    _, error = wrong.start(0, torch.ones_like(x))(x)
    for row, found in zip(model[1].weight.tolist(), error[0].tolist(), strict=True):
        assert sum(map(Fraction, row)) <= Fraction(found)


def exact_batch_norm(m: nn.Module, x: list[mpf]) -> list[mpf]:
    parts = (m.running_mean, m.running_var, m.weight, m.bias)
    rows = zip(x, *(exact(p) for p in parts), strict=True)
    return [(v - mean) / sqrt(var + mpf(m.eps)) * w + b for v, mean, var, w, b in rows]


# One call alone: behind a wide layer its own rounding is lost in that of the layer.
ALONE = {
    "batch norm": (nn.BatchNorm1d(5), exact_batch_norm),
    "constant added": (
        Lambda(lambda m, x: x + m.c, c=torch.rand(5)),
        lambda m, x: [a + b for a, b in zip(x, exact(m.c), strict=True)],
    ),
    "sum with itself": (
        Lambda(lambda m, x: x + x.roll(1, 1)), lambda m, x: [x[i] + x[i - 1] for i in range(5)]
    ),
    "scaled sum": (
        Lambda(lambda m, x: torch.add(x, x.roll(1, 1), alpha=0.3)),
        lambda m, x: [x[i] + mpf(0.3) * x[i - 1] for i in range(5)],
    ),
    "factor": (
        Lambda(lambda m, x: x * m.c, c=torch.rand(5)),
        lambda m, x: [a * b for a, b in zip(x, exact(m.c), strict=True)],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ALONE)
def test_a_call_counts_its_own_rounding(name: str) -> None:
    torch.manual_seed(len(name))
    model, formula = ALONE[name]
    model = model.double().eval()
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data.uniform_(0.1, 2.0)
    x = torch.randn(64, 5, dtype=torch.float64)
    value, error = LogitEnclosure(model, trace_model(model, (5,)))(x)
    for sample, found, bound in zip(x, value.tolist(), error.tolist(), strict=True):
        for truth, v, e in zip(formula(model, list(exact(sample))), found, bound, strict=True):
            assert abs(truth - mpf(v)) <= mpf(e)


# Terms of an entry of the result, the bias one of them; more inputs than outputs.
MATRIX = torch.rand(7, 2)
TERMS: dict[str, tuple[nn.Module, tuple[int, ...], int]] = {
    "linear": (nn.Linear(7, 2), (7,), 8),
    "mm": (Lambda(lambda m, x: torch.mm(x, m.c), c=MATRIX), (7,), 7),
    "matmul": (Lambda(lambda m, x: x @ m.c, c=MATRIX), (7,), 7),
    "addmm": (Lambda(lambda m, x: torch.addmm(m.b, x, m.c), b=MATRIX[0], c=MATRIX), (7,), 8),
    "convolution": (nn.Conv1d(4, 2, 3, groups=2), (4, 5), 7),
    "transposed convolution": (nn.ConvTranspose1d(6, 4, 3, groups=2), (6, 5), 10),
    # One number for both axes; the division and what is rounded of it count as two.
    "average": (Lambda(lambda m, x: torch.ops.aten.avg_pool2d(x, [3])), (1, 6, 6), 11),
}


@pytest.mark.parametrize("name", TERMS)
def test_a_sum_counts_all_its_terms(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, shape, terms = TERMS[name]
    counts, summed = [], ErrorCall.summed

    def counted(call: ErrorCall, count: int, absolute: Mapping[str, Any] | None = None) -> Enclosed:
        counts.append(count)
        return summed(call, count, absolute)

    monkeypatch.setattr(ErrorCall, "summed", counted)
    model = model.double().eval()
    LogitEnclosure(model, trace_model(model, shape))(torch.rand(2, *shape, dtype=torch.float64))
    assert counts == [terms]


def test_a_border_below_zero_takes_nothing_off_an_error() -> None:
    model = Lambda(lambda m, x: torch.nn.functional.pad(torch.tanh(x), (1, 1), value=-1.0)).double()
    _, error = LogitEnclosure(model, trace_model(model, (3,)))(torch.rand(2, 3).double())
    assert bool((error >= 0.0).all())
    assert bool((error[:, 1:4] > 0.0).all())
