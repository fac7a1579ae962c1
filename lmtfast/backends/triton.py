# SPDX-License-Identifier: MIT
"""Triton kernels on an NVIDIA GPU, or anywhere under Triton's interpreter.

Margin losses and pair norms: the functions of :mod:`lmtfast.backends.margin_reference` and
:mod:`lmtfast.backends.pair_norm`, same arguments and results. This module allocates the outputs and
launches; the kernels and their block sizes are in :mod:`lmtfast.kernels`. Spectral norms are in
:mod:`lmtfast.backends.triton_spectral`.

A launch reads no value back from the device, so all of it can be captured in a CUDA graph. For the
same reason targets are not checked here: one that is no class gives its sample a NaN loss.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton import cdiv, knobs

from lmtfast.backends.margin_argument import (
    check_head,
    check_margin_problem,
    check_tensor,
    computing_dtype,
    with_unit_columns,
)
from lmtfast.backends.pair_norm import without_autocast
from lmtfast.backends.triton_spectral import STEPS, compose, spectral_step, spectral_vjp
from lmtfast.errors import ArgumentError, BackendUnavailableError
from lmtfast.kernels import margin_loss, pair_norm
from lmtfast.kernels.alignment import alignment

__all__ = [
    "DTYPES", "MEMBERS", "STEPS", "available", "compose", "margin_backward", "margin_forward",
    "pair_norm_forward", "pair_norm_vjp", "spectral_step", "spectral_vjp",
]  # fmt: skip

MEMBERS = margin_loss.MEMBERS
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def available() -> tuple[bool, str]:
    """Whether kernels can be launched here, and the reason if not."""
    if knobs.runtime.interpret:
        return True, "Triton's interpreter"
    if not torch.cuda.is_available():
        return False, "torch finds no NVIDIA GPU"
    return True, torch.cuda.get_device_name()


def margin_forward(
    member: str,
    logits: Tensor,  # (N, K)
    target: Tensor,  # (N,)
    row_index: Tensor,  # (N,)
    rows: Tensor,  # (U, K)
    coefficient: Tensor,  # (N,)
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss (N,), dlogits (N, K) and what the backward pass needs: one launch.

    Args:
        member: ``"lmt"``, ``"lmt++"``, ``"emma"`` or ``"gloro"``.
        logits: float16, bfloat16, float32 or float64; any strides.
        target, row_index: int64.
        rows, coefficient: float32, or float64 for float64 logits.

    Returns:
        loss and dlogits in the dtype of ``rows``; scale, (N,), or (2, N) for ``"gloro"``: the
        probability of the extra class and the class that attains it.

    Raises:
        ArgumentError, DtypeError, ShapeError: An argument is not as described.
        BackendUnavailableError: A tensor is on a device that Triton cannot reach here.

    Guarantee:
        None: a training objective. The same sample gives the same bits wherever it stands in a
        batch.

    Source:
        As :func:`lmtfast.backends.native.margin_forward`.

    Example:
        >>> from lmtfast.backends import available_backends
        >>> available_backends()["triton"].provides
        'margin losses, pair norms and bound steps on NVIDIA GPUs'
    """
    _check(member, logits, target, row_index, rows, coefficient)
    n, k = logits.shape
    logits, rows = with_unit_columns(logits), with_unit_columns(rows)
    dlogits = rows.new_empty(n, k)
    loss = rows.new_empty(n)
    scale = rows.new_empty((2, n) if member == "gloro" else n)
    geometry = margin_loss.forward_geometry(k)
    if n == 0:
        return loss, dlogits, scale
    block_n = geometry.get("BLOCK_N")
    kernel = margin_loss.margin_forward_whole if block_n else margin_loss.margin_forward_tiled
    with torch.cuda.device_of(logits):
        kernel[(cdiv(n, block_n or 1),)](
            logits, target.contiguous(), row_index.contiguous(), rows, coefficient.contiguous(),
            loss, dlogits, scale, n, k, logits.stride(0), rows.stride(0),
            MEMBER=MEMBERS[member], ALIGN=alignment(k, logits.stride(0), rows.stride(0)),
            **geometry,
        )  # fmt: skip
    return loss, dlogits, scale


def margin_backward(
    member: str,
    logits: Tensor,  # (N, K)
    target: Tensor,  # (N,)
    row_index: Tensor,  # (N,)
    rows: Tensor,  # (U, K)
    coefficient: Tensor,  # (N,)
    scale: Tensor,
    dlogits: Tensor,  # (N, K)
    grad_loss: Tensor,  # (N,)
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``sum(grad_loss * loss)`` by logits, rows and coefficient, shaped like them.

    The samples of one row of ``rows`` are added in ascending order by one owner, or by a fixed
    number of parts that are then added: deterministic, no atomics. Errors as
    :func:`margin_forward`.
    """
    _check(member, logits, target, row_index, rows, coefficient)
    (n, k), u = logits.shape, rows.shape[0]
    kept = (2, n) if member == "gloro" else (n,)
    check_tensor(dlogits, "dlogits", (n, k), rows.dtype, logits.device)
    check_tensor(scale, "scale", kept, rows.dtype, logits.device)
    check_tensor(grad_loss, "grad_loss", (n,), rows.dtype, logits.device)
    logits, rows = with_unit_columns(logits), with_unit_columns(rows)
    target, row_index = target.contiguous(), row_index.contiguous()
    coefficient, grad_loss = coefficient.contiguous(), grad_loss.contiguous()
    scale, dlogits = scale.contiguous(), dlogits.contiguous()
    grad_logits = logits.new_empty(n, k)
    grad_coefficient = torch.empty_like(coefficient)
    if n == 0 or u == 0:
        return grad_logits, rows.new_zeros(u, k), grad_coefficient
    strides, itemsize = (logits.stride(0), rows.stride(0)), rows.element_size()
    constants = {"MEMBER": MEMBERS[member], "ALIGN": alignment(k, *strides)}
    samples = margin_loss.samples_geometry(k, itemsize)
    gathering = margin_loss.rows_geometry(n, k, u, itemsize)
    split = gathering["SPLIT"]
    grad_rows = rows.new_empty(split, u, k)
    with torch.cuda.device_of(logits):
        margin_loss.margin_backward_samples[(cdiv(n, samples["BLOCK_N"]),)](
            logits, target, row_index, rows, coefficient, scale, dlogits, grad_loss,
            grad_logits, grad_coefficient, n, k, *strides, **constants, **samples,
        )  # fmt: skip
        grouped, order = row_index.sort(stable=True)
        begin = torch.searchsorted(grouped, torch.arange(u + 1, device=logits.device))
        margin_loss.margin_backward_rows[(u, cdiv(k, gathering["BLOCK_K"]), split)](
            logits, target, rows, coefficient, scale, dlogits, grad_loss, order, begin,
            grad_rows, n, k, u, *strides, **constants, **gathering,
        )  # fmt: skip
    return grad_logits, grad_rows[0] if split == 1 else grad_rows.sum(0), grad_coefficient


def pair_norm_forward(weight: Tensor, classes: Tensor | None) -> Tensor:
    """||w_c - w_j||, (U, K), for the rows ``classes`` (None: all), exactly 0 where j = c.

    Up to 256 classes, and in float64, from differences; beyond, from centred products in three
    TF32 passes, whose cancellation leaves an error of about ``sqrt(2 ** -22)`` times the length of
    a row in the distance of two nearly equal rows.
    """
    w, c = _head(weight, classes)
    k, d = w.shape
    u = k if c is None else c.shape[0]
    norms = torch.empty(u, k, dtype=computing_dtype(w), device=w.device)
    if u == 0:
        return norms
    geometry = pair_norm.forward_geometry(k, norms.element_size())
    grid = (cdiv(u, geometry["BLOCK_U"]), cdiv(k, geometry["BLOCK_K"]))
    options = {"ALL": c is None, "ALIGN": alignment(k, d, w.stride(0)), **geometry}
    with torch.cuda.device_of(w):
        if k <= pair_norm.EXACT_CLASSES or norms.dtype == torch.float64:
            pair_norm.pair_norm_exact[grid](w, c, norms, u, k, d, w.stride(0), **options)
        else:
            pair_norm.pair_norm_product[grid](
                w, _mean(w), c, norms, u, k, d, w.stride(0), PRECISION=_precision(w), **options
            )
    return norms


def pair_norm_vjp(weight: Tensor, classes: Tensor | None, norms: Tensor, grad: Tensor) -> Tensor:
    """Gradient to ``weight`` (K, D) of ``<grad, norms>``; a pair at distance 0 contributes 0."""
    w, c = _head(weight, classes)
    k, d = w.shape
    u = k if c is None else c.shape[0]
    dtype = computing_dtype(w)
    check_tensor(norms, "norms", (u, k), dtype, w.device)
    check_tensor(grad, "grad", (u, k), dtype, w.device)
    own, grad_weight = norms.new_empty(u, d), w.new_empty(k, d)
    if u == 0 or d == 0:
        return grad_weight.zero_()
    shared = (w, _mean(w), c, norms.contiguous(), grad.contiguous(), own)
    sizes = (u, k, d, w.stride(0))
    options = {"ALL": c is None, "PRECISION": _precision(w), "ALIGN": alignment(k, *sizes[2:])}
    sums = pair_norm.vjp_geometry(k, norms.element_size(), "BLOCK_K")
    gathers = pair_norm.vjp_geometry(k, norms.element_size(), "BLOCK_U")
    with torch.cuda.device_of(w):
        pair_norm.pair_norm_vjp_own[(cdiv(u, sums["BLOCK_U"]), cdiv(d, sums["BLOCK_D"]))](
            *shared, *sizes, **options, **sums
        )
        pair_norm.pair_norm_vjp_gather[(cdiv(k, gathers["BLOCK_K"]), cdiv(d, gathers["BLOCK_D"]))](
            *shared, grad_weight, *sizes, **options, **gathers
        )
    return grad_weight


def _check(member: str, logits: Tensor, *others: Tensor) -> None:
    _check_device(logits, "logits")
    check_margin_problem(
        member, logits, *others, members=MEMBERS, dtypes=DTYPES, device=logits.device
    )
    if logits.shape[1] > 2**24:  # gloro keeps the index of a class in a float32
        raise ArgumentError("K <= 2 ** 24", str(logits.shape[1]), "logits", "use 'reference'")


def _check_device(tensor: Tensor, name: str) -> None:
    if tensor.is_cuda or (tensor.is_cpu and knobs.runtime.interpret):
        return
    remedy = "move it to a GPU, or drop backend= to have one chosen"
    raise BackendUnavailableError("a tensor on an NVIDIA GPU", str(tensor.device), name, remedy)


def _head(weight: Tensor, classes: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The head with rows that the kernels can read, and its chosen classes."""
    _check_device(weight, "head_weight")
    check_head(weight, classes, weight.device)
    classes = None if classes is None else classes.contiguous()
    return with_unit_columns(weight), classes


def _mean(w: Tensor) -> Tensor:
    with without_autocast(w.device):
        return w.mean(0, dtype=computing_dtype(w))


def _precision(w: Tensor) -> str:
    """Three TF32 products where the tensor cores have them."""
    capable = w.is_cuda and torch.cuda.get_device_capability(w.device) >= (8, 0)
    return "tf32x3" if capable and w.dtype != torch.float64 else "ieee"
