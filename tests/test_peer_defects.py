# SPDX-License-Identifier: MIT
"""One test per defect known from other Lipschitz libraries: each must be impossible here."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lmtfast as lf
from lmtfast.bound import LipschitzBound
from lmtfast.enclosure import enclose
from lmtfast.errors import NotCertifiedError, UnsupportedLayerError
from lmtfast.radius import radius_lower
from lmtfast.tracing import trace_model
from tests.oracles import conv_matrix, norm_is_at_most, rayleigh_exceeds


def dense(weight: Tensor, shape: tuple[int, ...], **options: object) -> np.ndarray:
    return conv_matrix(weight.double().numpy(), shape, **options)  # type: ignore[arg-type]


def top(matrix: np.ndarray) -> float:
    return float(np.linalg.norm(matrix, 2))


def test_defect_01_power_iteration_never_certifies() -> None:
    """Plateaus where a hundred iterations stay low; start vectors that never leave a subspace."""
    torch.manual_seed(0)
    for _ in range(3):
        weight = torch.randn(4, 4, 3, 3)
        bound = lf.conv_spectral_norm(weight, (4, 6, 6), padding=1).total
        assert not rayleigh_exceeds(dense(weight, (4, 6, 6), padding=1), float(bound))
    # The all-ones start is orthogonal to the only singular vector: others return 0.
    layer = nn.Linear(2, 2, bias=False).eval()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, -1.0], [0.0, 0.0]]))
    assert lf.spectral_norm(layer, (2,)).total >= math.sqrt(2)
    # A stored iterate stuck on the smaller of two separate blocks.
    trap = nn.Linear(2, 2, bias=False).eval()
    with torch.no_grad():
        trap.weight.copy_(torch.diag(torch.tensor([1.0, 1414.0])))
    assert lf.certified_bound(trap, (2,)).total >= 1414.0
    estimate = lf.NetworkBound(trap, (2,)).converge(5)
    value = torch.tensor([[2.0, 1.0]], dtype=torch.float64)
    with pytest.raises(NotCertifiedError):
        radius_lower(value, torch.zeros_like(value), estimate)


def test_defect_02_ties_are_never_certified() -> None:
    bound = LipschitzBound(
        total=1e-30,
        features=1e-30,
        per_operator={},
        level="rigorous",
        slack=0.0,
        method="by hand",
        head_weight=torch.randn(3, 2).double(),
        classes=3,
    )
    value = torch.tensor([[0.0] * 3, [2.0, 2.0, 1.0], [1.0, 2.0, 2.0]], dtype=torch.float64)
    assert radius_lower(value, torch.zeros_like(value), bound)[1].tolist() == [0.0] * 3
    # Attack on tied masks: collapse all logits to the same value.
    model = nn.Linear(2, 3, bias=False).eval()
    collapsed = torch.zeros(1, 2)
    result = lf.certify(model, collapsed, input_shape=(2,), input_range=(0, 1))
    assert result.prediction_radius.tolist() == [0.0]


def test_defect_02b_tiny_weights_do_not_shrink_the_bound() -> None:
    """No epsilon enters a normalisation, and no square underflows."""
    for scale in (1e-5, 1e-12, 1e-23, 1e-30, 2.0**-140):
        layer = nn.Linear(2, 2, bias=False).eval()
        with torch.no_grad():
            layer.weight.copy_(scale * torch.eye(2))
        stored = float(layer.weight.detach()[0, 0])
        total = lf.certified_bound(layer, (2,)).total
        assert stored <= total <= stored * (1 + 1e-6)


class Unknown(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x


def test_defect_03_unknown_layers_are_refused() -> None:
    for layer in (Unknown(), nn.LayerNorm(4), nn.Softmax(1)):
        with pytest.raises(UnsupportedLayerError):
            lf.certified_bound(nn.Sequential(nn.Linear(4, 4), layer).eval(), (4,))


class Skip(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.relu(self.layer(x))


def test_defect_03_topology_and_overlapping_pools_count() -> None:
    model = Skip().eval()
    with torch.no_grad():
        model.layer.weight.copy_(3.0 * torch.eye(2))
    assert lf.certified_bound(model, (2,)).total >= 4.0
    pool = nn.Sequential(nn.MaxPool2d(3, 2), nn.Flatten()).eval()
    assert lf.certified_bound(pool, (1, 5, 5)).total >= 2.0
    norm = nn.BatchNorm1d(2).eval()
    norm.running_var.fill_(0.25)
    assert lf.certified_bound(nn.Sequential(norm).eval(), (2,)).total >= 1.0 / math.sqrt(
        0.25 + norm.eps
    )
    dilated = torch.ones(1, 1, 3)
    bound = lf.conv_spectral_norm(dilated, (1, 9), dilation=2, padding=2).total
    assert norm_is_at_most(dense(dilated, (1, 9), dilation=2, padding=2), float(bound))


def test_defect_04_groups_take_the_maximum() -> None:
    torch.manual_seed(1)
    weight = 0.2 * torch.randn(8, 2, 3, 3)
    bound = float(lf.conv_spectral_norm(weight, (8, 5, 5), padding=1, groups=4).total)
    matrix = dense(weight, (8, 5, 5), padding=1, groups=4)
    assert top(matrix) * (1 - 1e-9) <= bound
    blocks = [
        float(lf.conv_spectral_norm(weight[2 * g : 2 * g + 2], (2, 5, 5), padding=1).total)
        for g in range(4)
    ]
    assert math.isclose(bound, max(blocks), rel_tol=1e-5)


@pytest.mark.parametrize("kernel", [2, 3, 4])
def test_defect_05_circular_and_even_kernels(kernel: int) -> None:
    torch.manual_seed(2)
    weight = torch.randn(2, 2, kernel)
    for length in (kernel, kernel + 1, 7):
        pads = (kernel - 1) // 2
        model = nn.Conv1d(2, 2, kernel, padding=pads, padding_mode="circular", bias=False).eval()
        with torch.no_grad():
            model.weight.copy_(weight)
        matrix = dense(weight, (2, length), padding=pads, padding_mode="circular")
        assert norm_is_at_most(matrix, float(lf.spectral_norm(model, (2, length)).total))


@pytest.mark.parametrize("mode", ["reflect", "replicate"])
def test_defect_06_reflect_and_replicate_padding(mode: str) -> None:
    box = torch.ones(1, 1, 3, 3) / 9
    bound = lf.conv_spectral_norm(box, (1, 5, 5), padding=1, padding_mode=mode).total
    matrix = dense(box, (1, 5, 5), padding=1, padding_mode=mode)
    zero = top(dense(box, (1, 5, 5), padding=1))
    assert top(matrix) > zero
    assert norm_is_at_most(matrix, float(bound))


def test_defect_07_nothing_is_silently_one() -> None:
    """The bound is of the network that runs, whatever factor someone meant it to have."""
    model = nn.Sequential(
        nn.Linear(3, 3, bias=False), nn.ReLU(), nn.Linear(3, 2, bias=False)
    ).eval()
    with torch.no_grad():
        model[0].weight.copy_(9.0 * torch.eye(3))
    before = lf.certified_bound(model, (3,)).features
    with torch.no_grad():
        model[0].weight.mul_(2.0)
    assert lf.certified_bound(model, (3,)).features >= 1.99 * before


def test_defect_08_the_circular_norm_is_not_used_for_zero_padding() -> None:
    weight = torch.tensor([[[1.0, -1.0]]])
    for length in (3, 5, 7):
        matrix = dense(weight, (1, length), padding=1)
        circular = top(dense(weight, (1, length), padding=0, padding_mode="circular"))
        assert norm_is_at_most(
            matrix, float(lf.conv_spectral_norm(weight, (1, length), padding=1).total)
        )
        assert top(matrix) > circular or length > 5


def test_defect_09_more_iterations_do_not_return_the_first_one() -> None:
    torch.manual_seed(3)
    model = nn.Linear(40, 40, bias=False)
    one = float(lf.NetworkBound(model, (40,)).converge(1).total)
    many = float(lf.NetworkBound(model, (40,)).converge(300).total)
    truth = float(torch.linalg.matrix_norm(model.weight.double(), ord=2))
    assert one < many
    assert math.isclose(many, truth, rel_tol=1e-3)


def test_defect_10_float32_matrices_are_bounded_from_above() -> None:
    torch.manual_seed(4)
    for _ in range(5):
        layer = nn.Linear(24, 24, bias=False).eval()
        total = float(lf.spectral_norm(layer, (24,)).total)
        assert not rayleigh_exceeds(layer.weight.detach().double().numpy(), total)
        assert total <= (1 + 1e-6) * float(torch.linalg.matrix_norm(layer.weight.double(), ord=2))


def test_defect_11_logits_are_enclosed_in_float64() -> None:
    """Autocast and TF32 settings reach neither value nor error."""
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3)).eval()
    traced, x = trace_model(model, (32,)), torch.rand(4, 32)
    plain = enclose(model, traced, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = enclose(model, traced, x)
        certificate = lf.certify(model, x, input_shape=(32,), input_range=(0, 1))
    assert torch.equal(plain[0], mixed[0])
    assert torch.equal(plain[1], mixed[1])
    again = lf.certify(model, x, input_shape=(32,), input_range=(0, 1))
    assert np.array_equal(certificate.prediction_radius, again.prediction_radius)


def test_defect_12_row_normalised_heads_use_pair_distances() -> None:
    """Rows of length one do not make a head 1-Lipschitz; pairwise distances need no such claim."""
    model = nn.Linear(2, 2, bias=False).double().eval()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
    x = torch.tensor([[0.25, 0.0]], dtype=torch.float64)
    result = lf.certify(model, x, input_shape=(2,), input_range=(0, 1))
    # The gap 0.5 closes at distance 0.25, not at 0.5 / sqrt(2).
    assert 0.25 * (1 - 1e-6) < result.prediction_radius[0] < 0.25
    assert result.total >= math.sqrt(2)


class Normalise(nn.Module):
    def __init__(self, std: list[float]) -> None:
        super().__init__()
        self.register_buffer("std", torch.tensor(std).reshape(-1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x - 0.5) / self.std


def test_defect_13_normalisation_divides_by_the_smallest_deviation() -> None:
    model = nn.Sequential(Normalise([0.5, 0.25, 0.125]), nn.Flatten()).eval()
    total = float(lf.certified_bound(model, (3, 2, 2)).total)
    assert 8.0 <= total < 8.0 * (1 + 1e-6)


def test_defect_14_dead_iterates_do_not_matter() -> None:
    """Zero weights, zero gradients and stored iterates of any kind leave the guarantee alone."""
    zero = nn.Linear(3, 3, bias=False).eval()
    with torch.no_grad():
        zero.weight.zero_()
    assert lf.certified_bound(zero, (3,)).total == 0.0
    network = lf.NetworkBound(zero, (3,))
    network()
    with torch.no_grad():
        zero.weight.copy_(2.0 * torch.eye(3))
        network.state.iterates.zero_()
    assert lf.certified_bound(zero, (3,)).total >= 2.0


def test_defect_15_rounding_of_the_centre_is_subtracted() -> None:
    """Biases of 1e6 hide a margin of 1e-12: its sign is not known in float64, so no radius."""
    model = nn.Linear(2, 2).double().eval()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.1, 0.3], [0.3, 0.1]]))
        model.bias.fill_(1e6)
    x = torch.tensor([[0.5, 0.5 - 1e-12]], dtype=torch.float64)
    result = lf.certify(model, x, input_shape=(2,), input_range=(0, 1))
    assert result.prediction_radius.tolist() == [0.0]
