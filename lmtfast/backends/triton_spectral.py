# SPDX-License-Identifier: MIT
"""Spectral norms by Triton kernels: all operators of a network in a handful of launches.

The functions of :mod:`lmtfast.backends.native_spectral`, same arguments and results, on an NVIDIA
GPU or under Triton's interpreter. This module allocates and launches; the kernels and their work
tables are in :mod:`lmtfast.kernels`. A network's tables go to the device at its first call there,
the addresses of its tensors when one has moved; any other call copies nothing, reads nothing back
and waits for nothing, so that it can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lmtfast.backends.spectral_argument import check_state, vector
from lmtfast.backends.triton_network import Network, Step, prepared, require_device
from lmtfast.backends.triton_operator import operator_step, precision
from lmtfast.kernels import (
    composition,
    operator_gradient,
    separable_gradient,
    separable_pass,
    symbol_finish,
    symbol_gradient,
    symbol_pass,
)
from lmtfast.table import CLOSED_FORM, OperatorTable

STEPS = frozenset({"operator", "symbol", "separable", CLOSED_FORM})


def spectral_step(
    table: OperatorTable, tensors: Sequence[Tensor], state: Tensor, *, update: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of every operator that the table marks as compiled: three launches of each engine,
    two of power iteration where nothing is to move. Diagonal maps come with the first, the
    matrices of power iteration with ``symbol`` where that runs any operator.

    Arguments and results are those of :func:`lmtfast.backends.native_spectral.spectral_step`, on
    a GPU; weights may be float16 as well.

    Raises:
        BackendUnavailableError: The state is on a device that Triton cannot reach here.
        DtypeError: The state is not float32, or a tensor is not real.
        ShapeError: The state has another size, or a tensor is on another device.

    Guarantee:
        None: power iteration estimates norms from below. The order in which the device runs its
        programs has no effect on any bit.
    """
    require_device(state, "PowerState")
    check_state(table, state, "triton")
    network = prepared(table, state.device)
    views = network.views(tensors)
    state = state.contiguous()
    rows = len(table.rows)
    sigmas = state.new_empty(rows) if network.complete else state.new_zeros(rows)
    saved = state.new_empty(table.saved_size)
    if not update:
        new_state = state.new_empty(0)
    else:
        new_state = torch.empty_like(state) if network.complete else state.clone()
    step = Step(network, views, network.described(views), state, new_state, sigmas, saved, update)
    with torch.cuda.device_of(state):
        operator_step(step)
        _separable_step(step)
        _symbol_step(step)
    return sigmas, new_state, saved


def _separable_step(step: Step) -> None:
    network, work = step.network, step.network.separable
    if work is None:
        return
    operators, described, state = work.operators, step.described, step.state
    workspace = state.new_empty(work.workspace)
    counters = torch.empty(work.counters, dtype=torch.int32, device=state.device)
    groups, packing = work.groups.shape[0], work.packing.shape[0]
    separable_pass.separable_prepare[(groups + packing + network.stretches.shape[0],)](
        operators, described, network.factors, network.stretches, work.visits, work.groups,
        work.packing, state, step.saved, workspace, counters, step.sigmas, groups, packing,
        **separable_pass.PREPARE_GEOMETRY,
    )  # fmt: skip
    grid = (work.tiles.shape[0],)
    separable_pass.separable_image[grid](
        operators, described, work.visits, work.classes, work.tiles, step.saved, workspace,
        counters, step.sigmas, UPDATE=step.update, **separable_pass.image_geometry(step.update),
    )  # fmt: skip
    if step.update:
        separable_pass.separable_adjoint[grid](
            operators, described, work.tiles, state, workspace, counters, step.new_state,
            **separable_pass.PASS_GEOMETRY,
        )  # fmt: skip


def _symbol_step(step: Step) -> None:
    network, work = step.network, step.network.symbol
    vectors = work.vectors.shape[0]
    if not vectors and (network.operator or network.separable):
        return
    operators, described, state = work.operators, step.described, step.state
    workspace = state.new_empty(work.workspace)
    counters = torch.empty(work.counters, dtype=torch.int32, device=state.device)
    # Scales alone where there are no operators but diagonal maps.
    symbol_pass.symbol_prepare[(vectors + network.stretches.shape[0],)](
        operators, described, network.factors, network.stretches, work.vectors, work.tap_table,
        state, step.saved, workspace, counters, step.sigmas, vectors, BITS=work.bits,
        **symbol_pass.PREPARE_GEOMETRY,
    )  # fmt: skip
    if not vectors:
        return
    symbol_pass.symbol_pass[(work.tiles.shape[0],)](
        operators, described, work.tiles, step.saved, workspace, UPDATE=step.update,
        DTYPES=network.dtypes("symbol", step.views), **symbol_pass.PASS_GEOMETRY,
    )  # fmt: skip
    blocks = work.blocks if step.update else work.readings
    symbol_finish.symbol_finish[(blocks.shape[0],)](
        operators, described, blocks, work.tap_table, work.roots, state, step.saved, workspace,
        counters, step.sigmas, step.new_state, UPDATE=step.update, BITS=work.bits,
        **symbol_finish.FINISH_GEOMETRY,
    )  # fmt: skip


def spectral_vjp(
    table: OperatorTable,
    tensors: Sequence[Tensor],
    saved: Tensor,
    grad_sigmas: Tensor,
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """Gradient of ``<grad_sigmas, sigmas>`` in every wanted tensor, in the tensor's own dtype.

    One launch by ``symbol``, scales included; one by power iteration, two by ``separable``, and one
    for their scales.

    Args:
        table: The plan's table.
        tensors: As given to :func:`spectral_step`.
        saved: As returned by it.
        grad_sigmas: Shape ``(R,)``, float32.
        wanted: Which tensors' gradients are wanted; the others' are None.
    """
    require_device(saved, "saved")
    saved = vector(saved, table.saved_size, "saved", saved.device)
    grad_sigmas = vector(grad_sigmas, len(table.rows), "grad_sigmas", saved.device)
    network = prepared(table, saved.device)
    views = network.views(tensors)
    offsets, size = [], 0
    for view, want in zip(views, wanted, strict=True):
        offsets.append(size if want and view is not None else -1)
        if offsets[-1] >= 0 and view is not None:
            size += -(-view.numel() * view.element_size() // 16) * 16
    # One allocation for all gradients: where they lie in it does not change from call to call.
    gradients = torch.empty(size, dtype=torch.uint8, device=saved.device)
    if size:
        with torch.cuda.device_of(saved):
            _write_gradients(network, views, saved, grad_sigmas, gradients, offsets)
    found: list[Tensor | None] = []
    for tensor, view, want, offset in zip(tensors, views, wanted, offsets, strict=True):
        if not want:
            found.append(None)
        elif view is None:
            found.append(torch.zeros_like(tensor))
        else:
            part = gradients[offset : offset + view.numel() * view.element_size()]
            # Detached: autograd lets nobody modify a view in place that was made without a graph.
            grad = part.view(view.dtype).as_strided(view.shape, view.stride()).detach()
            found.append(grad.to(tensor.dtype))
    return found


def _write_gradients(
    network: Network,
    views: Sequence[Tensor | None],
    saved: Tensor,
    grad_sigmas: Tensor,
    gradients: Tensor,
    offsets: Sequence[int],
) -> None:
    described, targets = network.described(views), network.on_device(tuple(offsets))
    entries = network.entries
    scales = any(offsets[slot] >= 0 for slot in network.scale_slots)
    sums = torch.empty(max(1, entries.sums), dtype=torch.float64, device=saved.device)
    if network.operator is not None:
        for part in network.operator_tiles:
            operator_gradient.operator_gradient[(part.tiles.shape[0],)](
                network.operator.operators, described, network.operator.visits, part.tiles,
                part.sharers, targets, saved, grad_sigmas, sums, gradients,
                DTYPES=network.dtypes("operator", views), SCALES=scales and entries.sums > 0,
                PRECISION=precision(), **operator_gradient.GRADIENT_GEOMETRY,
            )  # fmt: skip
    if network.separable is not None:
        work = network.separable
        workspace = saved.new_empty(work.workspace)
        separable_gradient.separable_overlap[(work.operators.shape[0],)](
            work.operators, work.visits, saved, workspace, **separable_gradient.GRADIENT_GEOMETRY
        )
        for part in network.separable_tiles:
            separable_gradient.separable_gradient[(part.tiles.shape[0],)](
                work.operators, described, part.tiles, part.sharers, targets, saved, grad_sigmas,
                sums, workspace, gradients, DTYPES=network.dtypes("separable", views),
                SCALES=scales and entries.sums > 0, **separable_gradient.GRADIENT_GEOMETRY,
            )  # fmt: skip
    # Last, for it reads what the others leave of the scales' gradients.
    tiles = network.symbol_tiles.tiles.shape[0]
    programs = tiles + (entries.entries.shape[0] if scales else 0)
    if programs:
        symbol_gradient.symbol_gradient[(programs,)](
            network.symbol.operators, described, network.factors, network.symbol_tiles.tiles,
            network.symbol_tiles.sharers, entries.entries, entries.uses, targets, saved,
            grad_sigmas, sums, gradients, tiles, DTYPES=network.dtypes("symbol", views),
            **symbol_gradient.GRADIENT_GEOMETRY,
        )  # fmt: skip


def compose(table: OperatorTable, sigmas: Tensor) -> tuple[Tensor, Tensor]:
    """The bounds of features and logits ``(2,)`` and their derivatives in sigmas ``(2, R)``: one
    launch."""
    require_device(sigmas, "sigmas")
    rows = len(table.rows)
    sigmas = vector(sigmas, rows, "sigmas", sigmas.device)
    values, jacobian = sigmas.new_empty(2), sigmas.new_empty(2, rows)
    tape = prepared(table, sigmas.device).tape
    steps = tape.steps.shape[1]
    workspace = torch.empty(2 * steps, dtype=torch.float64, device=sigmas.device)
    with torch.cuda.device_of(sigmas):
        composition.compose_tape[(2,)](
            tape.steps, tape.constants, tape.consumers, tape.readers, tape.outputs, sigmas, values,
            jacobian, workspace, steps, tape.consumers.shape[0], tape.readers.shape[0], rows,
            tape.depth, **composition.compose_geometry(tape.block),
        )  # fmt: skip
    return values, jacobian
