# SPDX-License-Identifier: MIT
"""Fourteen ways to lay a tensor out in memory: the same bits as when it is contiguous."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lmtfast.enclosure import LogitEnclosure
from lmtfast.errors import LmtfastError
from lmtfast.guarantee import plan_bound
from lmtfast.level import Level
from lmtfast.plan import make_plan
from lmtfast.tracing import trace_model
from lmtfast.weights import named_tensors, weights_sha256

Layout = Callable[[Tensor], Tensor]


def _strided(t: Tensor) -> Tensor:
    wide = torch.full((*t.shape[:-1], 2 * t.shape[-1]), 7.0, dtype=t.dtype)
    wide[..., ::2] = t
    return wide[..., ::2]


def _transposed(t: Tensor) -> Tensor:
    return t.transpose(0, -1).contiguous().transpose(0, -1)


def _offset(t: Tensor) -> Tensor:
    return torch.cat([torch.full((3,), 7.0, dtype=t.dtype), t.reshape(-1)])[3:].view(t.shape)


def _misaligned(t: Tensor) -> Tensor:
    buffer = np.zeros(t.numel() * t.element_size() + 1, dtype=np.uint8)
    view = buffer[1:].view(t.detach().numpy().dtype)
    view[:] = t.detach().numpy().reshape(-1)
    return torch.from_numpy(view).view(t.shape)


def _padded(t: Tensor) -> Tensor:
    rows = torch.full((t.shape[0], t[0].numel() + 3), 7.0, dtype=t.dtype)
    rows[:, : t[0].numel()] = t.reshape(t.shape[0], -1)
    strides = (rows.stride(0), *t[0].contiguous().stride()) if t.ndim > 1 else (rows.stride(0),)
    return rows.as_strided(t.shape, strides)


def _last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last) if t.ndim == 4 else _transposed(t)


def _negated(t: Tensor) -> Tensor:
    return torch._neg_view(-t)


LAYOUTS: dict[str, Layout] = {
    "strided": _strided,
    "transposed": _transposed,
    "offset": _offset,
    "misaligned": _misaligned,
    "padded rows": _padded,
    "channels last": _last,
    "lazily negated": _negated,
    "real part": lambda t: torch.complex(t, t + 1).real,
    "column of a table": lambda t: torch.stack([t + 1, t, t - 1], -1)[..., 1],
    "reversed twice": lambda t: t.flip(0).flip(0),
    "slice of a larger": lambda t: torch.cat([t, t + 1])[: t.shape[0]],
    "DLPack": lambda t: torch.from_dlpack(_strided(t)),
    "NumPy, Fortran order": lambda t: torch.from_numpy(np.asfortranarray(t.detach().numpy())),
    "read-only": lambda t: torch.frombuffer(t.detach().numpy().tobytes(), dtype=t.dtype).view(
        t.shape
    ),
    "expanded": lambda t: t[:1].expand(t.shape),
    "overlapping": lambda t: t.reshape(-1)[: t.shape[0]].as_strided(t.shape, (1,) + (0,) * (
        t.ndim - 1)),
}  # fmt: skip


class Everything(nn.Module):
    """One layer of every kind that reads a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2), nn.BatchNorm2d(4)
        self.wrap = nn.Conv2d(4, 2, 2, padding=1, padding_mode="circular")
        self.up, self.slope = nn.ConvTranspose2d(2, 2, 2), nn.PReLU(2)
        self.pool, self.line = nn.MaxPool2d(2, 1), nn.Conv1d(2, 2, 2)
        self.scale = nn.Parameter(torch.rand(2, 1))
        self.head = nn.LazyLinear(3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.slope(self.up(self.wrap(torch.relu(self.norm(self.conv(x))))))
        return self.head((self.line(self.pool(y).flatten(2)) * self.scale).flatten(1))


SHAPE = (2, 5, 6)


@cache
def network() -> nn.Module:
    torch.manual_seed(8)
    model = Everything()
    model(torch.rand(2, *SHAPE))
    return model.eval().requires_grad_(False)


@cache
def traced():  # noqa: ANN201
    found = trace_model(network(), SHAPE)
    return found, make_plan(network(), found.graph, engine="operator", backend="reference")


def results(model: nn.Module, x: Tensor) -> tuple[object, ...]:
    program, plan = traced()
    bound = plan_bound(plan, model, level=Level("rigorous"))
    norms = {name: float(norm) for name, norm in bound.per_operator.items()}
    value, error = LogitEnclosure(model, program, norms=norms)(x)
    return bound.total, norms, bound.pairs, value, error, weights_sha256(named_tensors(model))


def same(a: object, b: object) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b


def test_there_are_fourteen_layouts() -> None:
    assert len(LAYOUTS) >= 14
    for name, layout in LAYOUTS.items():
        tensor = torch.rand(3, 2, 4, 5)
        laid = layout(tensor)
        assert laid.shape == tensor.shape
        assert torch.equal(laid, tensor) or name in ("expanded", "overlapping")


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_of_weights_or_inputs_changes_no_bit(name: str) -> None:
    model, layout = network(), LAYOUTS[name]
    saved = {key: tensor.data for key, tensor in named_tensors(model).items()}
    x = torch.rand(3, *SHAPE)
    try:
        values = {k: layout(t) if t.ndim and t.is_floating_point() else t for k, t in saved.items()}
        for key, tensor in named_tensors(model).items():
            tensor.data = values[key].contiguous().clone()
        expected = results(model, layout(x).contiguous().clone())
        for key, tensor in named_tensors(model).items():
            tensor.data = values[key]
        try:
            got = results(model, layout(x))
        except LmtfastError:
            return
        assert all(same(a, b) for a, b in zip(got, expected, strict=True))
    finally:
        for key, tensor in named_tensors(model).items():
            tensor.data = saved[key]
