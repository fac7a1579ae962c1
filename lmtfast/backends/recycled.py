# SPDX-License-Identifier: MIT
"""Memory on the CPU that goes from one call to the next."""

from __future__ import annotations

import weakref
from collections import defaultdict

import torch
from torch import Tensor

# Entries of a block that is worth it; smaller ones mostly stay with the allocator.
LARGE = 1 << 18


class Recycled:
    """Blocks of float32 that calls of one network take in turns.

    A step of a large network writes as much as its feature maps or its weights. Such blocks come
    from the system zeroed, a page at a time, and go back to it when they are freed: that can cost
    more than the step. Here a block is taken again once no tensor is left on it, so that a network
    holds what its calls held at once, and no more.
    """

    def __init__(self) -> None:
        self._free: defaultdict[int, list[Tensor]] = defaultdict(list)

    def empty(self, entries: int) -> Tensor:
        """Uninitialised memory, shape ``(entries,)``; nothing else lies on it while this tensor, a
        view of it or a graph that saved one is alive."""
        if entries < LARGE:
            return _block(entries)
        free = self._free[entries]
        try:
            block = free.pop()
        except IndexError:
            block = _block(entries)
        # torch keeps the array for as long as a tensor needs its memory.
        lease = block.numpy()
        weakref.finalize(lease, free.append, block).atexit = False
        return torch.from_numpy(lease)

    def empty_like(self, tensor: Tensor) -> Tensor:
        """The same in the shape and the layout of a dense tensor."""
        # Detached: autograd lets nobody modify a view in place that was made without a graph.
        return self.empty(tensor.numel()).as_strided(tensor.shape, tensor.stride()).detach()


def _block(entries: int) -> Tensor:
    return torch.empty(entries, dtype=torch.float32, device="cpu")
