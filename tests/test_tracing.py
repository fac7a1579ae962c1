# SPDX-License-Identifier: MIT
"""However a network is written (functional, hooked, parametrized, tied, in place), the traced bound
is that of the function it computes."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import lmtfast as lf
from lmtfast.errors import LmtfastError, NonFiniteError, NotCertifiedError, TrainModeError
from lmtfast.tracing import trace_model
from tests.cases import Lambda, unit_matrix
from tests.networks import IMAGE, ResNet, randomised, steepest
from tests.oracles import svd_norm

# Rounding of the oracle's own float64 matrix products.
ROUNDING = 1e-12


class Negated(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return -2 * weight.tril()


def _tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    return model


def _hooked() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3))
    model[0].register_forward_hook(lambda m, i, o: 3 * o)
    model[1].register_forward_pre_hook(lambda m, i: (-5 * i[0],))
    return model


def _old_style(norm) -> nn.Module:  # noqa: ANN001
    return nn.Sequential(norm(nn.Linear(4, 3)))


# Linear functions, so that the bound can be compared with the dense matrix from both sides.
LINEAR: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "tied weights": (_tied(), (4,)),
    "weight of one layer, bias of another": (
        Lambda(lambda m, x: F.linear(x, m.a.weight, m.b.bias), a=nn.Linear(4, 3),
               b=nn.Linear(4, 3)), (4,)),
    "transposed weight tying": (
        Lambda(lambda m, x: F.linear(m.a(x), m.a.weight.t()), a=nn.Linear(4, 3)), (4,)),
    "buffer as weight": (
        Lambda(lambda m, x: F.conv1d(x, m.w, padding=1), w=torch.randn(2, 1, 3)), (1, 5)),
    "literal as weight": (
        Lambda(lambda m, x: F.linear(x, torch.tensor([[1.0, 2.0], [3.0, -4.0]], dtype=x.dtype))),
        (2,)),
    "functional batch norm": (
        Lambda(lambda m, x: F.batch_norm(m.a(x), m.mean, m.var, eps=1e-3), a=nn.Linear(4, 3),
               mean=torch.randn(3), var=torch.rand(3) + 0.1), (4,)),
    "weight from a computation": (
        Lambda(lambda m, x: F.linear(x, (m.w + m.w.t()) / 2), w=nn.Parameter(torch.randn(4, 4))),
        (4,)),
    "chunk of a weight": (
        Lambda(lambda m, x: F.linear(x, m.w.chunk(2)[1]), w=nn.Parameter(torch.randn(4, 4))), (4,)),
    "row of a weight": (
        Lambda(lambda m, x: F.linear(x, m.w[1:3]), w=nn.Parameter(torch.randn(4, 4))), (4,)),
    "stacked weights": (
        Lambda(lambda m, x: F.linear(x, torch.cat([m.a, -m.a])), a=nn.Parameter(torch.randn(2, 4))),
        (4,)),
    "weight norm": (nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 3))), (4,)),
    "weight norm of a conv": (
        nn.Sequential(parametrizations.weight_norm(nn.Conv1d(2, 3, 3))), (2, 5)),
    "spectral norm": (nn.Sequential(parametrizations.spectral_norm(nn.Linear(4, 3))), (4,)),
    "orthogonal, householder": (
        nn.Sequential(parametrizations.orthogonal(nn.Linear(4, 3), orthogonal_map="householder")),
        (4,)),
    "orthogonal, cayley": (
        nn.Sequential(parametrizations.orthogonal(nn.Linear(4, 4), orthogonal_map="cayley")), (4,)),
    "orthogonal, exponential": (
        nn.Sequential(parametrizations.orthogonal(nn.Linear(4, 4), orthogonal_map="matrix_exp")),
        (4,)),
    "own parametrization": (nn.Sequential(nn.Linear(4, 4)), (4,)),
    "old weight norm": (_old_style(nn.utils.weight_norm), (4,)),
    "hooks": (_hooked(), (4,)),
    "in-place operations": (
        Lambda(lambda m, x: m.a(x).mul_(-3.0).add_(x).neg_(), a=nn.Linear(4, 4)), (4,)),
    "casts": (Lambda(lambda m, x: m.a(x.float().double()).to(torch.float64), a=nn.Linear(4, 3)),
              (4,)),
    "dropout": (nn.Sequential(nn.Dropout(0.9), nn.Linear(4, 3), nn.AlphaDropout(0.5)), (4,)),
    "detach, clone, contiguous": (
        Lambda(lambda m, x: m.a(x.clone().contiguous()), a=nn.Linear(4, 3)), (4,)),
    "batch norm 1d after linear": (
        nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, affine=False)), (4,)),
    "batch norm on sequences": (nn.Sequential(nn.Conv1d(2, 3, 1), nn.BatchNorm1d(3)), (2, 4)),
    "negative gains": (
        Lambda(lambda m, x: -(m.a(-x) * -0.5) / -3.0, a=nn.Linear(4, 3)), (4,)),
    "alpha of an addition": (
        Lambda(lambda m, x: torch.sub(torch.add(x, m.a(x), alpha=-2.5), x, alpha=3),
               a=nn.Linear(4, 4)), (4,)),
    "rsub": (Lambda(lambda m, x: 1.0 - m.a(x), a=nn.Linear(4, 4)), (4,)),
    "same module twice": (Lambda(lambda m, x: m.a(m.a(x)), a=nn.Linear(4, 4)), (4,)),
    "same module on two inputs": (Lambda(lambda m, x: m.a(x) + m.a(-2 * x), a=nn.Linear(4, 4)),
                                  (4,)),
    "einops-like patches": (
        Lambda(lambda m, x: m.a(x.reshape(-1, 1, 2, 2, 2, 2).permute(0, 2, 4, 1, 3, 5)
                                .reshape(-1, 4, 4)), a=nn.Linear(4, 3)), (1, 4, 4)),
    "stack and unbind": (
        Lambda(lambda m, x: torch.stack([m.a(x), x], 2).flatten(1), a=nn.Linear(4, 4)), (4,)),
    "channels last": (
        Lambda(lambda m, x: m.a(x.to(memory_format=torch.channels_last)).flatten(1),
               a=nn.Conv2d(2, 3, 2)), (2, 3, 3)),
}  # fmt: skip
parametrize.register_parametrization(LINEAR["own parametrization"][0][0], "weight", Negated())


@pytest.mark.parametrize("name", LINEAR)
def test_the_traced_map_is_the_function(name: str) -> None:
    module, shape = LINEAR[name]
    module = module.double().eval()
    truth = svd_norm(unit_matrix(module, shape))
    bound = lf.certified_bound(module, shape)
    assert bound.total >= truth * (1 - ROUNDING)
    # One region is bounded as a whole; a head is split off, and then a product is all there is:
    # also of one operator with itself.
    if len(bound.per_operator) == 1 and name != "same module twice":
        assert bound.total <= truth * (1 + 1e-9)


def test_old_spectral_norm_is_bounded_or_refused() -> None:
    module = _old_style(nn.utils.spectral_norm).double().eval()
    try:
        total = lf.certified_bound(module, (4,)).total
    except LmtfastError:
        return
    assert total >= svd_norm(unit_matrix(module, (4,))) * (1 - ROUNDING)


def test_tracing_leaves_the_model_as_it_was() -> None:
    model = ResNet().train()
    model.bn1.eval()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    lf.trace(model, IMAGE)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_a_failed_trace_restores_the_mode_too() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)).train()
    with pytest.raises(LmtfastError):
        lf.trace(model, (3,))
    assert all(m.training for m in model.modules())


def test_every_way_to_change_a_weight_changes_the_bound() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2)).double().eval()
    first = model[0].weight
    others = copy.deepcopy(model.state_dict())
    others["0.weight"] *= 5

    def step() -> None:
        first.grad = -first.detach()
        torch.optim.SGD([first], 1.0).step()

    def replace() -> None:
        model[0].weight = nn.Parameter(3 * model[0].weight.detach())

    routes = {
        "in place": lambda: first.detach().mul_(2),
        "data": lambda: setattr(first, "data", first.data * 2),
        "no_grad": lambda: torch.no_grad()(lambda: first.mul_(2))(),
        "optimizer": step,
        "load_state_dict": lambda: model.load_state_dict(others),
        "entry": lambda: first.data.__setitem__((0, 0), 1e3),
        "new parameter": replace,
        "numpy": lambda: first.detach().numpy().__imul__(2),
    }
    bound = lf.NetworkBound(model, (3,), engine="operator")
    for name, route in routes.items():
        before = (lf.certified_bound(model, (3,)).total, float(bound.converge(50).total))
        route()
        first = model[0].weight
        after = (lf.certified_bound(model, (3,)).total, float(bound.converge(50).total))
        assert before[0] != after[0], name
        assert before[1] != after[1], name
        truth = svd_norm(model[0].weight.detach().numpy()) * svd_norm(
            model[2].weight.detach().numpy()
        )
        assert after[0] >= truth * (1 - ROUNDING), name


def test_a_certificate_needs_eval_mode_values_and_finite_weights() -> None:
    for module in (nn.BatchNorm1d(3), nn.Dropout(), nn.Linear(3, 3)):
        with pytest.raises(TrainModeError):
            lf.certified_bound(nn.Sequential(module).train(), (3,))
    partly = nn.Sequential(nn.Linear(3, 3), nn.Dropout()).eval()
    partly[1].train()
    with pytest.raises(TrainModeError, match="'1'"):
        lf.certified_bound(partly, (3,))
    with pytest.raises(NotCertifiedError, match="meta"):
        lf.certified_bound(nn.Linear(3, 3, device="meta").eval(), (3,))
    for value in (math.nan, math.inf, -math.inf):
        for target in ("weight", "bias", "running_var"):
            model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).eval()
            tensor = model[1].running_var if target == "running_var" else getattr(model[0], target)
            tensor.data[0] = value
            with pytest.raises(NonFiniteError):
                lf.certified_bound(model, (3,))
    negative = nn.BatchNorm1d(3).eval()
    negative.running_var[0] = -1.0
    with pytest.raises(NonFiniteError):
        lf.certified_bound(negative, (3,))


def test_extreme_and_empty_weights() -> None:
    for exponent in (-149, -140, -60, 0, 60, 120):
        layer = nn.Linear(2, 2, bias=False).eval()
        layer.weight.data = torch.diag(torch.tensor([1.0, 0.75])) * 2.0**exponent
        truth = 2.0**exponent
        assert truth <= lf.certified_bound(layer, (2,)).total <= truth * (1 + 1e-9)
    pair = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 2, bias=False))
    pair[0].weight.data = torch.eye(2) * 2.0**-120
    pair[2].weight.data = torch.eye(2) * 2.0**120
    assert 1.0 <= lf.certified_bound(pair.eval(), (2,)).total <= 1 + 1e-9
    zero = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    for parameter in zero.parameters():
        parameter.data.zero_()
    bound = lf.certified_bound(zero, (3,))
    assert (bound.total, bound.features) == (0.0, 0.0)
    assert not bound.pairs.any()
    huge = nn.Sequential(*(nn.Linear(1, 1, bias=False) for _ in range(3))).eval()
    for layer in huge:
        layer.weight.data.fill_(1e38)
    assert lf.certified_bound(huge, (1,)).total >= 1e113


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_narrow_weights_are_taken_as_they_are_stored(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).to(dtype).eval()
    wide = copy.deepcopy(model).double()
    assert lf.certified_bound(model, (4,)).total == lf.certified_bound(wide, (4,)).total
    best, _ = steepest(wide, (4,))
    assert best * (1 - ROUNDING) <= lf.certified_bound(model, (4,)).total


def test_meta_models_are_planned_like_real_ones() -> None:
    with torch.device("meta"):
        empty = ResNet()
    plan = lf.trace(empty, IMAGE)
    assert plan.fingerprint == lf.trace(ResNet(), IMAGE).fingerprint
    assert lf.NetworkBound(empty, IMAGE, engine="operator").state.iterates.is_meta


def test_one_pixel_and_one_class() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(4, 1),
    )  # fmt: skip
    model = randomised(model, 3)
    bound = lf.certified_bound(model, (3, 1, 1))
    best, _ = steepest(model, (3, 1, 1))
    assert best * (1 - ROUNDING) <= bound.total
    assert bound.pairs.tolist() == [[0.0]]


# -- the head --------------------------------------------------------------------------------------


def _head(function, **extra: Tensor) -> nn.Module:  # noqa: ANN001
    module = Lambda(function, body=nn.Linear(4, 5), head=nn.Linear(5, 3), **extra)
    return randomised(module, 7)


HEADS = {
    "plain": (lambda m, x: m.head(torch.relu(m.body(x))), True),
    "scaled": (lambda m, x: m.head(torch.relu(m.body(x))) * 0.3, True),
    "scaled twice, inexactly": (lambda m, x: m.head(torch.relu(m.body(x))) * 0.1 * 0.3, True),
    "negated and divided": (lambda m, x: -m.head(torch.relu(m.body(x))) / 7, True),
    "scaled per class": (lambda m, x: m.head(torch.relu(m.body(x))) * m.s, True),
    "divided per class": (lambda m, x: m.head(torch.relu(m.body(x))) / m.s, True),
    "shifted": (lambda m, x: m.head(torch.relu(m.body(x))) + m.s, True),
    "reshaped": (lambda m, x: m.head(torch.relu(m.body(x))).unflatten(1, (3, 1)).flatten(1), True),
    "permuted": (lambda m, x: m.head(torch.relu(m.body(x)))[:, [2, 0, 1]], False),
    "reversed": (lambda m, x: m.head(torch.relu(m.body(x))).flip(1), False),
    "cut": (lambda m, x: m.head(torch.relu(m.body(x)))[:, :2], False),
    "nonlinear": (lambda m, x: torch.tanh(m.head(torch.relu(m.body(x)))), False),
    "two heads added": (lambda m, x: m.head(y := torch.relu(m.body(x))) + m.head(-y * 2), False),
    "added to itself": (lambda m, x: (y := m.head(torch.relu(m.body(x)))) + y, False),
    "used inside as well": (
        lambda m, x: m.head(F.pad(torch.relu(m.head(torch.relu(m.body(x)))), (1, 1))), True),
    "no body": (lambda m, x: m.head(F.pad(x, (0, 1))), True),
    "on a sequence": (lambda m, x: m.head(torch.relu(m.body(x)).unsqueeze(1)).squeeze(1), False),
    "mean of logits": (
        lambda m, x: m.head(torch.relu(m.body(torch.stack([x, 2 * x], 1)))).mean(1), False),
}  # fmt: skip


@pytest.mark.parametrize("name", HEADS)
def test_features_and_pairs_survive_what_happens_around_the_head(name: str) -> None:
    function, split = HEADS[name]
    model = _head(function, s=nn.Parameter(torch.ones(3)))
    bound = lf.certified_bound(model, (4,))
    best, pairs = steepest(model, (4,), points=24)
    assert best * (1 - ROUNDING) <= bound.total
    assert bound.pairs.shape == pairs.shape
    assert bool((pairs * (1 - ROUNDING) <= bound.pairs).all())
    assert (bound.head_weight is not None) == split or name in ("added to itself", "on a sequence")


def test_a_shared_module_is_one_operator() -> None:
    model = Lambda(
        lambda m, x: m.head(torch.relu(m.a(torch.relu(m.a(x))))), a=nn.Linear(4, 4),
        head=nn.Linear(4, 2),
    )  # fmt: skip
    graph = trace_model(model, (4,)).graph
    assert len(graph.operators) == 2
    model = randomised(model, 5)
    best, _ = steepest(model, (4,))
    assert best * (1 - ROUNDING) <= lf.certified_bound(model, (4,)).total
