# SPDX-License-Identifier: MIT
"""Memory that goes from call to call is never handed out while somebody still reads it."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import lmtfast as lf
from lmtfast.backends import native_spectral
from lmtfast.backends.recycled import LARGE, Recycled

HOLDERS: dict[str, Callable[[Tensor], object]] = {
    "the tensor": lambda t: t,
    "a view": lambda t: t[5:],
    "a view of a view": lambda t: t.view(2, -1)[1][3:],
    "a detached twin": lambda t: t.detach(),
    "its storage": lambda t: t.untyped_storage(),
    "an array": lambda t: t.numpy(),
    "a memory view": lambda t: memoryview(t.numpy()),
    "a graph": lambda t: t.requires_grad_().square().sum(),
    "a capsule": lambda t: torch.from_dlpack(t),
}


@pytest.mark.parametrize("name", HOLDERS)
def test_memory_is_not_shared_while_it_is_held(name: str) -> None:
    memory = Recycled()
    first = memory.empty(LARGE)
    address = first.data_ptr()
    holder = HOLDERS[name](first)
    del first
    others = [memory.empty(LARGE) for _ in range(3)]
    assert address not in [t.data_ptr() for t in others]
    del holder
    gc.collect()
    assert memory.empty(LARGE).data_ptr() == address


def test_small_and_other_sizes_have_blocks_of_their_own() -> None:
    memory = Recycled()
    for entries in (0, 1, LARGE - 1, LARGE, LARGE + 1):
        kept = [memory.empty(entries) for _ in range(2)]
        assert all(t.shape == (entries,) and t.dtype == torch.float32 for t in kept)
    block = memory.empty(2 * LARGE)
    address = block.data_ptr()
    del block
    assert memory.empty(LARGE).data_ptr() != address
    assert memory.empty(2 * LARGE).data_ptr() == address


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_block_takes_a_tensors_layout(layout: torch.memory_format) -> None:
    like = torch.empty(90, 80, 6, 7).contiguous(memory_format=layout)
    found = Recycled().empty_like(like.bfloat16())
    assert (found.shape, found.stride(), found.dtype) == (like.shape, like.stride(), torch.float32)


@pytest.mark.parametrize("entries", [12, LARGE])
def test_a_block_may_be_modified_in_place(entries: int) -> None:
    """As memory of its own may: a gradient is scaled by what is learned."""
    with torch.no_grad():
        found = Recycled().empty_like(torch.empty(entries // 4, 4)).zero_()
    scale = torch.ones((), requires_grad=True)
    found.mul_(scale)
    assert found.requires_grad
    assert found.detach_().grad_fn is None


def test_a_default_dtype_changes_no_block(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        assert {Recycled().empty(n).dtype for n in (0, LARGE)} == {torch.float32}
    finally:
        torch.set_default_dtype(before)


def test_threads_get_different_blocks() -> None:
    memory, wrong = Recycled(), []

    def use(mark: float) -> None:
        for _ in range(200):
            block = memory.empty(LARGE)
            block.fill_(mark)
            if not bool((block == mark).all()):
                wrong.append(mark)

    threads = [threading.Thread(target=use, args=(float(i),)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def wide() -> nn.Sequential:
    """Weights, and vectors of power iteration together, beyond the size of recycled blocks."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(64, 128, 7), nn.ReLU(), nn.Conv2d(128, 256, 3), nn.Flatten())


def bound_of(model: nn.Module, engine: str) -> lf.NetworkBound:
    return lf.NetworkBound(model, (64, 28, 28), engine=engine, backend="native")


@pytest.mark.parametrize("engine", ["operator", "symbol", "separable"])
def test_gradients_survive_the_calls_after_them(engine: str) -> None:
    model = wide()
    bound = bound_of(model, engine)
    early, late = bound(update=False), bound(update=False)
    for _ in range(2):
        bound()  # a graph that is dropped gives its blocks back
    late.total.backward()
    kept = [p.grad for p in model.parameters() if p.grad is not None]
    copies = [g.clone() for g in kept]
    model.zero_grad(set_to_none=True)
    early.total.backward()
    for _ in range(2):
        bound().total.backward()
    assert len(kept) == 2
    assert all(map(torch.equal, kept, copies))
    model.zero_grad(set_to_none=True)
    twin = wide()
    bound_of(twin, engine)(update=False).total.backward()
    fresh = [p.grad for p in twin.parameters() if p.grad is not None]
    assert all(map(torch.equal, fresh, copies))


def test_a_step_takes_the_blocks_of_the_step_before() -> None:
    model = wide()
    bound = bound_of(model, "operator")
    table = bound.plan.table
    for _ in range(2):
        bound().total.backward()  # the first one's gradients stay with the model
    free = native_spectral.prepared(table).memory._free
    addresses = {t.data_ptr() for blocks in free.values() for t in blocks}
    for _ in range(3):
        bound().total.backward()
    assert {t.data_ptr() for blocks in free.values() for t in blocks} == addresses


def test_a_network_that_is_gone_leaves_no_memory() -> None:
    bound = bound_of(wide(), "operator")
    bound()
    table = bound.plan.table
    known = len(native_spectral._PREPARED)
    assert table in native_spectral._PREPARED
    del bound, table
    gc.collect()
    assert len(native_spectral._PREPARED) == known - 1
