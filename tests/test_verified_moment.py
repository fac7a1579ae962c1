# SPDX-License-Identifier: MIT
"""The probabilistic moment bound: measured failure rates, scales, refusals."""

from __future__ import annotations

import math

import pytest
import torch

from lmtfast.errors import ArgumentError, DtypeError, NonFiniteError
from lmtfast.verified import lanczos
from lmtfast.verified.drawn import hashed_entropy
from lmtfast.verified.lanczos import top_eigenvalue, top_eigenvector
from lmtfast.verified.moment import moment_norm_upper, normal_draw


def bound(matrix: torch.Tensor, **kwargs) -> float:
    kwargs = {"delta": 2.0**-100, "iterations": 60} | kwargs
    return moment_norm_upper(
        lambda x: x @ matrix.T, lambda y: y @ matrix, (matrix.shape[1],), **kwargs
    )


@pytest.mark.parametrize("delta", [0.1, 0.01])
def test_failure_rate_is_within_its_promise(delta: float) -> None:
    """Rank one is the sharp case: the bound fails exactly when the small ball is hit."""
    matrix = torch.zeros(3, 6, dtype=torch.float64)
    matrix[1, 4] = 2.0
    trials = 2000
    failures = sum(
        bound(
            matrix, delta=delta, probes=1, iterations=1,
            entropy=hashed_entropy("failure rate", str(delta), str(trial)),
        ) < 2.0
        for trial in range(trials)
    )  # fmt: skip
    # 99.9 % upper limit of a binomial with this delta; the sharp case also has to come near it.
    tail, term, limit = 1.0, (1.0 - delta) ** trials, 0
    while tail > 1e-3:
        tail -= term
        limit += 1
        term *= (trials - limit + 1) / limit * delta / (1.0 - delta)
    assert 0.5 * delta * trials < failures < limit


@pytest.mark.parametrize("rows", [1, 7, 40])
@pytest.mark.parametrize("columns", [1, 5, 60])
def test_never_below_the_norm_at_the_default_level(rows: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(rows * 100 + columns)
    for _ in range(8):
        matrix = torch.randn(rows, columns, dtype=torch.float64, generator=generator)
        truth = float(torch.linalg.svdvals(matrix)[0])
        value = bound(matrix)
        assert value >= truth
        assert value <= truth * 1.15


def test_more_rounds_are_tighter() -> None:
    matrix = torch.randn(80, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    truth = float(torch.linalg.svdvals(matrix)[0])
    assert truth <= bound(matrix, iterations=300) <= truth * 1.03


@pytest.mark.parametrize("exponent", [-400, -149, 0, 127, 400])
def test_scales_do_not_overflow(exponent: int) -> None:
    matrix = torch.diag(torch.tensor([1.0, 0.5, 0.25], dtype=torch.float64)) * 2.0**exponent
    value = bound(matrix)
    assert 2.0**exponent <= value <= 1.15 * 2.0**exponent


def test_probes_of_very_different_size_keep_their_own_scale() -> None:
    matrix = torch.diag(torch.tensor([1.0, 2.0**-300], dtype=torch.float64))
    assert 1.0 <= bound(matrix, iterations=5) < 16.0


def test_image_shapes_and_adjoint() -> None:
    weight = torch.randn(
        4, 3, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2)
    )

    def matvec(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.conv2d(x, weight, padding=1)

    def rmatvec(y: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.conv_transpose2d(y, weight, padding=1)

    basis = torch.eye(3 * 25, dtype=torch.float64).reshape(75, 3, 5, 5)
    truth = float(torch.linalg.svdvals(matvec(basis).reshape(75, -1))[0])
    value = moment_norm_upper(matvec, rmatvec, (3, 5, 5), delta=2.0**-100, iterations=100)
    assert truth <= value <= truth * 1.1


def test_zero_and_empty_operators() -> None:
    assert bound(torch.zeros(3, 4, dtype=torch.float64)) == 0.0
    assert bound(torch.zeros(3, 0, dtype=torch.float64)) == 0.0
    assert bound(torch.zeros(0, 3, dtype=torch.float64)) == 0.0


def test_draws_are_fresh_and_normal() -> None:
    first, second = normal_draw((50_000,)), normal_draw((50_000,))
    assert not torch.equal(first, second)
    for x in (first, second):
        assert abs(float(x.mean())) < 0.03
        assert abs(float(x.std()) - 1.0) < 0.02
        assert abs(float((x.abs() < 0.1).double().mean()) - 0.07966) < 0.008
    assert abs(float((first[:25_000] * first[25_000:]).mean())) < 0.05
    assert normal_draw((3, 0)).shape == (3, 0)


def test_global_generators_are_left_alone() -> None:
    matrix = torch.eye(4, dtype=torch.float64)
    torch.manual_seed(5)
    expected = torch.randn(3)
    torch.manual_seed(5)
    bound(matrix)
    top_eigenvalue(lambda v: v @ matrix, 1, 4)
    assert torch.equal(torch.randn(3), expected)


def test_settings_that_void_the_statement_are_refused() -> None:
    matrix = torch.eye(3, dtype=torch.float64)
    for kwargs in (
        {"delta": 0.0},
        {"delta": 1.0},
        {"delta": math.nan},
        {"probes": 0},
        {"iterations": 0},
    ):
        with pytest.raises(ArgumentError):
            bound(matrix, **kwargs)
    with pytest.raises(ArgumentError, match="probes"):
        bound(matrix, delta=2.0**-100, probes=3)
    with pytest.raises(ArgumentError, match="rounding allowance"):
        bound(matrix, delta=2.0**-100, probes=4, iterations=1000)
    with pytest.raises(DtypeError):
        moment_norm_upper(lambda x: x.float(), lambda y: y, (3,), delta=0.01)
    with pytest.raises(NonFiniteError):
        bound(matrix * math.nan)


def test_lanczos_finds_the_top_of_known_spectra() -> None:
    for spectrum in ([3.0], [1.0, 1.0, 1.0], [5.0, 4.999, 1.0, 0.0], list(range(40))):
        matrix = torch.diag(torch.tensor(spectrum, dtype=torch.float64))
        theta, _ = top_eigenvalue(lambda v, matrix=matrix: v @ matrix, 2, len(spectrum))
        assert torch.allclose(theta, torch.full((2,), max(spectrum), dtype=torch.float64))
    zero, _ = top_eigenvalue(torch.zeros_like, 1, 5)
    assert float(zero) == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lanczos_stops_where_repeated_eigenvalues_exhaust_the_space(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A strided 1x1 convolution has as many distinct values as channels: what comes after them is
    rounding, which must not be taken for directions."""
    kernel = torch.randn(3, 2, dtype=dtype, generator=torch.Generator().manual_seed(0))
    gram = torch.zeros(32, 32, dtype=dtype)
    gram[:8, :8] = torch.kron(kernel.T @ kernel, torch.eye(4, dtype=dtype))
    top = float(torch.linalg.eigvalsh(gram.double())[-1])
    for seed in range(100):
        start = torch.Generator().manual_seed(seed)
        monkeypatch.setattr(lanczos, "fresh_generator", lambda device, start=start: start)
        found = top_eigenvector(lambda v: v @ gram, 32, dtype=dtype, tolerance=1e-9).double()
        assert float(found @ gram.double() @ found) > (1.0 - 1e-5) * top
