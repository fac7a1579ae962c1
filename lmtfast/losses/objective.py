# SPDX-License-Identifier: MIT
"""Margin cross-entropy: the one entry point to every member of the family."""

from __future__ import annotations

import math
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from lmtfast.autograd import margin_loss
from lmtfast.backends.margin_reference import reference_class
from lmtfast.backends.margin_step import MarginProblem
from lmtfast.losses.argument import checked_member, checked_shapes, checked_values
from lmtfast.losses.members import MEMBERS

MIN_FULL_CLASSES = 256


class MarginBound(Protocol):
    """What the losses read of a Lipschitz bound."""

    @property
    def total(self) -> Tensor | float: ...
    @property
    def features(self) -> Tensor | float: ...
    @property
    def head_weight(self) -> Tensor | None: ...


def margin_cross_entropy(
    logits: Tensor,
    target: Tensor,
    bound: MarginBound,
    *,
    eps: float | Tensor,
    scaling: str = "lmt++",
    reduction: str = "mean",
    trades_weight: float = 1.0,
    backend: str | None = None,
) -> Tensor:
    """Cross-entropy on logits whose rivals are raised by what an attack could add to them.

    With ``A_ij = eps * L * ||w_r - w_j||`` for rivals j of sample i and 0 at its reference class r,
    L the bound of the features and w the rows of the head:

    ============= =============================================================================
    ``lmt``       CE(z + A), r the target
    ``lmt++``     CE(z + a_i A), one ``a_i = min over j of clip((z_t - z_j) / A_ij, 0, 1)``
    ``lmt-total`` ``lmt++`` with ``A_ij = sqrt(2) * eps * L_total`` for every rival
    ``emma``      CE(z + s A), ``s_ij = clip((z_t - z_j) / A_ij, 0.01, 1)``
    ``gloro``     CE over K + 1 logits, the last ``max over j of z_j + A_ij``, r the prediction
    ``trades``    CE(z) + trades_weight * KL(p || p_gloro)
    ============= =============================================================================

    The factors a and s are constants in backward. Where ``bound.head_weight`` is None every member
    uses ``sqrt(2) * eps * L_total``. At ``eps = 0`` all but the last two are plain cross-entropy;
    ``gloro`` and ``trades`` still repeat the runner-up as a rival, which is their definition.

    Args:
        logits: Class scores, (N, K), float16, bfloat16, float32 or float64; computed in float32, or
            float64 for float64. Gradients return in the dtype of ``logits``.
        target: True classes, (N,), int64 in [0, K). The range is checked on a CPU only: elsewhere
            it would stall.
        bound: Lipschitz bound with ``features``, ``total`` and ``head_weight`` (K, D), such as a
            ``NetworkBound`` returns; an estimate is enough for training.
        eps: Budget in input units, L2: a number, one value per sample (N,), or class-pair margins
            (K, K) whose entry ``[r, j]`` holds against rival j (diagonal ignored). Tensors of
            values < 0 are refused on a CPU only. Gradients flow to a scalar or (N,) tensor.
        scaling: Member of the family, from the table above.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        trades_weight: Weight of the divergence in ``trades``; unused by the others.
        backend: Name of a backend with margin losses, such as ``"native"`` or ``"reference"``
            (:func:`lmtfast.available_backends`); None chooses, and only then may fall back.

    Returns:
        Scalar, or (N,) for ``"none"``, float32 (float64 for float64 logits). NaN logits give NaN;
        one class gives 0.

    Raises:
        ShapeError: Shapes disagree, or the mean of an empty batch is asked.
        DtypeError: ``target`` is not int64, or ``logits`` are not floating point.
        ArgumentError: Unknown ``scaling``, ``reduction`` or ``backend``; a negative or non-finite
            ``eps``; a target out of range; tensors on different devices.
        BackendUnavailableError: The requested backend cannot run on these tensors.

    Guarantee:
        None: this is a training objective. Ask :func:`lmtfast.certify` for statements about
        robustness.

    Source:
        ``lmtfast.losses.MEMBERS[scaling].source``. First-order gradients only, to ``logits`` and to
        ``bound``.

    Example:
        >>> import torch, lmtfast
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3))
        >>> bound = lmtfast.NetworkBound(model, (4,))(update=True)
        >>> x, y = torch.rand(8, 4), torch.randint(3, (8,))
        >>> loss = lmtfast.margin_cross_entropy(model(x), y, bound, eps=36 / 255)
        >>> loss.backward()
    """
    member = checked_member(MEMBERS, scaling)
    head = bound.head_weight if member.pairwise else None
    checked_shapes(logits, target, head, eps, reduction)
    checked_values(target, logits.shape[1], eps, trades_weight)
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32

    coefficient = _scalar(bound.total if head is None else bound.features, logits, dtype)
    pairs = eps if isinstance(eps, Tensor) and eps.dim() == 2 else None
    if pairs is None:
        coefficient = coefficient * _scalar(eps, logits, dtype)
    classes, row_index, row_scale = _rows(member.formula, logits, target, head, pairs, dtype)
    problem = MarginProblem(
        logits, head, coefficient.expand(len(target)), target, classes, row_index, row_scale
    )
    loss = margin_loss(member.formula, backend, problem)
    if member.clean_share:
        # gloro is CE(z) + softplus(z_bottom - logsumexp(z)), and that second term is the KL
        # divergence.
        clean = F.cross_entropy(logits.to(dtype), target, reduction="none")
        loss = clean + trades_weight * (loss - clean)
    if reduction == "none":
        return loss
    return loss.mean() if reduction == "mean" else loss.sum()


def _scalar(value: Tensor | float, like: Tensor, dtype: torch.dtype) -> Tensor:
    """As a tensor beside ``like``; a number is filled in there, not copied from the host."""
    if isinstance(value, Tensor):
        return value.to(device=like.device, dtype=dtype)
    return torch.full((), value, dtype=dtype, device=like.device)


def _rows(
    formula: str,
    logits: Tensor,
    target: Tensor,
    head: Tensor | None,
    pairs: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """Rows of the pair table to build: (classes or None for all, row per sample, their factor).

    The distinct reference classes are what is needed, but finding them (``unique``) has a
    label-dependent shape and would make the host wait for the device. Instead: all K rows where K
    <= N, a table no larger than the logits (or K <= 256, where it is tiny); else one row per
    sample, repeated classes repeated. So U <= max(N, 256) and K x K is never formed for more
    classes than samples beyond 256.
    """
    n, k = logits.shape
    if head is None and pairs is None:
        ones = torch.full((1, k), math.sqrt(2.0), dtype=dtype, device=logits.device)
        return None, torch.zeros_like(target), ones
    reference = reference_class(formula, logits, target)
    full = k <= max(n, MIN_FULL_CLASSES)
    classes = None if full else reference
    row_index = reference if full else torch.arange(n, device=logits.device)
    if pairs is None:
        return classes, row_index, None
    scale = pairs.to(dtype) if classes is None else pairs.index_select(0, classes).to(dtype)
    return classes, row_index, scale if head is not None else scale * math.sqrt(2.0)
