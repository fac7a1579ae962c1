# SPDX-License-Identifier: MIT
"""Error rules of linear calls, one call at a time: small integers, so that majorants are exact."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from mpmath import mpf, sqrt
from torch import Tensor

from lmtfast.builder import Value
from lmtfast.enclosure.linear import BATCH_NORMS, CASTS, CONVOLUTIONS, PRODUCTS, TRANSPOSED
from lmtfast.errors import NotCertifiedError
from lmtfast.rules.copying import COPYING, IDENTITIES
from lmtfast.rules.pooling import AVERAGES
from lmtfast.verified.rounding import UNDERFLOW
from tests.soundness.error_calls import (
    UNIT,
    call_of,
    enclosed,
    fractions,
    is_close_above,
    result_of,
)
from tests.soundness.test_proof_terms import gamma

STEP = 2.0**-30


def integers(*shape: int, least: int = -4) -> Tensor:
    return torch.randint(least, 5, shape).double()


# Target, shape of x, other arguments (weights first), and the products and the bias of one entry.
SUMS: list[tuple[str, tuple[int, ...], tuple[Any, ...], int]] = [
    ("aten.linear.default", (2, 7), ((3, 7), (3,)), 8),
    ("aten.linear.default", (2, 2, 7), ((3, 7), None), 7),
    ("aten.conv1d.default", (2, 4, 6), ((2, 2, 3), (2,), [1], [1], [1], 2), 7),
    ("aten.conv2d.default", (2, 2, 5, 5), ((3, 2, 3, 2), (3,), [2, 1], [1, 0], [1, 2]), 13),
    ("aten.conv3d.default", (1, 1, 3, 3, 3), ((2, 1, 2, 2, 2), None), 8),
    ("aten.conv1d.padding", (2, 2, 6), ((2, 2, 3), (2,), [1], "same"), 7),
    ("aten.conv2d.padding", (1, 2, 4, 4), ((2, 2, 3, 3), (2,), [1, 1], "same"), 19),
    ("aten.conv3d.padding", (1, 1, 3, 3, 3), ((2, 1, 2, 2, 2), (2,), [1, 1, 1], "valid"), 9),
    ("aten.conv_transpose1d.default", (2, 6, 4), ((6, 2, 3), (4,), [1], [0], [0], 2), 10),
    ("aten.conv_transpose2d.input", (1, 3, 3, 3), ((3, 2, 2, 2), None), 12),
    ("aten.conv_transpose3d.input", (1, 2, 2, 2, 2), ((2, 1, 2, 2, 2), (1,)), 17),
    ("aten.mm.default", (2, 7), ((7, 3),), 7),
    ("aten.matmul.default", (2, 2, 7), ((7, 3),), 7),
]  # fmt: skip


def filled(item: Any) -> Any:
    return integers(*item) if isinstance(item, tuple) else item


def of_sizes(item: Any) -> Any:
    return item.abs() if isinstance(item, Tensor) else item


@pytest.mark.parametrize(("target", "shape", "parts", "terms"), SUMS)
def test_sums_err_by_gamma_of_their_terms(
    target: str, shape: tuple[int, ...], parts: tuple[Any, ...], terms: int
) -> None:
    torch.manual_seed(terms)
    others = tuple(map(filled, parts))
    operation = call_of(target, enclosed(torch.zeros(shape)), *others).operation
    x, local = integers(*shape), integers(*shape, least=0) * STEP
    found = result_of(target, enclosed(x, local, 0.7), *others, norm=lambda v: 3.0)
    assert torch.equal(found.value, operation(x, *others))
    assert is_close_above(found.base, [Fraction(0.7) * 3] * shape[0])
    bias_free = (of_sizes(others[0]), *((None, *others[2:]) if len(others) > 1 else ()))
    size = operation(x.abs(), *map(of_sizes, others))
    moved = operation(local, *bias_free)
    checked(found.local, terms, size, moved)
    quiet = result_of(target, enclosed(torch.zeros_like(x), local), *others)
    bias = others[1].abs() if len(others) > 1 and others[1] is not None else torch.zeros(1)
    axes = quiet.value.ndim - 2 if "conv" in target else 0
    sizes = bias.reshape(-1, *(1,) * axes).expand_as(quiet.value)
    checked(quiet.local, terms, sizes, moved)


def checked(found: Tensor, terms: int, size: Tensor, moved: Tensor) -> None:
    """``gamma size + moved``, and what every term may lose where it underflows."""
    lost = terms * Fraction(UNDERFLOW)
    for f, s, m in zip(*map(fractions, (found, size, moved)), strict=True):
        assert gamma(terms) * s + m + lost / 2**60 <= f
        assert f <= (gamma(terms + 8) * s + m) * (1 + 8 * gamma(terms + 8)) + 16 * lost


@pytest.mark.parametrize("alpha", [1.0, -0.5, 2.0])
@pytest.mark.parametrize("beta", [1.0, -4.0, 0.25])
def test_factors_of_a_product_count_by_their_size(alpha: float, beta: float) -> None:
    bias, x, matrix = integers(3), integers(2, 7), integers(7, 3)
    local = integers(2, 7, least=0) * STEP
    found = result_of(
        "aten.addmm.default", bias, enclosed(x, local), matrix, alpha=alpha, beta=beta
    )
    assert torch.equal(found.value, torch.addmm(bias, x, matrix, alpha=alpha, beta=beta))
    sizes = {"alpha": abs(alpha), "beta": abs(beta)}
    size = torch.addmm(bias.abs(), x.abs(), matrix.abs(), **sizes)
    checked(found.local, 8, size, abs(alpha) * (local @ matrix.abs()))


# Target, shape, arguments, and the largest number of entries that one result averages.
MEANS: list[tuple[str, tuple[int, ...], tuple[Any, ...], int]] = [
    ("aten.avg_pool1d.default", (2, 2, 7), ([3], [2], [1]), 3),
    ("aten.avg_pool2d.default", (1, 2, 5, 5), ([2], [1]), 4),
    ("aten.avg_pool2d.default", (1, 2, 5, 5), ([2, 3], [1, 2], [1, 0], True, False, 7), 6),
    ("aten.avg_pool3d.default", (1, 1, 4, 4, 4), ([2],), 8),
    ("aten.avg_pool3d.default", (1, 1, 4, 4, 4), ([1, 2, 3],), 6),
    ("aten.adaptive_avg_pool1d.default", (2, 2, 7), ([3],), 3),
    ("aten.adaptive_avg_pool2d.default", (1, 2, 7, 5), ([3, 2],), 9),
    ("aten._adaptive_avg_pool2d.default", (1, 2, 6, 4), ([2, 2],), 6),
    ("aten.adaptive_avg_pool3d.default", (1, 1, 5, 5, 5), ([3, 3, 3],), 27),
    ("aten._adaptive_avg_pool3d.default", (1, 1, 4, 4, 4), ([2, 2, 2],), 8),
    ("aten.mean.dim", (2, 3, 4), ([1],), 3),
    ("aten.mean.dim", (2, 3, 4), ([-1, 1],), 12),
    ("aten.sum.dim_IntList", (2, 3, 4), ([2], True), 4),
    ("aten.sum.dim_IntList", (2, 3, 4), ([1, 2], False), 12),
]  # fmt: skip


@pytest.mark.parametrize(("target", "shape", "others", "terms"), MEANS)
def test_averages_err_by_gamma_of_their_entries(
    target: str, shape: tuple[int, ...], others: tuple[Any, ...], terms: int
) -> None:
    torch.manual_seed(terms)
    operation = call_of(target, enclosed(torch.zeros(shape)), *others).operation
    x, local = integers(*shape), integers(*shape, least=0) * STEP
    named = {"dtype": torch.float32} if "dim" in target else {}
    found = result_of(target, enclosed(x, local, 0.7), *others, norm=lambda v: 3.0, **named)
    assert found.value.dtype == found.local.dtype == torch.float64
    assert torch.equal(found.value, operation(x, *others))
    assert is_close_above(found.base, [Fraction(0.7) * 3] * shape[0])
    # The quotients round here, too.
    size, moved = operation(x.abs(), *others), operation(local, *others)
    for f, s, m in zip(*map(fractions, (found.local, size, moved)), strict=True):
        assert (gamma(terms + 1) * s + m) * (1 - 2 * UNIT) < f
        # Adaptive windows are counted as one longer along every axis.
        most = 1 + (4 * terms if "adaptive" in target else terms + 8)
        assert f <= (gamma(most) * s + m) * (1 + 8 * gamma(most)) + 8 * most * Fraction(UNDERFLOW)


def test_every_linear_call_is_tested() -> None:
    targets = {target for target, *_ in (*SUMS, *MEANS)}
    assert targets == {*CONVOLUTIONS, *TRANSPOSED, *PRODUCTS, *AVERAGES, "aten.linear.default"}


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("target", BATCH_NORMS)
def test_batch_norm_errs_by_its_formula(target: str, affine: bool) -> None:
    torch.manual_seed(0)
    mean, variance = torch.randn(3).double(), torch.rand(3).double() + 0.01
    weight, bias = torch.randn(3).double(), torch.randn(3).double()
    given = [weight, bias] if affine else [None, None]
    flags: dict[str, tuple[Any, ...]] = {
        "aten.batch_norm.default": (False, 0.1, 1e-3, False),
        "aten._native_batch_norm_legit_no_training.default": (0.1, 1e-3),
        "aten.native_batch_norm.default": (False, 0.1, 1e-3),
        "aten.cudnn_batch_norm.default": (False, 0.1, 1e-3),
    }
    x = torch.randn(4, 3, 2).double()
    x[0, :, 0] = mean  # nothing but the sum is left
    for error in (0.0, 2.0**-20):
        found = result_of(
            target, enclosed(x, error, 0.7), *given, mean, variance, *flags[target],
            norm=lambda v: 3.0,
        )  # fmt: skip
        if target != "aten.batch_norm.default":
            assert found[1:] == (None, None)
            found = found[0]
        assert is_close_above(found.base, [Fraction(0.7) * 3] * 4)
        for c in range(3):
            root = sqrt(mpf(float(variance[c])) + mpf(1e-3))
            gain = (mpf(float(weight[c])) if affine else mpf(1)) / root
            columns = (t[:, c].reshape(-1).tolist() for t in (x, found.value, found.local))
            for a, y, e in zip(*columns, strict=True):
                shifted = mpf(a) - mpf(float(mean[c]))
                truth = gain * shifted + (mpf(float(bias[c])) if affine else 0)
                moved, u = abs(gain) * mpf(error), mpf(2) ** -53
                assert abs(truth - mpf(y)) + moved <= mpf(e)
                # A sum, a root, a quotient, a difference, a product: six, the root twice; a sum.
                least = moved + u * (6 * abs(gain * shifted) + (abs(truth) if affine else 0))
                assert least <= mpf(e)
                size = abs(gain * shifted) + abs(truth)
                assert mpf(e) <= moved * (1 + 64 * u) + 20 * u * size + mpf(2) ** -900


@pytest.mark.parametrize("factor", [-0.3, 3, torch.tensor([0.3, -0.7, 5.0], dtype=torch.float64)])
@pytest.mark.parametrize("kind", ["mul", "div"])
def test_factors_err_by_their_size(kind: str, factor: Any) -> None:
    overload = "Tensor" if isinstance(factor, Tensor) else "Scalar"
    x = torch.randn(2, 3).double()
    sizes = fractions(torch.as_tensor(factor, dtype=torch.float64).abs().expand(2, 3))
    for error in (0.0, 2.0**-20):
        source = enclosed(x, error, 0.7)
        arguments = [(source, factor)]
        if kind == "mul" and overload == "Tensor":
            arguments.append((factor, source))
        for given in arguments:
            found = result_of(f"aten.{kind}.{overload}", *given, norm=lambda v: 3.0)
            assert is_close_above(found.base, [Fraction(0.7) * 3] * 2)
            for y, e, s in zip(fractions(found.value), fractions(found.local), sizes, strict=True):
                moved = Fraction(error) * (s if kind == "mul" else 1 / s)
                assert moved + UNIT * abs(y) <= e
                assert e <= moved * (1 + 64 * UNIT) + 4 * UNIT * abs(y) + 4 * Fraction(UNDERFLOW)


def test_signs_and_masks_are_exact_or_nearly_so() -> None:
    x, local = torch.randn(2, 3).double(), torch.rand(2, 3).double()
    found = result_of("aten.neg.default", enclosed(x, local, 0.7), norm=lambda v: 3.0)
    assert torch.equal(found.value, -x)
    assert torch.equal(found.local, local)
    mask = torch.tensor([True, False, True])
    found = result_of("aten.mul.Tensor", enclosed(x, local), mask)
    assert torch.equal(found.value, x * mask)
    for e, d, m in zip(*map(fractions, (found.local, local, mask.expand(2, 3))), strict=True):
        assert d * m <= e <= d * m * (1 + 64 * UNIT) + Fraction(1, 2**49)


def test_copies_take_their_errors_along() -> None:
    torch.manual_seed(0)
    x, local = torch.randn(2, 3, 4).double(), torch.rand(2, 3, 4).double()
    source = enclosed(x, local, 0.7)
    for target, others, call in (
        ("aten.permute.default", ([0, 2, 1],), lambda t: t.permute(0, 2, 1)),
        ("aten.view.default", ([2, 12],), lambda t: t.reshape(2, 12)),
        ("aten.slice.Tensor", (2, 1, 3), lambda t: t[:, :, 1:3]),
        ("aten.flip.default", ([1],), lambda t: t.flip(1)),
        ("aten.tril.default", (), lambda t: t.tril()),
    ):
        found = result_of(target, source, *others, norm=lambda v: 3.0)
        assert torch.equal(found.value, call(x))
        assert torch.equal(found.local, call(local))
        assert is_close_above(found.base, [Fraction(0.7) * 3] * 2)
    # Strides for which a view is no view.
    turned = enclosed(x.mT, local.mT)
    assert torch.equal(result_of("aten.view.default", turned, [2, 12]).value, x.mT.reshape(2, 12))
    assert "aten.permute.default" in COPYING


def test_parts_of_a_split_are_all_enclosed() -> None:
    x, local = torch.randn(2, 5).double(), torch.rand(2, 5).double()
    found = result_of("aten.split.Tensor", enclosed(x, local, 0.7), 2, 1, norm=lambda v: 3.0)
    assert isinstance(found, tuple)
    for part, value, error in zip(found, x.split(2, 1), local.split(2, 1), strict=True):
        assert torch.equal(part.value, value)
        assert torch.equal(part.local, error)
        assert is_close_above(part.base, [Fraction(0.7) * 3] * 2)
    whole = result_of("aten.split.Tensor", enclosed(x, local), 5, 1)
    assert torch.equal(whole[0].local, local)
    (nothing,) = result_of("aten.split.Tensor", enclosed(torch.rand(2, 0)), 5, 1)
    assert nothing.value.numel() == 0
    for sizes in ([0, 5], [5, 0], [2, 0, 3]):
        with pytest.raises(NotCertifiedError, match="without entries"):
            result_of("aten.split_with_sizes.default", enclosed(x, local), sizes, 1)


@pytest.mark.parametrize("mode", ["constant", "reflect", "replicate", "circular"])
def test_borders_err_as_the_entries_they_copy(mode: str) -> None:
    x, local = torch.randn(2, 2, 4).double(), torch.rand(2, 2, 4).double()
    value = -3.0 if mode == "constant" else None
    found = result_of("aten.pad.default", enclosed(x, local, 0.7), [1, 2], mode, value)
    assert torch.equal(found.value, F.pad(x, (1, 2), mode, value))
    assert torch.equal(found.local, F.pad(local, (1, 2), mode))
    if mode == "constant":
        found = result_of("aten.constant_pad_nd.default", enclosed(x, local), [1, 2], value)
        assert torch.equal(found.local, F.pad(local, (1, 2)))


def test_identities_keep_everything() -> None:
    x, local = torch.randn(2, 3).double(), torch.rand(2, 3).double()
    source = enclosed(x, local, 0.7)
    others: dict[str, tuple[Any, ...]] = {
        **dict.fromkeys((t for t in IDENTITIES if "dropout" in t), (0.5, False)),
        "aten.to.dtype": (torch.float16,),
        "aten.to.dtype_layout": (),
        "aten.type_as.default": (torch.rand(1),),
    }
    for target in (*IDENTITIES, *CASTS):
        if "float" in target:
            continue
        found = result_of(target, source, *others.get(target, ()), norm=lambda v: 3.0)
        assert torch.equal(found.value, x), target
        assert torch.equal(found.local, local), target
        assert is_close_above(found.base, [Fraction(0.7) * 3] * 2)
        over = {"norm": lambda v: 3.0, "output": source.traced}
        same = result_of(target, source, *others.get(target, ()), **over)
        assert torch.equal(same.base, source.base)


@pytest.mark.parametrize(
    ("small", "large"), [(-537, -538), (-1074, 900), (-1060, 300), (-300, -760)]
)
@pytest.mark.parametrize("width", [1, 2, 5])
def test_what_underflows_on_the_way_is_counted(width: int, small: int, large: int) -> None:
    """In the products, or in the majorant alone: gamma times a denormal is none."""
    torch.manual_seed(width)
    x = torch.randint(1, 8, (2, width)).double() * 2.0**small
    weight = (torch.rand(3, width, dtype=torch.float64) + 1.0) * 2.0**large
    truths = [sum(a * w for a, w in zip(fractions(row), fractions(column), strict=True))
              for row in x for column in weight]  # fmt: skip
    for error in (0.0, 2.0**-1074):
        found = result_of("aten.linear.default", enclosed(x, error), weight, None)
        moved = [Fraction(error) * sum(fractions(column)) for _ in x for column in weight]
        each = zip(truths, fractions(found.value), fractions(found.local), moved, strict=True)
        assert all(abs(t - v) + m <= e for t, v, e, m in each)
    alone = result_of("aten.sum.dim_IntList", enclosed(x[:, :1]), [1])
    assert torch.equal(alone.value, x[:, 0])
    assert bool((alone.local > 0.0).all())


def test_a_sum_too_long_for_its_bound_is_refused() -> None:
    call = call_of("aten.sum.dim_IntList", enclosed(torch.rand(2, 3)), [1])
    call.summed((1 << 43) - (1 << 34))
    with pytest.raises(NotCertifiedError, match="terms"):
        call.summed(1 << 43)


def test_without_errors_only_values_are_computed() -> None:
    source = enclosed(torch.rand(2, 3), 0.5, 0.7)
    call = call_of("aten.sum.dim_IntList", source, [1], norm=lambda v: 3.0)
    call.bounded = False
    found = call.summed(3)
    assert torch.equal(found.value, source.value.sum(1))
    assert not found.local.any()
    assert found.local.shape == found.value.shape
    assert torch.equal(found.base, source.base)


def test_the_one_traced_argument_is_asked_for() -> None:
    a, b = enclosed(torch.rand(2, 3)), enclosed(torch.rand(2, 3))
    assert call_of("aten.mul.Tensor", b.value, a).source is a
    assert call_of("aten.mul.Tensor", b.value, a).source_key == "other"
    assert call_of("aten.mul.Tensor", a, b.value).source_key == "self"
    for pair in ((a, b), (a.value, b.value)):
        with pytest.raises(NotCertifiedError, match="traced arguments"):
            _ = call_of("aten.mul.Tensor", *pair, output=a.traced).source


def test_a_carried_length_grows_unless_it_lies_over_the_same_base() -> None:
    a = enclosed(torch.rand(2, 3), 0.0, 0.7)
    seen: list[Value] = []

    def norm(value: Value) -> float:
        seen.append(value)
        return 1.0 + 2.0**-40

    grown = call_of("aten.neg.default", a, norm=norm)
    assert is_close_above(grown.carried(a), [Fraction(0.7) * Fraction(1.0 + 2.0**-40)] * 2)
    assert bool((grown.carried(a) > a.base).all())
    assert seen
    assert all(v is a.traced for v in seen)
    assert torch.equal(call_of("aten.neg.default", a).carried(a), a.base)
    same = call_of("aten.neg.default", a, norm=norm, output=a.traced)
    assert torch.equal(same.carried(a), a.base)
