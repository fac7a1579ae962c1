# SPDX-License-Identifier: MIT
"""What every margin loss and every margin backend owes, over the registries."""

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from lmtfast.backends.margin_choice import choose_margin_backend, margin_module
from lmtfast.backends.margin_reference import SHIFT_FORMULAS
from lmtfast.losses import MEMBERS, margin_cross_entropy

ROOT = math.sqrt(2)
NAMES = sorted(MEMBERS)
SHIFTS = [name for name in NAMES if MEMBERS[name].formula in SHIFT_FORMULAS]
BOTTOMS = [name for name in NAMES if name not in SHIFTS]
CONSTANT_FACTOR = [name for name in NAMES if MEMBERS[name].formula in ("lmt", "gloro")]

NATIVE, REASON = margin_module("native")
BACKENDS = [
    "reference",
    pytest.param("native", marks=pytest.mark.skipif(NATIVE is None, reason=f"native: {REASON}")),
    "cuda",
    # In the interpreter; tests/test_contract_margin.py is the part that every run can afford.
    pytest.param("triton", marks=pytest.mark.slow),
]


@dataclass(frozen=True)
class Bound:
    features: torch.Tensor | float
    total: torch.Tensor | float
    head_weight: torch.Tensor | None


def problem(n=16, k=6, d=5, seed=0, dtype=torch.float64, head=True, grad=True):
    """Logits, target, features, total and head; a third of the samples classified well."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(k, (n,), generator=generator)
    logits = torch.randn(n, k, generator=generator, dtype=torch.float64)
    lift = torch.rand(n, generator=generator, dtype=torch.float64) * 4
    logits = logits.scatter_add(1, target[:, None], lift[:, None]).to(dtype)
    weight = torch.randn(k, d, generator=generator, dtype=torch.float64).to(dtype)
    features, total = torch.tensor(0.8, dtype=dtype), torch.tensor(1.7, dtype=dtype)
    leaves = [leaf.requires_grad_(grad) for leaf in (logits, features, total, weight)]
    return leaves[0], target, *leaves[1:3], leaves[3] if head else None


def definition(name, logits, target, features, total, weight, eps, trades_weight=1.0):
    """Per-sample losses written out with (N, K, D) differences and detached factors."""
    member = MEMBERS[name]
    n, k = logits.shape
    gloro = member.formula == "gloro"
    reference = logits.argmax(1) if gloro else target
    own = torch.arange(k) == reference[:, None]
    if weight is None or not member.pairwise:
        shift = ROOT * total * torch.ones(n, k, dtype=logits.dtype)
    else:
        squares = (weight[reference][:, None] - weight).square().sum(2)
        distinct = squares > 0
        shift = features * torch.where(distinct, torch.where(distinct, squares, 1.0).sqrt(), 0.0)
    if isinstance(eps, torch.Tensor) and eps.dim() == 2:
        shift = shift * eps[reference]
    else:
        shift = shift * (eps[:, None] if isinstance(eps, torch.Tensor) and eps.dim() else eps)
    shift = shift.masked_fill(own, 0.0)
    if gloro:
        bottom = (logits + shift).masked_fill(own, -math.inf).amax(1, keepdim=True)
        extended = cross_entropy(torch.cat([logits, bottom], 1), target, reduction="none")
        if not member.clean_share:
            return extended
        clean = cross_entropy(logits, target, reduction="none")
        return clean + trades_weight * (extended - clean)
    margin = (logits.gather(1, target[:, None]) - logits).detach()
    fixed = shift.detach()
    if member.formula == "lmt":
        factor = torch.ones(n, 1, dtype=logits.dtype)
    elif member.formula == "lmt++":
        factor = (margin / fixed).clamp(0, 1)
        factor = torch.where(fixed == 0, (margin > 0).to(factor), factor)
        factor = factor.masked_fill(own, 1.0).amin(1, keepdim=True)
    else:
        factor = torch.where(fixed == 0, 1.0, (margin / fixed).clamp(0.01, 1))
    return cross_entropy(logits + factor * shift, target, reduction="none")


def compare(name, backend, leaves, target, eps, **tolerance):
    """Loss and every gradient of the library against the definition, under a random cotangent."""
    logits, features, total, weight = leaves
    ours = margin_cross_entropy(
        logits, target, Bound(features, total, weight), eps=eps, scaling=name,
        reduction="none", trades_weight=1.5, backend=backend,
    )  # fmt: skip
    plain = definition(name, logits, target, features, total, weight, eps, trades_weight=1.5)
    torch.testing.assert_close(ours, plain, **tolerance)
    cotangent = torch.randn(len(target), generator=torch.Generator().manual_seed(9)).to(ours)
    inputs = [leaf for leaf in leaves if leaf is not None]
    if isinstance(eps, torch.Tensor) and eps.requires_grad:
        inputs.append(eps)
    options = {"allow_unused": True, "materialize_grads": True}
    got = torch.autograd.grad(ours, inputs, cotangent, **options)
    expected = torch.autograd.grad(plain, inputs, cotangent, **options)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, **tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("head", [True, False], ids=["head", "no head"])
@pytest.mark.parametrize("kind", ["number", "tensor", "sample", "pair"])
def test_equals_its_definition(name, backend, head, kind):
    logits, target, features, total, weight = problem(head=head)
    generator = torch.Generator().manual_seed(5)
    eps = {
        "number": 0.7,
        "tensor": torch.tensor(0.7, dtype=torch.float64, requires_grad=True),
        "sample": torch.rand(16, generator=generator).double().requires_grad_(),
        "pair": torch.rand(6, 6, generator=generator).double(),
    }[kind]
    compare(name, backend, (logits, features, total, weight), target, eps, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("n", "k"), [(3, 300), (310, 300), (5, 2), (9, 33)])
def test_equals_its_definition_at_other_sizes(name, backend, n, k):
    if backend == "triton" and n > 100:
        pytest.skip("hundreds of programs take a minute in the interpreter")
    logits, target, features, total, weight = problem(n, k, 7, seed=2)
    compare(name, backend, (logits, features, total, weight), target, 0.2, atol=1e-8, rtol=1e-8)


@settings(deadline=None, max_examples=60)
@given(
    name=st.sampled_from(NAMES),
    n=st.integers(1, 9),
    k=st.integers(1, 7),
    seed=st.integers(0, 999),
    eps=st.sampled_from([0.0, 1e-8, 0.3, 2.0, 50.0]),
    scale=st.sampled_from([1e-3, 1.0, 30.0]),
)
def test_any_problem_equals_its_definition(name, n, k, seed, eps, scale):
    logits, target, features, total, weight = problem(n, k, 3, seed, grad=False)
    leaves = [leaf.requires_grad_() for leaf in (logits * scale, features, total, weight)]
    for backend in ["reference"] + (["native"] if NATIVE else []):
        compare(name, backend, tuple(leaves), target, eps, atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CONSTANT_FACTOR)
def test_gradcheck_where_no_factor_is_stopped(name, backend):
    logits, target, features, total, weight = problem(5, 4, 3)

    def function(logits, features, total, weight):
        return margin_cross_entropy(
            logits, target, Bound(features, total, weight), eps=0.4, scaling=name,
            reduction="none", trades_weight=1.5, backend=backend,
        )  # fmt: skip

    assert torch.autograd.gradcheck(function, (logits, features, total, weight))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", SHIFTS)
@pytest.mark.parametrize("lift", [40.0, -40.0])
def test_gradcheck_where_the_factor_saturates(name, backend, lift):
    """Far from its kinks the factor is locally constant, so finite differences may be compared."""
    logits, target, features, total, weight = problem(5, 4, 3)
    logits = logits.detach().scatter_add(
        1, target[:, None], torch.full((5, 1), lift, dtype=torch.float64)
    )

    def function(logits, features, total, weight):
        return margin_cross_entropy(
            logits, target, Bound(features, total, weight), eps=0.4, scaling=name, backend=backend
        )

    leaves = (logits.requires_grad_(), features, total, weight)
    assert torch.autograd.gradcheck(function, leaves, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", SHIFTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_budget_it_is_cross_entropy(name, backend, dtype):
    logits, target, features, total, weight = problem(dtype=dtype)
    # Ties and zero distances, where a ratio would be 0 / 0.
    logits = logits.detach().index_fill(0, torch.tensor([0]), 1.0).requires_grad_()
    weight = weight.detach().index_copy(0, torch.tensor([1]), weight[:1].detach())
    weight.requires_grad_()
    for eps, scale in ((0.0, 1.0), (0.5, 0.0)):
        bound = Bound(features * scale, total * scale, weight)
        loss = margin_cross_entropy(logits, target, bound, eps=eps, scaling=name, backend=backend)
        plain = cross_entropy(logits, target)
        torch.testing.assert_close(loss, plain, atol=1e-6, rtol=1e-6)
        got = torch.autograd.grad(loss, (logits, features, total, weight), allow_unused=True)
        (wanted,) = torch.autograd.grad(plain, logits)
        torch.testing.assert_close(got[0], wanted, atol=1e-6, rtol=1e-5)
        assert all(grad is None or grad.isfinite().all() for grad in got)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", BOTTOMS)
def test_without_budget_the_bottom_repeats_the_runner_up(name, backend):
    logits, target, features, total, weight = problem()
    loss = margin_cross_entropy(
        logits, target, Bound(features, total, weight), eps=0.0, scaling=name, backend=backend
    )
    extended = torch.cat([logits, logits.topk(2).values[:, 1:]], 1)
    torch.testing.assert_close(loss, cross_entropy(extended, target))


def test_trades_without_weight_is_cross_entropy():
    logits, target, features, total, weight = problem()
    loss = margin_cross_entropy(
        logits, target, Bound(features, total, weight), eps=0.5, scaling="trades", trades_weight=0.0
    )
    torch.testing.assert_close(loss, cross_entropy(logits, target))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_never_falls_as_the_budget_grows(name, backend):
    """Also with a factor: the shift it leaves, min(eps, tie), grows with eps."""
    logits, target, features, total, weight = problem(64, 9, grad=False)
    before = torch.full((64,), -math.inf, dtype=torch.float64)
    for eps in (0.0, 1e-6, 0.01, 0.1, 0.3, 0.5, 1.0, 3.0, 100.0):
        loss = margin_cross_entropy(
            logits, target, Bound(features, total, weight), eps=eps, scaling=name,
            reduction="none", backend=backend,
        )  # fmt: skip
        assert (loss >= before - 1e-12).all()
        before = loss


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_invariances(name, backend):
    logits, target, features, total, weight = problem()

    def evaluate(logits, target, bound):
        return margin_cross_entropy(
            logits, target, bound, eps=0.4, scaling=name, reduction="none", backend=backend
        )

    loss = evaluate(logits, target, Bound(features, total, weight))
    # A constant on all logits; a translation of all head rows; units moved from head to bound.
    torch.testing.assert_close(evaluate(logits + 7.5, target, Bound(features, total, weight)), loss)
    torch.testing.assert_close(evaluate(logits, target, Bound(features, total, weight + 3.0)), loss)
    torch.testing.assert_close(
        evaluate(logits, target, Bound(features / 4, total, 4 * weight)), loss
    )
    # Names of the classes and order of the samples.
    order = torch.randperm(6, generator=torch.Generator().manual_seed(1))
    renamed = torch.empty_like(order).scatter_(0, order, torch.arange(6))[target]
    torch.testing.assert_close(
        evaluate(logits[:, order], renamed, Bound(features, total, weight[order])), loss
    )
    flipped = evaluate(logits.flip(0), target.flip(0), Bound(features, total, weight))
    torch.testing.assert_close(flipped.flip(0), loss)
    constant = torch.autograd.grad(loss.sum(), logits)[0].sum(1)
    assert constant.abs().max() < 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_one_class_costs_nothing(name, backend):
    for head in (True, False):
        logits, target, features, total, weight = problem(4, 1, head=head)
        loss = margin_cross_entropy(
            logits, target, Bound(features, total, weight), eps=0.4, scaling=name, backend=backend
        )
        assert loss == 0
        loss.backward()
        assert (logits.grad == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_nan_is_not_hidden(name, backend):
    for column in range(6):
        logits, target, features, total, weight = problem(grad=False)
        logits[3, column] = math.nan
        loss = margin_cross_entropy(
            logits, target, Bound(features, total, weight), eps=0.4, scaling=name,
            reduction="none", backend=backend,
        )  # fmt: skip
        assert loss[3].isnan()
        assert loss.isnan().sum() == 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_duplicated_class_rows(name, backend):
    logits, target, features, total, weight = problem()
    weight = weight.detach().clone()
    weight[1], weight[4] = weight[0], weight[0]
    leaves = (logits, features, total, weight.requires_grad_())
    compare(name, backend, leaves, target, 0.4, atol=1e-9, rtol=1e-9)
    weight = torch.ones(6, 5, dtype=torch.float64, requires_grad=True)
    bound = Bound(features, total, weight)
    margin_cross_entropy(logits, target, bound, eps=0.4, scaling=name, backend=backend).backward()
    if MEMBERS[name].pairwise:
        assert (weight.grad == 0).all()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_accumulates_in_float32(name, dtype, autocast):
    logits, target, features, total, weight = problem(64, 40, 8, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss = margin_cross_entropy(
            logits, target, Bound(features, total, weight), eps=0.3, scaling=name
        )
        loss.backward()
    assert loss.dtype == torch.float32
    assert logits.grad.dtype == dtype
    assert not MEMBERS[name].pairwise or weight.grad.dtype == dtype
    wide = [leaf.detach().double().requires_grad_() for leaf in (logits, features, total, weight)]
    exact = definition(name, wide[0], target, *wide[1:], 0.3).mean()
    exact.backward()
    torch.testing.assert_close(loss.double(), exact, atol=1e-5, rtol=1e-5)
    step = torch.finfo(dtype).eps
    for leaf, other in zip((logits, features, total, weight), wide, strict=True):
        if other.grad is not None:
            torch.testing.assert_close(leaf.grad.double(), other.grad, atol=1e-6, rtol=2 * step)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_float32_error_is_that_of_cross_entropy(name, backend):
    """At most twice the error of the same definition in float32, against float64."""
    logits, target, features, total, weight = problem(128, 100, 32, dtype=torch.float32, grad=False)
    logits = logits * 20
    wide = [leaf.double() for leaf in (logits, features, total, weight)]
    exact = definition(name, wide[0], target, *wide[1:], 0.3)
    plain = definition(name, logits, target, features, total, weight, 0.3)
    ours = margin_cross_entropy(
        logits, target, Bound(features, total, weight), eps=0.3, scaling=name,
        reduction="none", backend=backend,
    )  # fmt: skip
    allowed = 2 * (plain - exact).abs().max() + 1e-6
    assert (ours - exact).abs().max() <= allowed


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_any_layout_of_the_logits(name, backend):
    logits, target, features, total, weight = problem(grad=False)
    bound = Bound(features, total, weight.T.contiguous().T)
    options = {"eps": 0.3, "scaling": name, "backend": backend}
    results = []
    wide = torch.zeros(16, 20, dtype=torch.float64)
    wide[:, 3:9] = logits
    layouts = (logits, logits.T.contiguous().T, wide[:, 3:9], wide.flip(0).flip(0)[:, 3:9])
    for layout in (*layouts, logits[:1].expand(16, 6)):
        leaf = layout.detach().requires_grad_()
        loss = margin_cross_entropy(leaf, target, bound, **options)
        results.append((loss, *torch.autograd.grad(loss, leaf)))
    for other in results[1 : len(layouts)]:
        torch.testing.assert_close(other, results[0])
    repeated = margin_cross_entropy(logits[:1].repeat(16, 1), target, bound, **options)
    torch.testing.assert_close(results[-1][0], repeated)


@pytest.mark.parametrize("name", NAMES)
def test_reductions_agree(name):
    logits, target, features, total, weight = problem()
    bound = Bound(features, total, weight)
    each, total_loss, mean = (
        margin_cross_entropy(logits, target, bound, eps=0.3, scaling=name, reduction=reduction)
        for reduction in ("none", "sum", "mean")
    )
    assert each.shape == (16,)
    torch.testing.assert_close(total_loss, each.sum())
    torch.testing.assert_close(mean, each.mean())


def test_numbers_serve_as_bounds():
    """A certified bound holds floats; the loss is the same, without a gradient to it."""
    logits, target, _, _, weight = problem()
    for name in NAMES:
        loss = margin_cross_entropy(
            logits, target, Bound(0.8, 1.7, weight.detach()), eps=0.3, scaling=name
        )
        tensors = Bound(torch.tensor(0.8), torch.tensor(1.7), weight)
        other = margin_cross_entropy(logits, target, tensors, eps=0.3, scaling=name)
        torch.testing.assert_close(loss, other, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("n", "k"), [(16, 6), (16, 400), (500, 400)])
def test_no_value_is_read_back_from_a_device(name, n, k):
    """Tensors without values: a shape that depends on labels, or a host read, would raise."""
    leaves = [
        leaf.detach().to("meta").requires_grad_() if leaf.is_floating_point() else leaf.to("meta")
        for leaf in problem(n, k)
    ]
    logits, target, features, total, weight = leaves
    for eps in (0.3, torch.ones(n, device="meta"), torch.ones(k, k, device="meta")):
        loss = margin_cross_entropy(
            logits, target, Bound(features, total, weight), eps=eps, scaling=name
        )
        loss.backward()
    assert logits.grad.shape == (n, k)


def test_backend_choice_is_by_device_and_dtype():
    usable = "lmtfast.backends.native" if NATIVE else "lmtfast.backends.margin_reference"
    expected = dict.fromkeys((torch.float32, torch.float64, torch.bfloat16), usable)
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        chosen = choose_margin_backend(torch.ones(2, 3, dtype=dtype), "lmt++")
        assert chosen.__name__ == expected.get(dtype, "lmtfast.backends.margin_reference")
    elsewhere = choose_margin_backend(torch.ones(2, 3, device="meta"), "lmt++")
    assert elsewhere.__name__ == "lmtfast.backends.margin_reference"
    ours = choose_margin_backend(torch.ones(2, 3), "a formula of the user's own")
    assert ours.__name__ == "lmtfast.backends.margin_reference"
