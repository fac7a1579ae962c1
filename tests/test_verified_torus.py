# SPDX-License-Identifier: MIT
"""Torus bounds against dense convolution matrices, judged exactly. No tolerances."""

from __future__ import annotations

import math
from fractions import Fraction

import mpmath
import numpy as np
import pytest
import torch

from lmtfast.errors import ArgumentError, DtypeError, NonFiniteError, ShapeError
from lmtfast.verified import residual, torus
from lmtfast.verified.circle import unit_circle
from lmtfast.verified.torus import circular_norm_upper, polyphase, torus_norm_upper
from tests.oracles import (
    conv_matrix,
    norm_is_at_most,
    output_extent,
    rayleigh_exceeds,
    svd_norm,
)


def bound_of(weight: np.ndarray, extent, stride, padding, dilation) -> float:
    taps, coarse = polyphase(
        torch.from_numpy(weight), stride=stride, padding=padding, dilation=dilation
    )
    out = [
        output_extent(n, k, s, p, d)
        for n, k, s, p, d in zip(extent, weight.shape[2:], stride, padding, dilation, strict=True)
    ]
    return torus_norm_upper(taps, input_extent=coarse(extent), output_extent=out).upper


def assert_sound(matrix: np.ndarray, bound: float) -> None:
    """Exactly up to 12 rows or columns; above, by the exact Rayleigh quotient of a float vector."""
    if min(matrix.shape) <= 12:
        assert norm_is_at_most(matrix, bound)
    else:
        assert not rayleigh_exceeds(matrix, bound)


def geometry(rng: np.random.Generator, axes: int) -> tuple:
    largest = 9 if axes == 1 else 5
    pick = lambda low, high: [int(rng.integers(low, high)) for _ in range(axes)]  # noqa: E731
    padding = [(int(rng.integers(0, 4)), int(rng.integers(0, 4))) for _ in range(axes)]
    weight = rng.standard_normal((*[int(rng.integers(1, 4)) for _ in range(2)], *pick(1, 5)))
    return weight, pick(1, largest), pick(1, 4), padding, pick(1, 4)


@pytest.mark.parametrize(("axes", "trials"), [(1, 400), (2, 150)])
def test_bounds_the_dense_operator_of_random_geometries(axes: int, trials: int) -> None:
    rng = np.random.default_rng(axes)
    judged = 0
    for _ in range(trials):
        weight, extent, stride, padding, dilation = geometry(rng, axes)
        matrix = conv_matrix(weight, (weight.shape[1], *extent), stride, padding, dilation)
        bound = bound_of(weight, extent, stride, padding, dilation)
        if matrix.size == 0:
            assert bound == 0.0
            continue
        judged += 1
        assert_sound(matrix, bound)
    assert judged > trials // 3


def test_bounds_three_axes() -> None:
    rng = np.random.default_rng(3)
    for _ in range(12):
        weight = rng.standard_normal((2, 1, 2, 3, 1))
        args = ([3, 3, 2], [2, 1, 1], [(1, 0), (1, 1), (0, 0)], [1, 1, 1])
        matrix = conv_matrix(weight, (1, 3, 3, 2), *args[1:])
        assert_sound(matrix, bound_of(weight, *args))


def test_adversarial_kernels() -> None:
    """All-ones, alternating, one-tap and integer kernels under every kind of padding."""
    rng = np.random.default_rng(4)
    for k in (1, 2, 3, 4, 7):
        kernels = [np.ones(k), (-1.0) ** np.arange(k), np.eye(k)[0], np.eye(k)[-1]]
        kernels += [rng.integers(-3, 4, k).astype(float) for _ in range(2)]
        for kernel in kernels:
            for n in (1, 2, 6):
                for low, high in ((0, k - 1), (k - 1, 0), (k, k), (k // 2, k // 2)):
                    weight = kernel.reshape(1, 1, k)
                    matrix = conv_matrix(weight, (1, n), 1, [(low, high)])
                    bound = bound_of(weight, [n], [1], [(low, high)], [1])
                    assert norm_is_at_most(matrix, bound)


def test_the_circular_norm_at_the_own_size_is_no_bound() -> None:
    """The classical mistake: the frequencies 2 pi j / n miss the zero-padded operator's peak."""
    rng = np.random.default_rng(5)
    exceeded = 0
    for _ in range(150):
        weight = rng.standard_normal((1, 1, 7))
        matrix = conv_matrix(weight, (1, 7), 1, 3)
        taps, _ = polyphase(torch.from_numpy(weight), stride=[1], padding=[3], dilation=[1])
        circular = circular_norm_upper(taps, extent=[7]).upper
        assert norm_is_at_most(matrix, bound_of(weight, [7], [1], [(3, 3)], [1]))
        exceeded += not norm_is_at_most(matrix, circular)
    assert exceeded >= 3


def test_a_grid_one_smaller_than_the_proof_asks_is_unsound() -> None:
    """The size N is needed: shrinking the extents by one must fail somewhere."""
    rng, failures = np.random.default_rng(6), 0
    for _ in range(120):
        weight = rng.standard_normal((1, 1, 3))
        matrix = conv_matrix(weight, (1, 3), 1, 1)
        taps, _ = polyphase(torch.from_numpy(weight), stride=[1], padding=[1], dilation=[1])
        assert norm_is_at_most(
            matrix, torus_norm_upper(taps, input_extent=[3], output_extent=[3]).upper
        )
        failures += not norm_is_at_most(matrix, circular_norm_upper(taps, extent=[3]).upper)
    assert failures > 0


@pytest.mark.parametrize("exponent", [-1074, -149, -40, 0, 127, 1000])
def test_scales(exponent: int) -> None:
    rng = np.random.default_rng(exponent + 3000)
    for _ in range(5):
        weight = np.ldexp(rng.integers(-4, 5, (2, 1, 3)).astype(float), exponent)
        matrix = conv_matrix(weight, (1, 6), 1, 1)
        bound = bound_of(weight, [6], [1], [(1, 1)], [1])
        assert norm_is_at_most(matrix, bound)
        assert (bound == 0.0) == (not weight.any())


def test_circular_is_exact_for_circular_padding() -> None:
    rng = np.random.default_rng(7)
    for stride in (1, 2):
        for _ in range(8):
            weight = rng.standard_normal((3, 2, 3, 3))
            matrix = conv_matrix(weight, (2, 4, 6), stride, 1, padding_mode="circular")
            taps, coarse = polyphase(
                torch.from_numpy(weight), stride=[stride] * 2, padding=[1, 1], dilation=[1, 1]
            )
            bound = circular_norm_upper(taps, extent=coarse([4, 6])).upper
            assert_sound(matrix, bound)
            assert bound <= svd_norm(matrix) * (1 + 1e-9)


def test_orthogonal_convolutions_have_norm_one() -> None:
    """Shifts and pixel-unshuffling permutations: exactly 1, whatever the geometry."""
    shift = np.zeros((1, 1, 3, 3))
    shift[0, 0, 0, 2] = 1.0
    unshuffle = np.eye(4).reshape(4, 1, 2, 2)
    for weight, stride, padding in (
        (shift, [1, 1], [(1, 1)] * 2),
        (unshuffle, [2, 2], [(0, 0)] * 2),
    ):
        bound = bound_of(weight, [8, 6], stride, padding, [1, 1])
        assert 1.0 <= bound <= 1.0 + 1e-12


@pytest.mark.parametrize(("extent", "excess"), [(16, 0.05), (32, 0.012)])
def test_tightness_against_the_dense_operator(extent: int, excess: float) -> None:
    weight = np.random.default_rng(8).standard_normal((2, 2, 3))
    matrix = conv_matrix(weight, (2, extent), 1, 1)
    bound = bound_of(weight, [extent], [1], [(1, 1)], [1])
    assert_sound(matrix, bound)
    assert bound <= svd_norm(matrix) * (1 + excess)


def test_polyphase_preserves_the_norm() -> None:
    """The dense matrix of the taps has the singular values of the strided convolution's."""
    rng = np.random.default_rng(9)
    for _ in range(40):
        weight, extent, stride, padding, dilation = geometry(rng, 1)
        matrix = conv_matrix(weight, (weight.shape[1], *extent), stride, padding, dilation)
        taps, coarse = polyphase(
            torch.from_numpy(weight), stride=stride, padding=padding, dilation=dilation
        )
        if matrix.size == 0:
            continue
        (m,), (n,) = coarse(extent), [matrix.shape[0] // weight.shape[0]]
        assert m == -(-extent[0] // stride[0])
        assert taps == sorted(taps, key=lambda tap: tap[0])
        dense = np.zeros((n, weight.shape[0], m, taps[0][1].shape[1]))
        for (q,), tap in taps:
            for o in range(n):
                if 0 <= o + q < m:
                    dense[o, :, o + q] += tap.numpy()
        dense = dense.reshape(n * weight.shape[0], -1)
        # Phases past the image's end read zeros there; the dense form may only be larger.
        assert svd_norm(dense) >= svd_norm(matrix) * (1 - 1e-12)
        if extent[0] % stride[0] == 0:
            assert svd_norm(dense) <= svd_norm(matrix) * (1 + 1e-12)


def test_frequencies_are_chunked(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = np.random.default_rng(10).standard_normal((3, 4, 3, 3))
    args = ([6, 6], [1, 1], [(1, 1)] * 2, [1, 1])
    whole = bound_of(weight, *args)
    monkeypatch.setattr(residual, "CHUNK_ENTRIES", 64)
    assert abs(bound_of(weight, *args) / whole - 1) < 1e-11


@pytest.mark.parametrize("n", [1, 2, 3, 4, 6, 7, 8, 12, 34, 45, 97, 128])
def test_unit_circle_is_within_a_rounding(n: int) -> None:
    with mpmath.workdps(60):
        for r, (c, s) in enumerate(zip(*unit_circle(n), strict=True)):
            angle = 2 * mpmath.pi * r / n
            assert abs(mpmath.mpf(c) - mpmath.cos(angle)) <= mpmath.mpf(2) ** -53
            assert abs(mpmath.mpf(s) - mpmath.sin(angle)) <= mpmath.mpf(2) ** -53


def test_symbol_error_covers_the_computed_symbol() -> None:
    """The allowance for A(w) exceeds the true error, found with 60 digits."""
    rng = np.random.default_rng(11)
    for _ in range(6):
        weights = torch.from_numpy(rng.standard_normal((5, 1, 2)))
        offsets = torch.from_numpy(rng.integers(-3, 4, (5, 2)))
        size = [5, 7]
        tables = [torch.tensor(unit_circle(n), dtype=torch.float64) for n in size]
        grid = torch.tensor([[j, k] for j in range(5) for k in range(7)])
        cosine, sine = torus._phases(grid, offsets, tables)
        allowed = torus._symbol_error(weights, 2)
        flat = weights.view(5, 2)
        for f, (re, im) in enumerate(
            zip((cosine @ flat).tolist(), (sine @ flat).tolist(), strict=True)
        ):
            with mpmath.workdps(60):
                error = mpmath.mpf(0)
                for column in range(2):
                    exact = mpmath.mpc(0)
                    for t in range(5):
                        turn = sum(
                            mpmath.mpf(int(grid[f, a] * offsets[t, a])) / size[a] for a in range(2)
                        )
                        exact += mpmath.mpf(float(flat[t, column])) * mpmath.expjpi(2 * turn)
                    error += abs(mpmath.mpc(re[column], im[column]) - exact) ** 2
                assert mpmath.sqrt(error) <= allowed
        assert allowed < 1e-13


def test_wrong_arguments_are_refused() -> None:
    tap = torch.ones(2, 2, dtype=torch.float64)
    with pytest.raises(ArgumentError, match="frequencies"):
        torus_norm_upper([((0,), tap)], input_extent=[50], output_extent=[50], max_frequencies=49)
    with pytest.raises(ShapeError):
        torus_norm_upper([((0, 1), tap)], input_extent=[5], output_extent=[5])
    with pytest.raises(ShapeError):
        torus_norm_upper([((0,), tap), ((1,), tap[:1])], input_extent=[5], output_extent=[5])
    with pytest.raises(ShapeError):
        torus_norm_upper([((0,), tap)], input_extent=[5], output_extent=[5, 5])
    with pytest.raises(DtypeError):
        torus_norm_upper([((0,), tap.float())], input_extent=[5], output_extent=[5])
    with pytest.raises(NonFiniteError):
        torus_norm_upper([((0,), tap * math.nan)], input_extent=[5], output_extent=[5])
    with pytest.raises(ArgumentError):
        polyphase(torch.ones(1, 1, 3, dtype=torch.float64), stride=[0], padding=[1], dilation=[1])
    with pytest.raises(ShapeError):
        polyphase(
            torch.ones(1, 1, 3, dtype=torch.float64), stride=[1, 1], padding=[1], dilation=[1]
        )
    with pytest.raises(DtypeError):
        polyphase(torch.ones(1, 1, 3), stride=[1], padding=[1], dilation=[1])


def test_nothing_to_bound_is_zero() -> None:
    tap = torch.ones(2, 2, dtype=torch.float64)
    assert torus_norm_upper([], input_extent=[5], output_extent=[5]).upper == 0.0
    assert torus_norm_upper([((9,), tap)], input_extent=[5], output_extent=[5]).upper == 0.0
    assert torus_norm_upper([((0,), tap)], input_extent=[0], output_extent=[5]).upper == 0.0
    assert torus_norm_upper([((0,), tap * 0)], input_extent=[4], output_extent=[5]).upper == 0.0
    assert circular_norm_upper([((0,), tap)], extent=[0]).upper == 0.0
    assert Fraction(circular_norm_upper([((0,), tap)], extent=[1]).upper) >= 2
