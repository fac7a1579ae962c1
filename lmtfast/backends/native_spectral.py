# SPDX-License-Identifier: MIT
"""Spectral norms by the compiled CPU core: all operators of a network in one call.

A backend that offers this exposes ``STEPS`` (the engines it runs, ``closed form`` if it takes the
norms of diagonal maps along), ``spectral_step``,
``spectral_vjp`` and ``compose``; every other operator of a plan is run by the reference.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from lmtfast.backends.recycled import Recycled
from lmtfast.backends.spectral_argument import check_state, dense, tap_major, vector
from lmtfast.errors import DtypeError, ShapeError
from lmtfast.table import AXES, CLOSED_FORM, FIELDS, KINDS, OperatorTable

STEPS = frozenset({"operator", "symbol", "separable", CLOSED_FORM})
DTYPES = {torch.float32: 0, torch.bfloat16: 2}
CPU = torch.device("cpu")


class Prepared(NamedTuple):
    """The compiled core's copy of a table, and where its calls take their large results from."""

    network: Any
    memory: Recycled


_PREPARED: WeakKeyDictionary[OperatorTable, Prepared] = WeakKeyDictionary()


def prepared(table: OperatorTable) -> Prepared:
    """Made at the first call for a table, and dropped with it."""
    found = _PREPARED.get(table)
    if found is None:
        from lmtfast import _C

        flat = [list(chain.from_iterable(part)) for part in (table.rows, table.scales, table.tape)]
        network = _C.Network(
            *flat, table.features, table.total, table.scale_size, table.saved_size, table.state_size
        )
        found = _PREPARED.setdefault(table, Prepared(network, Recycled()))
    return found


def spectral_step(
    table: OperatorTable, tensors: Sequence[Tensor], state: Tensor, *, update: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of every operator that the table marks as compiled.

    Args:
        table: The plan's table.
        tensors: One tensor per slot, on the CPU. Weights may be bfloat16; other dtypes and layouts
            than contiguous or channels-last are copied to float32 first.
        state: Iterates of all operators. Shape ``(state_size,)``, float32; not modified.
        update: Whether to advance; otherwise sigma is read before a step.

    Returns:
        sigmas ``(R,)``, zero for operators not run here; the new iterates ``(state_size,)``, equal
        to the old ones for operators not run here and where a step is not finite, or empty without
        ``update``; and what the gradient needs ``(saved_size,)``.

    Raises:
        DtypeError: The state is not float32, or a tensor is complex or not dense.
        ShapeError: A tensor is not on the CPU or has no data, or the state has another size.

    Guarantee:
        None: power iteration estimates norms from below.
    """
    check_state(table, state, "native")
    views = _views(tensors)
    state = state.contiguous()
    sigmas = state.new_zeros(len(table.rows))
    network, memory = prepared(table)
    saved = memory.empty(table.saved_size)
    # What runs here is written whole.
    alone = len(table.compiled) == len(table.rows)
    new_state = memory.empty(update * state.numel())
    if update and not alone:
        new_state.copy_(state)
    network.step(
        _described(views), state.data_ptr(), new_state.data_ptr() if update else 0,
        sigmas.data_ptr(), saved.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return sigmas, new_state, saved


def spectral_vjp(
    table: OperatorTable,
    tensors: Sequence[Tensor],
    saved: Tensor,
    grad_sigmas: Tensor,
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """Gradient of ``<grad_sigmas, sigmas>`` in every wanted tensor, in the tensor's own dtype.

    Args:
        table: The plan's table.
        tensors: As given to :func:`spectral_step`.
        saved: As returned by it.
        grad_sigmas: Shape ``(R,)``, float32.
        wanted: Which tensors' gradients are wanted; the others' are None.

    Raises:
        DtypeError, ShapeError: ``saved`` or ``grad_sigmas`` is not as described.
    """
    views = _views(tensors)
    network, memory = prepared(table)
    grads, outputs = _gradients(memory, views, wanted)
    saved = vector(saved, table.saved_size, "saved", CPU)
    grad_sigmas = vector(grad_sigmas, len(table.rows), "grad_sigmas", CPU)
    network.vjp(
        _described(views), saved.data_ptr(), grad_sigmas.data_ptr(), outputs,
        torch.get_num_threads(),
    )  # fmt: skip
    return [g if g is None else g.to(t.dtype) for g, t in zip(grads, tensors, strict=True)]


def row_matvec(table: OperatorTable, row: int, tensors: Sequence[Tensor], v: Tensor) -> Tensor:
    """``A v`` of one compiled operator. Flat float32, ``v`` of any shape with its entries.

    Raises:
        DtypeError: ``v`` is not float32.
        ShapeError: ``v`` has another number of entries, or the row is not compiled.
    """
    outputs, inputs = _sides(table, row)
    views, v = _views(tensors), vector(v, inputs, "v", CPU)
    u = v.new_empty(outputs)
    prepared(table).network.matvec(
        row, _described(views), v.data_ptr(), u.data_ptr(), torch.get_num_threads()
    )
    return u


def row_rmatvec(table: OperatorTable, row: int, tensors: Sequence[Tensor], u: Tensor) -> Tensor:
    """``A^T u`` of one compiled operator; as :func:`row_matvec`."""
    outputs, inputs = _sides(table, row)
    views, u = _views(tensors), vector(u, outputs, "u", CPU)
    v = u.new_empty(inputs)
    prepared(table).network.rmatvec(
        row, _described(views), u.data_ptr(), v.data_ptr(), torch.get_num_threads()
    )
    return v


def row_weight_vjp(
    table: OperatorTable,
    row: int,
    tensors: Sequence[Tensor],
    u: Tensor,
    v: Tensor,
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """Gradient of ``<u, A v>`` of one compiled operator, as :func:`spectral_vjp` returns it."""
    outputs, inputs = _sides(table, row)
    u, v = vector(u, outputs, "u", CPU), vector(v, inputs, "v", CPU)
    views = _views(tensors)
    network, memory = prepared(table)
    grads, described = _gradients(memory, views, wanted)
    network.weight_vjp(
        row, _described(views), u.data_ptr(), v.data_ptr(), described, torch.get_num_threads()
    )
    return [g if g is None else g.to(t.dtype) for g, t in zip(grads, tensors, strict=True)]


def power_vectors(
    acting: Tensor, phase: Tensor, terms: Tensor, start: Tensor, steps: int
) -> tuple[Tensor, Tensor]:
    """Power steps on a convolution's symbol at many frequencies, for a rescan.

    Args:
        acting: Kernels with entries of modulus one at most, shape ``(G, rows, C, T)``, float32 on
            the CPU.
        phase: Phase number of every tap, shape ``(T,)``, int64.
        terms: ``exp(-i w . tau_t)``, shape ``(N, T)`` complex64.
        start: The unit vector that every iteration starts from, shape ``(P * C,)`` complex64.
        steps: Power steps.

    Returns:
        Norm estimates ``(G, N)`` and unit vectors ``(G, N, P * C)`` complex.

    Raises:
        DtypeError: The kernels are not float32 on the CPU.
        ShapeError: The sizes do not fit.

    Guarantee:
        None: power iteration estimates norms from below.
    """
    from lmtfast import _C

    if acting.dtype != torch.float32 or not acting.is_cpu:
        raise DtypeError(
            "float32 kernels on the CPU", f"{acting.dtype} on {acting.device}", "power_vectors",
            "use lmtfast.engines.frequency.power_vectors",
        )  # fmt: skip
    groups, rows, channels, taps = acting.shape
    if terms.shape[1:] != (taps,) or phase.shape != (taps,) or start.numel() % channels:
        got = f"{tuple(terms.shape)}, {tuple(phase.shape)}, {tuple(start.shape)}"
        raise ShapeError(
            f"terms (N, {taps}), phase ({taps},) and start (P * {channels},)", got,
            "power_vectors", "build them as lmtfast.engines.frequency does",
        )  # fmt: skip
    acting, phase = acting.contiguous(), phase.contiguous()
    terms, start = terms.to(torch.complex64).contiguous(), start.to(torch.complex64).contiguous()
    norms = acting.new_empty(groups, terms.shape[0])
    vectors = start.new_empty(*norms.shape, start.numel())
    _C.power_vectors(
        groups, rows, channels, taps, start.numel() // channels, terms.shape[0], steps,
        acting.data_ptr(), phase.data_ptr(), terms.data_ptr(), start.data_ptr(), norms.data_ptr(),
        vectors.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return norms, vectors


def compose(table: OperatorTable, sigmas: Tensor) -> tuple[Tensor, Tensor]:
    """The bounds of features and logits ``(2,)`` and their derivatives in sigmas ``(2, R)``."""
    sigmas = vector(sigmas, len(table.rows), "sigmas", CPU)
    values, jacobian = sigmas.new_empty(2), sigmas.new_empty(2, len(table.rows))
    prepared(table).network.compose(sigmas.data_ptr(), values.data_ptr(), jacobian.data_ptr())
    return values, jacobian


def _sides(table: OperatorTable, row: int) -> tuple[int, int]:
    """Entries of an operator's output and input."""
    stencils = [i for i, fields in enumerate(table.rows) if fields[0] == KINDS.index("stencil")]
    if row not in stencils:
        raise ShapeError(
            f"a compiled stencil, one of {stencils}", str(row), "row",
            "run the others on the reference backend",
        )  # fmt: skip
    at = dict(zip(FIELDS, table.rows[row], strict=True))
    inputs = at["groups"] * at["channels"] * math.prod(at[f"in_{i}"] for i in range(AXES))
    outputs = at["groups"] * at["rows"] * math.prod(at[f"out_{i}"] for i in range(AXES))
    return (inputs, outputs) if at["transposed"] else (outputs, inputs)


def _views(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [dense(t, CPU, DTYPES, "native") for t in tensors]


def _gradients(
    memory: Recycled, views: Sequence[Tensor], wanted: Sequence[bool]
) -> tuple[list[Tensor | None], list[int]]:
    """Buffers for the wanted gradients, float32 in their tensor's layout, and their description."""
    grads = [memory.empty_like(v) if want else None for v, want in zip(views, wanted, strict=True)]
    described = []
    for view, grad in zip(views, grads, strict=True):
        if grad is None:
            described += [0, 0, 0, 0]
        else:
            described += [grad.data_ptr(), 0, view.numel(), int(tap_major(view))]
    return grads, described


def _described(views: Sequence[Tensor]) -> list[int]:
    flat: list[int] = []
    for t in views:
        address = t.data_ptr()
        if address == 0 and t.numel() > 0:
            raise ShapeError(
                "tensors with data", f"one of shape {tuple(t.shape)} whose storage was freed",
                "the native backend", "gather sharded parameters before calling the bound",
            )  # fmt: skip
        flat += (address, DTYPES[t.dtype], t.numel(), tap_major(t))
    return flat
