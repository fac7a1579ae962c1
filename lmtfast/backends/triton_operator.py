# SPDX-License-Identifier: MIT
"""Power iteration by Triton kernels: the launches of a step, and products of single operators."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lmtfast.backends.triton_network import Step, prepared, require_device
from lmtfast.errors import DtypeError, ShapeError
from lmtfast.kernels import operator_product
from lmtfast.kernels.gradient_work import rows_of_engine
from lmtfast.kernels.operator_work import (
    BACK,
    ENTERED_COUNT,
    ENTERED_PARTS,
    IMAGE,
    IMAGE_COUNT,
    IMAGE_PARTS,
    IMAGE_SIZE,
    VECTOR_SIZE,
    OperatorWork,
)
from lmtfast.table import FIELDS, OperatorTable


def precision() -> str:
    """float32 as it is, unless torch may round the operands of its own products to TF32."""
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"


class _Call(NamedTuple):
    """The launches of one step and what they alone share."""

    step: Step
    work: OperatorWork
    workspace: Tensor
    counters: Tensor

    def pack(self) -> None:
        step, work, network = self.step, self.work, self.step.network
        squares, packing = work.squares.shape[0], work.packing.shape[0]
        operator_product.operator_pack[(squares + packing + network.stretches.shape[0],)](
            work.operators, step.described, network.factors, network.stretches, work.squares,
            work.packing, step.state, step.saved, self.workspace, self.counters, step.sigmas,
            squares, packing, **operator_product.PACK_GEOMETRY,
        )  # fmt: skip

    def product(self, items: Tensor, *, second: bool, last: bool) -> None:
        step, work = self.step, self.work
        operator_product.operator_product[(items.shape[0],)](
            work.operators, step.described, work.visits, items, step.state, step.saved,
            self.workspace, self.counters, step.sigmas, step.new_state, SECOND=second, LAST=last,
            PRECISION=precision(), **operator_product.product_geometry(precision()),
        )  # fmt: skip


def _call(step: Step, work: OperatorWork) -> _Call:
    counters = torch.empty(work.operators.shape[0], dtype=torch.int32, device=step.state.device)
    return _Call(step, work, step.state.new_empty(work.workspace), counters)


def operator_step(step: Step) -> None:
    """The launches of one step of power iteration; matrices beside ``symbol`` are in that one's."""
    work = step.network.operator
    if work is None:
        return
    call = _call(step, work)
    call.pack()
    call.product(work.images, second=False, last=not step.update)
    if step.update:
        call.product(work.backs, second=True, last=True)


class _Single(NamedTuple):
    """One operator of a network, with its kernel packed."""

    call: _Call
    number: int
    at: list[int]  # its descriptor

    def normalised(self, parts: int, count: int) -> None:
        """Lets a vector have norm one, by which a product divides."""
        squares = self.call.workspace[parts : parts + 2 * count].view(torch.float64)
        squares.zero_()
        squares[0] = 1.0

    def items(self, items: Tensor) -> Tensor:
        return items[items[:, 0] == self.number]


def _single(
    table: OperatorTable,
    row: int,
    tensors: Sequence[Tensor],
    v: Tensor | None,
    device: torch.device,
) -> _Single:
    network = prepared(table, device)
    numbers = rows_of_engine(table, "operator")
    work = network.operator
    if work is None or row not in numbers:
        raise ShapeError(
            f"a row that power iteration runs, one of {numbers}", str(row), "row",
            "run the others on the reference backend",
        )  # fmt: skip
    at = work.operators[numbers.index(row)].tolist()
    state = torch.zeros(table.state_size, device=device)
    if v is not None:
        start = at[FIELDS.index("state_offset")]
        state[start : start + at[VECTOR_SIZE.value]] = _vector(v, at[VECTOR_SIZE.value], "v")
    saved, sigmas = torch.zeros(table.saved_size, device=device), state.new_empty(len(table.rows))
    views = network.views(tensors)
    new_state, described = torch.empty_like(state), network.described(views)
    call = _call(Step(network, views, described, state, new_state, sigmas, saved, True), work)
    with torch.cuda.device_of(state):
        call.pack()
    return _Single(call, numbers.index(row), at)


def row_matvec(table: OperatorTable, row: int, tensors: Sequence[Tensor], v: Tensor) -> Tensor:
    """``A v`` of one compiled operator. Flat float32, ``v`` of any shape with its entries.

    Raises:
        BackendUnavailableError: ``v`` is on a device that Triton cannot reach here.
        DtypeError: ``v`` is not float32.
        ShapeError: ``v`` has another number of entries, or power iteration does not run the row.
    """
    require_device(v, "v")
    single = _single(table, row, tensors, v, v.device)
    at, workspace = single.at, single.call.workspace
    single.normalised(at[ENTERED_PARTS.value], at[ENTERED_COUNT.value])
    with torch.cuda.device_of(v):
        single.call.product(single.items(single.call.work.images), second=False, last=False)
    return workspace[at[IMAGE.value] : at[IMAGE.value] + at[IMAGE_SIZE.value]].clone()


def row_rmatvec(table: OperatorTable, row: int, tensors: Sequence[Tensor], u: Tensor) -> Tensor:
    """``A^T u`` of one compiled operator; as :func:`row_matvec`."""
    require_device(u, "u")
    single = _single(table, row, tensors, None, u.device)
    at, workspace = single.at, single.call.workspace
    x = _vector(u, at[IMAGE_SIZE.value], "u")
    workspace[at[IMAGE.value] : at[IMAGE.value] + x.numel()] = x
    single.normalised(at[IMAGE_PARTS.value], at[IMAGE_COUNT.value])
    with torch.cuda.device_of(u):
        single.call.product(single.items(single.call.work.backs), second=True, last=True)
    return workspace[at[BACK.value] : at[BACK.value] + at[VECTOR_SIZE.value]].clone()


def saved_pair(
    table: OperatorTable, row: int, tensors: Sequence[Tensor], u: Tensor, v: Tensor
) -> Tensor:
    """What a step would save if one operator's pair were u, v and all other vectors zero: with it
    ``spectral_vjp`` finds the gradient of ``<u, A v>``."""
    require_device(u, "u")
    single = _single(table, row, tensors, None, u.device)
    start, sizes, saved = single.at[FIELDS.index("saved_offset")], single.at, single.call.step.saved
    pair = (
        _vector(u, sizes[IMAGE_SIZE.value], "u"), _vector(v, sizes[VECTOR_SIZE.value], "v"),
    )  # fmt: skip
    saved[start : start + sum(x.numel() for x in pair)] = torch.cat(pair)
    return saved


def _vector(x: Tensor, size: int, name: str) -> Tensor:
    if x.dtype != torch.float32:
        raise DtypeError("a float32 vector", str(x.dtype), name, "convert it first")
    if x.numel() != size:
        raise ShapeError(
            f"{size} entries", str(tuple(x.shape)), name, "use the operator's own shape"
        )
    return x.detach().reshape(-1)
