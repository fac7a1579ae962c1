# SPDX-License-Identifier: MIT
"""The tape over the norms, forward and adjoint: one small launch.

The definition is :func:`lmtfast.composing.compose_with_jacobian`. Steps of equal depth run side by
side, one lane each, in float64; a step finds its operands, and its adjoint its consumers, by a
gather from the lanes. One program per output runs all of the tape forward and its own output back.
Where an operand of hypot or max ties or vanishes, the derivative is the one PyTorch takes: half to
each side of a tie, zero at the origin.

Floor: nothing to stream; the tape's depth, some 40 for WRN-28-10, in each direction.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from lmtfast.kernels.specialization import Specialization
from lmtfast.table import OPERATIONS, OperatorTable

CONSTANT, SIGMA = (tl.constexpr(OPERATIONS.index(name)) for name in ("constant", "sigma"))
MUL, ADD = (tl.constexpr(OPERATIONS.index(name)) for name in ("mul", "add"))
HYPOT = tl.constexpr(OPERATIONS.index("hypot"))


@dataclass(frozen=True)
class TapeWork:
    """A tape by lanes; tensors on the CPU.

    Attributes:
        steps: int32, ``(4, n)``: operation, both operands, depth; operands of a step without any
            are 0, that of a sigma is the operator.
        constants: float64, ``(n,)``.
        consumers: int32, ``(m, n)``: twice the number of a step that reads this one, plus one where
            it is its second operand; -1 where there are fewer.
        readers: int32, ``(k, R)``: steps that are the operator's sigma, -1 where there are fewer.
        outputs: int32, ``(2,)``: the steps that are the features' bound and the logits'.
        depth: Depth of the deepest step.
    """

    steps: Tensor
    constants: Tensor
    consumers: Tensor
    readers: Tensor
    outputs: Tensor
    depth: int

    @property
    def block(self) -> int:
        return max(32, triton.next_power_of_2(self.steps.shape[1]))


def tape_work(table: OperatorTable) -> TapeWork:
    steps, constants = [], []
    consumers: list[list[int]] = [[] for _ in table.tape]
    readers: list[list[int]] = [[] for _ in table.rows]
    depths: list[int] = []
    for i, (operation, a, b, constant) in enumerate(table.tape):
        depth = 0
        if OPERATIONS[operation] == "sigma":
            readers[a].append(i)
        elif OPERATIONS[operation] != "constant":
            depth = 1 + max(depths[a], depths[b])
            consumers[a].append(2 * i)
            consumers[b].append(2 * i + 1)
        depths.append(depth)
        steps.append([operation, a, b, depth])
        constants.append(struct.unpack("<d", struct.pack("<q", constant))[0])
    return TapeWork(
        torch.tensor(steps, dtype=torch.int32).T.contiguous(),
        torch.tensor(constants, dtype=torch.float64), _padded(consumers), _padded(readers),
        torch.tensor([table.features, table.total], dtype=torch.int32), max(depths),
    )  # fmt: skip


def _padded(lists: list[list[int]]) -> Tensor:
    """Columns of equal length, at least one, filled up with -1."""
    length = max([1, *map(len, lists)])
    rows = [found + [-1] * (length - len(found)) for found in lists]
    return torch.tensor(rows, dtype=torch.int32).reshape(-1, length).T.contiguous()


@triton.jit
def lanes(x, index):
    """x[index], for a block of float64."""
    return tl.gather(x, index, 0)


@triton.jit(do_not_specialize=["n_steps", "n_consumers", "n_readers", "n_rows", "depth"])
def compose_tape(
    steps, constants, consumers, readers, outputs, sigmas, values, jacobian, workspace,
    n_steps, n_consumers, n_readers, n_rows, depth,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """values (2,) and jacobian (2, R); workspace (2, n_steps) float64."""
    which = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    inside = i < n_steps
    operation = tl.load(steps + i, inside, other=0)
    a = tl.load(steps + n_steps + i, inside, other=0)
    b = tl.load(steps + 2 * n_steps + i, inside, other=0)
    level = tl.load(steps + 3 * n_steps + i, inside, other=0)
    value = tl.load(constants + i, inside, other=0.0)
    sigma = tl.load(sigmas + a, inside & (operation == SIGMA), other=0.0).to(tl.float64)
    value = tl.where(operation == SIGMA, sigma, value)
    # Only steps with operands look at lanes.
    a, b = tl.where(operation >= MUL, a, 0), tl.where(operation >= MUL, b, 0)
    for d in range(1, depth + 1):
        left, right = lanes(value, a), lanes(value, b)
        # NaN on either side must come through.
        result = tl.where((left >= right) | (left != left), left, right)
        length = tl.sqrt(left * left + right * right)
        result = tl.where(operation == HYPOT, length, result)
        result = tl.where(operation == ADD, left + right, result)
        result = tl.where(operation == MUL, left * right, result)
        value = tl.where(level == d, result, value)
    left, right = lanes(value, a), lanes(value, b)
    to_left = tl.where(left == right, 0.5, tl.where(left > right, 1.0, 0.0)).to(tl.float64)
    to_right = 1.0 - to_left
    origin = value == 0
    length = tl.where(origin, 1.0, value)
    to_left = tl.where(operation == HYPOT, tl.where(origin, 0.0, left / length), to_left)
    to_right = tl.where(operation == HYPOT, tl.where(origin, 0.0, right / length), to_right)
    to_left = tl.where(operation == ADD, 1.0, tl.where(operation == MUL, right, to_left))
    to_right = tl.where(operation == ADD, 1.0, tl.where(operation == MUL, left, to_right))

    output = tl.load(outputs + which)
    adjoint = tl.where(i == output, 1.0, 0.0).to(tl.float64)
    for back in range(0, depth):
        # What no gradient reaches may be infinite.
        to_a = tl.where(adjoint == 0, 0.0, adjoint * to_left)
        to_b = tl.where(adjoint == 0, 0.0, adjoint * to_right)
        total = adjoint
        for m in range(0, n_consumers):
            consumer = tl.load(consumers + m * n_steps + i, inside, other=-1)
            place = tl.where(consumer < 0, 0, consumer // 2)
            found = tl.where(consumer % 2 == 1, lanes(to_b, place), lanes(to_a, place))
            total += tl.where(consumer < 0, 0.0, found)
        adjoint = tl.where(level == depth - 1 - back, total, adjoint)
    tl.store(values + which, tl.sum(tl.where(i == output, value, 0.0), 0).to(tl.float32))
    tl.store(workspace + which * n_steps + i, adjoint, inside)
    tl.debug_barrier()
    for start in range(0, n_rows, BLOCK):
        r = start + i
        total = tl.zeros((BLOCK,), tl.float64)
        for k in range(0, n_readers):
            step = tl.load(readers + k * n_rows + r, r < n_rows, other=-1)
            total += tl.load(workspace + which * n_steps + step, step >= 0, other=0.0)
        tl.store(jacobian + which * n_rows + r, total.to(tl.float32), r < n_rows)


def compose_geometry(block: int) -> dict[str, int]:
    return {"BLOCK": block, "num_warps": min(8, max(1, block // 128))}


def shipped() -> list[Specialization]:
    """A small tape and that of a deep network."""
    types = dict.fromkeys(("steps", "consumers", "readers", "outputs"), "*i32")
    types |= dict.fromkeys(("sigmas", "values", "jacobian"), "*fp32")
    types |= dict.fromkeys(("constants", "workspace"), "*fp64")
    names = compose_tape.arg_names
    types |= {n: "i32" for n in names if n not in types}
    found = []
    for block in (32, 512):
        geometry = compose_geometry(block)
        arguments = {n: types[n] for n in names} | {"BLOCK": block}
        found.append(
            Specialization(compose_tape, f"{block} steps", arguments, geometry["num_warps"])
        )
    return found
