# SPDX-License-Identifier: MIT
"""Arguments of a spectral call, checked and in a form that compiled code reads."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from lmtfast.errors import DtypeError, ShapeError
from lmtfast.table import OperatorTable


def tap_major(t: Tensor) -> bool:
    """Whether the taps of a kernel lie outside its channels (channels-last)."""
    return not t.is_contiguous()


def dense(
    t: Tensor,
    device: torch.device,
    dtypes: Collection[torch.dtype],
    backend: str,
    *,
    wide_scales: bool = True,
) -> Tensor:
    """A tensor of the network in a dtype and a layout that a backend reads.

    Args:
        t: A weight or a scale, any dtype and strides.
        device: Where the iterates are.
        dtypes: What the backend reads; anything else real becomes float32.
        backend: Its name, for messages.
        wide_scales: Whether vectors, which may be scales, are wanted in float32.

    Returns:
        The tensor itself where it already is: contiguous or channels-last, no lazy negation.

    Raises:
        DtypeError: It is complex or not strided.
        ShapeError: It is on another device.
    """
    strided = t.layout is torch.strided
    here = t.device == device
    if here and t.dtype is torch.float32 and strided and t.is_contiguous() and not t.is_neg():
        return t
    if not here:
        raise ShapeError(
            f"tensors on {device}, beside the iterates", f"one on {t.device}",
            f"the {backend} backend", "move the model and the bound to one device",
        )  # fmt: skip
    if not strided:
        raise DtypeError(
            "dense tensors", str(t.layout), f"the {backend} backend", "convert them with to_dense()"
        )
    t = t.detach().resolve_neg()
    vector = t.numel() == max(t.shape, default=1)
    if t.dtype not in dtypes or (wide_scales and vector):
        if t.is_complex():
            raise DtypeError("real weights", str(t.dtype), f"the {backend} backend", "use reals")
        t = t.float()
    if t.is_contiguous():
        return t
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(t.ndim)
    if last is not None and t.is_contiguous(memory_format=last):
        return t
    return t.contiguous()


def check_state(table: OperatorTable, state: Tensor, backend: str) -> None:
    """Raise unless the iterates are float32 and as many as the table says."""
    if state.dtype != torch.float32:
        raise DtypeError(
            "float32 iterates", str(state.dtype), f"the {backend} backend",
            "use backend='reference' for float64 weights",
        )  # fmt: skip
    if state.shape != (table.state_size,):
        raise ShapeError(
            f"iterates of shape ({table.state_size},)", str(tuple(state.shape)), "PowerState",
            "use the state that was made with the plan",
        )  # fmt: skip


def vector(x: Tensor, entries: int, name: str, device: torch.device) -> Tensor:
    """``x`` flat and contiguous.

    Raises:
        DtypeError: It is not float32 on the device.
        ShapeError: It has another number of entries.
    """
    if x.dtype != torch.float32 or x.device != device:
        raise DtypeError(
            f"a float32 vector on {device}", f"{x.dtype} on {x.device}", name, "convert it first"
        )
    if x.numel() != entries:
        raise ShapeError(
            f"{entries} entries", str(tuple(x.shape)), name, "use the operator's own shape"
        )
    if x.ndim == 1 and x.is_contiguous() and not (x.is_neg() or x.requires_grad):
        return x
    return x.detach().resolve_neg().reshape(-1).contiguous()
