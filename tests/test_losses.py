# SPDX-License-Identifier: MIT
"""The margin losses against published numbers, their arguments, their schedules."""

import math
import sys
import types
from dataclasses import FrozenInstanceError, dataclass

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from lmtfast import backends
from lmtfast.backends import margin_reference
from lmtfast.errors import ArgumentError, BackendUnavailableError, DtypeError, ShapeError
from lmtfast.losses import (
    MEMBERS,
    ConstantSchedule,
    LinearSchedule,
    LogSchedule,
    RampSchedule,
    margin_cross_entropy,
    perturbed_eps,
)


@dataclass(frozen=True)
class Bound:
    features: torch.Tensor | float
    total: torch.Tensor | float
    head_weight: torch.Tensor | None


# The reference example: four samples, three classes, l = c * L = 2.
LOGITS = [[3.0, 1.0, 0.5], [0.2, 1.0, 0.1], [5.0, 0.0, -1.0], [2.0, 1.9, 0.0]]
TARGET = torch.tensor([0, 0, 0, 1])
HEAD = [[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]
SHIFTED = [[3, 2.767767, 3], [0.2, 1, 0.1], [5, 2.828427, 3], [2, 1.9, 0]]
ROOT = math.sqrt(2)


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def example(request):
    dtype = request.param
    logits = torch.tensor(LOGITS, dtype=dtype, requires_grad=True)
    head = torch.tensor(HEAD, dtype=dtype, requires_grad=True)
    bound = torch.tensor(2.0, dtype=dtype, requires_grad=True)
    return logits, head, bound


def close(got, expected, atol=1e-6):
    expected = torch.as_tensor(expected, dtype=got.dtype)
    torch.testing.assert_close(got.detach(), expected, atol=atol, rtol=0)


def test_rows_and_sample_factor_of_the_example(example):
    logits, head, bound = example
    rows = margin_reference.torch.cdist(head.detach(), head.detach())[TARGET]
    close(rows, [[0, ROOT, 2]] * 3 + [[ROOT, 0, ROOT]])
    _, _, scale = margin_reference.margin_forward(
        "lmt++", logits.detach(), TARGET, torch.arange(4), rows, torch.full_like(rows[:, 0], 2.0)
    )
    close(scale, [0.625, 0, 1, 0])
    close(logits.detach() + scale[:, None] * 2 * rows, SHIFTED)


@pytest.mark.parametrize("backend", [None, "reference"])
def test_loss_and_gradients_of_the_example(example, backend):
    logits, head, bound = example
    loss = margin_cross_entropy(
        logits, TARGET, Bound(bound, math.nan, head), eps=1.0, backend=backend
    )
    loss.backward()
    close(loss, 0.8702611)
    close(loss, cross_entropy(torch.tensor(SHIFTED, dtype=loss.dtype), TARGET))
    close(
        logits.grad,
        [
            [-0.160483, 0.070966, 0.089517],
            [-0.189473, 0.134706, 0.054767],
            [-0.049893, 0.022812, 0.027081],
            [0.122539, -0.139122, 0.016584],
        ],
    )
    close(bound.grad, 0.2610456)
    close(head.grad, [[0.261046, -0.094986], [-0.094986, 0.094986], [-0.166059, 0]])


def plain_lmt_plus_plus(logits, head, bound, attached):
    difference = head[TARGET][:, None] - head
    rows = (difference.square().sum(2) + 1e-40).sqrt()
    shift = bound * rows
    own = torch.nn.functional.one_hot(TARGET, 3).bool()
    margin = logits.gather(1, TARGET[:, None]) - logits
    factor = (margin / shift).clamp(0, 1).masked_fill(own, 1.0).amin(1, keepdim=True)
    shift = shift.masked_fill(own, 0.0)
    return logits + (factor if attached else factor.detach()) * shift


def test_stop_gradient_is_what_moves_the_bound(example):
    logits, head, bound = example
    detached = cross_entropy(plain_lmt_plus_plus(logits, head, bound, attached=False), TARGET)
    expected = torch.autograd.grad(detached, [logits, head, bound])
    ours = margin_cross_entropy(logits, TARGET, Bound(bound, math.nan, head), eps=1.0)
    for got, wanted in zip(torch.autograd.grad(ours, [logits, head, bound]), expected, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-5)
    # Attached, the logit that limits sample 0 ties with the target whatever the bound.
    attached = plain_lmt_plus_plus(logits, head, bound, attached=True)
    (tied,) = torch.autograd.grad(attached[0, 2], bound, retain_graph=True)
    assert tied.abs() < 1e-6
    (total,) = torch.autograd.grad(cross_entropy(attached, TARGET), bound)
    assert (total - expected[2]).abs() > 1e-2


def test_factor_is_zero_exactly_when_a_rival_ties_or_exceeds():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(-2, 3, (400, 4), generator=generator).double()
    target = torch.randint(4, (400,), generator=generator)
    rows = torch.rand(4, 4, generator=generator, dtype=torch.float64)
    for coefficient in (0.0, 1e-300, 1.0, 1e300):
        _, _, factor = margin_reference.margin_forward(
            "lmt++",
            logits,
            target,
            target,
            rows,
            torch.full((400,), coefficient, dtype=torch.float64),
        )
        rivals = logits.scatter(1, target[:, None], -math.inf).amax(1)
        beaten = rivals >= logits.gather(1, target[:, None])[:, 0]
        assert ((factor >= 0) & (factor <= 1)).all()
        assert ((factor == 0) == beaten).all()


def test_lmt_total_uses_root_two_of_the_whole_network(example):
    logits, head, bound = example
    loss = margin_cross_entropy(
        logits, TARGET, Bound(math.nan, bound, head), eps=0.25, scaling="lmt-total"
    )
    shift = ROOT * 0.25 * 2.0
    rows = []
    for z, t in zip(LOGITS, TARGET.tolist(), strict=True):
        margin = z[t] - max(v for j, v in enumerate(z) if j != t)
        factor = min(max(margin / shift, 0), 1)
        rows.append([v if j == t else v + factor * shift for j, v in enumerate(z)])
    close(loss, cross_entropy(torch.tensor(rows, dtype=torch.float64), TARGET).item())
    loss.backward()
    assert head.grad is None
    assert bound.grad > 0


@pytest.mark.parametrize("weight", [0.0, 1.0, 1.5])
def test_trades_is_clean_plus_weighted_divergence(weight):
    logits = torch.tensor(LOGITS, dtype=torch.float64)
    head = torch.tensor(HEAD, dtype=torch.float64)
    loss = margin_cross_entropy(
        logits,
        TARGET,
        Bound(2.0, math.nan, head),
        eps=0.1,
        scaling="trades",
        trades_weight=weight,
        reduction="none",
    )
    prediction = logits.argmax(1)
    shifted = logits + 0.2 * torch.cdist(head, head)[prediction]
    bottom = shifted.scatter(1, prediction[:, None], -math.inf).amax(1, keepdim=True)
    p = torch.cat([logits.softmax(1), torch.zeros(4, 1, dtype=torch.float64)], 1)
    q = torch.cat([logits, bottom], 1).log_softmax(1)
    divergence = (torch.xlogy(p, p) - p * q).sum(1)
    close(loss, cross_entropy(logits, TARGET, reduction="none") + weight * divergence, 1e-12)


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor any operation returns."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                stored = tensor.untyped_storage().nbytes() // tensor.element_size()
                self.largest = max(self.largest, stored)
        return result


@pytest.mark.parametrize(("n", "k", "d"), [(64, 100, 96), (32, 400, 64), (500, 400, 64)])
@pytest.mark.parametrize("scaling", sorted(MEMBERS))
def test_no_difference_tensor_is_formed(n, k, d, scaling):
    logits = torch.randn(n, k, requires_grad=True)
    head = torch.randn(k, d, requires_grad=True)
    target = torch.randint(k, (n,))
    with LargestTensor() as record:
        loss = margin_cross_entropy(
            logits, target, Bound(1.0, 1.0, head), eps=0.1, scaling=scaling, backend="reference"
        )
        loss.backward()
    table = min(max(n, 256), k) * k
    assert record.largest <= max(n * (k + 1), k * d, n * d, table)
    assert record.largest < n * k * d / 4


def test_more_classes_than_samples_reads_only_their_rows():
    n, k, d = 4, 3000, 3
    logits = torch.randn(n, k, requires_grad=True)
    head = torch.randn(k, d, requires_grad=True)
    with LargestTensor() as record:
        margin_cross_entropy(
            logits, torch.tensor([5, 5, 0, 2999]), Bound(1.0, 1.0, head), eps=0.1
        ).backward()
    assert record.largest <= n * (k + 1)


@pytest.mark.parametrize("scaling", sorted(MEMBERS))
def test_row_selection_does_not_change_the_result(scaling):
    """All K rows, and one row per sample with repeated classes, are the same loss."""
    generator = torch.Generator().manual_seed(1)
    k = 300
    head = torch.randn(k, 8, generator=generator, dtype=torch.float64)
    logits = torch.randn(310, k, generator=generator, dtype=torch.float64)
    target = torch.randint(3, (310,), generator=generator)
    pairs = torch.rand(k, k, generator=generator, dtype=torch.float64)
    for eps in (0.3, pairs):
        values = []
        for batches in ([310], [10] * 31):
            w, bound = head.clone().requires_grad_(), torch.ones((), dtype=torch.float64)
            bound.requires_grad_()
            for z, t in zip(logits.split(batches), target.split(batches), strict=True):
                margin_cross_entropy(
                    z, t, Bound(bound, bound, w), eps=eps, scaling=scaling, reduction="sum"
                ).backward()
            values.append((bound.grad, w.grad))
        torch.testing.assert_close(values[0][0], values[1][0])
        if MEMBERS[scaling].pairwise:
            torch.testing.assert_close(values[0][1], values[1][1])


def test_double_backward_is_refused(example):
    logits, head, bound = example
    loss = margin_cross_entropy(logits, TARGET, Bound(bound, 1.0, head), eps=1.0)
    with pytest.raises(ArgumentError, match="no second derivative"):
        torch.autograd.grad(loss, logits, create_graph=True)


def call(logits=None, target=TARGET, head=HEAD, **kwargs):
    logits = torch.tensor(LOGITS) if logits is None else logits
    bound = Bound(2.0, 2.0, torch.tensor(head))
    return margin_cross_entropy(logits, target, bound, **{"eps": 0.1, **kwargs})


@pytest.mark.parametrize(
    ("kwargs", "error", "text"),
    [
        ({"scaling": "lmt+"}, ArgumentError, "'emma', 'gloro', 'lmt', 'lmt\\+\\+', 'lmt-total'"),
        ({"reduction": "avg"}, ArgumentError, "'mean', 'sum', 'none'"),
        ({"eps": -0.1}, ArgumentError, "eps finite and >= 0; got -0.1"),
        ({"eps": math.inf}, ArgumentError, "eps finite"),
        ({"eps": math.nan}, ArgumentError, "eps finite"),
        ({"eps": torch.tensor([0.1, -1, 0, 0])}, ArgumentError, "tensor with other values"),
        ({"eps": torch.ones(3)}, ShapeError, r"\(4,\) per sample or \(3, 3\) per class pair"),
        ({"eps": torch.ones(4, 4)}, ShapeError, "per class pair"),
        ({"eps": torch.ones(3, 3, requires_grad=True)}, ArgumentError, "constants"),
        ({"trades_weight": -1.0}, ArgumentError, "trades_weight"),
        ({"target": TARGET.int()}, DtypeError, "int64"),
        ({"target": TARGET[:3]}, ShapeError, r"target \(4,\)"),
        ({"target": TARGET + 2}, ArgumentError, r"\[0, 3\); got values from 2 to 3"),
        ({"target": TARGET - 1}, ArgumentError, "no ignored index"),
        ({"head": HEAD[:2]}, ShapeError, r"head_weight \(3, D\)"),
        ({"logits": torch.ones(4, 3, dtype=torch.int64)}, DtypeError, "floating-point"),
        ({"logits": torch.ones(4)}, ShapeError, r"\(N, K\)"),
        ({"logits": torch.ones(4, 0)}, ShapeError, "K >= 1"),
        ({"logits": torch.ones(4, 3, device="meta")}, ArgumentError, "on meta.*target="),
        ({"eps": torch.ones(4, device="meta")}, ArgumentError, "move it once"),
        ({"backend": "absent"}, ArgumentError, "one of reference, native, .*; got 'absent'"),
        ({"backend": "native", "logits": torch.ones(4, 3).half()}, DtypeError, "bfloat16; got"),
    ],
)
def test_refused_arguments(kwargs, error, text):
    with pytest.raises(error, match=text) as caught:
        call(**kwargs)
    assert "Do this: " in str(caught.value)


def test_empty_batch():
    empty = {"logits": torch.ones(0, 3, requires_grad=True), "target": TARGET[:0]}
    with pytest.raises(ShapeError, match="empty batch"):
        call(**empty)
    for scaling in MEMBERS:
        assert call(**empty, scaling=scaling, reduction="none").shape == (0,)
        total = call(**empty, scaling=scaling, reduction="sum")
        assert total == 0
        total.backward()
    assert empty["logits"].grad.shape == (0, 3)


def test_perturbed_eps():
    perturbation = torch.zeros(3, 1, 2, 2)
    perturbation[0, 0, 0] = torch.tensor([0.3, 0.4])
    perturbation[1] = 5.0
    close(perturbed_eps(0.75, perturbation), [0.25, 0.0, 0.75])
    close(perturbed_eps(torch.tensor([1.0, 12.0, 0.0]), perturbation), [0.5, 2.0, 0.0])
    assert perturbed_eps(0.5, perturbation.half()).dtype == torch.float32
    assert perturbed_eps(0.5, perturbation[:0]).shape == (0,)
    with pytest.raises(ShapeError, match="one eps per sample"):
        perturbed_eps(torch.ones(2), perturbation)
    loss = call(eps=perturbed_eps(0.5, torch.full((4, 2), 0.1)), reduction="none")
    assert loss.shape == (4,)


def test_linear_schedule_is_the_warm_up_of_the_paper():
    schedule = LinearSchedule(1e-5, 1e-2, epochs=5)
    for epoch, value in ((0, 1e-5), (1, 0.002008), (2.5, 0.005005), (4.999, 0.009998)):
        assert schedule(epoch) == pytest.approx(value, abs=1e-6)
    assert schedule(5) == schedule(160) == 1e-2
    assert LinearSchedule(0.1, 0.2, epochs=0)(0) == 0.2


def test_log_schedule_interpolates_exponentials():
    schedule = LogSchedule(0.0158, 1.738, epochs=50)
    for epoch in (0.0, 1.0, 12.5, 49.999):
        linear = math.exp(0.0158) + (math.exp(1.738) - math.exp(0.0158)) * epoch / 50
        assert schedule(epoch) == pytest.approx(math.log(linear), abs=1e-12)
    assert schedule(0) == 0.0158
    assert schedule(50) == schedule(99) == 1.738
    assert LogSchedule(1.0, 2000.0, epochs=2)(1) == pytest.approx(2000 - math.log(2))
    assert LogSchedule(2.0, 1.0, epochs=2)(1) == pytest.approx(
        math.log((math.exp(2) + math.exp(1)) / 2)
    )


def test_ramp_schedule_passes_the_certified_budget():
    ramp = RampSchedule(eps=36 / 255, epochs=800)
    assert ramp(0) == pytest.approx(0.1 * 36 / 255)
    assert ramp(200) == pytest.approx(1.55 * 36 / 255)
    assert ramp(400) == ramp(799) == 3 * 36 / 255
    assert ConstantSchedule(1.0)(3.7) == 1.0


def test_schedules_are_frozen_and_checked():
    with pytest.raises(ArgumentError, match=r"LinearSchedule\(end=\)"):
        LinearSchedule(0.0, -1.0, epochs=5)
    with pytest.raises(ArgumentError, match="RampSchedule"):
        RampSchedule(math.nan, 5)
    with pytest.raises(FrozenInstanceError):
        ConstantSchedule(1.0).value = 2.0


def test_a_registered_backend_computes_the_loss_it_was_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[str] = []
    module = types.ModuleType("counting_losses")
    module.margin_forward = lambda *a: (
        calls.append("forward") or margin_reference.margin_forward(*a)
    )
    module.margin_backward = lambda *a: (
        calls.append("backward") or margin_reference.margin_backward(*a)
    )
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(backends, "_REGISTRY", dict(backends._REGISTRY))
    backends.register_backend(
        "counting", module=module.__name__, provides="losses", probe=lambda: (True, "test")
    )
    logits = torch.randn(4, 3, requires_grad=True)
    target, bound = torch.tensor([0, 1, 2, 0]), Bound(1.0, 1.0, torch.randn(3, 5))
    margin_cross_entropy(logits, target, bound, eps=0.1, backend="counting").backward()
    assert calls == ["forward", "backward"]
    with pytest.raises(BackendUnavailableError, match="power steps"):
        backends.choose_backend("counting", "cpu", False)
