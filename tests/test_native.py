# SPDX-License-Identifier: MIT
"""The compiled margin cross-entropy against a plain-PyTorch definition under autograd."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lmtfast.backends import native
from lmtfast.errors import ArgumentError, BackendUnavailableError, DtypeError, ShapeError

MEMBERS = ["lmt", "lmt++", "emma", "gloro"]
DTYPES = [torch.float32, torch.float64]
Problem = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # logits, target, row_index, rows, c
Outputs = tuple[Tensor, Tensor, Tensor, Tensor]  # loss, grad_logits, grad_rows, grad_coefficient


def definition(member: str, problem: Problem, grad_loss: Tensor) -> Outputs:
    """The formulas of csrc/ops/margin_cross_entropy.h, one line each, in the problem's dtype."""
    logits, target, row_index, rows, coefficient = problem
    z, b, c = (x.detach().clone().requires_grad_() for x in (logits, rows, coefficient))
    reference = (z.argmax(1) if member == "gloro" else target)[:, None]
    own = torch.zeros(z.shape, dtype=torch.bool).scatter_(1, reference, True)
    addition = (c[:, None] * b[row_index]).masked_fill(own, 0.0)
    margin = z.gather(1, target[:, None]) - z
    if member == "gloro":
        bottom = (z + addition).masked_fill(own, -math.inf).amax(1, keepdim=True)
        # amax shares the gradient among ties; the first class that attains the maximum has it all.
        first = (z + addition).masked_fill(own, -math.inf).argmax(1, keepdim=True)
        if z.shape[1] > 1:
            bottom = (z + addition).gather(1, first)
        y = torch.cat([z, bottom], 1)
    elif member == "lmt++":
        ratio = torch.where(margin >= addition, 1.0, margin / addition)
        ratio = torch.where(margin <= 0, 0.0, ratio).masked_fill(own, 1.0)
        y = z + ratio.amin(1, keepdim=True).detach() * addition
    elif member == "emma":
        ratio = torch.where(addition == 0, 1.0, (margin / addition).clamp(0.01, 1.0))
        y = z + ratio.detach() * addition
    else:
        y = z + addition
    loss = y.logsumexp(1) - y.gather(1, target[:, None])[:, 0]
    grads = torch.autograd.grad(loss, (z, b, c), grad_loss, allow_unused=True)
    return loss.detach(), *(
        torch.zeros_like(x) if g is None else g for x, g in zip((z, b, c), grads, strict=True)
    )


def compiled(member: str, problem: Problem, grad_loss: Tensor) -> Outputs:
    loss, dlogits, scale = native.margin_forward(member, *problem)
    return loss, *native.margin_backward(member, *problem, scale, dlogits, grad_loss)


def make_problem(n: int, k: int, dtype: torch.dtype, *, spread: float = 3.0, seed: int = 0):
    generator = torch.Generator().manual_seed(1000 * n + k + seed)
    u = max(1, min(k, n // 2))  # fewer rows than samples: targets repeat
    logits = spread * torch.randn(n, k, generator=generator, dtype=dtype)
    rows = torch.rand(u, k, generator=generator, dtype=dtype)
    row_index = torch.randint(u, (n,), generator=generator)
    target = torch.randint(k, (n,), generator=generator)
    coefficient = torch.rand(n, generator=generator, dtype=dtype)
    grad_loss = torch.randn(n, generator=generator, dtype=dtype)
    return (logits, target, row_index, rows, coefficient), grad_loss


def to_double(problem: Problem) -> Problem:
    return tuple(x.double() if x.is_floating_point() else x for x in problem)  # type: ignore[return-value]


def error(got: Tensor, exact: Tensor) -> float:
    assert got.shape == exact.shape
    return (got.double() - exact).abs().max().item() if got.numel() else 0.0


def assert_as_good_as_torch(member: str, problem: Problem, grad_loss: Tensor) -> None:
    exact = definition(member, to_double(problem), grad_loss.double())
    plain = definition(member, problem, grad_loss)
    ours = compiled(member, problem, grad_loss)
    floor = 1e-6 if grad_loss.dtype == torch.float32 else 1e-13
    names = ("loss", "grad_logits", "grad_rows", "grad_coefficient")
    for name, got, same_dtype, want in zip(names, ours, plain, exact, strict=True):
        assert got.dtype == grad_loss.dtype
        size = max(1.0, want.abs().max().item()) if want.numel() else 1.0
        limit = 2 * error(same_dtype, want) + floor * size
        assert error(got, want) <= limit, (member, name, error(got, want), limit)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [1, 2, 3, 10, 17, 1000])
@pytest.mark.parametrize("member", MEMBERS)
def test_matches_the_definition(member, k, dtype):
    for n in (1, 2, 3, 10, 17, 65):
        assert_as_good_as_torch(member, *make_problem(n, k, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("member", MEMBERS)
def test_many_samples_per_row(member, dtype):
    (logits, target, _, rows, c), grad_loss = make_problem(1000, 10, dtype)
    row_index = torch.zeros(1000, dtype=torch.int64)
    assert_as_good_as_torch(member, (logits, target, row_index, rows, c), grad_loss)


@pytest.mark.parametrize("member", MEMBERS)
@pytest.mark.parametrize("spread", [1e-4, 40.0, 3e4])
def test_tiny_and_huge_logits(member, spread):
    assert_as_good_as_torch(member, *make_problem(33, 17, torch.float32, spread=spread))


@pytest.mark.parametrize("member", MEMBERS)
@pytest.mark.parametrize("factor", [1e-30, 1e-6, 1e6])
def test_tiny_and_huge_additions(member, factor):
    (logits, target, row_index, rows, c), grad_loss = make_problem(33, 17, torch.float32)
    assert_as_good_as_torch(member, (logits, target, row_index, rows, c * factor), grad_loss)


@pytest.mark.parametrize("member", MEMBERS)
def test_any_strides(member):
    (logits, target, row_index, rows, c), grad_loss = make_problem(9, 13, torch.float32)
    expected = compiled(member, (logits, target, row_index, rows, c), grad_loss)
    wide = torch.full((9, 20), math.nan)
    wide[:, :13] = logits
    tall = torch.full((18, 13), math.nan)
    tall[::2] = logits
    columns = logits.T.contiguous().T
    doubled = torch.stack([target, torch.full_like(target, -1)], 1)[:, 0]
    for strided in (wide[:, :13], tall[::2], columns):
        assert torch.equal(strided, logits)
        problem = (strided, doubled, row_index, rows.T.contiguous().T, c)
        for got, want in zip(compiled(member, problem, grad_loss), expected, strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("member", MEMBERS)
def test_expanded_rows_coefficient_and_gradient(member):
    (logits, target, _, rows, c), _ = make_problem(8, 5, torch.float64)
    row = rows[:1]
    index = torch.arange(8)
    expanded = (logits, target, index, row.expand(8, 5), c[:1].expand(8))
    copied = (logits, target, index, row.repeat(8, 1), c[:1].repeat(8))
    gradient = torch.tensor(0.125, dtype=torch.float64)
    ours = compiled(member, expanded, gradient.expand(8))
    for got, want in zip(ours, compiled(member, copied, gradient.repeat(8)), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("member", MEMBERS)
def test_ties_and_zero_additions(member, dtype):
    logits = torch.tensor([[1, 1, 0], [0, 0, 0], [2, 1, 1], [1, 2, 2], [1, 1, 1]], dtype=dtype)
    target = torch.tensor([0, 2, 0, 0, 1])
    rows = torch.tensor([[0, 1, 1], [0, 0, 0], [7, 7, 7]], dtype=dtype)
    for first_row in range(3):
        row_index = (torch.arange(5) + first_row) % 3
        for scale in (0.0, 0.25, 2.0):
            c = torch.full((5,), scale, dtype=dtype)
            problem = (logits, target, row_index, rows, c)
            assert_as_good_as_torch(member, problem, torch.ones(5, dtype=dtype))


@pytest.mark.parametrize("member", ["lmt", "lmt++", "emma"])
def test_zero_coefficient_is_plain_cross_entropy(member):
    (logits, target, row_index, rows, c), grad_loss = make_problem(17, 10, torch.float64)
    loss, *_, grad_c = compiled(member, (logits, target, row_index, rows, 0 * c), grad_loss)
    want = torch.nn.functional.cross_entropy(logits, target, reduction="none")
    torch.testing.assert_close(loss, want, rtol=1e-13, atol=1e-13)
    assert grad_c.isfinite().all()


def test_sample_factor_lies_in_the_unit_interval_and_vanishes_on_mistakes():
    (logits, target, row_index, rows, c), _ = make_problem(1000, 3, torch.float64)
    _, _, scale = native.margin_forward("lmt++", logits, target, row_index, rows, c)
    own = logits.gather(1, target[:, None])
    rivals = logits.scatter(1, target[:, None], -math.inf)
    wrong = (rivals >= own).any(1)
    assert ((scale >= 0) & (scale <= 1)).all()
    assert torch.equal(scale == 0, wrong)


@pytest.mark.parametrize("member", MEMBERS)
@pytest.mark.parametrize("k", [1, 2, 10, 300])
def test_nan_is_never_hidden(member, k):
    for column in {0, k // 2, k - 1}:
        (logits, target, row_index, rows, c), grad_loss = make_problem(4, k, torch.float32)
        logits[1, column] = math.nan
        loss, grad_logits, *_ = compiled(member, (logits, target, row_index, rows, c), grad_loss)
        assert torch.equal(loss.isnan(), torch.tensor([False, True, False, False]))
        assert grad_logits[1].isnan().all()
    if k > 1:
        (logits, target, row_index, rows, c), grad_loss = make_problem(4, k, torch.float32)
        c[2] = math.nan
        loss, *_ = compiled(member, (logits, target, row_index, rows, c), grad_loss)
        assert torch.equal(loss.isnan(), torch.tensor([False, False, True, False]))


@pytest.mark.parametrize("member", MEMBERS)
def test_entry_at_the_reference_class_is_ignored(member):
    (logits, target, _, _, c), grad_loss = make_problem(17, 10, torch.float32)
    reference = logits.argmax(1) if member == "gloro" else target
    rows = torch.rand(10, 10).fill_diagonal_(0.0)
    poisoned = rows.clone().fill_diagonal_(math.nan)
    clean = compiled(member, (logits, target, reference, rows, c), grad_loss)
    same = compiled(member, (logits, target, reference, poisoned, c), grad_loss)
    for got, want in zip(same, clean, strict=True):
        assert torch.equal(got, want)
    assert torch.equal(clean[2].diagonal(), torch.zeros(10))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("member", MEMBERS)
def test_empty_batch(member, dtype):
    empty = torch.empty(0, dtype=torch.int64)
    problem = (torch.empty(0, 5, dtype=dtype), empty, empty, torch.ones(3, 5, dtype=dtype))
    nothing = torch.empty(0, dtype=dtype)
    loss, grad_logits, grad_rows, grad_c = compiled(member, (*problem, nothing), nothing)
    assert loss.shape == (0,)
    assert grad_logits.shape == (0, 5)
    assert grad_c.shape == (0,)
    assert torch.equal(grad_rows, torch.zeros(3, 5, dtype=dtype))


@pytest.mark.parametrize("shape", [(257, 10), (40, 1000), (3, 20000)])
@pytest.mark.parametrize("member", MEMBERS)
def test_bit_identical_for_every_thread_count(member, shape):
    problem, grad_loss = make_problem(*shape, torch.float32)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            results.append(compiled(member, problem, grad_loss))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for got, want in zip(other, results[0], strict=True):
            assert torch.equal(got, want)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), member=st.sampled_from(MEMBERS))
def test_any_small_problem(data, member):
    n, k, u = (data.draw(st.integers(1, high)) for high in (5, 9, 4))
    # Multiples of 1/8: ties and zeros are common, and the definition rounds like the kernel.
    value, size = st.integers(-240, 240), st.integers(0, 80)

    def tensor(rows: int, columns: int, cells: st.SearchStrategy[int]) -> Tensor:
        flat = data.draw(st.lists(cells, min_size=rows * columns, max_size=rows * columns))
        return torch.tensor(flat, dtype=torch.float64).reshape(rows, columns) / 8

    def index(limit: int) -> Tensor:
        return torch.tensor(data.draw(st.lists(st.integers(0, limit - 1), min_size=n, max_size=n)))

    problem = (
        tensor(n, k, value),
        index(k),
        index(u),
        tensor(u, k, size),
        tensor(n, 1, size)[:, 0],
    )
    grad_loss = tensor(n, 1, value)[:, 0]
    wanted = definition(member, problem, grad_loss)
    for got, want in zip(compiled(member, problem, grad_loss), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


def test_errors_name_the_argument():
    (logits, target, row_index, rows, c), _ = make_problem(4, 3, torch.float32)
    call = native.margin_forward
    with pytest.raises(ArgumentError, match="member"):
        call("hinge", logits, target, row_index, rows, c)
    with pytest.raises(DtypeError, match="logits"):
        call("lmt", logits.half(), target, row_index, rows, c)
    with pytest.raises(DtypeError, match="rows"):
        call("lmt", logits, target, row_index, rows.double(), c)
    with pytest.raises(DtypeError, match="target"):
        call("lmt", logits, target.int(), row_index, rows, c)
    with pytest.raises(ShapeError, match="coefficient"):
        call("lmt", logits, target, row_index, rows, c[:2])
    with pytest.raises(ShapeError, match="logits"):
        call("lmt", logits[:, :0], target, row_index, rows[:, :0], c)
    with pytest.raises(ArgumentError, match=r"target\[0\]"):
        call("lmt", logits, target + 3, row_index, rows, c)
    with pytest.raises(ArgumentError, match=r"row_index\[0\]"):
        call("lmt", logits, target, row_index - 5, rows, c)
    with pytest.raises(ValueError, match="target"):
        call("lmt", logits, -1 - target, row_index, rows, c)


def test_available(monkeypatch: pytest.MonkeyPatch):
    assert native.available() == (True, "")
    monkeypatch.setattr(native, "_unavailable", "the compiled core is missing")
    assert native.available() == (False, "the compiled core is missing")
    problem, _ = make_problem(4, 3, torch.float32)
    with pytest.raises(BackendUnavailableError, match="the compiled core is missing"):
        native.margin_forward("lmt", *problem)


def test_a_tensor_elsewhere_is_refused():
    problem, _ = make_problem(4, 3, torch.float32)
    with pytest.raises(BackendUnavailableError, match="logits"):
        native.margin_forward("lmt", problem[0].to("meta"), *problem[1:])
