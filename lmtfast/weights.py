# SPDX-License-Identifier: MIT
"""From weight references to tensors: parameters, folded batch-norm gains, parametrized weights."""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lmtfast.errors import NotCertifiedError, StalePlanError
from lmtfast.graph import (
    BatchNormScale,
    ChannelScale,
    ConstantRef,
    Derived,
    ParameterRef,
    WeightRef,
)

# Beyond it not every integer is a float64.
LARGEST_INTEGER = 2**53


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers (persistent or not) by qualified name."""
    tensors: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    tensors.update(model.named_buffers(remove_duplicate=False))
    return tensors


def weights_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Hash of all parameters and buffers: name, dtype, shape and bytes, sorted by name."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = laid_out(tensors[name])
        for part in (name, str(tensor.dtype), str(tuple(tensor.shape))):
            digest.update(len(part.encode()).to_bytes(8, "little") + part.encode())
        digest.update(tensor.numel().to_bytes(8, "little"))
        if tensor.numel():
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def laid_out(tensor: Tensor) -> Tensor:
    """The numbers of a tensor on the CPU, contiguous: the order of later sums, and so their bits,
    must not depend on strides, nor bytes on a conjugation or negation that is still to be done."""
    return tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()


def on_host() -> AbstractContextManager[Any]:
    """Tensors made inside lie on the CPU, whatever device ``torch.set_default_device`` named."""
    elsewhere = torch.get_default_device().type != "cpu"
    return torch.device("cpu") if elsewhere else nullcontext()


def operation(target: str) -> Any:
    """The ATen overload called ``target``, for example ``aten.mul.Tensor``."""
    if target == "operator.getitem":
        return operator.getitem
    namespace, name, overload = target.split(".")
    return getattr(getattr(getattr(torch.ops, namespace), name), overload)


class Weights:
    """Resolves references against one snapshot of a model's tensors; each is computed once.

    Args:
        tensors: Parameters and buffers by qualified name.
        dtype: If given, every floating tensor is converted to it first (float64 when certifying;
            then integers beyond 2^53 are refused).
        batch_variance: Variances to use instead of running ones, by batch-norm module name.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        *,
        dtype: torch.dtype | None = None,
        batch_variance: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.tensors, self._dtype = tensors, dtype
        self._batch_variance = batch_variance or {}
        self._cache: dict[WeightRef, Tensor] = {}

    @property
    def device(self) -> torch.device:
        """Where the tensors are; the CPU without any."""
        known = (*self.tensors.values(), *self._cache.values())
        return next((t.device for t in known), torch.device("cpu"))

    def zeros(self, *shape: int) -> Tensor:
        """Zeros beside the tensors, float64."""
        return torch.zeros(shape, dtype=torch.float64, device=self.device)

    def __getitem__(self, ref: WeightRef) -> Tensor:
        if ref not in self._cache:
            self._cache[ref] = self._resolve(ref)
        return self._cache[ref]

    def _cast(self, tensor: Any) -> Any:
        if isinstance(tensor, (tuple, list)):
            return type(tensor)(self._cast(t) for t in tensor)
        if self._dtype is None or not isinstance(tensor, Tensor):
            return tensor
        if tensor.is_complex():
            return tensor.to(self._dtype.to_complex())
        if tensor.is_floating_point():
            return tensor.to(self._dtype)
        if self._dtype == torch.float64:
            _require_floats(tensor)
        return tensor

    def _resolve(self, ref: WeightRef) -> Tensor:
        if isinstance(ref, ParameterRef):
            if ref.name not in self.tensors:
                raise StalePlanError(
                    f"a parameter or buffer {ref.name!r}", "none", "the traced model",
                    "trace the model again after changing its structure",
                )  # fmt: skip
            return self._cast(self.tensors[ref.name])
        if isinstance(ref, ConstantRef):
            return self._cast(constant_tensor(ref).to(self.device))
        if isinstance(ref, BatchNormScale):
            variance = self._batch_variance.get(ref.module)
            variance = self[ref.variance] if variance is None else self._cast(variance)
            if self._dtype is None and variance.dtype in (torch.float16, torch.bfloat16):
                variance = variance.float()
            root = torch.sqrt(variance + ref.eps)
            return root.reciprocal() if ref.weight is None else self[ref.weight] / root
        args = [self._argument(a) for a in ref.args]
        kwargs = {k: self._argument(v) for k, v in ref.kwargs}
        # Casts and factories inside may have left the dtype.
        return self._cast(operation(ref.target)(*args, **kwargs))

    def _argument(self, arg: Any) -> Any:
        if isinstance(arg, (ParameterRef, ConstantRef, BatchNormScale, Derived)):
            return self[arg]
        if isinstance(arg, tuple):
            return [self._argument(a) for a in arg]
        return arg

    def channels(self, scale: ChannelScale) -> Tensor:
        """The factor per channel. Shape ``(C,)``, or ``(1,)`` for one factor on all of them."""
        value = self[scale.ref].reshape(-1)
        if not value.is_floating_point():
            value = value.to(self._dtype or torch.get_default_dtype())
        return value.reciprocal() if scale.inverse else value


def _require_floats(tensor: Tensor) -> None:
    """Refuse integers that float64, in which they are computed with, may not hold."""
    if tensor.dtype == torch.uint64 or (
        tensor.dtype == torch.int64
        and not torch.equal(tensor.clamp(-LARGEST_INTEGER, LARGEST_INTEGER), tensor)
    ):
        raise NotCertifiedError(
            "integers of modulus up to 2^53", f"{tensor.dtype} of shape {tuple(tensor.shape)}",
            "a buffer or constant", "store it as float64, or as smaller integers",
        )  # fmt: skip


def constant_tensor(ref: ConstantRef) -> Tensor:
    """The tensor a :class:`ConstantRef` holds."""
    dtype = getattr(torch, ref.dtype)
    if not ref.data:
        return torch.empty(ref.shape, dtype=dtype)
    return torch.frombuffer(bytearray(ref.data), dtype=dtype).reshape(ref.shape)


def constant_ref(tensor: Tensor) -> ConstantRef:
    """Freeze a tensor into a :class:`ConstantRef`."""
    flat = laid_out(tensor)
    data = bytes(flat.reshape(-1).view(torch.uint8).numpy()) if flat.numel() else b""
    return ConstantRef(tuple(flat.shape), str(flat.dtype).removeprefix("torch."), data)
