# SPDX-License-Identifier: MIT
"""Ways to change a model behind the back of a bound, and twenty small models to change."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune, stateless
from torch.nn.utils.fusion import fuse_conv_bn_eval

from lmtfast.nn import MinMax, Normalize
from tests.networks import BasicBlock, LiResBlock, WideBlock

SHAPE = (2, 4, 4)


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(2, 1, 1), nn.Conv2d(2, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([torch.relu(self.one(x)), self.two(x)], 1)


BODIES: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(32, 6)),
    "conv, zeros": lambda: nn.Conv2d(2, 2, 3, padding=1),
    "conv, circular": lambda: nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"),
    "conv, reflect": lambda: nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"),
    "conv, replicate": lambda: nn.Conv2d(2, 2, 3, padding=1, padding_mode="replicate"),
    "conv, strided": lambda: nn.Conv2d(2, 3, 3, stride=2, padding=1),
    "conv, dilated": lambda: nn.Conv2d(2, 2, 2, dilation=2),
    "conv, even kernel": lambda: nn.Conv2d(2, 2, (2, 4), padding="same"),
    "conv, grouped": lambda: nn.Conv2d(2, 4, 3, groups=2),
    "conv, depthwise": lambda: nn.Conv2d(2, 2, 3, padding=1, groups=2),
    "conv, transposed": lambda: nn.ConvTranspose2d(2, 2, 2, stride=2),
    "batch norm": lambda: nn.BatchNorm2d(2),
    "conv and batch norm": lambda: nn.Sequential(nn.Conv2d(2, 2, 2), nn.BatchNorm2d(2)),
    "residual block": lambda: BasicBlock(2, 3, 2),
    "wide block": lambda: WideBlock(2, 3, 1),
    "identity plus conv": lambda: nn.Sequential(LiResBlock(2), MinMax()),
    "weight norm": lambda: parametrizations.weight_norm(nn.Conv2d(2, 2, 3)),
    "orthogonal": lambda: nn.Sequential(
        nn.Flatten(), parametrizations.orthogonal(nn.Linear(32, 6))
    ),
    "average pools": lambda: nn.Sequential(nn.AvgPool2d(2, 1), nn.AdaptiveAvgPool2d(2)),
    "max pools": lambda: nn.Sequential(nn.MaxPool2d(3, 1, 1), nn.AdaptiveMaxPool2d(2)),
    "branches": Branches,
    "normalisation": lambda: nn.Sequential(
        Normalize([0.5, 0.4], [0.2, 0.3]), nn.Conv2d(2, 1, 3)
    ),
}  # fmt: skip


class Shift(nn.Module):
    """Leans and scales by what it holds beside buffers: a number, a list, an object, a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.gain, self.gains = 1.5, [0.5, 2.0]
        self.options = SimpleNamespace(gain=0.75)
        self.mask = torch.tensor([1.0, -2.0, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0])

    def forward(self, x: Tensor) -> Tensor:
        mask = self.mask.to(x.dtype)
        return x * mask * self.gain * self.gains[0] * self.gains[1] * self.options.gain


class Net(nn.Module):
    """A body under test before layers that every route finds something in."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body
        with torch.no_grad():
            features = body.eval()(torch.zeros(2, *SHAPE)).flatten(1).shape[1]
        self.enter = nn.Linear(features, 8)
        self.conv, self.norm = nn.Conv1d(2, 2, 3, padding=1), nn.BatchNorm1d(2)
        self.act, self.other = nn.LeakyReLU(0.5), nn.Tanh()
        self.twin, self.shift, self.head = nn.Linear(8, 8), Shift(), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.enter(self.body(x).flatten(1)).unflatten(1, (2, 4))
        y = self.act(self.norm(self.conv(y))).flatten(1)
        return self.head(self.shift(self.other(self.twin(y))))


def build(name: str) -> Net:
    torch.manual_seed(len(name))
    model = Net(BODIES[name]()).eval()
    with torch.no_grad():
        for key, buffer in model.named_buffers():
            if key.endswith("running_var"):
                buffer.copy_(torch.rand_like(buffer) + 0.5)
            if key.endswith("running_mean"):
                buffer.copy_(torch.rand_like(buffer) - 0.5)
    return model


def owner(model: Net) -> tuple[nn.Module, str]:
    """Module and name of the body's first weight, else of the layer behind it."""
    for module in (*model.body.modules(), model.enter):
        for name, tensor in module._parameters.items():
            if tensor is not None and tensor.ndim > 0:
                return module, name
    raise AssertionError("the layer behind the body has a weight")


def plain(model: Net) -> nn.Module:
    """The first layer with a weight of its own that is not parametrized yet."""
    for module in model.body.modules():
        if type(module) in (nn.Linear, nn.Conv2d, nn.ConvTranspose2d):
            return module
    return model.enter


def target(model: Net) -> nn.Parameter:
    module, name = owner(model)
    return module._parameters[name]  # type: ignore[return-value]


Action = Callable[[Net], Any]


@dataclass(frozen=True)
class Route:
    """``prepare`` runs before the bound is made; ``enter`` is the change, in force inside it."""

    enter: Callable[[Net], Any]
    prepare: Action | None = None


ROUTES: dict[str, Route] = {}


def route(name: str, prepare: Action | None = None) -> Callable[[Action], Action]:
    """Register a change that is made once and stays."""

    def add(action: Action) -> Action:
        @contextmanager
        def enter(model: Net) -> Iterator[None]:
            undo = action(model)
            try:
                yield
            finally:
                if callable(undo):
                    undo()

        ROUTES[name] = Route(enter, prepare)
        return action

    return add


def simple(name: str, action: Action) -> None:
    route(name)(lambda model: [action(model)][:0])


def _step(make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> Action:
    def step(model: Net) -> None:
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        make([target(model)]).step()

    return step


simple("SGD", _step(lambda p: torch.optim.SGD(p, lr=2.0)))
simple(
    "SGD with momentum, foreach",
    _step(lambda p: torch.optim.SGD(p, lr=2.0, momentum=0.9, foreach=True)),
)
simple("Adam", _step(lambda p: torch.optim.Adam(p, lr=2.0)))
simple("AdamW, fused", _step(lambda p: torch.optim.AdamW(p, lr=2.0, fused=True)))
simple("data entry", lambda m: target(m).data.reshape(-1)[:1].fill_(9.0))
simple("data assigned", lambda m: setattr(target(m), "data", target(m).data * 3))
simple("detached view", lambda m: target(m).detach().mul_(3))
simple("foreach", lambda m: torch._foreach_mul_([target(m).detach()], 3.0))
simple("numpy", lambda m: target(m).detach().numpy().__imul__(3))
simple("DLPack", lambda m: torch.from_dlpack(target(m).detach()).mul_(3))
simple(
    "storage set",
    torch.no_grad()(
        lambda m: target(m).set_((target(m) * 3).contiguous().untyped_storage(), 0, target(m).shape)
    ),
)
simple(
    "storage bytes",
    lambda m: (
        target(m).untyped_storage().copy_((target(m).detach() * 3).contiguous().untyped_storage())
    ),
)
simple("requires_grad", lambda m: target(m).requires_grad_(False).mul_(3).requires_grad_())
simple(
    "vector_to_parameters",
    lambda m: nn.utils.vector_to_parameters(
        3 * nn.utils.parameters_to_vector([target(m)]).detach(), [target(m)]
    ),
)
simple("float64", lambda m: m.double() and target(m).detach().mul_(3))
simple("half", lambda m: m.half() and target(m).detach().mul_(3))
simple("bfloat16", lambda m: m.bfloat16() and target(m).detach().mul_(3))
simple("running mean", lambda m: m.norm.running_mean.add_(3))
simple("running variance", lambda m: m.norm.running_var.div_(30))
simple("eps", lambda m: setattr(m.norm, "eps", 20.0))
simple("train", lambda m: m.train())
simple("layer replaced, same class", lambda m: setattr(m, "act", nn.LeakyReLU(4.0)))
simple("layer replaced, another class", lambda m: setattr(m, "act", nn.Sigmoid()))
simple("layers swapped", lambda m: m.__dict__["_modules"].update(act=m.other, other=m.act))
simple(
    "linears swapped", lambda m: m.__dict__["_modules"].update(twin=nn.Linear(8, 8), head=m.head)
)
simple("slope", lambda m: setattr(m.act, "negative_slope", 4.0))
simple("dilation", lambda m: m.conv.__dict__.update(dilation=(2,), padding=(2,)))
simple("stride", lambda m: m.conv.__dict__.update(stride=(2,), padding=(3,)))
simple("padding mode", lambda m: setattr(m.conv, "padding_mode", "replicate"))
simple("number", lambda m: setattr(m.shift, "gain", 6.0))
simple("list entry", lambda m: m.shift.gains.__setitem__(0, 6.0))
simple("options object", lambda m: setattr(m.shift.options, "gain", 6.0))
simple("plain tensor", lambda m: m.shift.mask.mul_(3))
simple("forward hook", lambda m: m.act.register_forward_hook(lambda a, i, o: 3 * o))
simple("forward pre-hook", lambda m: m.act.register_forward_pre_hook(lambda a, i: (3 * i[0],)))
simple("forward of the instance", lambda m: setattr(m.act, "forward", lambda x: 3 * x))
simple("forward of the model", lambda m: setattr(m, "forward", lambda x: 3 * Net.forward(m, x)))
simple("class of the instance", lambda m: setattr(m.act, "__class__", nn.ReLU))
simple("pruned", lambda m: prune.random_unstructured(plain(m), "weight", 0.5))
# Of the layer whose norm is the farthest from the 1 that it is given.
simple("spectral norm", lambda m: parametrizations.spectral_norm(max(
    (m.twin, m.enter, m.head),
    key=lambda p: abs(math.log(torch.linalg.matrix_norm(p.weight.detach(), 2))))))  # fmt: skip
simple("old weight norm", lambda m: nn.utils.weight_norm(m.twin).weight_g.detach().mul_(3))
simple(
    "load_state_dict",
    lambda m: m.load_state_dict(
        {k: 3 * v if k.startswith("enter") else v for k, v in m.state_dict().items()}
    ),
)
simple("load_state_dict, assign", lambda m: m.load_state_dict(
    {k: 3 * v if k.startswith("enter") else v for k, v in m.state_dict().items()},
    assign=True))  # fmt: skip


class Tripled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 3 * weight


@route("entry in place")
def _(model: Net) -> None:
    with torch.no_grad():
        target(model).mul_(3)


@route("new parameter")
def _(model: Net) -> None:
    module, name = owner(model)
    module._parameters[name] = nn.Parameter(3 * target(model).detach())


@route("swapped tensors")
def _(model: Net) -> None:
    torch.utils.swap_tensors(target(model), nn.Parameter(3 * target(model).detach()))


@route("averaged weights swapped in")
def _(model: Net) -> None:
    average = torch.optim.swa_utils.AveragedModel(model)
    with torch.no_grad():
        target(average.module).mul_(3)
        for mine, theirs in zip(model.parameters(), average.module.parameters(), strict=True):
            mine.copy_(theirs)


@route("copied, then edited")
def _(model: Net) -> None:
    copy.deepcopy(model)
    target(model).detach().mul_(3)


@route("groups")
def _(model: Net) -> None:
    model.conv.groups = 2
    model.conv.weight = nn.Parameter(model.conv.weight.detach()[:, :1])


@route("parametrization registered")
def _(model: Net) -> None:
    parametrize.register_parametrization(plain(model), "weight", Tripled(), unsafe=True)


@route("parametrization removed", lambda m: parametrize.register_parametrization(
    m.twin, "weight", Tripled(), unsafe=True))  # fmt: skip
def _(model: Net) -> None:
    parametrize.remove_parametrizations(model.twin, "weight", leave_parametrized=False)


@route("under a parametrization", lambda m: parametrizations.weight_norm(m.twin))
def _(model: Net) -> None:
    model.twin.parametrizations.weight.original0.detach().mul_(3)


@route("hook removed", lambda m: setattr(
    m, "handle", m.act.register_forward_hook(lambda a, i, o: 3 * o)))  # fmt: skip
def _(model: Net) -> None:
    model.handle.remove()


@route("mask of a pruned layer", lambda m: prune.identity(plain(m), "weight"))
def _(model: Net) -> None:
    plain(model).weight_mask.reshape(-1)[::2] = 0.0


@route("fused, then scaled")
def _(model: Net) -> None:
    model.conv, model.norm = fuse_conv_bn_eval(model.conv, model.norm), nn.Identity()
    model.conv.weight.detach().mul_(3)


@route("forward of the class")
def _(model: Net) -> Callable[[], None]:
    original = Shift.forward
    Shift.forward = lambda self, x: 3 * original(self, x)  # type: ignore[method-assign]

    def undo() -> None:
        Shift.forward = original  # type: ignore[method-assign]

    return undo


@route("reparametrized for a call")
def _(model: Net) -> Callable[[], None]:
    other = {"enter.weight": 3 * model.enter.weight.detach()}
    context = stateless._reparametrize_module(model, other)
    context.__enter__()
    return lambda: context.__exit__(None, None, None)


def mapped(folder: Path) -> Route:
    """A weight in a memory-mapped file that somebody else writes to."""
    path = folder / "weights.bin"

    def prepare(model: Net) -> None:
        weight = model.enter.weight
        path.write_bytes(weight.detach().numpy().tobytes())
        size = weight.numel()
        weight.data = torch.from_file(str(path), shared=True, size=size).reshape(weight.shape)

    @contextmanager
    def enter(model: Net) -> Iterator[None]:
        written = np.memmap(path, dtype=np.float32, mode="r+")
        written *= 3
        written.flush()
        yield

    return Route(enter, prepare)


NAMES = (*ROUTES, "memory-mapped file")
