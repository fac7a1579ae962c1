# SPDX-License-Identifier: MIT
"""What has no global constant, mixes samples, or is not one fixed program is refused by name."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lmtfast as lf
from lmtfast.errors import (
    ArgumentError,
    LmtfastError,
    NotCertifiedError,
    UnsupportedLayerError,
)
from lmtfast.rules.registry import MODULE_RULES, OPERATION_RULES
from tests.cases import Lambda, sampled
from tests.oracles import rayleigh_exceeds
from tests.soundness.operations import OPERATIONS, VARIANTS

lin = nn.Linear


def fn(function, **members) -> Lambda:  # noqa: ANN001, ANN003
    return Lambda(function, **members)


class Counter(nn.Module):
    """Writes to a buffer in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("n", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.n += 1
        return x * 2


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(4, 12)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return F.scaled_dot_product_attention(q, k, v)


# name: (module, input shape, what the message must name)
NO_CONSTANT: dict[str, tuple[nn.Module, tuple[int, ...], str]] = {
    "layer norm": (nn.Sequential(lin(4, 4), nn.LayerNorm(4)), (4,), "'1'"),
    "group norm": (nn.Sequential(nn.Conv2d(2, 4, 1), nn.GroupNorm(2, 4)), (2, 3, 3), "'1'"),
    "instance norm": (nn.Sequential(nn.InstanceNorm2d(2)), (2, 3, 3), "'0'"),
    "rms norm": (nn.Sequential(nn.RMSNorm(4)), (4,), "'0'"),
    "local response": (nn.Sequential(nn.LocalResponseNorm(2)), (2, 3, 3), "'0"),
    "attention": (nn.Sequential(Attention()), (3, 4), "'0'"),
    "multihead": (fn(lambda m, x: m.a(x, x, x)[0], a=nn.MultiheadAttention(4, 2)), (4,), "a"),
    "lstm": (fn(lambda m, x: m.a(x)[0], a=nn.LSTM(3, 4, batch_first=True)), (5, 3), "a"),
    "gru": (fn(lambda m, x: m.a(x)[0], a=nn.GRU(3, 4, batch_first=True)), (5, 3), "a"),
    "softmax": (nn.Sequential(lin(3, 3), nn.Softmax(1)), (3,), "'1'"),
    "log softmax": (nn.Sequential(nn.LogSoftmax(1)), (3,), "'0'"),
    "bilinear": (fn(lambda m, x: m.a(x, x), a=nn.Bilinear(3, 3, 2)), (3,), "a"),
    "glu": (nn.Sequential(nn.GLU()), (4,), "'0'"),
    "square": (fn(lambda m, x: x * x), (3,), "forward"),
    "power": (fn(lambda m, x: x**2), (3,), "forward"),
    "swish by hand": (fn(lambda m, x: x * torch.sigmoid(x)), (3,), "forward"),
    "gate": (fn(lambda m, x: m.a(x) * torch.sigmoid(m.b(x)), a=lin(3, 3), b=lin(3, 3)), (3,), "f"),
    "exp": (fn(lambda m, x: x.exp()), (3,), "forward"),
    "division by a traced tensor": (fn(lambda m, x: x / (1 + x.abs())), (3,), "forward"),
    "one over x": (fn(lambda m, x: 1 / x), (3,), "forward"),
    "normalisation to unit length": (fn(lambda m, x: F.normalize(x)), (3,), "forward"),
    "norm": (fn(lambda m, x: x.norm(dim=1, keepdim=True)), (3,), "forward"),
    "variance": (fn(lambda m, x: x.var(1)), (3,), "forward"),
    "product of entries": (fn(lambda m, x: x.prod(1)), (3,), "forward"),
    "cumulative sum": (fn(lambda m, x: x.cumsum(1)), (3,), "forward"),
    "gram": (fn(lambda m, x: x @ x.transpose(1, 2)), (3, 4), "forward"),
    "W @ x": (fn(lambda m, x: m.w @ x, w=nn.Parameter(torch.ones(3, 3))), (3, 2), "forward"),
    "as_strided": (fn(lambda m, x: x.as_strided((x.shape[0], 3), (4, 2))), (4,), ""),
    "unfold of a tensor": (fn(lambda m, x: x.unfold(1, 2, 1)), (4,), "forward"),
    "unfold of an image": (nn.Sequential(nn.Unfold(2)), (1, 3, 3), "'0'"),
    "fold": (nn.Sequential(nn.Fold((3, 3), 2)), (4, 4), "'0'"),
    "bilinear upsampling": (nn.Sequential(nn.Upsample(scale_factor=2, mode="bilinear")),
                            (1, 2, 2), "'0'"),
    "where": (fn(lambda m, x: torch.where(x > 0, x, 0.1 * x)), (3,), "forward"),
    "comparison": (fn(lambda m, x: (x > 0).float()), (3,), "forward"),
    "sign": (fn(lambda m, x: x.sign()), (3,), "forward"),
    "floor": (fn(lambda m, x: x.floor()), (3,), "forward"),
    "cast to integer": (fn(lambda m, x: x.long().float()), (3,), "forward"),
    "argmax": (fn(lambda m, x: x.argmax(1).float()), (3,), ""),
    "indices of a sort": (fn(lambda m, x: x.sort(1)[1].float()), (3,), ""),
    "indices of a pool": (fn(lambda m, x: m.a(x)[1].float(),
                             a=nn.MaxPool1d(2, return_indices=True)), (1, 4), ""),
    "gather": (fn(lambda m, x: x.gather(1, x.argsort(1))), (3,), ""),
    "index from the input": (fn(lambda m, x: m.w[x.argmax(1)], w=nn.Parameter(torch.eye(3))),
                             (3,), ""),
    "embedding": (fn(lambda m, x: m.a(x.long()), a=nn.Embedding(4, 2)), (3,), "forward"),
    "cosine similarity": (fn(lambda m, x: F.cosine_similarity(x, m.w), w=torch.ones(1, 3)),
                          (3,), ""),
    "a product with a traced weight": (fn(lambda m, x: F.linear(x, m.a(x).t() @ x), a=lin(3, 3)),
                                       (3,), "forward"),
    "a traced bias": (fn(lambda m, x: F.linear(x, m.w, m.a(x)), a=lin(3, 3), w=torch.eye(3)),
                      (3,), "forward"),
    "infinite padding": (fn(lambda m, x: F.pad(x, (1, 1), value=float("inf"))), (3,), "forward"),
    "division by zero": (fn(lambda m, x: x / 0.0), (3,), "forward"),
    "a factor of nan": (fn(lambda m, x: x * float("nan")), (3,), "forward"),
    "in-place write to a slice": (fn(lambda m, x: _write(x)), (4,), "forward"),
    "lp pool": (nn.Sequential(nn.LPPool2d(2, 2)), (1, 4, 4), "'0"),
    "einsum of traced tensors": (fn(lambda m, x: torch.einsum("bi,bj->bij", x, x)), (3,), ""),
}  # fmt: skip

BATCH_MIXING = {
    "mean over the batch": (fn(lambda m, x: x.mean(0, keepdim=True) + x), (3,)),
    "centred over the batch": (fn(lambda m, x: x - x.mean(0)), (3,)),
    "sum over everything": (fn(lambda m, x: x.sum()), (3,)),
    "flip over the batch": (fn(lambda m, x: x.flip(0)), (3,)),
    "roll by one": (fn(lambda m, x: x.roll(1, 0)), (3,)),
    "roll by the example's batch": (fn(lambda m, x: x.roll(2, 0)), (3,)),
    "roll by ten": (fn(lambda m, x: x.roll(10, 0)), (3,)),
    "roll of the flattened": (fn(lambda m, x: x.roll(6)), (3,)),
    "view(-1)": (fn(lambda m, x: x.view(-1)), (3,)),
    "view that joins samples": (fn(lambda m, x: x.view(-1, 3)), (2, 3)),
    "transpose with the batch": (fn(lambda m, x: x.transpose(0, 1)), (3,)),
    "softmax over the batch": (fn(lambda m, x: x.softmax(0)), (3,)),
    "sort over the batch": (fn(lambda m, x: x.sort(0)[0]), (3,)),
    "maximum over the batch": (fn(lambda m, x: x.amax(0, keepdim=True) + x), (3,)),
    "first sample": (fn(lambda m, x: x + x[0]), (3,)),
    "first two samples": (fn(lambda m, x: x[:2]), (3,)),
    "every second sample": (fn(lambda m, x: x[::2]), (3,)),
    "concatenation along the batch": (fn(lambda m, x: torch.cat([x, x])), (3,)),
    "chunks of the batch": (fn(lambda m, x: x.chunk(2)[0]), (3,)),
    "batch as rows of a triangle": (fn(lambda m, x: x.triu(-1)), (3,)),
    "shifted batch": (fn(lambda m, x: F.pad(x, (0, 0, -2, 2))), (3,)),
    "repeated batch": (fn(lambda m, x: x.repeat(2, 1)), (3,)),
    "index along the batch": (fn(lambda m, x: x[[1, 0]]), (3,)),
    "unbatched max pool": (fn(lambda m, x: F.max_pool1d(x, 3, 1)), (5,)),
    "unbatched adaptive pool": (fn(lambda m, x: F.adaptive_max_pool2d(x, 3)), (5, 5)),
    "unbatched conv": (fn(lambda m, x: m.a(x), a=nn.Conv1d(2, 2, 1)), (3,)),
    "batch norm without running statistics": (nn.BatchNorm1d(3, track_running_stats=False), (3,)),
}  # fmt: skip

NOT_ONE_PROGRAM = {
    "branch on a value": (fn(lambda m, x: x if x.sum() > 0 else 2 * x), (3,)),
    "branch on one sample": (fn(lambda m, x: x * 100 if x.shape[0] == 1 else x), (3,)),
    "branch on a large batch": (fn(lambda m, x: x * 100 if x.shape[0] > 64 else x), (3,)),
    "factor of the batch size": (fn(lambda m, x: x * x.shape[0]), (3,)),
    "constant as long as the batch": (fn(lambda m, x: x + torch.ones(x.shape[0], 1)), (3,)),
    "item": (fn(lambda m, x: x * float(x.sum())), (3,)),
    "nonzero": (fn(lambda m, x: x[x > 0]), (3,)),
    "mutated buffer": (Counter(), (3,)),
    "noise": (fn(lambda m, x: x + torch.randn(3)), (3,)),
    "noise like the input": (fn(lambda m, x: x + torch.randn_like(x)), (3,)),
    "random weight": (fn(lambda m, x: F.linear(x, torch.rand(2, 3))), (3,)),
    "dropout that never stops": (fn(lambda m, x: F.dropout(x, 0.5, training=True)), (3,)),
    "two outputs": (fn(lambda m, x: (x, 2 * x)), (3,)),
    "a dictionary of outputs": (fn(lambda m, x: {"a": x, "b": x}), (3,)),
    "no output": (fn(lambda m, x: None), (3,)),
    "constant output": (fn(lambda m, x: m.w, w=nn.Parameter(torch.ones(3))), (3,)),
    "input changed in place": (fn(lambda m, x: x.add_(1.0)), (3,)),
    "a wrong shape": (nn.Linear(4, 2), (3,)),
}


def _write(x: Tensor) -> Tensor:
    y = x.clone()
    y[:, 1:3] = 2 * y[:, :2]
    return y


@pytest.mark.parametrize("name", NO_CONSTANT)
def test_what_has_no_global_constant_is_refused_by_name(name: str) -> None:
    module, shape, place = NO_CONSTANT[name]
    with pytest.raises(LmtfastError) as caught:
        lf.trace(module.eval(), shape)
    assert place in str(caught.value.where)
    assert caught.value.remedy
    assert "Do this" in str(caught.value)


@pytest.mark.parametrize("name", BATCH_MIXING)
def test_what_mixes_the_samples_of_a_batch_is_refused(name: str) -> None:
    module, shape = BATCH_MIXING[name]
    with pytest.raises(UnsupportedLayerError):
        lf.trace(module.eval(), shape)


@pytest.mark.parametrize("name", NOT_ONE_PROGRAM)
def test_what_is_not_one_fixed_program_is_refused(name: str) -> None:
    module, shape = NOT_ONE_PROGRAM[name]
    with pytest.raises(UnsupportedLayerError):
        lf.trace(module.eval(), shape)


@pytest.mark.parametrize("shape", [(), (0,), (3, -1), 3, None, "ab", (2.5, "x")])
def test_what_is_no_input_shape_is_refused(shape: object) -> None:
    with pytest.raises((ArgumentError, ValueError)):
        lf.trace(nn.ReLU(), shape)  # type: ignore[arg-type]


# -- operations and arguments ----------------------------------------------------------------------

# Every sixth in a default run; each of them costs a trace.
OFTEN = 6


def judge(module: nn.Module, shape: tuple[int, ...], named: tuple[str, ...]) -> bool:
    """Whether the bound was refused; a refusal has four parts and a name, a bound is at least every
    Jacobian found."""
    try:
        total = float(lf.certified_bound(module, shape).total)
    except LmtfastError as error:
        refusal = error
    else:
        refusal = None
    if refusal is not None:
        assert all((refusal.expected, refusal.got, refusal.where, refusal.remedy))
        assert "Do this" in str(refusal)
        assert not named or any(n in refusal.got for n in named), refusal.got
        return True
    for scale in (0.01, 1.0, 30.0):
        x = scale * torch.randn(1, *shape, dtype=torch.float64)
        jacobian = torch.autograd.functional.jacobian(module, x).reshape(-1, x.numel())
        assert jacobian.isfinite().all()
        # Toward zero, past every rounding in an entry: of a nonnegative matrix that is below it.
        rounded = bool((jacobian >= 0).all()) and bool((jacobian % 2.0**-16 != 0).any())
        below = jacobian * (1 - 2.0**-48) if rounded else jacobian
        assert not rayleigh_exceeds(below.numpy(), total)
    return False


def test_the_tables_have_the_sizes_they_promise() -> None:
    assert len(OPERATIONS) >= 150
    assert len(VARIANTS) >= 40


@pytest.mark.parametrize("name", sampled(OPERATIONS, OFTEN))
def test_an_operation_without_a_rule_is_refused_by_name(name: str) -> None:
    case = OPERATIONS[name]
    refused = judge(case.build().double(), case.shape, case.named)
    # Two of the table need no rule of their own: the identity, and a difference of known parts.
    assert refused or name in ("torch.conj_physical", "F.tanhshrink")


@pytest.mark.parametrize("name", sampled(VARIANTS, OFTEN // 2))
def test_an_unusual_argument_is_refused_or_bounded(name: str) -> None:
    module = VARIANTS[name].build().double().eval().requires_grad_(False)
    for tensor in module.parameters():
        tensor.copy_((torch.randn_like(tensor) * 256).round() / 256)
    judge(module, VARIANTS[name].shape, ())


def test_a_cast_to_integers_is_refused_wherever_it_hides() -> None:
    """A sum or a ``type_as`` may truncate as well: no constant, though the difference quotients of
    nearby points are 0."""
    for name in ("sum into integers", "integer by type_as"):
        with pytest.raises(UnsupportedLayerError, match="not continuous"):
            lf.trace(VARIANTS[name].build().eval(), (4,))


# -- modules with rules of their own ---------------------------------------------------------------


class Own(nn.Module):
    """Twice the sine, in two calls."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x) * 2.0


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x * x, x.exp()


class Both(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x * y


LITERALS = {
    "sum": lambda x, n: (x + n) - 2**53, "difference": lambda x, n: n - x,
    "weighted sum": lambda x, n: torch.add(x, x.relu(), alpha=n),
    "product": lambda x, n: x * n, "quotient": lambda x, n: x / n,
    "limit": lambda x, n: torch.clamp(x, min=n) - 2**53, "slope": lambda x, n: F.leaky_relu(x, n),
}  # fmt: skip


@pytest.mark.parametrize("name", LITERALS)
def test_an_integer_that_is_no_float_is_refused(name: str) -> None:
    """Its float64 is smaller, and so would be a product's constant, or a sum's exact value."""
    module = fn(lambda m, x: LITERALS[name](x, -(2**53) - 1)).eval()
    with pytest.raises(UnsupportedLayerError, match="no float64"):
        lf.trace(module, (3,))
    exact = lf.certified_bound(fn(lambda m, x: LITERALS[name](x, 2**53)).eval(), (3,))
    assert exact.total >= {"product": 2.0**53, "slope": 2.0**53}.get(name, 0.0)


TENSORS = {
    "product": lambda x, n: x * n, "limit": lambda x, n: torch.maximum(x, n) - 2.0**53,
    "sum": lambda x, n: (x + n) - 2.0**53, "cast": lambda x, n: torch.maximum(x, n.double()),
    "weight": lambda x, n: F.linear(x.double(), n.expand(3, 3).double()),
}  # fmt: skip


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("n", [2**53 + 1, -(2**53) - 1, 2**63 - 1, 2**53, -(2**53)])
def test_integer_tensors_beyond_the_floats_are_refused(name: str, kept: bool, n: int) -> None:
    """Buffers and constants alike: a limit was enclosed wrongly, with an error of zero."""
    values = torch.tensor([n, 1, 0])
    module = fn(lambda m, x: TENSORS[name](x, m.n)).eval()
    if kept:
        module.register_buffer("n", values)
    else:
        module.n = values
    subject = module, [torch.zeros(1, 3)]
    if abs(n) > 2**53:
        with pytest.raises(NotCertifiedError, match="up to 2.53"):
            lf.certify(*subject, input_shape=(3,), input_range=(0.0, 1.0))
    else:
        found = lf.certify(*subject, input_shape=(3,), input_range=(0.0, 1.0))
        assert found.logits.shape == (1, 3)


def test_ends_of_slices_may_be_larger_than_any_size() -> None:
    assert lf.certified_bound(fn(lambda m, x: x[:, 1 : 2**62 + 1]).eval(), (3,)).total >= 1.0


@pytest.mark.usefixtures("registries")
def test_a_registered_module_counts_once_per_call() -> None:
    lf.register_rule(Own)(lambda module: 3.0)
    own = Own()
    for function, truth in (
        (lambda m, x: m.a(x), 3.0),
        (lambda m, x: m.a(m.a(x)), 9.0),
        (lambda m, x: m.a(x) + m.a(2 * x), 9.0),
        (lambda m, x: m.a(x) + x, 4.0),
        (lambda m, x: m.a(m.a(m.a(x)) + x), 30.0),
        (lambda m, x: torch.relu(m.a(-x)) * 0.5, 1.5),
    ):
        assert lf.certified_bound(Lambda(function, a=own).eval(), (2,)).total == truth


@pytest.mark.usefixtures("registries")
def test_what_a_module_rule_cannot_vouch_for_is_refused() -> None:
    for cls in (Own, Pair, Both):
        lf.register_rule(cls)(lambda module: 1.0)
    hooked, prehooked = Own(), Own()
    hooked.register_forward_hook(lambda m, i, o: 7 * o)
    prehooked.register_forward_pre_hook(lambda m, i: (7 * i[0],))
    for module in (
        Lambda(lambda m, x: m.a(x), a=hooked),
        Lambda(lambda m, x: m.a(x), a=prehooked),
        Lambda(lambda m, x: sum(m.a(x)), a=Pair()),
        Lambda(lambda m, x: m.a(x, torch.relu(x)), a=Both()),
    ):
        with pytest.raises(UnsupportedLayerError):
            lf.trace(module.eval(), (2,))


@pytest.mark.usefixtures("registries")
@pytest.mark.parametrize("constant", [-1.0, float("nan"), float("inf")])
def test_a_module_rule_must_return_a_constant(constant: float) -> None:
    lf.register_rule(Own)(lambda module: constant)
    with pytest.raises(UnsupportedLayerError, match="returned"):
        lf.trace(nn.Sequential(Own()), (2,))


@pytest.mark.usefixtures("registries")
def test_a_rule_is_never_replaced_and_not_inherited() -> None:
    lf.register_rule(Own)(lambda module: 3.0)
    with pytest.raises(ArgumentError):
        lf.register_rule(Own)(lambda module: 1.0)
    with pytest.raises(ArgumentError):
        lf.register_rule(torch.ops.aten.relu.default)(lambda call: call.value("self"))
    with pytest.raises(ArgumentError):
        lf.register_rule("relu")  # type: ignore[arg-type]
    heir = type("Heir", (Own,), {})
    # Traced through: sine has slope 1, the factor is 2.
    assert lf.certified_bound(nn.Sequential(heir()).eval(), (2,)).total == 2.0
    assert MODULE_RULES
    assert OPERATION_RULES
