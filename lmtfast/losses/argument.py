# SPDX-License-Identifier: MIT
"""Validation of the arguments of the losses, once, at the public entry."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lmtfast.errors import ArgumentError, DtypeError, ShapeError
from lmtfast.losses.members import Member

REDUCTIONS = ("mean", "sum", "none")
_WHERE = "margin_cross_entropy"


def checked_member(members: Mapping[str, Member], scaling: str) -> Member:
    """The member of that name."""
    if scaling not in members:
        raise ArgumentError(
            "scaling in {" + ", ".join(sorted(map(repr, members))) + "}",
            repr(scaling),
            f"{_WHERE}(scaling=)",
            "choose one of the names listed.",
        )
    return members[scaling]


def checked_shapes(
    logits: Tensor,
    target: Tensor,
    head_weight: Tensor | None,
    eps: float | Tensor,
    reduction: str,
) -> None:
    """Refuse shapes, dtypes and devices that do not belong together. Reads no values."""
    if not logits.is_floating_point():
        raise DtypeError(
            "floating-point logits", str(logits.dtype), f"{_WHERE}(logits=)", "pass class scores."
        )
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ShapeError(
            "logits (N, K) with K >= 1",
            str(tuple(logits.shape)),
            f"{_WHERE}(logits=)",
            "flatten every other dimension into the batch.",
        )
    n, k = logits.shape
    if target.dtype != torch.int64:
        raise DtypeError(
            "int64 targets",
            str(target.dtype),
            f"{_WHERE}(target=)",
            "pass class indices, target.long().",
        )
    if target.shape != (n,):
        raise ShapeError(
            f"target ({n},), one class index per row of the logits",
            str(tuple(target.shape)),
            f"{_WHERE}(target=)",
            "pass indices, not one-hot rows or probabilities.",
        )
    if head_weight is not None and (head_weight.dim() != 2 or head_weight.shape[0] != k):
        raise ShapeError(
            f"bound.head_weight ({k}, D), a row per class of the logits",
            str(tuple(head_weight.shape)),
            f"{_WHERE}(bound=)",
            "pass the bound of the network that computed these logits.",
        )
    for name, tensor in (("target", target), ("bound", head_weight)):
        if tensor is not None and tensor.device != logits.device:
            raise ArgumentError(
                f"everything on {logits.device}, the device of the logits",
                f"a tensor on {tensor.device}",
                f"{_WHERE}({name}=)",
                "move the model and its batch to one device.",
            )
    if isinstance(eps, Tensor):
        _check_eps_tensor(eps, logits)
    if reduction not in REDUCTIONS:
        raise ArgumentError(
            f"reduction in {REDUCTIONS}", repr(reduction), f"{_WHERE}(reduction=)", "choose one."
        )
    if n == 0 and reduction == "mean":
        raise ShapeError(
            "at least one sample for reduction='mean'",
            "an empty batch",
            f"{_WHERE}(logits=)",
            "skip the batch, or use reduction='sum', which gives 0.",
        )


def checked_values(
    target: Tensor, num_classes: int, eps: float | Tensor, trades_weight: float
) -> None:
    """Refuse values outside their documented sets, where reading them stalls no device.

    A graph that is being compiled has no values to read: there the kernels refuse targets.
    """
    readable = not torch.compiler.is_compiling()
    if readable and target.device.type == "cpu" and target.numel():
        low, high = (int(end) for end in target.aminmax())
        if low < 0 or high >= num_classes:
            raise ArgumentError(
                f"targets in [0, {num_classes})",
                f"values from {low} to {high}",
                f"{_WHERE}(target=)",
                "drop samples without a class; there is no ignored index.",
            )
    if isinstance(eps, Tensor):
        values = eps.detach()
        fine = values.isfinite() & (values >= 0)
        legal = not readable or values.device.type != "cpu" or bool(fine.all())
    else:
        legal = math.isfinite(eps) and eps >= 0
    if not legal:
        raise ArgumentError(
            "eps finite and >= 0",
            "a tensor with other values" if isinstance(eps, Tensor) else repr(eps),
            f"{_WHERE}(eps=)",
            "pass the attack budget in input units, such as 36 / 255.",
        )
    if not (math.isfinite(trades_weight) and trades_weight >= 0):
        raise ArgumentError(
            "trades_weight finite and >= 0",
            repr(trades_weight),
            f"{_WHERE}(trades_weight=)",
            "pass the weight of the divergence, such as 1.5.",
        )


def _check_eps_tensor(eps: Tensor, logits: Tensor) -> None:
    n, k = logits.shape
    if tuple(eps.shape) not in ((), (n,), (k, k)):
        raise ShapeError(
            f"eps a scalar, ({n},) per sample or ({k}, {k}) per class pair",
            str(tuple(eps.shape)),
            f"{_WHERE}(eps=)",
            "reshape it, or pass a number.",
        )
    if eps.dim() and eps.device != logits.device:
        raise ArgumentError(
            f"eps on {logits.device}, beside the logits",
            f"a tensor on {eps.device}",
            f"{_WHERE}(eps=)",
            "move it once, before training; copying it at every step would stall.",
        )
    if eps.dim() == 2 and eps.requires_grad:
        raise ArgumentError(
            "class-pair margins that are constants",
            "a tensor that requires a gradient",
            f"{_WHERE}(eps=)",
            "detach it; gradients flow to a scalar or per-sample eps only.",
        )
