# SPDX-License-Identifier: MIT
"""Pair norms, logit margins and the radius estimates of Propositions 1 and 2."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmtfast.backends import pair_norm
from lmtfast.backends.pair_norm import pair_norm_forward, pair_norm_vjp
from lmtfast.margin import logit_margin, pair_norms, prop1_radius, prop2_radius

HEAD = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)


def random_net(seed, n=32, k=7, d=5):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(k, d, generator=generator, dtype=torch.float64)
    features = torch.randn(n, d, generator=generator, dtype=torch.float64)
    target = torch.randint(k, (n,), generator=generator)
    return weight, features, target


def exact_pair_norms(weight, rows=None):
    chosen = weight if rows is None else weight[rows]
    return (chosen[:, None] - weight).square().sum(2).sqrt()


def test_radii_of_the_three_class_example():
    x = torch.tensor([[0.6, 0.1]], dtype=torch.float64)
    logits = x @ HEAD.T
    assert torch.allclose(logits, torch.tensor([[0.6, 0.1, -0.6]], dtype=torch.float64))
    total = torch.linalg.matrix_norm(HEAD, 2)
    target = torch.tensor([0])
    assert total.item() == pytest.approx(math.sqrt(2), abs=1e-12)
    assert prop1_radius(logits, target, total).item() == pytest.approx(0.25, abs=1e-6)
    assert prop2_radius(logits, target, 1.0, HEAD).item() == pytest.approx(0.353553, abs=1e-6)


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10_000), scale=st.sampled_from([1e-6, 0.5, 1.0, 3e5]))
def test_proposition_2_dominates_and_both_are_invariant(seed, scale):
    weight, features, target = random_net(seed)
    logits = features @ weight.T
    norm = torch.linalg.matrix_norm(weight, 2)
    first = prop1_radius(logits, target, norm)
    second = prop2_radius(logits, target, 1.0, weight)
    assert (second >= first * (1 - 1e-12)).all()
    wrong = logits.argmax(1) != target
    assert (first[wrong] == 0).all()
    assert (second[wrong] == 0).all()
    assert (second[~wrong] > 0).all()  # the target column stays out of the minimum
    for shift in (0.0, 11.0):
        moved = logits * scale + shift
        torch.testing.assert_close(
            prop1_radius(moved, target, norm * scale), first, atol=1e-9 / scale, rtol=1e-9
        )
        torch.testing.assert_close(
            prop2_radius(moved, target, 1.0, weight * scale), second, atol=1e-9 / scale, rtol=1e-9
        )


@pytest.mark.parametrize("seed", range(10))
def test_linear_network_flips_just_beyond_its_radius(seed):
    weight, features, _ = random_net(seed)
    logits = features @ weight.T
    target = logits.argmax(1)
    radius = prop2_radius(logits, target, 1.0, weight)
    distance = (logits.gather(1, target[:, None]) - logits) / pair_norms(weight)[target]
    rival = distance.scatter(1, target[:, None], math.inf).argmin(1)
    direction = torch.nn.functional.normalize(weight[rival] - weight[target], dim=1)
    for share, flips in ((0.999, False), (1.001, True)):
        moved = features + share * radius[:, None] * direction
        assert ((moved @ weight.T).argmax(1) != target).all() == flips
        if not flips:
            assert ((moved @ weight.T).argmax(1) == target).all()


def test_ties_nan_and_duplicated_rows():
    weight = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    logits = torch.tensor([[2.0, 2.0, 0.0], [math.nan, 0.0, 1.0], [3.0, 2.0, 1.0]])
    target = torch.zeros(3, dtype=torch.int64)
    radius = prop2_radius(logits, target, 1.0, weight)
    assert radius[0] == 0  # a tie, although the two rows are the same
    assert radius[1] == 0
    assert radius[2] == pytest.approx(2 / math.sqrt(2))  # only the third class can catch up
    assert prop1_radius(logits, target, 1.0)[:2].tolist() == [0, 0]
    assert (
        logit_margin(torch.ones(2, 1), torch.zeros(2, dtype=torch.int64)).tolist() == [math.inf] * 2
    )


@pytest.mark.parametrize("k", [1, 2, 32, 33, 256, 257])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_pair_norms_equal_plain_differences(k, dtype):
    weight = torch.randn(k, 16, generator=torch.Generator().manual_seed(k)).to(dtype)
    rows = torch.tensor([0, k - 1, 0])
    expected = exact_pair_norms(weight.double())
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    for classes in (None, rows):
        wanted = expected if classes is None else expected[classes]
        for got in (pair_norms(weight, classes), pair_norm_forward(weight, classes)):
            assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            torch.testing.assert_close(got.double(), wanted, atol=tolerance, rtol=tolerance)
            own = got.diagonal() if classes is None else got.gather(1, classes[:, None])
            assert (own == 0).all()


@pytest.mark.parametrize("k", [6, 40, 270])
@pytest.mark.parametrize("all_rows", [True, False])
def test_pair_norm_vjp_equals_autograd(k, all_rows):
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(k, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    classes = None if all_rows else torch.tensor([2, 0, 2, 5])
    norms = pair_norm_forward(weight.detach(), classes)
    grad = torch.randn(norms.shape, generator=generator, dtype=torch.float64)
    plain = pair_norms(weight, classes)
    (expected,) = torch.autograd.grad(plain, weight, grad)
    got = pair_norm_vjp(weight.detach(), classes, norms, grad)
    torch.testing.assert_close(got, expected, atol=1e-9, rtol=1e-9)


def test_duplicated_rows_have_zero_gradient():
    weight = torch.tensor([[1.0, 2.0], [1.0, 2.0], [0.0, 1.0]], requires_grad=True)
    norms = pair_norms(weight)
    assert norms[0, 1] == 0
    norms[0, 1].backward()
    assert (weight.grad == 0).all()
    grad = torch.zeros(3, 3)
    grad[0, 1] = 1.0
    assert (pair_norm_vjp(weight.detach(), None, norms.detach(), grad) == 0).all()


@pytest.mark.parametrize("k", [4, 32, 33, 256])
def test_nearly_equal_rows_keep_their_distance(k):
    """A step of 1e-6 of the row length; a Gram matrix in float32 would return noise."""
    weight = torch.randn(k, 64, generator=torch.Generator().manual_seed(0)) * 100
    weight[1] = weight[0]
    weight[1, 0] += 1e-3
    step = (weight[1, 0] - weight[0, 0]).item()
    assert pair_norm_forward(weight, None)[0, 1].item() == pytest.approx(
        step, rel=1e-6 if k <= pair_norm.EXACT_PAIR_CLASSES else 1e-3
    )


def test_gram_survives_a_common_offset():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(300, 32, generator=generator) + 1000.0
    expected = exact_pair_norms(weight.double())
    torch.testing.assert_close(
        pair_norm_forward(weight, None).double(), expected, atol=1e-3, rtol=1e-4
    )


def test_reduced_precision_products_are_not_used():
    weight = torch.randn(300, 32, generator=torch.Generator().manual_seed(0))
    expected = exact_pair_norms(weight.double())
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert pair_norm._reduced_products("cpu")
        assert pair_norm._centred(weight).dtype == torch.float64
        got = pair_norm_forward(weight, None)
    finally:
        torch.set_float32_matmul_precision(before)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = pair_norm_forward(weight, None)
        exact_under_autocast = pair_norms(weight)
    for value in (got, under_autocast, exact_under_autocast):
        torch.testing.assert_close(value.double(), expected, atol=1e-5, rtol=1e-5)
