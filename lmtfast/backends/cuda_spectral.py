# SPDX-License-Identifier: MIT
"""Spectral norms by the CUDA kernels: all operators of a network in a handful of launches.

The functions of :mod:`lmtfast.backends.native_spectral`, same arguments and results. The plan of a
network goes to the device once, at its first call there; after that a call copies nothing and waits
for nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from lmtfast.backends import cuda_device
from lmtfast.backends.spectral_argument import check_state, dense, tap_major, vector
from lmtfast.table import CLOSED_FORM, OperatorTable

STEPS = frozenset({"operator", "symbol", "separable", CLOSED_FORM})
DTYPES = {torch.float32: 0, torch.bfloat16: 2}


@lru_cache(maxsize=64)
def planned(table: OperatorTable, core: Any, device: torch.device) -> tuple[Any, Tensor]:
    """The compiled core's plan of a network, and its copy on the device."""
    flat = [list(chain.from_iterable(part)) for part in (table.rows, table.scales, table.tape)]
    plan = core.Plan(
        *flat, table.features, table.total, table.scale_size, table.saved_size, table.state_size,
        core.shared_bytes(device.index or 0),
    )  # fmt: skip
    copy = torch.empty(plan.table_size, dtype=torch.int64)
    plan.copy_table(copy.data_ptr())
    return plan, copy.to(device)


def spectral_step(
    table: OperatorTable, tensors: Sequence[Tensor], state: Tensor, *, update: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of every operator that the table marks as compiled.

    Three launches of each engine, two of power iteration where nothing is to move; they share the
    first, which takes diagonal maps along. Arguments and results are those of
    :func:`lmtfast.backends.native_spectral.spectral_step`, on a GPU.

    Raises:
        BackendUnavailableError: No CUDA build, no GPU, or the state is elsewhere.
        DtypeError: The state is not float32, or a tensor is not real.
        ShapeError: The state has another size, or a tensor is on another device.

    Guarantee:
        None: power iteration estimates norms from below. The order in which the device runs its
        blocks has no effect.
    """
    cuda_device.require(state, "PowerState")
    check_state(table, state, "cuda")
    views = [dense(t, state.device, DTYPES, "cuda") for t in tensors]
    state = state.contiguous()
    sigmas = state.new_zeros(len(table.rows))
    saved = state.new_empty(table.saved_size)
    new_state = state.clone() if update else state.new_empty(0)
    plan, copy, workspace = _prepared(table, state.device)
    with cuda_device.of(state):
        plan.step(
            copy.data_ptr(), _described(views), state.data_ptr(),
            new_state.data_ptr() if update else 0, sigmas.data_ptr(), saved.data_ptr(),
            workspace.data_ptr(), cuda_device.stream(state),
        )  # fmt: skip
    return sigmas, new_state, saved


def spectral_vjp(
    table: OperatorTable,
    tensors: Sequence[Tensor],
    saved: Tensor,
    grad_sigmas: Tensor,
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """Gradient of ``<grad_sigmas, sigmas>`` in every wanted tensor, in the tensor's own dtype.

    One launch, scales included; one more for each further shape in which a weight is read.
    """
    views = [dense(t, saved.device, DTYPES, "cuda") for t in tensors]
    grads = [
        torch.empty_like(v, dtype=torch.float32) if want else None
        for v, want in zip(views, wanted, strict=True)
    ]
    outputs: list[int] = []
    for view, grad in zip(views, grads, strict=True):
        if grad is None:
            outputs += [0, 0, 0, 0]
        else:
            outputs += [grad.data_ptr(), 0, view.numel(), int(tap_major(view))]
    saved = vector(saved, table.saved_size, "saved", saved.device)
    grad_sigmas = vector(grad_sigmas, len(table.rows), "grad_sigmas", saved.device)
    plan, copy, workspace = _prepared(table, saved.device)
    with cuda_device.of(saved):
        plan.vjp(
            copy.data_ptr(), _described(views), saved.data_ptr(), grad_sigmas.data_ptr(), outputs,
            workspace.data_ptr(), cuda_device.stream(saved),
        )  # fmt: skip
    return [g if g is None else g.to(t.dtype) for g, t in zip(grads, tensors, strict=True)]


def compose(table: OperatorTable, sigmas: Tensor) -> tuple[Tensor, Tensor]:
    """The bounds of features and logits ``(2,)`` and their derivatives in sigmas ``(2, R)``."""
    cuda_device.require(sigmas, "sigmas")
    sigmas = vector(sigmas, len(table.rows), "sigmas", sigmas.device)
    values, jacobian = sigmas.new_empty(2), sigmas.new_empty(2, len(table.rows))
    plan, copy, workspace = _prepared(table, sigmas.device)
    with cuda_device.of(sigmas):
        plan.compose(
            copy.data_ptr(), sigmas.data_ptr(), values.data_ptr(), jacobian.data_ptr(),
            workspace.data_ptr(), cuda_device.stream(sigmas),
        )  # fmt: skip
    return values, jacobian


def _prepared(table: OperatorTable, device: torch.device) -> tuple[Any, Tensor, Tensor]:
    """The plan, its copy, and a workspace; the caller holds all three until it has launched."""
    plan, copy = planned(table, cuda_device.core, device)
    return plan, copy, torch.empty(plan.workspace_bytes, dtype=torch.uint8, device=device)


def _described(views: Sequence[Tensor]) -> list[int]:
    flat: list[int] = []
    for t in views:
        flat += [t.data_ptr(), DTYPES[t.dtype], t.numel(), int(tap_major(t))]
    return flat
