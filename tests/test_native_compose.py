# SPDX-License-Identifier: MIT
"""The compiled tape against the reference's: values, derivatives, ties, zeros, NaN."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import Tensor

from lmtfast import backends
from lmtfast.backends import native_spectral
from lmtfast.composing import compose_with_jacobian
from lmtfast.graph import Instruction
from lmtfast.table import OperatorTable, build_table

if not backends.available_backends()["native"].available:
    pytest.skip("the compiled core is not built", allow_module_level=True)

BINARY = ("mul", "add", "hypot", "max")
SPECIAL = (0.0, 1.0, 1.0, 2.5, 1e-30, 1e30, math.inf, math.nan)


def table_of(tape: list[Instruction], outputs: tuple[int, int], operators: int) -> OperatorTable:
    """A table of operators that are all run elsewhere: only the tape counts."""
    table = build_table([], tape, outputs, slots={}, engines=[], state_sizes=[])
    rows = ((0,) * 36,) * operators
    return OperatorTable(rows, table.scales, table.tape, (0,) * operators, *outputs, 0, 0, 0)


def random_tape(rng: random.Random, operators: int) -> list[Instruction]:
    tape = [Instruction("sigma", (i,)) for i in range(operators)]
    tape.append(Instruction("constant", (rng.choice((0.0, 0.5, 1.0, 3.0)),)))
    for _ in range(12):
        earlier = range(len(tape))
        tape.append(Instruction(rng.choice(BINARY), (rng.choice(earlier), rng.choice(earlier))))
    return tape


def both(
    tape: list[Instruction], sigmas: Tensor, outputs: tuple[int, int]
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    table = table_of(tape, outputs, len(sigmas))
    return native_spectral.compose(table, sigmas), compose_with_jacobian(
        tape, sigmas.double(), outputs
    )


@pytest.mark.parametrize("seed", range(8))
def test_random_tapes(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(25):
        operators = rng.randint(1, 5)
        tape = random_tape(rng, operators)
        outputs = rng.randrange(len(tape)), len(tape) - 1
        sigmas = torch.tensor(
            [rng.choice((0.0, 0.5, 0.5, rng.uniform(0, 3))) for _ in range(operators)]
        )
        got, want = both(tape, sigmas, outputs)
        for a, b in zip(got, want, strict=True):
            # Float32 at the ends of the range holds neither the reference's largest nor smallest.
            torch.testing.assert_close(a, b.float(), rtol=1e-6, atol=1e-37)


@pytest.mark.parametrize("seed", range(4))
def test_what_is_not_finite_comes_through(seed: int) -> None:
    rng = random.Random(100 + seed)
    seen = 0
    for _ in range(60):
        operators = rng.randint(1, 4)
        tape = random_tape(rng, operators)
        outputs = len(tape) - 2, len(tape) - 1
        sigmas = torch.tensor([rng.choice(SPECIAL) for _ in range(operators)])
        (values, jacobian), (want, slopes) = both(tape, sigmas, outputs)
        torch.testing.assert_close(values, want.float(), rtol=1e-6, atol=1e-37, equal_nan=True)
        seen += int(not values.isfinite().all())
        # A branch that does not count has the derivative 0 here; there 0 times infinity is NaN.
        known = slopes.isfinite()
        torch.testing.assert_close(jacobian[known], slopes[known].float(), rtol=1e-6, atol=1e-37)
    assert seen > 10


def single(op: str, a: float, b: float) -> tuple[float, list[float]]:
    """Value of one operation and its derivatives in both operands."""
    tape = [Instruction("sigma", (0,)), Instruction("sigma", (1,)), Instruction(op, (0, 1))]
    (values, jacobian), (want, slopes) = both(tape, torch.tensor([a, b]), (2, 2))
    torch.testing.assert_close(values, want.float(), equal_nan=True)
    torch.testing.assert_close(jacobian, slopes.float(), equal_nan=True)
    return values[0].item(), jacobian[0].tolist()


def test_ties_and_the_origin() -> None:
    assert single("max", 2.0, 2.0) == (2.0, [0.5, 0.5])
    assert single("max", 0.0, -0.0)[1] == [0.5, 0.5]
    assert single("max", 3.0, 2.0) == (3.0, [1.0, 0.0])
    assert single("max", 2.0, 3.0) == (3.0, [0.0, 1.0])
    assert single("hypot", 0.0, 0.0) == (0.0, [0.0, 0.0])
    assert single("hypot", 3.0, 4.0)[0] == 5.0
    assert single("hypot", 0.0, 2.0) == (2.0, [0.0, 1.0])
    assert single("mul", 0.0, 2.0) == (0.0, [2.0, 0.0])
    assert single("max", math.inf, math.inf) == (math.inf, [0.5, 0.5])


@pytest.mark.parametrize("op", BINARY)
@pytest.mark.parametrize(
    "pair", [(math.nan, 1.0), (1.0, math.nan), (math.inf, 1.0), (2.0, math.inf)]
)
def test_single_operations_on_what_is_not_finite(op: str, pair: tuple[float, float]) -> None:
    value, _ = single(op, *pair)
    assert not math.isfinite(value)


def test_an_operator_that_is_read_twice() -> None:
    tape = [Instruction("sigma", (0,)), Instruction("mul", (0, 0)), Instruction("add", (1, 0))]
    values, jacobian = native_spectral.compose(table_of(tape, (1, 2), 2), torch.tensor([3.0, 7.0]))
    assert values.tolist() == [9.0, 12.0]
    assert jacobian.tolist() == [[6.0, 0.0], [7.0, 0.0]]


def test_squares_beyond_float32_stay_finite() -> None:
    value, slopes = single("hypot", 3e38, 1e38)
    assert value == pytest.approx(math.hypot(3e38, 1e38), rel=1e-6)
    assert slopes == pytest.approx([0.9486833, 0.3162278], rel=1e-6)
    value, slopes = single("hypot", 3e-38, 4e-38)
    assert value == pytest.approx(5e-38, rel=1e-6)
    assert slopes == pytest.approx([0.6, 0.8], rel=1e-6)


@pytest.mark.parametrize(
    ("step", "where"),
    [
        ((3, 2, 0, 0), "tape"),
        ((1, 5, 0, 0), "tape"),
        ((9, 0, 0, 0), "tape"),
        ((2, -1, 0, 0), "tape"),
    ],
)
def test_a_tape_that_reads_ahead_is_refused(step: tuple[int, ...], where: str) -> None:
    tape = [Instruction("sigma", (0,)), Instruction("sigma", (0,)), Instruction("sigma", (0,))]
    table = table_of(tape, (0, 2), 1)
    broken = OperatorTable(
        table.rows, (), (table.tape[0], table.tape[1], step), (0,), 0, 2, 0, 0, 0
    )
    with pytest.raises(ValueError, match=where):
        native_spectral.compose(broken, torch.ones(1))
