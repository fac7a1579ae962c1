# SPDX-License-Identifier: MIT
"""Compiled CPU kernels: hands tensor addresses to ``lmtfast._C`` and allocates the outputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lmtfast.backends import pair_norm
from lmtfast.backends.margin_argument import (
    check_head,
    check_margin_problem,
    check_tensor,
    with_unit_columns,
)
from lmtfast.backends.native_spectral import (
    STEPS,
    compose,
    power_vectors,
    spectral_step,
    spectral_vjp,
)
from lmtfast.errors import ArgumentError, BackendUnavailableError

__all__ = [
    "STEPS", "available", "compose", "margin_backward", "margin_forward", "pair_norm_forward",
    "pair_norm_vjp", "power_vectors", "spectral_step", "spectral_vjp",
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
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2}
CPU = torch.device("cpu")


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
        logits: Class scores. Shape ``(N, K)``, bfloat16, float32 or float64, CPU; strides are free.
        target: True classes. Shape ``(N,)``, int64 in ``[0, K)``.
        row_index: Row of ``rows`` for each sample's reference class. Shape ``(N,)``, int64.
        rows: Pair norms. Shape ``(U, K)``, float32, or float64 for float64 logits.
        coefficient: ``eps * L``, in logit units per pair norm. Shape ``(N,)``, as ``rows``.

    Returns:
        In the dtype of ``rows``: loss ``(N,)``, dlogits ``(N, K)`` (derivative of each loss), scale
        ``(N,)`` (the factor of ``"lmt++"``, the extra class's probability for ``"gloro"``, else
        one). Sums are accumulated in float64.

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
    dlogits = rows.new_empty(logits.shape)
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
    check_tensor(dlogits, "dlogits", logits.shape, rows.dtype, CPU)
    check_tensor(scale, "scale", target.shape, rows.dtype, CPU)
    check_tensor(grad_loss, "grad_loss", target.shape, rows.dtype, CPU)
    dlogits, scale, grad_loss = dlogits.contiguous(), scale.contiguous(), grad_loss.contiguous()
    grad_logits = logits.new_empty(logits.shape)
    grad_rows = torch.empty_like(kept[3], memory_format=torch.contiguous_format)
    grad_coefficient = torch.empty_like(kept[-1])
    _call(problem.backward, grad_loss, dlogits, scale, grad_logits, grad_rows, grad_coefficient)
    return grad_logits, grad_rows, grad_coefficient


def pair_norm_forward(weight: Tensor, classes: Tensor | None) -> Tensor:
    """``||w_c - w_j||`` from the rows ``classes`` of a head to all its rows.

    float32 and bfloat16 heads: products of rows minus row 0, and exact differences wherever they
    cancel or K <= 32, so the relative error of every norm is below about 1e-5; float64 and float16
    ones are left to :mod:`lmtfast.backends.pair_norm`. Takes the head's bytes once more as scratch.

    Args:
        weight: Shape ``(K, D)``, CPU; strides are free.
        classes: Shape ``(U,)``, int64 in ``[0, K)``, or None for every row in order, at half the
            cost.

    Returns:
        ``(U, K)``, float32 (float64 for float64), exactly 0 where a class meets itself.

    Raises:
        ShapeError, DtypeError, ArgumentError: An argument is not as described.
        BackendUnavailableError: The compiled core is missing, or a tensor is not on the CPU.

    Guarantee:
        None: rounded to nearest. Bit-identical for every number of threads; exact squares where
        they are integers below 2 ** 24.

    Source:
        Tsuzuku, Sato, Sugiyama (2018), arXiv:1802.04034, Proposition 2.

    Example:
        >>> import torch
        >>> pair_norm_forward(torch.tensor([[3.0, 0.0], [0.0, 4.0]]), torch.tensor([1]))
        tensor([[5., 0.]])
    """
    head = _head(weight, classes)
    if head is None:
        return pair_norm.pair_norm_forward(weight, classes)
    problem, _, (u, k) = head
    norms = weight.new_empty(u, k, dtype=torch.float32)
    _call(problem.forward, norms, num_threads=torch.get_num_threads())
    return norms


def pair_norm_vjp(weight: Tensor, classes: Tensor | None, norms: Tensor, grad: Tensor) -> Tensor:
    """Gradient to ``weight`` ``(K, D)``, in its dtype, of ``<grad, norms>``.

    Takes the arguments of :func:`pair_norm_forward`, its result, and ``grad`` of the same shape and
    dtype. A pair at distance 0 contributes 0. Same errors and guarantee.
    """
    head = _head(weight, classes)
    if head is None:
        return pair_norm.pair_norm_vjp(weight, classes, norms, grad)
    problem, _, shape = head
    check_tensor(norms, "norms", shape, torch.float32, CPU)
    check_tensor(grad, "grad", shape, torch.float32, CPU)
    grad_weight = weight.new_empty(weight.shape)
    kept = norms.contiguous(), grad.contiguous()
    _call(problem.vjp, *kept, grad_weight, num_threads=torch.get_num_threads())
    return grad_weight


def _head(
    weight: Tensor, classes: Tensor | None
) -> tuple[Any, tuple[Tensor | None, ...], tuple[int, int]] | None:
    """The checked problem, the tensors it points into, and the shape of its norms.

    None for a head of a type that the compiled core does not take.
    """
    if _unavailable:
        raise _missing()
    check_head(weight, classes, CPU)
    classes = None if classes is None else classes.contiguous()
    if weight.dtype not in (torch.float32, torch.bfloat16):
        return None
    kept = with_unit_columns(weight)
    k, d = kept.shape
    u = k if classes is None else len(classes)
    address = 0 if classes is None else classes.data_ptr()
    code = DTYPES[kept.dtype]
    problem = _C.PairNorm(code, k, d, u, kept.stride(0), kept.data_ptr(), address)
    return problem, (kept, classes), (u, k)


def _missing() -> BackendUnavailableError:
    return BackendUnavailableError(
        "the compiled core lmtfast._C", _unavailable, "backend 'native'", "reinstall lmtfast"
    )


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
        raise _missing()
    check_margin_problem(
        member, logits, target, row_index, rows, coefficient,
        members=MEMBERS, dtypes=DTYPES, device=CPU,
    )  # fmt: skip
    (n, k), u = logits.shape, rows.shape[0]
    kept = (
        with_unit_columns(logits),
        target.contiguous(),
        row_index.contiguous(),
        with_unit_columns(rows),
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


def _call(function: Any, *tensors: Tensor, **options: int) -> None:
    try:
        function(*[tensor.data_ptr() for tensor in tensors], **options)
    except ValueError as error:
        remedy = "check target, row_index and classes"
        where = "native margin cross-entropy"
        raise ArgumentError("class and row indices in range", str(error), where, remedy) from error
