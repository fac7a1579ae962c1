# SPDX-License-Identifier: MIT
"""Certification end to end: radii against exact oracles and attacks, refusals, changing models."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lmtfast as lf
from lmtfast import certification
from lmtfast.errors import (
    ArgumentError,
    DtypeError,
    InputDomainError,
    NonFiniteError,
    NotCertifiedError,
    ShapeError,
    StalePlanError,
    TrainModeError,
    UnsupportedLayerError,
)
from lmtfast.models import build_model
from lmtfast.radius import radius_lower
from lmtfast.samples import Samples
from tests.classifiers import UNIT, certified, exact_radius_squared, hand_made, linear


class Any2d(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(-1, 2, 2)


def test_estimates_are_refused() -> None:
    model, x = linear([[1.0, 0.0], [0.0, 1.0]]), torch.rand(2, 2).double()
    with pytest.raises(NotCertifiedError, match="estimate"):
        certified(model, x, level="estimate")
    with pytest.raises(NotCertifiedError, match="estimate"):
        radius_lower(x, torch.zeros_like(x), hand_made(torch.eye(2), level="estimate"))
    with pytest.raises(ArgumentError):
        certified(model, x, level="certain")
    with pytest.raises(ArgumentError):
        certified(model, x, method="magic")


def test_hand_made_bounds_that_do_not_fit_are_refused() -> None:
    value = torch.zeros(2, 3, dtype=torch.float64)
    with pytest.raises(ShapeError):
        radius_lower(value, torch.zeros(2, 2), hand_made(torch.eye(3)))
    with pytest.raises(ShapeError):
        radius_lower(value, value, hand_made(torch.eye(2)))
    with pytest.raises(ArgumentError):
        radius_lower(value, value, hand_made(torch.eye(3), norm="linf"))
    with pytest.raises(NotCertifiedError):
        radius_lower(value, value, hand_made(torch.eye(3), math.nan))


def test_training_mode_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).eval()
    model[1].train()
    with pytest.raises(TrainModeError, match="'1'"):
        certified(model, torch.rand(2, 3))
    model.eval()
    model[1].track_running_stats = False
    model[1].running_mean = model[1].running_var = None
    with pytest.raises(UnsupportedLayerError):
        certified(model, torch.rand(2, 3))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_weights_and_buffers_that_are_not_finite_are_refused(bad: float) -> None:
    for where in ("0.weight", "0.bias", "1.running_var", "1.running_mean"):
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).eval()
        tensor = model.state_dict()[where]
        tensor.reshape(-1)[1] = bad
        with pytest.raises(NonFiniteError, match=where):
            certified(model, torch.rand(2, 3))


@pytest.mark.parametrize(
    "low_high",
    [None, 1.0, (0,), (0, 1, 2), (1, 0), (0, 0), (0, math.inf), (math.nan, 1), ("a", "b")],
)
def test_an_input_range_that_is_none_is_refused(low_high: Any) -> None:
    with pytest.raises(InputDomainError):
        certified(linear([[1.0, 0.0], [0.0, 1.0]]), torch.rand(2, 2).double(), low_high=low_high)


def test_the_input_range_has_no_default() -> None:
    with pytest.raises(TypeError, match="input_range"):
        lf.certify(nn.Linear(2, 2).eval(), torch.rand(1, 2), input_shape=(2,))  # type: ignore[call-arg]


def chunked(data: Any, shape: tuple[int, ...] = (2,), classes: int = 3, size: int = 4) -> list[Any]:
    return list(Samples(data, shape, UNIT, classes).chunks(size))


def test_inputs_outside_the_range_are_counted() -> None:
    x = torch.full((3, 2), 0.5)
    x[0, 0], x[1, 1], x[2, 0] = 1.25, -4.0, 1.0
    with pytest.raises(
        InputDomainError, match=r"2 values outside, 0 of them NaN; the worst is -4.0"
    ):
        chunked(x)
    x[0, 0], x[1, 1] = 1.0, math.nan
    with pytest.raises(InputDomainError, match="1 values outside, 1 of them NaN"):
        chunked(x)
    with pytest.raises(InputDomainError):
        chunked(torch.full((1, 2), math.inf))


def test_integer_inputs_are_refused_with_the_remedy() -> None:
    for dtype in (torch.uint8, torch.int64, torch.bool):
        with pytest.raises(DtypeError, match="/ 255"):
            chunked(torch.zeros(2, 2, dtype=dtype))
    with pytest.raises(DtypeError):
        chunked(np.array([["a", "b"]]))


def test_data_of_another_form_is_refused() -> None:
    x = torch.rand(3, 2)
    y = torch.tensor([0, 1, 2])
    shape_errors = [(torch.rand(3, 3), y), (torch.rand(2), None), (x, y[:2]), (x, y[:, None])]
    for data in shape_errors:
        with pytest.raises(ShapeError):
            chunked(data)
    for labels in (y.float(), y > 0):
        with pytest.raises(DtypeError):
            chunked((x, labels))
    for data in ((x, y + 1), (x, y - 1), [(x, y), x], [(x, y, y)], 7, "data", {"x": x}):
        with pytest.raises(ArgumentError):
            chunked(data)


def test_an_output_that_is_no_vector_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Any2d()).eval()
    with pytest.raises(ShapeError, match="one vector of logits"):
        certified(model, torch.rand(2, 4))


def test_chunks_do_not_depend_on_batches() -> None:
    x, y = torch.rand(23, 2), torch.randint(0, 3, (23,))
    whole = chunked((x, y))
    assert [len(a) for a, _ in whole] == [4, 4, 4, 4, 4, 3]
    forms = [
        (x.numpy(), y.numpy()),
        DataLoader(TensorDataset(x, y), batch_size=5),
        [(x[i : i + 9], y[i : i + 9]) for i in range(0, 23, 9)],
        [[x[:0], y[:0]], [x, y]],
        (x.double(), y.int()),
    ]
    for form in forms:
        for (a, b), (c, d) in zip(chunked(form), whole, strict=True):
            assert torch.equal(a, c)
            assert torch.equal(b, d)
    assert torch.equal(torch.cat([a for a, _ in chunked(x)]), x.double())
    assert chunked([(x[:3],), (x[3:],)], size=30)[0][1] is None


def test_a_loader_gives_the_identical_certificate(tmp_path: Any) -> None:
    torch.manual_seed(7)
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 3)).eval()
    x, y = torch.rand(25, 3), torch.randint(0, 3, (25,))
    seen: list[tuple[int, int | None]] = []
    whole = certified(model, x, y, progress=lambda done, total: seen.append((done, total)))
    loader = DataLoader(TensorDataset(x, y), batch_size=4)
    streamed = lf.certify(model, loader, input_shape=(3,), input_range=UNIT)
    first, second = whole.save(tmp_path / "a.npz"), streamed.save(tmp_path / "b.npz")
    assert first.read_bytes() == second.read_bytes()
    assert seen[-1] == (25, 25)


def test_empty_data() -> None:
    model = linear([[1.0, 0.0], [0.0, 1.0]])
    for data in (torch.rand(0, 2), (torch.rand(0, 2), torch.zeros(0).long()), []):
        result = lf.certify(model, data, input_shape=(2,), input_range=UNIT)
        assert result.n_total == 0
        assert result.prediction_radius.shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_narrow_inputs_and_weights_are_taken_exactly(dtype: torch.dtype) -> None:
    torch.manual_seed(8)
    model = nn.Linear(4, 3).to(dtype).eval()
    x = torch.rand(10, 4).to(dtype)
    result = certified(model, x)
    for point, r, c in zip(x.double(), result.prediction_radius, result.prediction, strict=True):
        best, square = exact_radius_squared(model.weight.double(), model.bias.double(), point)
        assert best == c
        assert Fraction(float(r)) ** 2 < square


def test_probabilistic_certificates_carry_delta() -> None:
    torch.manual_seed(9)
    model = nn.Sequential(nn.Conv1d(1, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(4, 2)).eval()
    x = torch.rand(6, 1, 3)
    result = certified(model, x, level="probabilistic", delta=1e-6)
    assert (result.level, result.delta) == ("probabilistic", 1e-6)
    assert certified(model, x).delta == 0.0


def test_a_certificate_of_closed_forms_is_rigorous_whatever_was_asked() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    result = certified(model, torch.rand(2, 3), level=lf.Level("probabilistic", 1e-6))
    assert (result.level, result.delta) == ("rigorous", 0.0)


class Changing:
    """Data that edits the model while it is read."""

    def __init__(self, model: nn.Module, x: Tensor, edit: Callable[[nn.Module], Any]) -> None:
        self.model, self.x, self.edit = model, x, edit

    def __iter__(self) -> Iterator[Tensor]:
        yield self.x
        self.edit(self.model)
        yield self.x


EDITS: dict[str, Callable[[nn.Module], Any]] = {
    "in place": lambda m: m[0].weight.data.mul_(2),
    "one ulp": lambda m: m[0].weight.data.copy_(
        torch.nextafter(m[0].weight.data, torch.tensor(9.0))
    ),
    "bias": lambda m: m[2].bias.data.add_(1),
    "load_state_dict": lambda m: m.load_state_dict({k: v + 1 for k, v in m.state_dict().items()}),
    "new parameter": lambda m: setattr(m[0], "weight", nn.Parameter(torch.zeros(4, 3))),
    "dtype": lambda m: m.double(),
    "buffer": lambda m: m.register_buffer("extra", torch.zeros(1)),
}


@pytest.mark.parametrize("name", EDITS)
def test_weights_that_change_while_certifying_are_noticed(name: str) -> None:
    torch.manual_seed(10)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    data = Changing(model, torch.rand(3, 3), EDITS[name])
    with pytest.raises(StalePlanError, match="weights"):
        lf.certify(model, data, input_shape=(3,), input_range=UNIT)


def test_weights_changed_between_bound_and_use_do_not_enter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Logits come from the weights the bound was computed for, whatever happens in between."""
    torch.manual_seed(11)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double().eval()
    x = torch.rand(4, 3).double()
    honest = certified(model, x)
    original, logits = certification.sample_radii, []

    def meddling(subject: Any, *rest: Any, **options: Any) -> Any:
        with torch.no_grad():
            model[0].weight.mul_(100.0)
        columns = original(subject, *rest, **options)
        logits.append(columns["prediction_radius"])
        return columns

    monkeypatch.setattr(certification, "sample_radii", meddling)
    with pytest.raises(StalePlanError):
        certified(model, x)
    assert np.array_equal(logits[0], honest.prediction_radius)


def test_every_certificate_is_computed_afresh() -> None:
    torch.manual_seed(12)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    x = torch.rand(4, 3)
    first = certified(model, x)
    with torch.no_grad():
        model[0].weight.mul_(4.0)
        model[0].bias.mul_(4.0)
    second = certified(model, x)
    assert second.weights_sha256 != first.weights_sha256
    assert math.isclose(second.features, 4 * first.features, rel_tol=1e-6)


class Overridden(nn.Linear):
    """Exports as a linear layer, runs as something steeper."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if torch.compiler.is_compiling() else 3.0 * y


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.calls = nn.Linear(3, 2), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.layer(x) * (1.0 if self.calls < 3 else 1.5)


def test_a_module_that_does_not_compute_what_it_exports_is_refused() -> None:
    for model in (Overridden(3, 2), Counting()):
        with pytest.raises((NotCertifiedError, UnsupportedLayerError)):
            certified(model.eval(), torch.rand(2, 3))


def test_a_patched_call_is_refused() -> None:
    class Patched(nn.Sequential):
        def __call__(self, x: Tensor) -> Tensor:
            y = super().__call__(x)
            return y if torch.compiler.is_exporting() else y.flip(1)

    with pytest.raises((NotCertifiedError, UnsupportedLayerError)):
        certified(Patched(nn.Linear(3, 2)).eval(), torch.rand(2, 3))


def test_a_patched_forward_is_what_gets_certified() -> None:
    """An instance attribute that replaces forward is the module as it is called."""
    model = linear([[1.0, 0.0], [0.0, 1.0]])
    model.forward = lambda x: nn.functional.linear(4.0 * x, model.weight)  # type: ignore[method-assign]
    result = certified(model, torch.tensor([[0.75, 0.25]], dtype=torch.float64))
    assert result.total >= 4.0


def test_hooks_are_part_of_the_model() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).eval()
    plain = certified(model, torch.rand(1, 2)).features
    model[0].register_forward_hook(lambda module, inputs, output: 5.0 * output)
    assert certified(model, torch.rand(1, 2)).features >= 4.9 * plain


def test_dropout_in_eval_mode_is_the_identity() -> None:
    torch.manual_seed(13)
    layers = [nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)]
    plain = nn.Sequential(*layers).eval()
    dropped = nn.Sequential(layers[0], nn.Dropout(0.5), *layers[1:]).eval()
    x = torch.rand(5, 3)
    assert np.array_equal(
        certified(plain, x).prediction_radius, certified(dropped, x).prediction_radius
    )


def test_a_small_residual_network_end_to_end() -> None:
    torch.manual_seed(14)
    shape = (1, 8, 8)
    model = build_model(
        "wide-resnet", input_shape=shape, classes=4, options={"depth": 10, "width": 1}
    ).eval()
    x = torch.rand(3, *shape)
    result = lf.certify(model, x, input_shape=shape, input_range=UNIT, method="torus")
    assert result.prediction.tolist() == model(x).argmax(1).tolist()
    assert (result.prediction_radius > 0).all()
