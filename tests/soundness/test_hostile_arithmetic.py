# SPDX-License-Identifier: MIT
"""Every rounding term of the norm proofs is needed: an arithmetic within the model, but hostile.

Guesses and factors are not trusted by the proofs, so these tests choose them, below the truth; the
products err by what their bound allows, in the direction that hides it. A proof that forgot one of
its terms then states a bound below the truth, which an exact judge sees.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lmtfast.verified import banded, region, residual
from lmtfast.verified import composite as composite_module
from lmtfast.verified import convolution as convolution_module
from lmtfast.verified import matrix as matrix_module
from lmtfast.verified.banded import residual_up
from lmtfast.verified.convolution import ConvolutionGram, Geometry, banded_form
from lmtfast.verified.dense import materialise
from lmtfast.verified.matrix import matrix_norm_upper
from lmtfast.verified.region import operator_norm_upper
from lmtfast.verified.residual import ResidualSweep
from lmtfast.verified.rounding import inflate, prescale, prescale_loss
from lmtfast.verified.torus import circular_norm_upper
from tests.oracles import rayleigh_exceeds
from tests.soundness.hostile import UNIT, hostile
from tests.test_verified_banded import regions

Factoriser = Callable[[Tensor], tuple[Tensor, Tensor]]


def never_below(matrix: Tensor, upper: float) -> bool:
    """Judged exactly, with the float64 top vector as witness."""
    top = torch.linalg.eigh(matrix @ matrix.mT)[1][:, -1] @ matrix
    return not rayleigh_exceeds(matrix.numpy(), upper, top.numpy())


# -- scalars
# ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 3, 100, 4096])
@pytest.mark.parametrize("exact", [Fraction(1), Fraction(1, 3), Fraction(10**200)])
def test_a_sum_that_lost_all_it_may_is_raised_again(depth: int, exact: Fraction) -> None:
    lowest = exact * (1 - Fraction(1, 2**53)) ** depth
    computed = float(lowest)
    if Fraction(computed) > lowest:
        computed = math.nextafter(computed, 0.0)
    # Rounding down to a float costs up to two more units.
    assert Fraction(inflate(computed, depth + 2, 1)) >= exact


def test_a_sum_of_products_that_all_vanished_is_positive() -> None:
    assert inflate(0.0, 10, 10) >= 10 * 2.0**-1022


@pytest.mark.parametrize("count", [1, 2, 1000])
def test_what_prescaling_rounds_away_is_known(count: int) -> None:
    tiny = torch.full((count,), 5e-324, dtype=torch.float64)
    values = torch.cat((torch.tensor([2.0**1000], dtype=torch.float64), tiny))
    scaled, exponent = prescale(values)
    factor = Fraction(2) ** -exponent
    lost = sum((Fraction(a) * factor - Fraction(b)) ** 2
               for a, b in zip(values.tolist(), scaled.tolist(), strict=True))  # fmt: skip
    assert lost > 0
    assert Fraction(prescale_loss(len(values))) ** 2 >= lost


# -- dense proofs
# ----------------------------------------------------------------------------------------


def test_the_gram_matrix_may_be_too_small() -> None:
    generator = torch.Generator().manual_seed(1)
    matrix = torch.rand(4, 4096, dtype=torch.float64, generator=generator)
    with hostile():
        upper = matrix_norm_upper(matrix).upper
    assert never_below(matrix, upper)


@contextmanager
def factorising(factoriser: Factoriser) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.linalg, "cholesky_ex", factoriser)
        yield


def uniform_top(order: int, columns: int) -> tuple[Tensor, float]:
    """A matrix whose top left vector is uniform, and the largest eigenvalue of its Gram matrix."""
    matrix = torch.full((order, columns), 1.0 / math.sqrt(order * columns), dtype=torch.float64)
    return matrix, float(torch.linalg.matrix_norm(matrix, 2)) ** 2


def factor_of(shift: float) -> Factoriser:
    """Factors of the matrix plus ``shift`` along the uniform vector."""
    cholesky = torch.linalg.cholesky_ex

    def factorise(a: Tensor) -> tuple[Tensor, Tensor]:
        factor, info = cholesky(a + shift / a.shape[-1])
        assert not bool(info.any()), "the test chose a factor that does not exist"
        return factor, info

    return factorise


def test_the_factors_product_may_hide_what_the_guess_lacks() -> None:
    """The guess lies below the truth, and the product L L^T errs just so that no residual shows."""
    order = 512
    matrix, top = uniform_top(order, 8)
    wanted: list[Tensor] = []
    factorise = factor_of(200 * UNIT * top)

    def remember(a: Tensor) -> tuple[Tensor, Tensor]:
        wanted[:] = [a.clone()]
        return factorise(a)

    def hide(result: Tensor, reach: Tensor) -> Tensor:
        same = bool(wanted) and result.shape[-2:] == wanted[0].shape[-2:]
        return (wanted[0] - result).clamp(-reach, reach) if same else torch.zeros_like(result)

    sweep = ResidualSweep()
    sweep._guess = top * (1 - 100 * UNIT)
    with factorising(remember), hostile(hide):
        sweep.feed(matrix[None])
    assert wanted
    assert sweep.squared >= top * (1 - 10 * UNIT)


@pytest.mark.parametrize("relative", [1e-13, 1e-10, 1e-8])
@pytest.mark.parametrize("imaginary", [False, True])
def test_no_factoriser_makes_a_low_guess_true(relative: float, imaginary: bool) -> None:
    """Whatever factor is returned, its residual is part of the bound."""
    order = 16
    matrix, top = uniform_top(order, 8)
    sweep = ResidualSweep()
    sweep._guess = top * (1 - relative)
    with factorising(factor_of(1.5 * relative * top + 64 * UNIT * top)):
        sweep.feed(matrix[None], torch.zeros_like(matrix)[None] if imaginary else None)
    assert sweep.squared >= top * (1 - 16 * UNIT)


@pytest.mark.parametrize("rows", [1, 6])
def test_the_largest_of_a_batch_may_come_anywhere(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matrix_module, "chunk_size", lambda m, n: 1)
    sizes = 2.0 ** torch.arange(5.0).view(-1, 1, 1)
    members = torch.randn(5, rows, 7, dtype=torch.float64) * sizes
    for batch in (members, members.flip(0), members.roll(2, 0)):
        upper = matrix_norm_upper(batch).upper
        assert all(never_below(member, upper) for member in batch)


@pytest.mark.parametrize("part", [0.3, 0.9, 1 - 1e-9])
@pytest.mark.parametrize("order", [2, 17, 40])
def test_dense_estimates_are_not_trusted(
    part: float, order: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ResidualSweep, "_top", staticmethod(scaled(ResidualSweep._top, part)))
    matrix = torch.randn(order, order + 3, dtype=torch.float64)
    assert never_below(matrix, matrix_norm_upper(matrix).upper)


def scaled(function: Callable[..., Any], part: float) -> Callable[..., Any]:
    """An estimator whose values are that part of the truth, and which calls itself converged."""

    def less(*args: Any, **options: Any) -> Any:
        found = function(*args, **options)
        return (found[0] * part, True) if isinstance(found, tuple) else found * part

    return less


# -- symbols
# ----------------------------------------------------------------------------------------


def test_a_symbols_sum_may_be_too_small() -> None:
    """At frequency 0 of a positive kernel, 729 terms of one sign."""
    generator = torch.Generator().manual_seed(2)
    weights = torch.rand(9, 9, 9, dtype=torch.float64, generator=generator)
    taps = [((i, j, k), weights[i, j, k].reshape(1, 1))
            for i in range(9) for j in range(9) for k in range(9)]  # fmt: skip
    exact = sum(map(Fraction, weights.reshape(-1).tolist()))
    with hostile():
        upper = circular_norm_upper(taps, extent=(1, 1, 1)).upper
    assert Fraction(upper) >= exact


# -- banded proofs
# ----------------------------------------------------------------------------------------


class Given:
    """Blocks of a matrix that is stored whole."""

    def __init__(self, matrix: Tensor, order: int, bandwidth: int) -> None:
        self.matrix, self.bandwidth = matrix, bandwidth
        self.orders = [order] * (len(matrix) // order)

    def block(self, i: int, j: int) -> Tensor:
        n = self.orders[0]
        return self.matrix[i * n : (i + 1) * n, j * n : (j + 1) * n].clone()

    def error(self, i: int, j: int) -> float:
        return 0.0


def test_a_convolutions_blocks_may_be_too_small() -> None:
    generator = torch.Generator().manual_seed(3)
    weight = torch.rand(1, 4096, 2, dtype=torch.float64, generator=generator)
    g = Geometry((3,), (2,), (2,), (1,), (1,), (0,))
    matrix = torch.zeros(2, 4096, 3, dtype=torch.float64)
    for o in range(2):
        matrix[o, :, o : o + 2] = weight[0]
    flat = matrix.reshape(2, -1)
    top = float(torch.linalg.matrix_norm(flat, 2)) ** 2
    with hostile():
        gram = ConvolutionGram(weight, g, banded_form(g, 1, 4096))
        guess = top * (1 - 1500 * UNIT)
        excess = residual_up(gram, guess)
    assert never_below(flat, math.sqrt(guess + excess) * (1 + 2 * UNIT))


def test_a_banded_factors_product_may_hide_what_the_guess_lacks() -> None:
    order = 512
    matrix, top = uniform_top(order, 8)
    gram = Given(matrix @ matrix.T, order, 0)

    def hide(result: Tensor, reach: Tensor) -> Tensor:
        return (-result).clamp(-reach, reach)

    guess = top * (1 - 100 * UNIT)
    with factorising(factor_of(200 * UNIT * top)), hostile(hide):
        excess = residual_up(gram, guess)
    assert guess + excess >= top * (1 - 10 * UNIT)


def test_residuals_beside_the_diagonal_count_in_both_rows() -> None:
    """An arrow: its norm is sqrt(2) a, more than any entry; the factor is zero."""
    a = 0.25
    arrow = torch.tensor([[0.0, a, a], [a, 0.0, 0.0], [a, 0.0, 0.0]], dtype=torch.float64)
    guess = 1.0

    def nothing(block: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(block), torch.zeros((), dtype=torch.int32)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.linalg, "cholesky_ex", nothing)
        patch.setattr(torch.linalg, "solve_triangular", lambda a, b, *, upper: torch.zeros_like(b))
        excess = residual_up(Given(torch.eye(3, dtype=torch.float64) + arrow, 1, 2), guess)
    assert excess >= math.sqrt(2.0) * a


# -- operators: what Lanczos says decides nothing
# ----------------------------------------------------------------------------------------


class Doubling(nn.Module):
    """Copies its input twice: an operator of norm sqrt(2) times its convolution's."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((self.conv(x), self.conv(x)), 1)


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "plain": (lambda: nn.Conv2d(3, 4, 3, padding=1), (3, 6, 5)),
    "strided groups": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), (4, 7, 6)),
    "dilated": (lambda: nn.Conv2d(2, 2, 3, dilation=2, padding=2), (2, 6, 5)),
    "transposed": (lambda: nn.ConvTranspose2d(3, 2, 3, stride=2, padding=1, output_padding=1),
                   (3, 4, 5)),
    "transposed groups": (lambda: nn.ConvTranspose1d(4, 6, 4, stride=3, groups=2), (4, 7)),
    "circular": (lambda: nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"), (2, 5, 4)),
    "circular strided": (lambda: nn.Conv1d(2, 3, 3, stride=2, padding=1, padding_mode="circular"),
                         (2, 7)),
    "reflect": (lambda: nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"), (2, 5, 4)),
    "pointwise": (lambda: nn.Conv2d(3, 4, 1, stride=2), (3, 5, 5)),
    "batch norm": (lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)), (2, 6, 6)),
    "repeated": (Doubling, (2, 5, 4)),
    "pooled": (lambda: nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.AvgPool2d(2)), (2, 6, 6)),
}  # fmt: skip


@pytest.mark.parametrize("part", [0.6, 1 - 1e-7])
@pytest.mark.parametrize("method", ["auto", "dense", "banded", "torus"])
@pytest.mark.parametrize("name", LAYERS)
def test_estimates_of_operators_are_not_trusted(
    name: str, method: str, part: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(len(name))
    make, shape = LAYERS[name]
    layer = make().eval()
    for module in layer.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.uniform_(0.1, 4.0)
            module.weight.data.normal_()
    for module in (region, banded, residual):
        for estimator in ("lanczos_norm", "top_eigenvalue"):
            if hasattr(module, estimator):
                less = scaled(getattr(module, estimator), part)
                monkeypatch.setattr(module, estimator, less)
    monkeypatch.setattr(convolution_module, "SMALLEST_BLOCK", 16)
    monkeypatch.setattr(composite_module, "SMALLEST_BLOCK", 16)
    for operator, weights in regions(layer, shape):
        matrix = materialise(operator, weights)
        found = operator_norm_upper(operator, weights, method=method)
        error = 0.0 if name != "batch norm" else 1e-14
        assert never_below(matrix * (1 - error), found.upper), found
