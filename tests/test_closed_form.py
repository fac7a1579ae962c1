# SPDX-License-Identifier: MIT
"""The two older bounds on a convolution, beside the true norm: Cor. 1 and Cisse et al."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from lmtfast import layer_bounds as module
from lmtfast.closed_form import stagnation_bound
from lmtfast.layer_bounds import LayerBound, layer_bounds
from tests.oracles import conv_matrix, svd_norm

# Input size, kernel, stride, padding: root of the windows over one entry, root of the kernel size.
TABLE = [
    (28, 4, 2, 1, 2.0, 4.0),
    (14, 4, 2, 1, 2.0, 4.0),
    (32, 3, 1, 1, 3.0, 3.0),
    (32, 3, 2, 1, 2.0, 3.0),
    (32, 1, 1, 0, 1.0, 1.0),
    (8, 8, 1, 0, 1.0, 8.0),
    (28, 5, 1, 0, 5.0, 5.0),
    (5, 5, 1, 0, 1.0, 5.0),
]


@pytest.fixture(autouse=True)
def _one_power_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """The estimate that stands beside the two bounds is not under test here."""
    monkeypatch.setattr(module, "ESTIMATE_STEPS", 1)


def only_layer(conv: nn.Conv2d, input_shape: tuple[int, ...]) -> LayerBound:
    (layer,) = layer_bounds(conv.eval(), input_shape).layers
    return layer


@pytest.mark.parametrize(("size", "kernel", "stride", "padding", "root", "cisse"), TABLE)
def test_table_of_factors(
    size: int, kernel: int, stride: int, padding: int, root: float, cisse: float
) -> None:
    conv = nn.Conv2d(2, 3, kernel, stride=stride, padding=padding, bias=False).double()
    matrix_norm = svd_norm(conv.weight.detach().reshape(3, -1).numpy())
    layer = only_layer(conv, (2, size, size))
    assert layer.corollary_1 == pytest.approx(root * matrix_norm, rel=1e-12)
    assert layer.cisse == pytest.approx(cisse * matrix_norm, rel=1e-12)


axis = st.tuples(
    st.integers(1, 7), st.integers(1, 4), st.integers(1, 3), st.integers(0, 2)
)  # size, kernel, stride, padding


@settings(max_examples=15)
@given(rows=axis, columns=axis, groups=st.sampled_from([1, 2]), seed=st.integers(0, 2**31))
def test_true_norm_corollary_cisse_are_in_order(
    rows: tuple[int, ...], columns: tuple[int, ...], groups: int, seed: int
) -> None:
    size, kernel, stride, padding = zip(rows, columns, strict=True)
    assume(all(n + 2 * p >= k for n, k, p in zip(size, kernel, padding, strict=True)))
    torch.manual_seed(seed)
    conv = nn.Conv2d(
        2, 4, kernel, stride=stride, padding=padding, groups=groups, bias=False
    ).double()
    layer = only_layer(conv, (2, *size))
    matrix = conv_matrix(conv.weight.detach().numpy(), (2, *size), stride, padding, groups=groups)
    # The two bounds are singular values of another matrix in float64: at equality (no overlap)
    # they may round below the true norm by a few units, which is why they are estimates.
    rounding = 1.0 + 64 * np.finfo(float).eps
    assert svd_norm(matrix) <= layer.corollary_1 * rounding
    assert layer.corollary_1 <= layer.cisse * rounding


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(2, 2, 3, dilation=2),
        nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"),
        nn.ConvTranspose2d(2, 2, 3),
    ],
    ids=["dilated", "circular", "transposed"],
)
def test_other_maps_have_neither(conv: nn.Module) -> None:
    layer = only_layer(conv, (2, 8, 8))
    assert layer.corollary_1 is None
    assert layer.cisse is None


def test_batch_norm_is_part_of_the_kernel() -> None:
    conv, norm = nn.Conv2d(2, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3)
    norm.weight.data.copy_(torch.tensor([2.0, 1.0, 0.5]))
    norm.running_var.copy_(torch.tensor([4.0, 0.25, 1.0]))
    layer = only_layer(nn.Sequential(conv, norm), (2, 8, 8))
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    matrix = (conv.weight.double().reshape(3, -1) * scale[:, None]).detach().numpy()
    assert layer.corollary_1 == pytest.approx(3.0 * svd_norm(matrix), rel=1e-12)


@pytest.mark.parametrize(
    ("value", "growth", "dimension", "want"),
    [(4.0, 1e-6, 784, 2.0140490), (4.0, 0.0, 784, 2.0), (1.0, 1e-12, 3072, 1.0000277)],
)
def test_stagnation_bound(value: float, growth: float, dimension: int, want: float) -> None:
    got = stagnation_bound(value, value - growth, dimension)
    assert got == pytest.approx(want, abs=5e-8)
