# SPDX-License-Identifier: MIT
"""Verified matrix norms, judged by exact rationals. Soundness assertions carry no tolerance."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmtfast.errors import ArgumentError, DtypeError, NonFiniteError, ShapeError
from lmtfast.verified import residual
from lmtfast.verified.matrix import complex_matrix_norm_upper, matrix_norm_upper
from tests.oracles import (
    complex_norm_is_at_most,
    conv_matrix,
    norm_is_at_most,
    rayleigh_exceeds,
    svd_norm,
)


def upper(matrix: np.ndarray, entry_error: float = 0.0) -> float:
    tensor = torch.from_numpy(np.ascontiguousarray(matrix, dtype=np.float64))
    return matrix_norm_upper(tensor, entry_error=entry_error).upper


def hadamard(order: int) -> np.ndarray:
    h = np.ones((1, 1))
    while len(h) < order:
        h = np.block([[h, h], [h, -h]])
    return h


def orthogonal(rng: np.random.Generator, n: int) -> np.ndarray:
    return np.linalg.qr(rng.standard_normal((n, n)))[0]


def householder(rng: np.random.Generator, n: int) -> np.ndarray:
    v = np.where(np.arange(n) < 4 ** int(rng.integers(0, 2)), 1.0, 0.0) if n >= 4 else np.eye(n)[0]
    return np.eye(n) - 2.0 * np.outer(v, v) / (v @ v)


def shape(rng: np.random.Generator, low: int = 1, high: int = 7) -> tuple[int, int]:
    return int(rng.integers(low, high)), int(rng.integers(low, high))


def signed_permutation(rng: np.random.Generator) -> np.ndarray:
    n = int(rng.integers(1, 9))
    return np.diag(rng.integers(-8, 9, n) / 4.0)[rng.permutation(n)]


def near_ties(rng: np.random.Generator) -> np.ndarray:
    n = int(rng.integers(2, 7))
    q = orthogonal(rng, n)
    return q * (1.0 - 2.0 ** -float(rng.integers(1, 53)) * (np.arange(n) > 0)) @ orthogonal(rng, n)


def cancelling(rng: np.random.Generator) -> np.ndarray:
    big = rng.standard_normal(shape(rng, 2)) * 2.0**30
    return np.concatenate([big, big + rng.standard_normal(big.shape), -big], axis=1)


FAMILIES: dict[str, Callable[[np.random.Generator], np.ndarray]] = {
    "signed permutation": signed_permutation,
    "hadamard": lambda rng: hadamard(int(2 ** rng.integers(0, 4))) * 2.0 ** rng.integers(-9, 9),
    "circulant": lambda rng: np.stack(
        [np.roll(c, i) for c in [rng.integers(-4, 5, 6)] for i in range(6)]
    ),
    "kronecker": lambda rng: np.kron(
        rng.integers(-2, 3, (2, 2)), rng.integers(-3, 4, shape(rng, 1, 4))
    ),
    "direct sum": lambda rng: np.diag(np.r_[1.0, 2.0, rng.integers(-3, 4, 3)]),
    "rank one": lambda rng: np.outer([3.0, 4.0, 0.0, 12.0], [1.0, 2.0, 2.0]) * rng.integers(1, 9),
    "rank one float": lambda rng: np.outer(rng.standard_normal(6), rng.standard_normal(5)),
    "householder": lambda rng: householder(rng, int(rng.integers(1, 9))),
    "pixel shuffle": lambda rng: np.eye(8)[rng.permutation(8)],
    "small integers": lambda rng: rng.integers(-3, 4, shape(rng)).astype(float),
    "dyadic": lambda rng: rng.integers(-64, 65, shape(rng)) / 64.0,
    "gaussian": lambda rng: rng.standard_normal(shape(rng)),
    "uniform": lambda rng: rng.random(shape(rng)),
    "float32 orthogonal": lambda rng: orthogonal(rng, int(rng.integers(2, 9))).astype(np.float32),
    "float64 orthogonal": lambda rng: orthogonal(rng, int(rng.integers(2, 9))),
    "bfloat16 orthogonal": lambda rng: (
        torch.from_numpy(orthogonal(rng, 6)).bfloat16().double().numpy()
    ),
    "near ties": near_ties,
    "cancelling": cancelling,
    "one row": lambda rng: rng.standard_normal((1, int(rng.integers(1, 40)))),
    "one column": lambda rng: rng.standard_normal((int(rng.integers(1, 40)), 1)),
    "tall": lambda rng: rng.standard_normal((40, int(rng.integers(2, 5)))),
    "mixed rows": lambda rng: (
        rng.standard_normal((4, 4)) * 2.0 ** np.array([[120], [-140], [0], [-1]])
    ),
    "graded": lambda rng: rng.standard_normal((5, 5)) * 2.0 ** rng.integers(-300, 300, (5, 5)),
    "sparse": lambda rng: rng.standard_normal((6, 6)) * (rng.random((6, 6)) < 0.2),
    "denormal only": lambda rng: rng.integers(-5, 6, shape(rng)) * 5e-324,
    "near overflow": lambda rng: rng.uniform(-1, 1, shape(rng)) * 1e300,
    "nilpotent": lambda rng: np.triu(rng.integers(-3, 4, (5, 5)), 1).astype(float),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_no_bound_is_below_the_exact_norm(name: str) -> None:
    rng = np.random.default_rng(sum(map(ord, name)))
    for _ in range(76):
        matrix = np.asarray(FAMILIES[name](rng), dtype=np.float64)
        bound = upper(matrix)
        assert norm_is_at_most(matrix, bound), (matrix.tolist(), bound)
        if matrix.any() and np.abs(matrix).max() > 1e-290:
            scale = 2.0 ** -math.frexp(np.abs(matrix).max())[1]
            assert bound * scale <= svd_norm(matrix * scale) * (1 + 1e-9)
        assert (bound == 0.0) == (not matrix.any())


@pytest.mark.parametrize(
    "name", ["signed permutation", "gaussian", "float32 orthogonal", "hadamard"]
)
@pytest.mark.parametrize("exponent", [-149, -126, -75, -1, 40, 127, -1000, 900])
def test_scales_change_nothing(name: str, exponent: int) -> None:
    rng = np.random.default_rng(exponent + 2000)
    for _ in range(6):
        matrix = np.ldexp(np.asarray(FAMILIES[name](rng), dtype=np.float64), exponent)
        bound = upper(matrix)
        assert norm_is_at_most(matrix, bound)
        unscaled = np.ldexp(matrix, -exponent)
        assert math.ldexp(bound, -exponent) <= svd_norm(unscaled) * (1 + 1e-9)


KNOWN = [
    (hadamard(4), 2.0),
    (hadamard(16), 4.0),
    (hadamard(64), 8.0),
    (np.outer([3.0, 4.0], [1.0, 2.0, 2.0]), 15.0),
    (np.kron(hadamard(4), np.diag([1.0, 5.0])), 10.0),
    (householder(np.random.default_rng(0), 64), 1.0),
    (np.diag(np.r_[np.ones(40), 2.0]), 2.0),
    (np.array([[1.0, -1.0]]), math.sqrt(2.0)),
    (np.array([[-3.5]]), 3.5),
]


@pytest.mark.parametrize(("matrix", "norm"), KNOWN)
@pytest.mark.parametrize("exponent", [-149, 0, 127])
def test_known_norms(matrix: np.ndarray, norm: float, exponent: int) -> None:
    bound = upper(np.ldexp(matrix, exponent))
    assert bound >= math.ldexp(norm, exponent)
    assert bound <= math.ldexp(norm, exponent) * (1 + 1e-11)


def test_tiny_weights_have_a_positive_norm() -> None:
    for value in (1e-5, 1e-23, 2.0**-149, 5e-324):
        matrix = np.full((3, 2), value)
        assert upper(matrix) >= value
        assert norm_is_at_most(matrix, upper(matrix))


@pytest.mark.parametrize("n", [64, 150, pytest.param(700, marks=pytest.mark.slow)])
def test_rounded_orthogonal_matrices_are_not_understated(n: int) -> None:
    matrix = orthogonal(np.random.default_rng(n), n).astype(np.float32).astype(np.float64)
    bound = upper(matrix)
    assert not rayleigh_exceeds(matrix, bound)
    assert bound <= svd_norm(matrix) * (1 + 1e-9)


def test_empty_zero_and_special_shapes() -> None:
    for size in [(0, 0), (0, 3), (3, 0), (0, 2, 2), (2, 0, 3), (2, 3, 0)]:
        assert matrix_norm_upper(torch.zeros(size, dtype=torch.float64)).upper == 0.0
    for size in [(1, 1), (3, 2), (2, 3, 3), (1, 5)]:
        result = matrix_norm_upper(-torch.zeros(size, dtype=torch.float64))
        assert (result.upper, result.method, result.slack) == (0.0, "zero", 0.0)
    zero = torch.zeros(2, 3, 4, dtype=torch.float64)
    assert complex_matrix_norm_upper(zero, zero).upper == 0.0


def test_views_transposes_and_inputs_stay_untouched() -> None:
    base = torch.randn(12, 20, dtype=torch.float64)
    copy = base.clone()
    for view in (base.t(), base[::2, 1::3], base.flip(0), base[:1].expand(5, 20)):
        array = view.numpy().copy()
        assert norm_is_at_most(array, matrix_norm_upper(view).upper)
    assert torch.equal(base, copy)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_entries_are_refused(bad: float) -> None:
    matrix = torch.eye(3, dtype=torch.float64)
    matrix[1, 2] = bad
    with pytest.raises(NonFiniteError):
        matrix_norm_upper(matrix)
    with pytest.raises(NonFiniteError):
        complex_matrix_norm_upper(torch.eye(3, dtype=torch.float64), matrix)


def test_wrong_arguments_are_refused() -> None:
    good = torch.eye(3, dtype=torch.float64)
    for dtype in (torch.float32, torch.float16, torch.int64, torch.complex128):
        with pytest.raises(DtypeError):
            matrix_norm_upper(good.to(dtype))
    with pytest.raises(ShapeError):
        matrix_norm_upper(good[0])
    with pytest.raises(ShapeError):
        complex_matrix_norm_upper(good, good[:2])
    for error in (-1e-9, math.nan):
        with pytest.raises(ArgumentError):
            matrix_norm_upper(good, entry_error=error)


def test_overflow_gives_infinity() -> None:
    matrix = np.full((4, 4), 1.7e308)
    assert upper(matrix) == math.inf


def test_entry_error_is_added_outward() -> None:
    rng = np.random.default_rng(3)
    for _ in range(50):
        exact = rng.standard_normal((4, 5))
        given_matrix = exact.astype(np.float32).astype(np.float64)
        error = float(np.linalg.norm(exact - given_matrix)) * (1 + 1e-12)
        assert norm_is_at_most(exact, upper(given_matrix, error))
    assert upper(np.zeros((2, 2)), 0.25) == 0.25
    assert upper(np.eye(2), math.inf) == math.inf


def test_batches_bound_every_member() -> None:
    rng = np.random.default_rng(4)
    for _ in range(40):
        members = rng.standard_normal((int(rng.integers(1, 9)), *shape(rng)))
        members = members * 2.0 ** rng.integers(-400, 3, (len(members), 1, 1))
        result = matrix_norm_upper(torch.from_numpy(members))
        assert all(norm_is_at_most(member, result.upper) for member in members)
        assert result.upper <= max(map(svd_norm, members)) * (1 + 1e-9)


def test_chunks_agree_with_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    members = torch.from_numpy(np.random.default_rng(5).standard_normal((30, 6, 7)))
    whole = matrix_norm_upper(members).upper
    monkeypatch.setattr(residual, "CHUNK_ENTRIES", 200)
    parts = matrix_norm_upper(members).upper
    assert all(norm_is_at_most(m.numpy(), min(whole, parts)) for m in members)
    assert abs(whole / parts - 1) < 1e-11


@pytest.mark.parametrize("block", [1, 2, 3, 5])
def test_blocked_products_stay_sound(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(residual, "BLOCK", block)
    rng = np.random.default_rng(block)
    for _ in range(40):
        matrix = rng.standard_normal(shape(rng, 2, 9))
        bound = upper(matrix)
        assert norm_is_at_most(matrix, bound)
        assert bound <= svd_norm(matrix) * (1 + 1e-9)
        real, imag = (torch.from_numpy(rng.standard_normal((2, 5, 4))) for _ in range(2))
        bound = complex_matrix_norm_upper(real, imag).upper
        for r, i in zip(real.numpy(), imag.numpy(), strict=True):
            assert complex_norm_is_at_most(r, i, bound)


def test_complex_batches_bound_every_member() -> None:
    rng = np.random.default_rng(6)
    for _ in range(60):
        size = (int(rng.integers(1, 4)), *shape(rng, 1, 5))
        real, imag = (
            rng.standard_normal(size),
            rng.standard_normal(size) * 2.0 ** rng.integers(-60, 2),
        )
        result = complex_matrix_norm_upper(torch.from_numpy(real), torch.from_numpy(imag))
        for r, i in zip(real, imag, strict=True):
            assert complex_norm_is_at_most(r, i, result.upper)
        assert result.upper <= max(map(svd_norm, real + 1j * imag)) * (1 + 1e-9)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=3, max_size=3),
        min_size=1,
        max_size=4,
    )
)
def test_any_floats(rows: list[list[float]]) -> None:
    matrix = np.array(rows)
    assert norm_is_at_most(matrix, upper(matrix))


def wrong_factor(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A solver that reports success and returns noise."""
    return torch.randn_like(matrix), torch.zeros(len(matrix), dtype=torch.int32)


def nearly_right_factor(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A solver that reports success on a matrix a little more positive than the one given."""
    m = matrix.shape[-1]
    tilted = matrix + 1e-7 * torch.eye(m, dtype=matrix.dtype)
    return torch.linalg.cholesky(tilted + 2.0 * torch.eye(m)), torch.zeros(len(matrix))


@pytest.mark.parametrize("factor", [wrong_factor, nearly_right_factor])
def test_a_lying_factorisation_cannot_lower_the_bound(
    monkeypatch: pytest.MonkeyPatch, factor: Callable
) -> None:
    rng = np.random.default_rng(7)
    monkeypatch.setattr(torch.linalg, "cholesky_ex", factor)
    for _ in range(6):
        matrix = rng.standard_normal((4, 5))
        assert norm_is_at_most(matrix, upper(matrix))


@pytest.mark.parametrize(
    "share", [0.0, 0.5, 0.999999, 1 - 1e-12, 1.0 + 1e-3, 100.0, math.nan, math.inf, -1.0]
)
def test_a_lying_estimate_cannot_lower_the_bound(
    monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    honest = residual.ResidualSweep._top

    def lying(*args: Any, **kwargs: Any) -> tuple[float, bool]:
        guess, solved = honest(*args, **kwargs)
        return share * guess, solved

    monkeypatch.setattr(residual.ResidualSweep, "_top", staticmethod(lying))
    rng = np.random.default_rng(8)
    for _ in range(6):
        matrix = rng.standard_normal((4, 5))
        bound = upper(matrix)
        assert norm_is_at_most(matrix, bound)
        assert bound <= np.linalg.norm(matrix) * (1 + 1e-12)


@pytest.mark.parametrize(
    ("size", "excess"),
    [((64, 64), 1e-12), ((256, 256), 1e-11), ((512, 1024), 5e-11), ((300, 40), 1e-11)],
)
def test_tightness(size: tuple[int, int], excess: float) -> None:
    matrix = np.random.default_rng(9).standard_normal(size)
    assert upper(matrix) <= svd_norm(matrix) * (1 + excess)


def test_tightness_where_lanczos_does_not_converge() -> None:
    """A long image: the top of the spectrum is a cluster with gaps near 1e-6."""
    matrix = conv_matrix(np.array([[[1.0, 2.0, 1.5]]]), (1, 800), 1, 1)
    bound = upper(matrix)
    assert not rayleigh_exceeds(matrix, bound)
    assert bound <= svd_norm(matrix) * (1 + 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("size", [(1568, 3136), (2048, 2048)])
def test_tightness_at_layer_size(size: tuple[int, int]) -> None:
    matrix = np.random.default_rng(10).standard_normal(size)
    bound = upper(matrix)
    assert not rayleigh_exceeds(matrix, bound, np.linalg.svd(matrix)[2][0])
    assert bound <= svd_norm(matrix) * (1 + 1e-9)


def test_tightness_of_complex_batches() -> None:
    rng = np.random.default_rng(11)
    values = rng.standard_normal((40, 64, 64)) + 1j * rng.standard_normal((40, 64, 64))
    result = complex_matrix_norm_upper(
        torch.from_numpy(values.real.copy()), torch.from_numpy(values.imag.copy())
    )
    truth = max(map(svd_norm, values))
    assert truth * (1 - 1e-12) <= result.upper <= truth * (1 + 1e-9)
    assert result.slack < 1e-9


@pytest.mark.slow
def test_many_small_matrices_exactly() -> None:
    rng = np.random.default_rng(12)
    names = list(FAMILIES)
    for trial in range(20_000):
        matrix = np.asarray(FAMILIES[names[trial % len(names)]](rng), dtype=np.float64)
        assert norm_is_at_most(matrix, upper(matrix))
