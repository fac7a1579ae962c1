# SPDX-License-Identifier: MIT
"""The CUDA entry points of the compiled core, and the device and stream that a call runs on."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from lmtfast.errors import BackendUnavailableError

ABI_VERSION = 2
# Tensor-core instructions and the shared memory that the kernels ask for.
MIN_CAPABILITY = 80

# The same functions as compiled for the CPU take this place in the tests; their DEVICE is "cpu".
core: Any = None
_missing = ""
try:
    from lmtfast import _C
except ImportError as error:
    _missing = f"the compiled core cannot be loaded: {error}"
else:
    core = _C.cuda
    if _C.ABI_VERSION != ABI_VERSION:
        _missing = (
            f"the compiled core has ABI version {_C.ABI_VERSION}, this package needs {ABI_VERSION}"
        )


def available() -> tuple[bool, str]:
    """Whether the kernels can be launched here, and the reason if they cannot."""
    if core is None or (core.DEVICE == "cuda" and _missing):
        return False, _missing
    if core.DEVICE == "cpu":
        return True, "emulated on the CPU"
    if not torch.cuda.is_available():
        return False, "torch finds no NVIDIA GPU"
    device = torch.cuda.current_device()
    try:
        capability = core.capability(device)
    except RuntimeError as error:
        return False, str(error)
    if capability < MIN_CAPABILITY:
        return False, f"the GPU has compute capability {capability / 10}, 8.0 is needed"
    return True, torch.cuda.get_device_name(device)


def require(tensor: Tensor, name: str) -> None:
    """Refuse a tensor that the kernels cannot reach."""
    usable, reason = available()
    if not usable:
        raise BackendUnavailableError(
            "CUDA kernels that run here", reason, "backend 'cuda'",
            "build with make cuda on a machine with a GPU, or drop backend=",
        )  # fmt: skip
    if tensor.device.type != core.DEVICE:
        raise BackendUnavailableError(
            f"a tensor on {core.DEVICE}", str(tensor.device), name,
            "move it to the GPU, or drop backend= to have one chosen",
        )  # fmt: skip


def of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Makes the tensor's device the current one, as the entry points expect."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def stream(tensor: Tensor) -> int:
    """The current stream of the tensor's device, as an address."""
    return torch.cuda.current_stream(tensor.device).cuda_stream if tensor.is_cuda else 0
