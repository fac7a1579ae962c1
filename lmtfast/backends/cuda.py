# SPDX-License-Identifier: MIT
"""CUDA C++ kernels: allocates the outputs and hands addresses and a stream to the compiled core.

The functions of :mod:`lmtfast.backends.margin_reference` and :mod:`lmtfast.backends.pair_norm`,
same arguments and results. A call reads no value back from the device, so it can be captured in a
CUDA graph; for the same reason a target that is no class is not refused: its sample's loss is NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lmtfast.backends import cuda_device
from lmtfast.backends.cuda_device import available
from lmtfast.backends.cuda_spectral import STEPS, compose, spectral_step, spectral_vjp
from lmtfast.backends.margin_argument import (
    check_margin_problem,
    check_tensor,
    computing_dtype,
    with_unit_columns,
)
from lmtfast.errors import DtypeError, ShapeError

__all__ = [
    "DTYPES", "MEMBERS", "STEPS", "available", "compose", "margin_backward", "margin_forward",
    "pair_norm_forward", "pair_norm_vjp", "spectral_step", "spectral_vjp",
]  # fmt: skip

MEMBERS = {"lmt": 0, "lmt++": 1, "emma": 2, "gloro": 3}
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2}


def margin_forward(
    member: str,
    logits: Tensor,  # (N, K)
    target: Tensor,  # (N,)
    row_index: Tensor,  # (N,)
    rows: Tensor,  # (U, K)
    coefficient: Tensor,  # (N,)
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss (N,), dlogits (N, K) and scale (N,), what the backward pass needs: one launch.

    Args:
        member: ``"lmt"``, ``"lmt++"``, ``"emma"`` or ``"gloro"``.
        logits: bfloat16, float32 or float64; any strides.
        target, row_index: int64.
        rows, coefficient: float32, or float64 for float64 logits.

    Raises:
        ArgumentError, DtypeError, ShapeError: An argument is not as described.
        BackendUnavailableError: No CUDA build, no GPU, or a tensor elsewhere.

    Guarantee:
        None: a training objective. The order in which the device runs its blocks has no effect.

    Source:
        As :func:`lmtfast.backends.native.margin_forward`.

    Example:
        >>> from lmtfast.backends import available_backends
        >>> "cuda" in available_backends()
        True
    """
    problem, kept = _problem(member, logits, target, row_index, rows, coefficient)
    dlogits = kept[3].new_empty(logits.shape)
    loss, scale = torch.empty_like(kept[4]), torch.empty_like(kept[4])
    with cuda_device.of(logits):
        cuda_device.core.margin_forward(
            problem, loss.data_ptr(), dlogits.data_ptr(), scale.data_ptr(),
            cuda_device.stream(logits),
        )  # fmt: skip
    return loss, dlogits, scale


def margin_backward(
    member: str,
    logits: Tensor,  # (N, K)
    target: Tensor,  # (N,)
    row_index: Tensor,  # (N,)
    rows: Tensor,  # (U, K)
    coefficient: Tensor,  # (N,)
    scale: Tensor,  # (N,)
    dlogits: Tensor,  # (N, K)
    grad_loss: Tensor,  # (N,)
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``sum(grad_loss * loss)`` by logits, rows and coefficient, shaped like them.

    Two launches; every entry of the rows' gradient has one owner, which adds in a fixed order.
    Errors as :func:`margin_forward`.
    """
    problem, kept = _problem(member, logits, target, row_index, rows, coefficient)
    check_tensor(dlogits, "dlogits", tuple(logits.shape), rows.dtype, logits.device)
    check_tensor(scale, "scale", tuple(target.shape), rows.dtype, logits.device)
    check_tensor(grad_loss, "grad_loss", tuple(target.shape), rows.dtype, logits.device)
    inputs = grad_loss.contiguous(), dlogits.contiguous(), scale.contiguous()
    outputs = (
        logits.new_empty(logits.shape), rows.new_empty(rows.shape), torch.empty_like(kept[4])
    )  # fmt: skip
    entries = cuda_device.core.margin_workspace(len(target), len(rows))
    workspace = torch.empty(entries, dtype=torch.int32, device=logits.device)
    with cuda_device.of(logits):
        cuda_device.core.margin_backward(
            problem, *(t.data_ptr() for t in (*inputs, *outputs, workspace)),
            cuda_device.stream(logits),
        )  # fmt: skip
    return outputs


def pair_norm_forward(weight: Tensor, classes: Tensor | None) -> Tensor:
    """||w_c - w_j||, (U, K), for the rows ``classes`` (None: all), exactly 0 where j = c.

    From differences for every K, summed in float32 (float64 for a float64 head): one launch.
    """
    head, kept = _head(weight, classes)
    norms = torch.empty(head[3], head[1], dtype=computing_dtype(weight), device=weight.device)
    with cuda_device.of(weight):
        cuda_device.core.pair_norm_forward(*head, norms.data_ptr(), cuda_device.stream(weight))
    return norms


def pair_norm_vjp(weight: Tensor, classes: Tensor | None, norms: Tensor, grad: Tensor) -> Tensor:
    """Gradient to ``weight`` (K, D) of ``<grad, norms>``; a pair at distance 0 contributes 0.

    Two launches, no atomics.
    """
    head, kept = _head(weight, classes)
    _, k, d, u = head[:4]
    dtype = computing_dtype(weight)
    check_tensor(norms, "norms", (u, k), dtype, weight.device)
    check_tensor(grad, "grad", (u, k), dtype, weight.device)
    norms, grad = norms.contiguous(), grad.contiguous()
    own, grad_weight = norms.new_empty(u, d), weight.new_empty(k, d)
    with cuda_device.of(weight):
        cuda_device.core.pair_norm_vjp(
            *head, *(t.data_ptr() for t in (norms, grad, own, grad_weight)),
            cuda_device.stream(weight),
        )  # fmt: skip
    return grad_weight


def _head(
    weight: Tensor, classes: Tensor | None
) -> tuple[tuple[int, ...], tuple[Tensor | None, ...]]:
    """The checked head as integers, and the tensors they point into."""
    cuda_device.require(weight, "head_weight")
    if weight.dtype not in DTYPES:
        raise DtypeError(
            "a float32, float64 or bfloat16 head", str(weight.dtype), "head_weight", "cast it"
        )
    if weight.ndim != 2:
        raise ShapeError(
            "shape (K, D)", str(tuple(weight.shape)), "head_weight", "pass a row per class"
        )
    if classes is not None:
        check_tensor(classes, "classes", (classes.numel(),), torch.int64, weight.device)
        classes = classes.contiguous()
    rows = with_unit_columns(weight.detach())
    k, d = rows.shape
    u = k if classes is None else len(classes)
    addresses = rows.data_ptr(), 0 if classes is None else classes.data_ptr()
    return (DTYPES[weight.dtype], k, d, u, rows.stride(0), *addresses), (rows, classes)


def _problem(
    member: str,
    logits: Tensor,
    target: Tensor,
    row_index: Tensor,
    rows: Tensor,
    coefficient: Tensor,
) -> tuple[tuple[int, ...], tuple[Tensor, ...]]:
    """The checked problem as integers, and the tensors it points into."""
    cuda_device.require(logits, "logits")
    check_margin_problem(
        member, logits, target, row_index, rows, coefficient,
        members=MEMBERS, dtypes=DTYPES, device=logits.device,
    )  # fmt: skip
    kept = (
        with_unit_columns(logits), target.contiguous(), row_index.contiguous(),
        with_unit_columns(rows), coefficient.contiguous(),
    )  # fmt: skip
    sizes = (*logits.shape, len(rows), kept[0].stride(0), kept[3].stride(0))
    codes = (DTYPES[logits.dtype], MEMBERS[member])
    return (*codes, *sizes, *(t.data_ptr() for t in kept)), kept
