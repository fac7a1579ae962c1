# SPDX-License-Identifier: MIT
"""A network's tables on a device, and its tensors as the Triton kernels read them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import knobs

from lmtfast.backends.spectral_argument import dense, tap_major
from lmtfast.errors import BackendUnavailableError
from lmtfast.kernels.composition import TapeWork, tape_work
from lmtfast.kernels.gradient_work import (
    ORDER,
    ScaleEntries,
    WeightTiles,
    scale_entries,
    scale_slots,
    weight_slots,
    weight_tiles,
)
from lmtfast.kernels.operator_work import OperatorWork, operator_tiles, operator_work
from lmtfast.kernels.scale_work import STRETCH_FIELDS, scale_stretches
from lmtfast.kernels.separable_work import SeparableWork, separable_tiles, separable_work
from lmtfast.kernels.symbol_work import SymbolWork, symbol_work
from lmtfast.table import SCALE_FIELDS, OperatorTable

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
SEVERAL_DTYPES = -1
# Tables of addresses that are kept; training needs one, exponential averages and the like a second.
REMEMBERED = 8


@dataclass
class Network:
    """What one network's launches read. Tables by engine are None where it runs no operator; those
    of symbol are empty, for its launches serve scales too.

    Attributes:
        table: The plan's table.
        device: Where all tensors here are.
        complete: Whether every operator is run here.
        factors: The scales' factors, int64, as in the table.
        stretches: Blocks of the scale buffer.
        entries: Who owns the gradients in the scales' tensors.
        tape: The composition.
        slots: Weights by engine.
        scale_slots: Tensors that scale channels.
        used: Every tensor that is read here.
    """

    table: OperatorTable
    device: torch.device
    complete: bool
    factors: Tensor
    stretches: Tensor
    entries: ScaleEntries
    tape: TapeWork
    slots: dict[str, frozenset[int]]
    scale_slots: frozenset[int]
    used: frozenset[int]
    operator: OperatorWork | None
    operator_tiles: list[WeightTiles]
    separable: SeparableWork | None
    separable_tiles: list[WeightTiles]
    symbol: SymbolWork
    symbol_tiles: WeightTiles
    _known: dict[tuple[int, ...], Tensor] = field(default_factory=dict)
    _captured: list[Tensor] = field(default_factory=list)

    def views(self, tensors: Sequence[Tensor]) -> list[Tensor | None]:
        """Every tensor that is read here, in a dtype and a layout that the kernels read."""
        return [
            dense(t, self.device, DTYPES, "triton", wide_scales=False) if i in self.used else None
            for i, t in enumerate(tensors)
        ]

    def described(self, views: Sequence[Tensor | None]) -> Tensor:
        """The table of tensors (kernels/descriptor.py), made again when one has moved."""
        key: list[int] = []
        for t in views:
            if t is None:
                key += (0, 0, 0, 0, 0)
                continue
            row_bytes = t.numel() // max(1, t.shape[0]) * t.element_size() if t.ndim > 1 else 1
            address = t.data_ptr()
            aligned = address % 16 == 0 and row_bytes % 16 == 0
            key += (address, DTYPES[t.dtype], t.numel(), int(tap_major(t)), int(aligned))
        return self.on_device(tuple(key))

    def on_device(self, numbers: tuple[int, ...]) -> Tensor:
        """A table of int64 on the device; a new one only where the numbers are new.

        A CUDA graph goes on reading the tables it was captured with, so those are never dropped.
        """
        found = self._known.get(numbers)
        if found is None:
            while len(self._known) >= REMEMBERED:
                del self._known[next(iter(self._known))]
            found = torch.tensor(numbers, dtype=torch.int64)
            if self.device.type == "cuda":
                found = found.pin_memory().to(self.device, non_blocking=True)
            self._known[numbers] = found
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            self._captured.append(found)
        return found

    def dtypes(self, engine: str, views: Sequence[Tensor | None]) -> int:
        """Code of the one dtype of an engine's weights, or of several."""
        codes = {DTYPES[t.dtype] for i in self.slots[engine] if (t := views[i]) is not None}
        return codes.pop() if len(codes) == 1 else SEVERAL_DTYPES


class Step(NamedTuple):
    """What the launches of one step share."""

    network: Network
    views: Sequence[Tensor | None]
    described: Tensor
    state: Tensor
    new_state: Tensor
    sigmas: Tensor
    saved: Tensor
    update: bool


@lru_cache(maxsize=64)
def prepared(table: OperatorTable, device: torch.device) -> Network:
    """A network's tables on a device."""
    slots = {engine: weight_slots(table, engine) for engine in ORDER}
    scales = scale_slots(table)
    network = Network(
        table, device, all(row[0] for row in table.rows),
        torch.tensor(table.scales, dtype=torch.int64).reshape(-1, len(SCALE_FIELDS)),
        torch.tensor(scale_stretches(table), dtype=torch.int64).reshape(-1, len(STRETCH_FIELDS)),
        scale_entries(table), tape_work(table), slots, scales, scales.union(*slots.values()),
        operator_work(table), operator_tiles(table), separable_work(table),
        separable_tiles(table), symbol_work(table), weight_tiles(table, "symbol"),
    )  # fmt: skip
    _move(network, device)
    return network


def _move(work: Any, device: torch.device) -> None:
    """Every tensor of a dataclass, and of those inside, to the device."""
    for part in fields(work):
        value = getattr(work, part.name)
        if isinstance(value, Tensor):
            object.__setattr__(work, part.name, value.to(device))
        for inner in value if isinstance(value, list) else [value]:
            if is_dataclass(inner) and not isinstance(inner, OperatorTable):
                _move(inner, device)


def require_device(tensor: Tensor, name: str) -> None:
    """Raise unless Triton can reach the tensor."""
    if tensor.is_cuda or (tensor.is_cpu and knobs.runtime.interpret):
        return
    remedy = "move it to a GPU, or drop backend= to have one chosen"
    raise BackendUnavailableError("a tensor on an NVIDIA GPU", str(tensor.device), name, remedy)
