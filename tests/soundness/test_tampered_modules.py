# SPDX-License-Identifier: MIT
"""Modules that pretend: what Python does between a call and its tensors is certified or refused.

The judge is the module itself: wherever ``certify`` answers, the constant is at least every
difference quotient of the module as it is called, and its logits are the module's own.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import lmtfast as lf
from lmtfast.errors import LmtfastError
from tests.cases import sampled
from tests.classifiers import UNIT

Tamper = Callable[[nn.Sequential], Any]


def base() -> nn.Sequential:
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double().eval()


class Steeper(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 5 * super().forward(x)


class SteeperOnce(nn.Linear):
    """Five times as steep from the third call on."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x) * (5.0 if self.calls > 3 else 1.0)


class OnlyWhenRun(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if torch.compiler.is_compiling() else 5 * y


class OnlyWithGradients(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return 5 * y if not torch.is_grad_enabled() and type(x) is Tensor else y


class LyingTensor(nn.Linear):
    """``weight`` is one tensor to ``named_parameters`` and another to ``forward``."""

    def __getattr__(self, name: str) -> Any:
        found = super().__getattr__(name)
        return 5 * found if name == "weight" else found


class LyingParameters(nn.Linear):
    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        for name, p in super().named_parameters(*args, **kwargs):
            yield name, nn.Parameter(p.detach() / 5)


class LyingBuffers(nn.BatchNorm1d):
    def named_buffers(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Tensor]]:
        for name, b in super().named_buffers(*args, **kwargs):
            yield name, b * 5 if b.is_floating_point() else b


class OwnFunction(torch.autograd.Function):
    """A custom function: what it computes is nobody's rule."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 5 * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def replaced(layer: type[nn.Module], position: int = 0) -> Tamper:
    def tamper(model: nn.Sequential) -> None:
        old = model[position]
        new = layer(*old.weight.shape[::-1]).double().eval()
        new.load_state_dict(old.state_dict())
        model[position] = new

    return tamper


def set_forward(function: Callable[..., Tensor], where: int | None = 1) -> Tamper:
    def tamper(model: nn.Sequential) -> None:
        target = model if where is None else model[where]
        target.forward = function  # type: ignore[method-assign]

    return tamper


def patched_class(model: nn.Sequential) -> None:
    model[1].__class__ = type("ReLU", (nn.ReLU,), {"forward": lambda self, x: 5 * F.relu(x)})


def patched_call(model: nn.Sequential) -> None:
    kind = type(model)
    model.__class__ = type(
        "Sequential", (kind,), {"__call__": lambda self, x: 5 * nn.Module.__call__(self, x)}
    )


def registered_parameter_twice(model: nn.Sequential) -> None:
    model[0].weight = nn.Parameter(model[0].weight.detach())
    model.register_parameter("again", model[0].weight)


def batch_norm_that_lies(model: nn.Sequential) -> None:
    model.insert(1, LyingBuffers(4).double().eval())
    model[1].running_var.fill_(0.01)


def closure(model: nn.Sequential) -> None:
    weight = 5 * model[0].weight.detach().clone()
    model[0].forward = lambda x: F.linear(x, weight)  # type: ignore[method-assign]


def alternating(model: nn.Sequential) -> None:
    state = {"n": 0}

    def forward(x: Tensor) -> Tensor:
        state["n"] += 1
        return F.relu(x) * (5.0 if state["n"] % 2 else 1.0)

    model[1].forward = forward  # type: ignore[method-assign]


def by_value(x: Tensor) -> Tensor:
    return 5 * x if float(x.sum()) > 0 else x


def by_batch(x: Tensor) -> Tensor:
    return 5 * x if x.shape[0] > 40 else x


TAMPERED: dict[str, Tamper] = {
    "subclass with another forward": replaced(Steeper),
    "subclass that counts its calls": replaced(SteeperOnce),
    "steeper when run": replaced(OnlyWhenRun),
    "steeper without gradients": replaced(OnlyWithGradients),
    "attribute that lies": replaced(LyingTensor),
    "parameters that lie": replaced(LyingParameters),
    "buffers that lie": batch_norm_that_lies,
    "own autograd function": set_forward(lambda x: OwnFunction.apply(x)),
    "forward of an instance": set_forward(lambda x: 5 * F.relu(x)),
    "forward of the head": set_forward(lambda x: x[:, :2] * 5, 2),
    "bound method": lambda m: setattr(m[1], "forward", types.MethodType(
        lambda self, x: 5 * F.relu(x), m[1])),
    "class of an instance": patched_class,
    "call of the model": patched_call,
    "closure over another weight": closure,
    "alternating": alternating,
    "by value": set_forward(by_value),
    "by batch size": set_forward(by_batch),
    "by dtype": set_forward(lambda x: 5 * x if x.dtype == torch.float64 else x),
    "by type of tensor": set_forward(lambda x: 5 * x if type(x) is Tensor else x),
    "by NumPy": set_forward(lambda x: torch.from_numpy(5 * x.detach().numpy())),
    "by data": set_forward(lambda x: x.data * 5),
    "by no_grad": set_forward(torch.no_grad()(lambda x: x * 5)),
    "random factor": set_forward(lambda x: x * (1 + 4 * torch.rand(1, dtype=x.dtype))),
    "training flag of its own": lambda m: setattr(m[1], "forward", lambda x: F.dropout(x, 0.9)),
    "weight registered twice": registered_parameter_twice,
    "in-place on the input": set_forward(lambda x: x.mul_(5)),
    "returns its input's view": set_forward(lambda x: x.view_as(x) * 5),
    "jitted part": lambda m: m.__setitem__(
        1, torch.jit.trace(nn.ReLU(), torch.rand(2, 4).double())),
    "compiled part": lambda m: setattr(m[1], "forward", torch.compiler.disable(
        lambda x: 5 * F.relu(x))),
}  # fmt: skip


def hooked(kind: str, hook: Callable[..., Any], where: int = 1, **options: Any) -> Tamper:
    return lambda m: getattr(m[where], kind)(hook, **options)


class Scaled(nn.Module):
    def __init__(self, factor: float = 5.0) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, w: Tensor) -> Tensor:
        return w * self.factor


HOOKED: dict[str, Tamper] = {
    "forward hook": hooked("register_forward_hook", lambda m, i, o: 5 * o),
    "forward hook with kwargs": hooked(
        "register_forward_hook", lambda m, i, k, o: 5 * o, with_kwargs=True),
    "forward hook, always called": hooked(
        "register_forward_hook", lambda m, i, o: 5 * o, always_call=True),
    "forward hook, prepended": hooked(
        "register_forward_hook", lambda m, i, o: 5 * o, prepend=True),
    "forward hook in place": hooked("register_forward_hook", lambda m, i, o: o.mul_(5)),
    "forward pre-hook": hooked("register_forward_pre_hook", lambda m, i: (5 * i[0],)),
    "forward pre-hook with kwargs": hooked(
        "register_forward_pre_hook", lambda m, i, k: ((5 * i[0],), k), with_kwargs=True),
    "pre-hook that edits the weight": hooked(
        "register_forward_pre_hook", lambda m, i: [m.weight.data.mul_(1.5)].clear(), 0),
    "hook on the model": lambda m: m.register_forward_hook(lambda a, i, o: 5 * o),
    "backward hook": hooked("register_full_backward_hook", lambda m, i, o: None),
    "state dict hook": hooked("register_state_dict_post_hook", lambda *a: None, 0),
    "two hooks": lambda m: [m[1].register_forward_hook(lambda a, i, o: 3 * o) for _ in range(2)],
    "parametrization": lambda m: parametrize.register_parametrization(m[0], "weight", Scaled()),
    "two parametrizations": lambda m: [
        parametrize.register_parametrization(m[0], "weight", Scaled(2.0)) for _ in range(2)],
    "shared parametrization": lambda m: [
        parametrize.register_parametrization(m[i], "weight", shared)
        for shared in [Scaled()] for i in (0, 2)],
    "parametrized bias": lambda m: parametrize.register_parametrization(m[0], "bias", Scaled()),
    "weight norm": lambda m: parametrizations.weight_norm(m[0]),
    "weight norm of hooks": lambda m: nn.utils.weight_norm(m[0]),
    "spectral norm": lambda m: parametrizations.spectral_norm(m[0]),
    "spectral norm of hooks": lambda m: nn.utils.spectral_norm(m[0]),
    "orthogonal": lambda m: parametrizations.orthogonal(m[2]),
    "pruned": lambda m: prune.l1_unstructured(m[0], "weight", 0.5),
    "pruned twice": lambda m: [prune.random_unstructured(m[0], "weight", 0.3) for _ in range(2)],
}  # fmt: skip


@contextmanager
def everywhere(hook: str) -> Iterator[None]:
    """A hook on every module of the process."""
    register = getattr(nn.modules.module, hook)
    handle = register(lambda m, *a: 5 * a[-1] if isinstance(a[-1], Tensor) else (5 * a[-1][0],))
    try:
        yield
    finally:
        handle.remove()


def test_the_tables_have_the_sizes_they_promise() -> None:
    assert len(TAMPERED) >= 25
    assert len(HOOKED) >= 20


def judge(model: nn.Module) -> bool:
    """Whether the model was refused; else its certificate speaks of what the model computes."""
    x = torch.rand(6, 3, dtype=torch.float64)
    try:
        certificate = lf.certify(model, x, input_shape=(3,), input_range=UNIT)
    except LmtfastError as error:
        refusal = error
    else:
        refusal = None
    if refusal is not None:
        assert all((refusal.expected, refusal.got, refusal.where, refusal.remedy))
        return True
    a, b = torch.rand(64, 3, dtype=torch.float64), torch.rand(64, 3, dtype=torch.float64)
    with torch.no_grad():
        moved = (model(a.clone()) - model(b.clone())).norm(dim=1) / (a - b).norm(dim=1)
        own = model(x.clone())
    assert float(moved.max() * (1 - 1e-9)) <= certificate.total
    assert certificate.logits is not None
    away = (own - torch.from_numpy(certificate.logits)).abs().amax(1)
    assert bool((away <= 1e-9 * own.abs().max()).all())
    return False


OFTEN = 5
EVERY = {**TAMPERED, **HOOKED}


@cache
def honest() -> lf.Certificate:
    x = torch.rand(6, 3, dtype=torch.float64)
    return lf.certify(base(), x, input_shape=(3,), input_range=UNIT)


@pytest.mark.parametrize("name", sampled(EVERY, OFTEN))
def test_a_module_that_pretends_is_certified_as_it_runs_or_refused(name: str) -> None:
    certificate, model, x = honest(), base(), torch.rand(4, 3, dtype=torch.float64)
    with torch.no_grad():
        before = model(x.clone())
        EVERY[name](model)
        after = model.eval()(x.clone())  # hooks that write a weight have run
    if not torch.allclose(before, after, rtol=1e-6):
        # A certificate of the module as it was speaks of another one.
        with pytest.raises(LmtfastError):
            certificate.verify(model)
    judge(model)


@pytest.mark.parametrize(
    "hook", ["register_module_forward_hook", "register_module_forward_pre_hook"]
)
def test_hooks_on_every_module_are_part_of_the_model(hook: str) -> None:
    model = base()
    plain = lf.certified_bound(copy.deepcopy(model), (3,)).total
    with everywhere(hook):
        try:
            assert lf.certified_bound(model, (3,)).total >= 100 * plain
        except LmtfastError:
            return
        judge(model)
