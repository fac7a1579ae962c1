# SPDX-License-Identifier: MIT
"""What the compiled margin backends demand of their tensors, checked once for all of them.

A kernel believes its shapes, so a wrong one must end here.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from lmtfast.errors import ArgumentError, BackendUnavailableError, DtypeError, ShapeError


def computing_dtype(tensor: Tensor) -> torch.dtype:
    """float64 for float64, else float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def check_margin_problem(
    member: str,
    logits: Tensor,  # (N, K)
    target: Tensor,  # (N,)
    row_index: Tensor,  # (N,)
    rows: Tensor,  # (U, K)
    coefficient: Tensor,  # (N,)
    *,
    members: Collection[str],
    dtypes: Collection[torch.dtype],
    device: torch.device,
) -> None:
    """Refuse a margin problem whose member, shapes, dtypes or devices the kernels do not take."""
    if member not in members:
        raise ArgumentError(f"one of {sorted(members)}", repr(member), "member", "pick one of them")
    if logits.dtype not in dtypes:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise DtypeError(names, str(logits.dtype), "logits", "cast the logits to one of these")
    if logits.ndim != 2 or logits.shape[1] == 0:
        got = str(tuple(logits.shape))
        raise ShapeError("shape (N, K) with K >= 1", got, "logits", "pass a batch of class scores")
    n, k = logits.shape
    u = rows.shape[0] if rows.ndim == 2 else 0
    dtype = computing_dtype(logits)
    check_tensor(logits, "logits", (n, k), logits.dtype, device)
    check_tensor(target, "target", (n,), torch.int64, device)
    check_tensor(row_index, "row_index", (n,), torch.int64, device)
    check_tensor(rows, "rows", (u, k), dtype, device)
    check_tensor(coefficient, "coefficient", (n,), dtype, device)


def check_head(weight: Tensor, classes: Tensor | None, device: torch.device) -> None:
    """Refuse a head that is no floating-point matrix, or classes that are no vector of int64."""
    if not weight.is_floating_point():
        raise DtypeError("a floating-point head", str(weight.dtype), "head_weight", "cast it")
    if weight.ndim != 2:
        got = str(tuple(weight.shape))
        raise ShapeError("shape (K, D)", got, "head_weight", "pass one row per class")
    check_tensor(weight, "head_weight", weight.shape, weight.dtype, device)
    if classes is not None:
        check_tensor(classes, "classes", (classes.numel(),), torch.int64, device)


def check_tensor(
    tensor: Tensor, name: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device
) -> None:
    """Refuse a tensor of another shape, dtype or device."""
    if tensor.device == device and tensor.dtype is dtype and tensor.shape == shape:
        return
    if tensor.dtype != dtype:
        raise DtypeError(str(dtype), str(tensor.dtype), name, "cast it")
    if tensor.shape != shape:
        raise ShapeError(
            f"shape {tuple(shape)}", str(tuple(tensor.shape)), name, "reshape or slice it"
        )
    remedy = "move it there, or drop backend= to have one chosen"
    raise BackendUnavailableError(f"a tensor on {device}", str(tensor.device), name, remedy)


def with_unit_columns(matrix: Tensor) -> Tensor:
    """The matrix itself where its rows are contiguous and do not overlap, else a copy."""
    matrix = matrix.resolve_neg()
    columns = matrix.shape[1]
    fine = (columns == 1 or matrix.stride(1) == 1) and matrix.stride(0) >= columns
    return matrix if fine else matrix.contiguous()
