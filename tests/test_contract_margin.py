# SPDX-License-Identifier: MIT
"""What the functions of every margin backend owe: the reference's results on any legal tensor.

One suite for all of them: the compiled ones, the CUDA kernels compiled for the CPU, and the Triton
kernels in their interpreter. tests/test_contract_losses.py asks the same of the public function.
"""

from __future__ import annotations

import importlib
import math
from types import ModuleType

import pytest
import torch
from torch import Tensor

from lmtfast.backends import pair_norm
from lmtfast.backends.margin_argument import computing_dtype
from lmtfast.backends.margin_reference import margin_members
from lmtfast.errors import LmtfastError
from lmtfast.losses import MEMBERS, margin_cross_entropy
from tests.conftest import TRITON_DEVICE

BACKENDS = ["reference", "native", "cuda", "triton"]
FORMULAS = list(margin_members())
DTYPES = [torch.float32, torch.float64, torch.bfloat16]
Problem = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # logits, target, row_index, rows, c

# Samples, classes, rows: one class, two, odd, more rows than samples, one row for all, a whole row
# in several vectors, and (for the kernels that sweep a row in tiles) thousands.
SHAPES = [(1, 1, 1), (5, 2, 2), (7, 3, 9), (9, 17, 1), (4, 65, 3), (13, 130, 5)]
LONG = (2, 9001, 2)


def module_of(backend: str) -> ModuleType:
    name = "margin_reference" if backend == "reference" else backend
    return importlib.import_module(f"lmtfast.backends.{name}")


def pair_norms_of(backend: str) -> ModuleType:
    return pair_norm if backend == "reference" else module_of(backend)


def on_device(backend: str, tensors):
    """The tensors where the backend runs."""
    device = TRITON_DEVICE if backend == "triton" else "cpu"
    return tuple(t if t is None else t.to(device) for t in tensors)


def make_problem(
    n: int, k: int, u: int, dtype: torch.dtype = torch.float32, *, spread: float = 3.0
) -> tuple[Problem, Tensor]:
    """A problem in ``dtype`` and the gradient of its losses."""
    generator = torch.Generator().manual_seed(1000 * n + k)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    target = torch.randint(k, (n,), generator=generator)
    lift = 3 * torch.rand(n, 1, generator=generator, dtype=torch.float64)
    logits = spread * (normal(n, k) + torch.zeros(n, k).double().scatter_(1, target[:, None], lift))
    row_index = torch.randint(u, (n,), generator=generator)
    problem = (
        logits.to(dtype), target, row_index, normal(u, k).abs().to(wide), normal(n).abs().to(wide)
    )  # fmt: skip
    return problem, normal(n).to(wide)


def evaluate(backend: str, member: str, problem: Problem, grad_loss: Tensor) -> tuple[Tensor, ...]:
    """Loss, dlogits and the gradients to logits, rows and coefficient, on the CPU."""
    module = module_of(backend)
    *moved, grad = on_device(backend, (*problem, grad_loss))
    loss, dlogits, scale = module.margin_forward(member, *moved)
    grads = module.margin_backward(member, *moved, scale, dlogits, grad)
    return tuple(t.cpu() for t in (loss, dlogits, *grads))


def exact(member: str, problem: Problem, grad_loss: Tensor) -> tuple[Tensor, ...]:
    doubled = tuple(t.double() if t.is_floating_point() else t for t in problem)
    return evaluate("reference", member, doubled, grad_loss.double())  # type: ignore[arg-type]


def assert_as_the_reference(
    backend: str, member: str, problem: Problem, grad_loss: Tensor, floor: float = 2e-6
) -> None:
    """At most twice the error of the reference in the same dtype, and a floor."""
    dtype, wide = problem[0].dtype, grad_loss.dtype
    wanted = exact(member, problem, grad_loss)
    plain = evaluate("reference", member, problem, grad_loss)
    ours = evaluate(backend, member, problem, grad_loss)
    floor = 1e-13 if wide == torch.float64 else floor
    # Triton's interpreter cuts a bfloat16 off instead of rounding it.
    step = 2**-7 if dtype == torch.bfloat16 else 0.0
    kinds = ("loss", "dlogits", "grad_logits", "grad_rows", "grad_coefficient")
    for kind, got, same, want in zip(kinds, ours, plain, wanted, strict=True):
        assert got.shape == want.shape
        assert got.dtype == (dtype if kind == "grad_logits" else wide), kind
        if want.numel():
            size = max(1.0, want.abs().max().item())
            error, allowed = ((x.double() - want).abs().max().item() for x in (got, same))
            rounding = step * size if kind == "grad_logits" else 0.0
            assert error <= 2 * allowed + floor * size + rounding, (kind, error, allowed)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("member", FORMULAS)
def test_every_shape_is_the_reference(member, dtype, backend):
    for n, k, u in SHAPES:
        assert_as_the_reference(backend, member, *make_problem(n, k, u, dtype))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("member", FORMULAS)
def test_thousands_of_classes(member, backend):
    assert_as_the_reference(backend, member, *make_problem(*LONG))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("member", FORMULAS)
def test_many_samples_of_one_row(member, backend):
    """Enough that a kernel may share them out."""
    assert_as_the_reference(backend, member, *make_problem(700, 3, 1))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("member", FORMULAS)
@pytest.mark.parametrize("spread", [1e-6, 3e3])
def test_tiny_and_huge_logits(member, spread, backend):
    assert_as_the_reference(backend, member, *make_problem(9, 17, 4, spread=spread))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("member", FORMULAS)
@pytest.mark.parametrize("factor", [0.0, 1e-30, 1e6])
def test_tiny_and_huge_additions(member, factor, backend):
    (*inputs, coefficient), grad_loss = make_problem(9, 17, 4)
    assert_as_the_reference(backend, member, (*inputs, coefficient * factor), grad_loss)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("member", FORMULAS)
def test_no_samples(member, backend):
    problem, grad_loss = make_problem(0, 5, 3)
    loss, dlogits, grad_logits, grad_rows, grad_coefficient = evaluate(
        backend, member, problem, grad_loss
    )
    assert loss.shape == grad_coefficient.shape == (0,)
    assert dlogits.shape == grad_logits.shape == (0, 5)
    assert torch.equal(grad_rows, torch.zeros(3, 5))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("member", FORMULAS)
def test_strides_change_nothing(member, backend):
    (logits, target, row_index, rows, coefficient), grad_loss = make_problem(9, 13, 4)
    wanted = evaluate(backend, member, (logits, target, row_index, rows, coefficient), grad_loss)
    wide = torch.full((18, 20), math.nan)
    wide[::2, 3:16] = logits
    doubled = torch.stack([target, torch.full_like(target, -1)], 1)
    strided = (
        wide[::2, 3:16], doubled[:, 0], row_index, rows.T.contiguous().T,
        torch.stack([coefficient, coefficient], 1)[:, 1],
    )  # fmt: skip
    gradient = torch.stack([grad_loss, grad_loss], 1)[:, 0]
    for got, want in zip(evaluate(backend, member, strided, gradient), wanted, strict=True):
        assert torch.equal(got, want)
    columns = (logits.T.contiguous().T, target, row_index, rows, coefficient)
    for got, want in zip(evaluate(backend, member, columns, grad_loss), wanted, strict=True):
        assert torch.equal(got, want)
    same = rows[:1].expand(4, 13), rows[:1].repeat(4, 1)
    one, other = (
        evaluate(backend, member, (logits, target, row_index, table, coefficient), grad_loss)
        for table in same
    )
    for got, want in zip(one, other, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("member", FORMULAS)
def test_the_order_of_samples_and_rows_changes_nothing(member, backend):
    (logits, target, row_index, rows, coefficient), grad_loss = make_problem(11, 6, 4)
    wanted = evaluate(backend, member, (logits, target, row_index, rows, coefficient), grad_loss)
    # Samples of one row keep their order, or their sum would round differently.
    order = torch.sort((row_index + 2) % 4, stable=True).indices
    place = torch.tensor([2, 0, 3, 1])
    moved = torch.empty_like(rows)
    moved[place] = rows
    problem = (logits[order], target[order], place[row_index[order]], moved, coefficient[order])
    loss, dlogits, grad_logits, grad_rows, grad_coefficient = evaluate(
        backend, member, problem, grad_loss[order]
    )
    for got, want in ((loss, wanted[0]), (dlogits, wanted[1]), (grad_logits, wanted[2])):
        assert torch.equal(got, want[order])
    assert torch.equal(grad_rows[place], wanted[3])
    assert torch.equal(grad_coefficient, wanted[4][order])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("member", FORMULAS)
def test_entry_at_the_reference_class_is_ignored(member, backend):
    (logits, target, _, _, coefficient), grad_loss = make_problem(9, 5, 5)
    reference = logits.argmax(1) if member == "gloro" else target
    rows = torch.rand(5, 5).fill_diagonal_(0.0)
    poisoned = rows.clone().fill_diagonal_(99.0)
    clean, same = (
        evaluate(backend, member, (logits, target, reference, table, coefficient), grad_loss)
        for table in (rows, poisoned)
    )
    for got, want in zip(same, clean, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("member", FORMULAS)
def test_nan_shows_in_its_sample_alone(member, backend):
    for k in (1, 2, 19):
        for place in ("first", "last", "coefficient"):
            if k == 1 and place == "coefficient":
                continue
            (logits, target, row_index, rows, coefficient), grad_loss = make_problem(4, k, 4)
            if place == "coefficient":
                coefficient[1] = math.nan
            else:
                logits[1, 0 if place == "first" else k - 1] = math.nan
            problem = (logits, target, row_index, rows, coefficient)
            loss, dlogits, grad_logits, *_ = evaluate(backend, member, problem, grad_loss)
            alone = torch.tensor([False, True, False, False])
            assert torch.equal(loss.isnan(), alone)
            for gradient in (dlogits, grad_logits):
                assert gradient[1].isnan().any()
                assert gradient[~alone].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("member", FORMULAS)
def test_minus_infinity_is_a_class_that_cannot_be(member, backend):
    (logits, target, row_index, rows, coefficient), grad_loss = make_problem(4, 6, 2)
    rival = (target + 1) % 6
    logits = logits.scatter(1, rival[:, None], -math.inf)
    problem = (logits, target, row_index, rows, coefficient)
    loss, dlogits, *_ = evaluate(backend, member, problem, grad_loss)
    assert loss.isfinite().all()
    assert (dlogits.gather(1, rival[:, None]) == 0).all()


class Allocations:
    """Every new tensor lies in a larger one: NaN where results belong, sentinels around them."""

    BAND, SENTINEL = 64, -12345.0

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.whole: list[tuple[Tensor, int]] = []
        for name in ("empty", "empty_like"):
            original = getattr(torch, name)
            monkeypatch.setattr(torch, name, self.guarded(original))
        monkeypatch.setattr(Tensor, "new_empty", self.guarded(Tensor.new_empty))

    def guarded(self, original):
        def allocate(*args, **options):
            plain = original(*args, **options)
            if not plain.is_floating_point() or plain.device.type == "meta":
                return plain
            size = plain.numel()
            whole = torch.full((size + 2 * self.BAND,), self.SENTINEL, dtype=torch.float64)
            whole[self.BAND : self.BAND + size] = math.nan
            whole = whole.to(plain.dtype).to(plain.device)
            self.whole.append((whole, size))
            return whole[self.BAND : self.BAND + size].view(plain.shape)

        return allocate

    def check(self) -> None:
        assert self.whole
        for whole, size in self.whole:
            around = torch.cat([whole[: self.BAND], whole[self.BAND + size :]])
            assert torch.equal(around, torch.full_like(around, self.SENTINEL))


@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize("member", FORMULAS)
def test_writes_its_outputs_whole_and_nothing_else(member, backend, monkeypatch):
    for shape, dtype in (((5, 3, 2), torch.float32), ((3, 33, 7), torch.bfloat16)):
        problem, grad_loss = make_problem(*shape, dtype)
        plain = evaluate(backend, member, problem, grad_loss)
        with monkeypatch.context() as patch:
            allocations = Allocations(patch)
            guarded = evaluate(backend, member, problem, grad_loss)
            allocations.check()
        for got, want in zip(guarded, plain, strict=True):
            assert torch.equal(got, want)


# Rows, columns, chosen classes: one class, odd sizes, a class chosen twice and others never, every
# path that a number of classes selects.
HEADS = [
    (1, 3, None), (2, 5, [1]), (7, 1, None), (10, 33, [3, 3, 0, 9]), (40, 17, None),
    (40, 9, [39, 0, 0, 5, 39]), (70, 5, []), (262, 6, [261, 0, 261]), (260, 3, None),
]  # fmt: skip


def make_head(k: int, d: int, chosen: list[int] | None, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(k * 100 + d)
    weight = torch.randn(k, d, generator=generator, dtype=torch.float64).to(dtype)
    classes = None if chosen is None else torch.tensor(chosen, dtype=torch.int64)
    u = k if classes is None else len(classes)
    grad = torch.randn(u, k, generator=generator, dtype=torch.float64)
    return weight, classes, grad.to(computing_dtype(weight))


def pair_norms(backend: str, weight: Tensor, classes: Tensor | None, grad: Tensor):
    module = pair_norms_of(backend)
    weight, classes, grad = on_device(backend, (weight, classes, grad))
    norms = module.pair_norm_forward(weight, classes)
    return norms.cpu(), module.pair_norm_vjp(weight, classes, norms, grad).cpu()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "head", HEADS, ids=lambda h: f"{h[0]}x{h[1]}-{'all' if h[2] is None else len(h[2])}"
)
def test_pair_norms_are_the_reference(head, dtype, backend):
    if backend == "triton" and head[0] > 256 and dtype != torch.float32:
        pytest.skip("the other types of a large head take seconds in the interpreter")
    weight, classes, grad = make_head(*head, dtype)
    norms, grad_weight = pair_norms(backend, weight, classes, grad)
    wide = computing_dtype(weight)
    assert norms.dtype == wide
    assert grad_weight.dtype == dtype
    wanted, wanted_grad = pair_norms("reference", weight.double(), classes, grad.double())
    tolerance = 1e-12 if wide == torch.float64 else 1e-5
    torch.testing.assert_close(norms.double(), wanted, rtol=tolerance, atol=tolerance)
    own = torch.arange(head[0]) if classes is None else classes
    assert (norms.gather(1, own[:, None]) == 0).all()
    size = wanted_grad.abs().max().item() if wanted_grad.numel() else 1.0
    step = 2**-7 if dtype == torch.bfloat16 else 20 * tolerance
    torch.testing.assert_close(grad_weight.double(), wanted_grad, rtol=0, atol=step * max(size, 1))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("k", [9, 64, 300])
def test_pair_norms_of_small_integers_are_bit_equal(k, backend):
    """Their squares are: a root may be off by its last bit.

    Rows in pairs of opposites, so that a mean row has no rounding either.
    """
    half = torch.randint(-8, 9, (k // 2, 11)).float()
    weight = torch.cat([half, -half, torch.zeros(k % 2, 11)])
    classes = torch.tensor([0, k - 1, k // 2])
    wide = weight.double()
    squares = (wide[classes][:, None] - wide).square().sum(-1)
    norms, _ = pair_norms(backend, weight, classes, torch.zeros(3, k))
    assert torch.equal(norms.double().square().round(), squares)
    whole = squares.sqrt() == squares.sqrt().round()
    assert torch.equal(norms[whole].double(), squares[whole].sqrt())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("k", [6, 40])
def test_a_strided_head_is_its_copy(k, backend):
    weight, classes, grad = make_head(k, 7, [0, 3, 3], torch.float32)
    wanted = pair_norms(backend, weight, classes, grad)
    wide = torch.full((2 * k, 12), math.nan)
    wide[::2, 2:9] = weight
    for strided in (wide[::2, 2:9], weight.T.contiguous().T):
        for got, want in zip(pair_norms(backend, strided, classes, grad), wanted, strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("k", [6, 40])
def test_rows_that_coincide_receive_nothing_from_each_other(k, backend):
    weight = torch.ones(k, 5)
    norms, grad_weight = pair_norms(backend, weight, None, torch.ones(k, k))
    assert (norms == 0).all()
    assert (grad_weight == 0).all()


@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize("k", [6, 50])
def test_pair_norms_write_their_outputs_whole_and_nothing_else(k, backend, monkeypatch):
    for chosen in (None, [0, 4, 4]):
        weight, classes, grad = make_head(k, 9, chosen, torch.float32)
        plain = pair_norms(backend, weight, classes, grad)
        with monkeypatch.context() as patch:
            allocations = Allocations(patch)
            guarded = pair_norms(backend, weight, classes, grad)
            allocations.check()
        for got, want in zip(guarded, plain, strict=True):
            assert torch.equal(got, want)


class Bound:
    def __init__(self, features: Tensor, head_weight: Tensor) -> None:
        self.features = self.total = features
        self.head_weight = head_weight


@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize("name", sorted(MEMBERS))
def test_the_whole_loss_is_the_reference(name, backend):
    (logits, target, *_), grad_loss = make_problem(6, 5, 1)
    results = []
    for which in ("reference", backend):
        z, weight, features = on_device(
            which, (logits, torch.linspace(-1, 1, 20).reshape(5, 4), torch.tensor(0.7))
        )
        leaves = [leaf.detach().requires_grad_() for leaf in (z, weight, features)]
        (t,) = on_device(which, (target,))
        loss = margin_cross_entropy(
            leaves[0], t, Bound(leaves[2], leaves[1]), eps=0.4, scaling=name, reduction="none",
            backend=which,
        )  # fmt: skip
        (cotangent,) = on_device(which, (grad_loss,))
        grads = torch.autograd.grad(
            loss, leaves, cotangent, allow_unused=True, materialize_grads=True
        )
        results.append([t.cpu() for t in (loss, *grads)])
    for got, want in zip(*reversed(results), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_errors_name_the_argument(backend):
    module = module_of(backend)
    problem, _ = make_problem(4, 3, 2)
    *inputs, coefficient = on_device(backend, problem)
    logits, target, row_index, rows = inputs
    for message, member, arguments in (
        ("member", "hinge", (logits, target, row_index, rows, coefficient)),
        ("rows", "lmt", (logits, target, row_index, rows.double(), coefficient)),
        ("target", "lmt", (logits, target.int(), row_index, rows, coefficient)),
        ("coefficient", "lmt", (logits, target, row_index, rows, coefficient[:2])),
        ("logits", "lmt", (logits[:, :0], target, row_index, rows[:, :0], coefficient)),
        ("logits", "lmt", (logits.to("meta"), target, row_index, rows, coefficient)),
        ("rows", "lmt", (logits, target, row_index, rows.to("meta"), coefficient)),
    ):
        with pytest.raises(LmtfastError, match=f"at {message}"):
            module.margin_forward(member, *arguments)
    for head in (logits[0], logits.to("meta"), logits.long()):
        with pytest.raises(LmtfastError, match="at head_weight"):
            module.pair_norm_forward(head, None)
