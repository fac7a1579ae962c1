# SPDX-License-Identifier: MIT
"""Banded proofs: never below the exact norm, blocks that are the Gram matrix, tight and bounded."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lmtfast as lf
from lmtfast.errors import ArgumentError
from lmtfast.graph import Region
from lmtfast.plan import trace
from lmtfast.verified import banded, composite, convolution
from lmtfast.verified import budget as budget_module
from lmtfast.verified.banded import residual_up, squared_norm_upper
from lmtfast.verified.budget import (
    FREE_OPERATIONS,
    OPERATIONS_PER_SECOND,
    Allowance,
    Budget,
    Cost,
    share,
)
from lmtfast.verified.convolution import (
    BandedForm,
    ConvolutionGram,
    Geometry,
    banded_form,
    convolution_norm_upper,
)
from lmtfast.verified.dense import materialise
from lmtfast.verified.region import operator_norm_upper
from lmtfast.weights import Weights, named_tensors
from tests.oracles import norm_is_at_most, rayleigh_exceeds, svd_norm


def random_geometry(rng: np.random.Generator, largest: int = 9) -> Geometry | None:
    axes = int(rng.integers(1, 4))
    most = {1: 3 * largest, 2: largest, 3: max(2, largest // 2)}[axes]

    def draw(low: int, high: int) -> tuple[int, ...]:
        return tuple(int(v) for v in rng.integers(low, high, axes))

    n, k, s, d = draw(1, most), draw(1, 4), draw(1, 4), draw(1, 3)
    low, high = draw(0, 3), draw(0, 3)
    m = tuple((n[a] + low[a] + high[a] - d[a] * (k[a] - 1) - 1) // s[a] + 1 for a in range(axes))
    return Geometry(n, m, k, s, d, low) if min(m) > 0 else None


def dense_matrix(weight: Tensor, g: Geometry) -> Tensor:
    """The operator's matrix by torch's own convolution on the unit vectors: copies of weights."""
    count, axes = weight.shape[1] * math.prod(g.in_extent), len(g.kernel)
    pads = []
    for a in reversed(range(axes)):
        needed = g.stride[a] * (g.out_extent[a] - 1) + g.dilation[a] * (g.kernel[a] - 1) + 1
        pads += [g.padding[a], max(0, needed - g.in_extent[a] - g.padding[a])]
    basis = torch.eye(count, dtype=torch.float64).reshape(count, -1, *g.in_extent)
    function = (F.conv1d, F.conv2d, F.conv3d)[axes - 1]
    image = function(F.pad(basis, pads), weight, stride=g.stride, dilation=g.dilation)
    inside = tuple(slice(0, m) for m in g.out_extent)
    return image[(slice(None), slice(None), *inside)].reshape(count, -1).T


def all_forms(g: Geometry, rows: int, channels: int) -> Iterator[BandedForm]:
    for outputs in (False, True):
        for axis in range(len(g.kernel)):
            yield convolution._form(g, rows, channels, outputs, axis)


def assembled(gram: banded.GramBlocks) -> Tensor:
    ends = np.cumsum([0, *gram.orders])
    result = torch.zeros(ends[-1], ends[-1], dtype=torch.float64)
    for i in range(len(gram.orders)):
        for j in range(max(0, i - gram.bandwidth), i + 1):
            block = gram.block(i, j)
            result[ends[i] : ends[i + 1], ends[j] : ends[j + 1]] = block
            result[ends[j] : ends[j + 1], ends[i] : ends[i + 1]] = block.T
    return result


def integers(rng: np.random.Generator, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(rng.integers(-3, 4, shape)).double()


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("smallest", [1, 8, 256])
def test_blocks_of_small_integers_are_the_gram_matrix_exactly(
    seed: int, smallest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convolution, "SMALLEST_BLOCK", smallest)
    rng, done = np.random.default_rng(seed), 0
    while done < 4:
        g = random_geometry(rng)
        if g is None:
            continue
        done += 1
        rows, channels = (int(v) for v in rng.integers(1, 4, 2))
        weight = integers(rng, (rows, channels, *g.kernel))
        matrix = dense_matrix(weight, g)
        for form in all_forms(g, rows, channels):
            axes = [form.axis, *(a for a in range(len(g.kernel)) if a != form.axis)]
            extent = g.out_extent if form.outputs else g.in_extent
            order = rows if form.outputs else channels
            side = (matrix if form.outputs else matrix.T).reshape(order, *extent, -1)
            side = side.permute(*(1 + a for a in axes), 0, len(extent) + 1).flatten(0, -2)
            gram = ConvolutionGram(weight, g, form)
            assert torch.equal(assembled(gram), side @ side.T), (g, form)


@pytest.mark.parametrize("seed", range(12))
def test_never_below_the_exact_norm(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Judged in exact rationals: by Bareiss where that is quick, else by the best witness."""
    monkeypatch.setattr(convolution, "SMALLEST_BLOCK", (1, 5, 256)[seed % 3])
    rng, done = np.random.default_rng(1000 + seed), 0
    while done < 6:
        g = random_geometry(rng, 6)
        if g is None:
            continue
        done += 1
        rows, channels = (int(v) for v in rng.integers(1, 4, 2))
        weight = torch.from_numpy(rng.standard_normal((rows, channels, *g.kernel)))
        weight = weight.float().double() * 2.0 ** int(rng.integers(-140, 120))
        if seed % 4 == 0:
            weight = weight.where(torch.from_numpy(rng.random(weight.shape) < 0.5), 0.0)
        matrix = dense_matrix(weight, g).numpy()
        truth = svd_norm(matrix)
        for guess in (truth, truth * (1 - 1e-9), truth * 0.999, 2.0 * truth):
            upper = convolution_norm_upper([weight], g, estimate=guess)
            assert not rayleigh_exceeds(matrix, upper)
            if min(matrix.shape) <= 14:
                assert norm_is_at_most(matrix, upper)
            if guess == truth and truth > 0:
                assert upper <= truth * (1 + 1e-6)


@pytest.mark.parametrize("relative", [-1e-3, -1e-6, -1e-8])
def test_a_guess_below_the_truth_is_refused(relative: float) -> None:
    g = Geometry((12, 12), (12, 12), (3, 3), (1, 1), (1, 1), (1, 1))
    weight = torch.randn(8, 8, 3, 3, dtype=torch.float64) / 16
    gram = ConvolutionGram(weight, g, banded_form(g, 8, 8))
    top = float(torch.linalg.eigvalsh(assembled(gram))[-1])
    assert residual_up(gram, top * (1 + relative)) > banded.ACCEPT * top
    assert residual_up(gram, top * (1 + 1e-8)) < 1e-7 * top


class Corrupted:
    """Blocks whose factorisation a solver gets wrong in one entry."""

    def __init__(self, gram: ConvolutionGram) -> None:
        self.gram, self.orders, self.bandwidth = gram, gram.orders, gram.bandwidth

    def block(self, i: int, j: int) -> Tensor:
        return self.gram.block(i, j)

    def error(self, i: int, j: int) -> float:
        return self.gram.error(i, j)


@pytest.mark.parametrize("size", [1e-12, 1e-6, 1e-3, 1.0, math.nan, math.inf])
def test_solvers_are_not_trusted(size: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the Cholesky and triangular solvers return, a finite bound is not below the norm."""
    g = Geometry((9,), (9,), (3,), (1,), (1,), (1,))
    weight = torch.randn(2, 2, 3, dtype=torch.float64)
    matrix = dense_matrix(weight, g).numpy()
    monkeypatch.setattr(convolution, "SMALLEST_BLOCK", 4)
    cholesky, solve = torch.linalg.cholesky_ex, torch.linalg.solve_triangular

    def bad_cholesky(a: Tensor) -> tuple[Tensor, Tensor]:
        factor, info = cholesky(a)
        factor[-1, 0] += size
        return factor, torch.zeros_like(info)

    def bad_solve(a: Tensor, b: Tensor, *, upper: bool) -> Tensor:
        return solve(a, b, upper=upper) * (1.0 + size)

    for name, function in (("cholesky_ex", bad_cholesky), ("solve_triangular", bad_solve)):
        with monkeypatch.context() as patch:
            patch.setattr(torch.linalg, name, function)
            for guess in (0.5, 1.0, 1.0 + 1e-9):
                upper = convolution_norm_upper([weight], g, estimate=guess * svd_norm(matrix))
                assert not rayleigh_exceeds(matrix, upper)


def test_residual_bounds_the_true_residual_of_any_factor() -> None:
    """The inequality itself: |c I - G| <= |L L^T| + bound, for blocks of several sizes."""
    rng = np.random.default_rng(3)
    weight = torch.from_numpy(rng.standard_normal((3, 3, 3, 3)))
    g = Geometry((7, 6), (7, 6), (3, 3), (1, 1), (1, 1), (1, 1))
    gram = ConvolutionGram(weight / 8, g, banded_form(g, 3, 3))
    full = assembled(gram)
    top = float(torch.linalg.eigvalsh(full)[-1])
    for factor in (1.0 + 1e-7, 1.5, 20.0):
        excess = residual_up(gram, factor * top)
        assert 0.0 < excess < 1e-8 * factor * top
        assert squared_norm_upper(gram, top) >= top


def test_groups_transposes_scales_and_the_identity() -> None:
    torch.manual_seed(5)
    layers: list[tuple[nn.Module, tuple[int, ...]]] = [
        (nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), (4, 9, 8)),
        (nn.Conv2d(6, 6, 3, padding=1, groups=6), (6, 7, 7)),
        (nn.ConvTranspose2d(4, 3, 3, stride=2, padding=1, output_padding=1), (4, 5, 6)),
        (nn.ConvTranspose1d(4, 6, 4, stride=3, groups=2), (4, 9)),
        (nn.Conv3d(2, 3, 2, dilation=2), (2, 4, 5, 4)),
        (nn.Sequential(nn.Conv2d(3, 5, 3, padding=1, bias=False), nn.BatchNorm2d(5)), (3, 8, 8)),
        (Residual(4), (4, 7, 6)),
        (nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.AvgPool2d(2)), (3, 8, 8)),
        (Shortcut(3, 4), (3, 8, 8)),
        (nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), (2, 6, 7)),
        (nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), (2, 6, 7)),
        (nn.Conv2d(2, 3, 3, padding=2, padding_mode="replicate"), (2, 6, 5)),
        (nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(3 * 4 * 4, 5)), (2, 6, 6)),
    ]
    for layer, shape in layers:
        spread_statistics(layer)
        for operator, weights in regions(layer.eval(), shape):
            if operator.kind == "linear":
                continue
            truth = svd_norm(materialise(operator, weights).numpy())
            found = operator_norm_upper(operator, weights, method="banded")
            assert found.method == "banded"
            assert truth * (1 - 1e-13) <= found.upper <= truth * (1 + 1e-6), layer


class Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.5 * self.norm(self.conv(x))


class Shortcut(nn.Module):
    """Two strided branches that meet: one operator."""

    def __init__(self, channels: int, rows: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, rows, 3, stride=2, padding=1)
        self.short = nn.Conv2d(channels, rows, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + self.short(F.avg_pool2d(x, 2))


def spread_statistics(layer: nn.Module) -> None:
    for module in layer.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.uniform_(0.1, 4.0)
            module.weight.data.normal_()


def regions(layer: nn.Module, shape: tuple[int, ...]) -> Iterator[tuple[Region, Weights]]:
    weights = Weights({n: t.detach() for n, t in named_tensors(layer).items()}, dtype=torch.float64)
    for operator in trace(layer, shape).operators:
        assert isinstance(operator, Region)
        yield operator, weights


@pytest.mark.parametrize("smallest", [1, 30, 256])
def test_a_composite_has_the_blocks_of_its_matrix(
    smallest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(composite, "SMALLEST_BLOCK", smallest)
    torch.manual_seed(6)
    for layer, shape in ((Shortcut(2, 3), (2, 8, 6)), (Residual(3), (3, 6, 5))):
        spread_statistics(layer)
        ((region, weights),) = regions(layer.eval(), shape)
        matrix = materialise(region, weights)
        reach = composite.line_reach(region, weights)
        for outputs in (False, True):
            form = composite._form(region, reach if outputs else reach.T, outputs)
            gram = composite.CompositeGram(region, weights, form, 0)
            side = matrix if outputs else matrix.T
            image = region.out_shape if outputs else region.in_shape
            numbers = composite.by_lines(torch.arange(math.prod(image))[None], image)[0]
            order = torch.cat([part.reshape(-1) for part in numbers.split(form.merged, dim=1)])
            full = (side @ side.T)[order][:, order]
            torch.testing.assert_close(assembled(gram), full, rtol=0, atol=1e-13)


def test_lines_that_reach_nothing_in_common_are_known() -> None:
    ((region, weights),) = regions(Shortcut(2, 3).eval(), (2, 8, 6))
    reach = composite.line_reach(region, weights)
    assert reach.shape == (4, 8)
    expected = torch.zeros(4, 8, dtype=torch.bool)
    for o in range(4):
        expected[o, max(0, 2 * o - 1) : 2 * o + 2] = True
    assert torch.equal(reach, expected)


def test_zero_weights_lines_and_positions() -> None:
    g = Geometry((5, 5), (5, 5), (3, 3), (1, 1), (1, 1), (1, 1))
    zero = torch.zeros(2, 3, 3, 3, dtype=torch.float64)
    assert convolution_norm_upper([zero], g, estimate=1.0) == 0.0
    one = zero.clone()
    one[0, 0, 1, 1] = 3.0
    assert 3.0 <= convolution_norm_upper([one, zero], g, estimate=3.0) < 3.0 * (1 + 1e-6)
    # A kernel that lies in the padding alone moves nothing.
    outside = replace(g, in_extent=(1, 1), out_extent=(1, 1), padding=(2, 2))
    assert convolution_norm_upper([one], outside, estimate=1.0) >= 0.0


@pytest.mark.parametrize("exponent", [-1060, -600, -149, 0, 127, 600, 1000])
def test_scale_changes_nothing(exponent: int) -> None:
    g = Geometry((6, 6), (6, 6), (3, 3), (1, 1), (1, 1), (1, 1))
    weight = torch.randn(
        2, 2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    truth = svd_norm(dense_matrix(weight, g).numpy())
    scaled = torch.from_numpy(np.ldexp(weight.numpy(), exponent))
    upper = convolution_norm_upper([scaled], g, estimate=float(np.ldexp(truth, exponent)))
    lost = 2.0 ** max(-1070, -1074) * 100 if exponent < -1000 else 0.0
    assert float(np.ldexp(truth, exponent)) - lost <= upper
    if exponent > -1000:
        assert upper <= float(np.ldexp(truth, exponent)) * (1 + 1e-6)


# -- budget ----------------------------------------------------------------------------------------


def test_the_cheapest_proofs_are_paid_first() -> None:
    second = OPERATIONS_PER_SECOND
    costs = [Cost(5 * second, 1.0), None, Cost(1 * second, 1.0), Cost(3 * second, 1.0)]
    allowed = share(Budget(seconds=4.5), costs)
    assert [a.operations for a in allowed] == [0.0, 0.0, second, 3 * second]
    assert [a.operations for a in share(Budget(0.0), costs)] == [0.0] * 4
    assert [a.operations for a in share(Budget(math.inf), costs)][0] == 5 * second


def test_an_allowance_knows_what_it_pays() -> None:
    assert Allowance(0.0).pays(Cost(FREE_OPERATIONS, 1.0))
    assert not Allowance(0.0).pays(Cost(2 * FREE_OPERATIONS, 1.0))
    assert not Allowance(math.inf, 10.0).pays(Cost(1.0, 11.0))


@pytest.mark.parametrize("field", ["seconds", "memory"])
@pytest.mark.parametrize("value", [-1.0, math.nan])
def test_a_budget_is_nonnegative(field: str, value: float) -> None:
    with pytest.raises(ArgumentError, match="nonnegative"):
        Budget(**{field: value})


def test_the_budget_decides_and_the_result_says_what_was_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(budget_module, "FREE_OPERATIONS", 0.0)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(24, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 24, 3, padding=1)
    ).eval()
    tight = lf.certified_bound(model, (24, 9, 9))
    loose = lf.certified_bound(model, (24, 9, 9), budget=Budget(0.0))
    assert set(tight.methods.values()) == {"banded"}
    assert set(loose.methods.values()) == {"torus"}
    assert tight.total < loose.total
    assert tight.slack < 1e-6 < loose.slack
    with pytest.raises(ArgumentError, match="budget"):
        lf.certified_bound(model, (24, 9, 9), method="banded", budget=Budget(memory=1e6))


def test_a_certificate_is_verified_by_the_proofs_it_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget_module, "FREE_OPERATIONS", 0.0)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 24, 3, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(24 * 81, 3),
    ).eval()  # fmt: skip
    data = (torch.rand(4, 2, 9, 9), torch.tensor([0, 1, 2, 0]))
    for budget, method in ((Budget(), "banded"), (Budget(0.0), "torus")):
        certificate = lf.certify(
            model, data, input_shape=(2, 9, 9), input_range=(0, 1), budget=budget
        )
        assert method in certificate.method
        certificate.verify(model, data)
