# SPDX-License-Identifier: MIT
"""The CUDA kernels, compiled for the CPU, against the reference backend.

The contract of the losses is in tests/test_contract_losses.py, that of the steps in
tests/test_contract_spectral.py; here is what is particular to these kernels: every path that a
size chooses, bfloat16, memory around the outputs, the order of blocks and threads, bad indices.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lmtfast.backends import available_backends, cuda, cuda_device, margin_reference, pair_norm
from lmtfast.backends.margin_argument import computing_dtype
from lmtfast.errors import ArgumentError, BackendUnavailableError, DtypeError, ShapeError

pytestmark = pytest.mark.usefixtures("emulated_cuda")

MEMBERS = list(cuda.MEMBERS)
DTYPES = list(cuda.DTYPES)
# One warp per row, one block per row, a large block, a row that shared memory does not hold.
CLASSES = [1, 2, 31, 33, 512, 513, 8193, 12289]
ORDERS = (1, 2)


def margin_problem(n: int, k: int, dtype: torch.dtype, u: int = 3) -> tuple[Tensor, ...]:
    """Logits, target, row_index, rows, coefficient and grad_loss."""
    generator = torch.Generator().manual_seed(n * k)
    wide = computing_dtype(torch.empty(0, dtype=dtype))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(wide)

    return (
        (3 * normal(n, k)).to(dtype), torch.randint(k, (n,), generator=generator),
        torch.randint(u, (n,), generator=generator), normal(u, k).abs(), normal(n).abs(), normal(n),
    )  # fmt: skip


def margin_results(backend, member: str, problem: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    *inputs, grad_loss = problem
    loss, dlogits, scale = backend.margin_forward(member, *inputs)
    grads = backend.margin_backward(member, *inputs, scale, dlogits, grad_loss)
    return loss, dlogits, *grads


def assert_near(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    """Within the rounding of ``dtype`` of what float64 gives, relative to the largest entry."""
    eps = {torch.float32: 3e-6, torch.float64: 1e-13, torch.bfloat16: 2e-2}[dtype]
    size = max(1.0, want.abs().max().item()) if want.numel() else 1.0
    assert got.shape == want.shape
    torch.testing.assert_close(got.double(), want, rtol=eps, atol=eps * size)


def doubled(problem: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
    return tuple(  # type: ignore[return-value]
        t.double() if t is not None and t.is_floating_point() else t for t in problem
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", CLASSES)
@pytest.mark.parametrize("member", MEMBERS)
def test_margin_is_the_reference(member, k, dtype):
    problem = margin_problem(9, k, dtype)
    wanted = margin_results(margin_reference, member, doubled(problem))
    results = margin_results(cuda, member, problem)
    assert results[2].dtype == dtype
    assert_near(results[2], wanted[2], dtype)
    wide = results[0].dtype
    for got, want in zip((*results[:2], *results[3:]), (*wanted[:2], *wanted[3:]), strict=True):
        assert got.dtype == wide
        assert_near(got, want, wide)


@pytest.mark.parametrize("k", CLASSES)
@pytest.mark.parametrize("member", MEMBERS)
def test_margin_does_not_depend_on_the_order(member, k, emulated_cuda):
    problem = margin_problem(37, k, torch.float32, u=5)
    if k > 8192:
        problem = margin_problem(3, k, torch.float32, u=2)
    wanted = margin_results(cuda, member, problem)
    for seed in ORDERS:
        emulated_cuda.set_order(seed)
        for got, want in zip(margin_results(cuda, member, problem), wanted, strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("member", MEMBERS)
def test_margin_takes_strided_tensors(member):
    logits, target, row_index, rows, coefficient, grad_loss = margin_problem(9, 33, torch.float32)
    wanted = margin_results(cuda, member, (logits, target, row_index, rows, coefficient, grad_loss))
    wide = torch.full((9, 40), math.nan)
    wide[:, :33] = logits
    strided = (
        wide[:, :33], torch.stack([target, target + 99], 1)[:, 0], row_index,
        rows.T.contiguous().T, coefficient, torch.stack([grad_loss, grad_loss], 1)[:, 1],
    )  # fmt: skip
    for got, want in zip(margin_results(cuda, member, strided), wanted, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("k", [10, 600])
@pytest.mark.parametrize("member", MEMBERS)
def test_an_index_out_of_range_gives_nan_in_its_sample(member, k):
    problem = margin_problem(8, k, torch.float32)
    wanted = margin_results(cuda, member, problem)
    for which, bad in ((1, -1), (1, k), (2, -1), (2, 3), (1, 2**62), (2, -(2**62))):
        broken = [t.clone() for t in problem]
        broken[which][4] = bad
        got = margin_results(cuda, member, tuple(broken))
        others = torch.arange(8) != 4
        for entry in (0, 1, 2, 4):
            assert got[entry][4].isnan().all()
            assert torch.equal(got[entry][others], wanted[entry][others])


@pytest.mark.parametrize("member", MEMBERS)
def test_margin_of_nothing(member):
    loss, dlogits, *grads = margin_results(cuda, member, margin_problem(0, 5, torch.float32))
    assert loss.shape == (0,)
    assert dlogits.shape == grads[0].shape == (0, 5)
    assert torch.equal(grads[1], torch.zeros(3, 5))
    assert grads[2].shape == (0,)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("k", "d", "classes"),
    [
        (1, 1, None), (2, 3, None), (65, 17, None), (130, 70, None), (70, 33, [3]),
        (40, 5, [0, 39, 0, 7, 7, 7]), (9, 4, list(range(9)) * 40), (3, 2, []),
    ],
)  # fmt: skip
def test_pair_norms_are_the_reference(k, d, classes, dtype):
    generator = torch.Generator().manual_seed(k * d)
    weight = torch.randn(k, d, generator=generator, dtype=torch.float64).to(dtype)
    chosen = None if classes is None else torch.tensor(classes, dtype=torch.int64)
    u = k if classes is None else len(classes)
    wide = computing_dtype(weight)
    grad = torch.randn(u, k, generator=generator, dtype=torch.float64).to(wide)
    norms = cuda.pair_norm_forward(weight, chosen)
    wanted = pair_norm.pair_norm_forward(weight.double(), chosen)
    assert norms.dtype == wide
    assert_near(norms, wanted, wide)
    got = cuda.pair_norm_vjp(weight, chosen, norms, grad)
    assert got.dtype == dtype
    assert_near(got, pair_norm.pair_norm_vjp(weight.double(), chosen, wanted, grad.double()), dtype)


def test_pair_norms_of_integers_are_exact():
    weight = torch.randint(-8, 9, (67, 41)).float()
    weight[5], weight[60] = weight[4], weight[4]
    norms = cuda.pair_norm_forward(weight, None)
    wide = weight.double()
    difference = wide[:, None] - wide
    assert torch.equal(norms, difference.square().sum(-1).sqrt().float())
    ratio = torch.randint(-2, 3, norms.shape)  # powers of two, so that the quotient is exact
    ratio[norms == 0] = 0
    got = cuda.pair_norm_vjp(weight, None, norms, norms * ratio)
    wanted = torch.einsum("uj,ujd->ud", (ratio + ratio.T).double(), difference)
    assert torch.equal(got, wanted.float())


def test_pair_norms_do_not_depend_on_the_order(emulated_cuda):
    weight, grad = torch.randn(70, 19), torch.randn(90, 70)
    classes = torch.randint(70, (90,))
    results = []
    for seed in (0, *ORDERS):
        emulated_cuda.set_order(seed)
        norms = cuda.pair_norm_forward(weight, classes)
        results.append((norms, cuda.pair_norm_vjp(weight, classes, norms, grad)))
    for other in results[1:]:
        assert torch.equal(other[0], results[0][0])
        assert torch.equal(other[1], results[0][1])


def test_pair_norms_show_a_class_out_of_range_and_nan():
    weight = torch.randn(6, 4)
    norms = cuda.pair_norm_forward(weight, torch.tensor([0, 6, -1, 2]))
    assert norms[1:3].isnan().all()
    assert norms[[0, 3]].isfinite().all()
    weight[1, 2] = math.nan
    assert cuda.pair_norm_forward(weight, None)[0, 1].isnan()


def test_strided_head():
    wide = torch.full((12, 9), math.nan)
    wide[::2, :5] = torch.randn(6, 5)
    assert torch.equal(
        cuda.pair_norm_forward(wide[::2, :5], None),
        cuda.pair_norm_forward(wide[::2, :5].contiguous(), None),
    )


def test_errors_name_the_argument():
    logits, target, row_index, rows, coefficient, _ = margin_problem(4, 3, torch.float32)
    with pytest.raises(ArgumentError, match="member"):
        cuda.margin_forward("hinge", logits, target, row_index, rows, coefficient)
    with pytest.raises(DtypeError, match="logits"):
        cuda.margin_forward("lmt", logits.half(), target, row_index, rows, coefficient)
    with pytest.raises(DtypeError, match="rows"):
        cuda.margin_forward(
            "lmt", logits.bfloat16(), target, row_index, rows.bfloat16(), coefficient
        )
    with pytest.raises(ShapeError, match="coefficient"):
        cuda.margin_forward("lmt", logits, target, row_index, rows, coefficient[:2])
    with pytest.raises(BackendUnavailableError, match="logits"):
        cuda.margin_forward("lmt", logits.to("meta"), target, row_index, rows, coefficient)
    with pytest.raises(ShapeError, match="head_weight"):
        cuda.pair_norm_forward(logits[0], None)
    with pytest.raises(DtypeError, match="head_weight"):
        cuda.pair_norm_forward(logits.half(), None)


def test_the_entry_points_refuse_what_the_host_can_see(emulated_cuda):
    logits, target, row_index, rows, coefficient, _ = margin_problem(4, 3, torch.float32)
    fields = [0, 0, 4, 3, 3, 3, 3]
    fields += [t.data_ptr() for t in (logits, target, row_index, rows, coefficient)]
    out = torch.full((4, 3), -1.0)
    address = out.data_ptr()
    for position, value, message in (
        (0, 7, "dtype"), (1, 4, "member"), (2, -1, "n"), (2, 2**31, "n"), (3, 0, "k"),
        (4, -1, "u"), (5, 2, "logits_stride"), (6, 1, "rows_stride"), (7, 0, "inputs"),
        (10, 0, "rows"),
    ):  # fmt: skip
        broken = list(fields)
        broken[position] = value
        with pytest.raises(ValueError, match=f"at {message}$"):
            emulated_cuda.margin_forward(tuple(broken), address, address, address, 0)
    with pytest.raises(ValueError, match="at loss$"):
        emulated_cuda.margin_forward(tuple(fields), 0, address, address, 0)
    with pytest.raises(ValueError, match="at grad_logits$"):
        emulated_cuda.margin_backward(tuple(fields), *[address] * 7, 0)
    assert (out == -1).all()


def test_without_a_device(monkeypatch: pytest.MonkeyPatch):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    monkeypatch.setattr(cuda_device, "core", cuda_device._C.cuda)
    status = available_backends()["cuda"]
    assert not status.available
    assert status.reason == "torch finds no NVIDIA GPU"
    with pytest.raises(BackendUnavailableError, match="torch finds no NVIDIA GPU"):
        cuda.margin_forward("lmt", *margin_problem(4, 3, torch.float32)[:5])
