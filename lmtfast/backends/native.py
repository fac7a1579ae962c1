# SPDX-License-Identifier: MIT
"""Compiled CPU kernels: hands tensor addresses to ``lmtfast._C`` and allocates the outputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lmtfast.backends.native_spectral import STEPS, compose, spectral_step, spectral_vjp
from lmtfast.errors import ArgumentError, BackendUnavailableError, DtypeError, ShapeError

__all__ = [
    "STEPS", "available", "compose", "margin_backward", "margin_forward", "spectral_step",
    "spectral_vjp",
]  # fmt: skip

# Imported after torch on purpose: both then share one OpenMP runtime and its warm threads.
_unavailable = ""
try:
    from lmtfast import _C
except ImportError as error:
    _C = None
    _unavailable = f"the compiled core cannot be loaded: {error}"
else:
    if _C.ABI_VERSION != 2:
        _unavailable = f"the compiled core has ABI version {_C.ABI_VERSION}, this package needs 2"

MEMBERS = {"lmt": 0, "lmt++": 1, "emma": 2, "gloro": 3}
DTYPES = {torch.float32: 0, torch.float64: 1}


def available() -> tuple[bool, str]:
    """Whether the compiled core can be used, and the reason if it cannot."""
    return not _unavailable, _unavailable


def margin_forward(
    member: str,
    logits: Tensor,  # (N, K)
    target: Tensor,  # (N,)
    row_index: Tensor,  # (N,)
    rows: Tensor,  # (U, K)
    coefficient: Tensor,  # (N,)
) -> tuple[Tensor, Tensor, Tensor]:
    """Margin cross-entropy per sample, and what its backward pass needs.

    With ``A_j = coefficient * rows[row_index, j]``, zero at the reference class (the target; for
    ``"gloro"`` the predicted class), the rivals' logits are raised by ``A_j`` (``"lmt"``), by the
    largest share of it that keeps a correct prediction correct (``"lmt++"``), or by a ratio per
    class (``"emma"``); ``"gloro"`` appends their maximum as one more class.

    Args:
        member: ``"lmt"``, ``"lmt++"``, ``"emma"`` or ``"gloro"``.
        logits: Class scores. Shape ``(N, K)``, float32 or float64, CPU; row strides are free.
        target: True classes. Shape ``(N,)``, int64 in ``[0, K)``.
        row_index: Row of ``rows`` for each sample's reference class. Shape ``(N,)``, int64.
        rows: Pair norms. Shape ``(U, K)``, the logits' dtype.
        coefficient: ``eps * L``, in logit units per pair norm. Shape ``(N,)``, the logits' dtype.

    Returns:
        loss ``(N,)``, dlogits ``(N, K)`` (derivative of each loss), scale ``(N,)`` (the factor of
        ``"lmt++"``, the extra class's probability for ``"gloro"``, else one). Sums are accumulated
        in float64.

    Raises:
        ShapeError, DtypeError, ArgumentError: An argument is not as described.
        BackendUnavailableError: The compiled core is missing, or a tensor is not on the CPU.

    Guarantee:
        None: a training objective. Bit-identical for every number of threads.

    Source:
        Tsuzuku, Sato, Sugiyama (2018), arXiv:1802.04034; Hu et al. (2024); Leino et al. (2021).

    Example:
        >>> import torch
        >>> logits, rows = torch.tensor([[3.0, 1.0]]), torch.tensor([[0.0, 1.0]])
        >>> index = torch.tensor([0])
        >>> loss, _, _ = margin_forward("lmt", logits, index, index, rows, torch.tensor([2.0]))
        >>> round(loss.item(), 4)
        0.6931
    """
    problem, kept = _problem(member, logits, target, row_index, rows, coefficient)
    dlogits = torch.empty_like(kept[0], memory_format=torch.contiguous_format)
    loss, scale = torch.empty_like(kept[-1]), torch.empty_like(kept[-1])
    _call(problem.forward, loss, dlogits, scale)
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

    Takes the arguments of :func:`margin_forward`, its scale and dlogits, and ``grad_loss`` of shape
    ``(N,)``. The factors that scale the additions are constants of the gradient, as in the sources.
    Same errors and the same guarantee as :func:`margin_forward`.
    """
    problem, kept = _problem(member, logits, target, row_index, rows, coefficient)
    _check(dlogits, "dlogits", logits.shape, logits.dtype)
    _check(scale, "scale", target.shape, logits.dtype)
    _check(grad_loss, "grad_loss", target.shape, logits.dtype)
    dlogits, scale, grad_loss = dlogits.contiguous(), scale.contiguous(), grad_loss.contiguous()
    grad_logits = torch.empty_like(dlogits)
    grad_rows = torch.empty_like(kept[3], memory_format=torch.contiguous_format)
    grad_coefficient = torch.empty_like(kept[-1])
    _call(problem.backward, grad_loss, dlogits, scale, grad_logits, grad_rows, grad_coefficient)
    return grad_logits, grad_rows, grad_coefficient


def _problem(
    member: str,
    logits: Tensor,
    target: Tensor,
    row_index: Tensor,
    rows: Tensor,
    coefficient: Tensor,
) -> tuple[Any, tuple[Tensor, ...]]:
    """The checked problem, and the tensors it points into: they must outlive the call."""
    if _unavailable:
        raise BackendUnavailableError(
            "the compiled core lmtfast._C", _unavailable, "backend 'native'", "reinstall lmtfast"
        )
    if member not in MEMBERS:
        raise ArgumentError(f"one of {sorted(MEMBERS)}", repr(member), "member", "pick one of them")
    if logits.dtype not in DTYPES:
        remedy = "cast half-precision logits to float32 first"
        raise DtypeError("float32 or float64", str(logits.dtype), "logits", remedy)
    if logits.ndim != 2 or logits.shape[1] == 0:
        got = str(tuple(logits.shape))
        raise ShapeError("shape (N, K) with K >= 1", got, "logits", "pass a batch of class scores")
    n, k = logits.shape
    u = rows.shape[0] if rows.ndim == 2 else 0
    _check(logits, "logits", (n, k), logits.dtype)
    _check(target, "target", (n,), torch.int64)
    _check(row_index, "row_index", (n,), torch.int64)
    _check(rows, "rows", (u, k), logits.dtype)
    _check(coefficient, "coefficient", (n,), logits.dtype)
    kept = (
        _with_unit_columns(logits),
        target.contiguous(),
        row_index.contiguous(),
        _with_unit_columns(rows),
        coefficient.contiguous(),
    )
    strides = kept[0].stride(0), kept[3].stride(0)
    problem = _C.MarginCrossEntropy(
        DTYPES[logits.dtype],
        MEMBERS[member],
        n,
        k,
        u,
        *strides,
        torch.get_num_threads(),
        *[tensor.data_ptr() for tensor in kept],
    )
    return problem, kept


def _check(tensor: Tensor, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tensor.is_cpu and tensor.dtype is dtype and tensor.shape == shape:
        return
    if tensor.dtype != dtype:
        raise DtypeError(str(dtype), str(tensor.dtype), name, "cast it")
    if tensor.shape != shape:
        raise ShapeError(f"shape {shape}", str(tuple(tensor.shape)), name, "reshape or slice it")
    remedy = "move it to the CPU, or drop backend='native'"
    raise BackendUnavailableError("a CPU tensor", str(tensor.device), name, remedy)


def _with_unit_columns(matrix: Tensor) -> Tensor:
    """The matrix itself where its rows are contiguous and do not overlap, else a copy."""
    columns = matrix.shape[1]
    fine = (columns == 1 or matrix.stride(1) == 1) and matrix.stride(0) >= columns
    return matrix if fine else matrix.contiguous()


def _call(function: Any, *tensors: Tensor) -> None:
    try:
        function(*[tensor.data_ptr() for tensor in tensors])
    except ValueError as error:
        remedy = "check target and row_index"
        where = "native margin cross-entropy"
        raise ArgumentError("class and row indices in range", str(error), where, remedy) from error
