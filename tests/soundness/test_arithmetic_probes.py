# SPDX-License-Identifier: MIT
"""The self-test of the arithmetic sees every fault alone, in one entry of one operation.

Processors and libraries with such faults are emulated: the exact result is rounded wrongly.
"""

from __future__ import annotations

import ctypes
import math
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lmtfast.errors import NotCertifiedError
from lmtfast.verified import arithmetic

LEAST_NORMAL = 2.0**-1022
EXACT: dict[str, Callable[[Fraction, Fraction], Fraction]] = {
    "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b, "reciprocal": lambda a, b: 1 / a,
}  # fmt: skip
Rounding = Callable[[Fraction], float]


def neighbours(value: Fraction) -> tuple[float, float]:
    nearest = float(value)
    if Fraction(nearest) == value:
        return nearest, nearest
    other = math.nextafter(nearest, -math.inf if Fraction(nearest) > value else math.inf)
    return min(nearest, other), max(nearest, other)


def directed(up: Callable[[Fraction], bool]) -> Rounding:
    return lambda value: neighbours(value)[up(value)]


def ties(up: Callable[[Fraction], bool]) -> Rounding:
    def rounded(value: Fraction) -> float:
        low, high = neighbours(value)
        middle = value - Fraction(low) == Fraction(high) - value
        return (low, high)[up(value)] if middle else float(value)

    return rounded


def odd(value: Fraction) -> float:
    low, high = neighbours(value)
    middle = low != high and value - Fraction(low) == Fraction(high) - value
    return (low if float(value) == high else high) if middle else float(value)


def flushed(below: float) -> Rounding:
    return lambda value: 0.0 if abs(float(value)) < below else float(value)


ROUNDINGS: dict[str, Rounding] = {
    "up": directed(lambda v: True), "down": directed(lambda v: False),
    "to zero": directed(lambda v: v < 0), "from zero": directed(lambda v: v > 0),
    "ties from zero": ties(lambda v: v > 0), "ties to zero": ties(lambda v: v < 0),
    "ties up": ties(lambda v: True), "ties down": ties(lambda v: False), "ties to odd": odd,
    "flushed": flushed(LEAST_NORMAL), "flushed deep": flushed(2.0**-1073),
    "denormals to zero": lambda v: (neighbours(v)[v < 0] if abs(v) < LEAST_NORMAL else float(v)),
    "flushed shallow": lambda v: 0.0 if 2.0**-1030 < abs(v) < LEAST_NORMAL else float(v),
}  # fmt: skip


class Faulty(TorchFunctionMode):
    """One entry of some operations is rounded wrongly, or reads small operands as zero."""

    def __init__(self, names: tuple[str, ...], rounding: Rounding, lane: int, least: float = 0.0):
        super().__init__()
        self.names, self.rounding, self.lane, self.least, self.met = names, rounding, lane, least, 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name not in self.names:
            return result
        at = self.lane % result.numel()
        values = [self._operand(a, at) for a in (*args, 1.0)[:2]]
        if all(math.isfinite(v) for v in values):
            exact = EXACT[name](*map(Fraction, values))
            result.view(-1)[at] = self.rounding(exact)
            self.met += 1
        return result

    def _operand(self, item: Any, at: int) -> float:
        value = float(item.reshape(-1)[at % item.numel()] if isinstance(item, Tensor) else item)
        return value if abs(value) >= self.least else 0.0


LANES = (0, 17, 63)
SEEN = [
    *((name, (op,)) for name in ("up", "down", "to zero", "from zero") for op in ("add", "sub")),
    *((name, ("add", "sub")) for name in ROUNDINGS if "ties" in name),
    *((name, ("add",)) for name in ("ties from zero", "ties to zero", "ties up", "ties down",
                                    "ties to odd")),
    ("ties to zero", ("sub",)), ("ties to odd", ("sub",)), ("ties down", ("sub",)),
    ("ties from zero", ("sub",)),
    ("up", ("mul",)), ("down", ("mul",)), ("to zero", ("mul",)), ("from zero", ("mul",)),
    ("flushed", ("mul",)), ("flushed deep", ("mul",)),
    ("flushed shallow", ("mul",)), ("flushed", ("add", "sub", "mul", "div")),
    ("down", ("div",)), ("to zero", ("div",)),
    ("denormals to zero", ("div",)),
]  # fmt: skip


def on(size: int = 64) -> Tensor:
    return torch.ones(size, dtype=torch.float64)


@pytest.mark.parametrize(("name", "operations"), SEEN)
def test_a_wrongly_rounded_entry_is_seen(name: str, operations: tuple[str, ...]) -> None:
    for lane in LANES:
        with (
            pytest.raises(NotCertifiedError, match="round|denormal"),
            Faulty(operations, ROUNDINGS[name], lane),
        ):
            arithmetic._check_arithmetic(on(), "here")


@pytest.mark.parametrize("operation", ["mul", "add"])
def test_small_operands_read_as_zero_are_seen(operation: str) -> None:
    for lane in LANES:
        with (
            pytest.raises(NotCertifiedError, match="denormal"),
            Faulty((operation,), float, lane, LEAST_NORMAL),
        ):
            arithmetic._check_arithmetic(on(), "here")


def test_right_rounding_is_not_refused() -> None:
    """Whatever the emulation itself does wrong would be seen as well."""
    with Faulty(tuple(EXACT), float, 5) as met:
        arithmetic._check_arithmetic(on(), "here")
        arithmetic._check_quotients(on(), "here")
    assert met.met >= 25


@pytest.mark.parametrize("operation", ["div", "reciprocal"])
@pytest.mark.parametrize("name", ["up", "down", "to zero", "from zero"])
def test_wrongly_rounded_quotients_are_seen(name: str, operation: str) -> None:
    refused = []
    for lane in range(97):
        try:
            with Faulty((operation,), ROUNDINGS[name], lane):
                arithmetic._check_quotients(on(), "here")
        except NotCertifiedError:
            refused.append(lane)
    # A quotient is unharmed where it is a float, or where the fault rounds it to nearest.
    assert len(refused) >= 30
    wrong = [math.nextafter(1.0, 2.0), 1.0 - 2.0**-53]
    for factor in wrong:
        for lane in range(97):
            with (
                pytest.raises(NotCertifiedError, match="quotients|reciprocals"),
                Faulty((operation,), lambda v, f=factor: float(v * Fraction(f) ** 2), lane),
            ):
                arithmetic._check_quotients(on(), "here")


def test_every_kind_of_quotient_is_probed() -> None:
    """Ones over numbers, numbers over numbers, reciprocals: each alone."""
    counts = []
    for kind in ("div", "reciprocal"):
        with Faulty((kind,), float, 3) as met:
            arithmetic._check_quotients(on(), "here")
        counts.append(met.met)
    assert counts == [2, 1]
    for nth in (1, 2):
        seen = 0

        def second(value: Fraction, nth: int = nth) -> float:
            nonlocal seen
            seen += 1
            return float(value) if seen != nth else math.nextafter(float(value), math.inf)

        with pytest.raises(NotCertifiedError, match="quotients"), Faulty(("div",), second, 8):
            arithmetic._check_quotients(on(), "here")


# -- roots -----------------------------------------------------------------------------------------


class WrongRoots(TorchFunctionMode):
    """One root of the tensors of one size is two floats off."""

    def __init__(self, size: int, at: int, towards: float) -> None:
        super().__init__()
        self.size, self.at, self.towards, self.met = size, at, towards, 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") != "sqrt" or result.numel() != self.size:
            return result
        self.met += 1
        if self.size == 1 and self.met != self.at + 1:
            return result
        at = self.at if self.size > 1 else 0
        value = float(result.reshape(-1)[at])
        for _ in range(2):
            value = math.nextafter(value, self.towards)
        result.view(-1)[at] = value
        return result


def test_every_root_is_looked_at() -> None:
    count = len(arithmetic._root_probes()[0])
    assert count >= 500
    for size, places in ((count, range(0, count, 7)), (-(-count // 2), range(0, count // 2, 7)),
                         (1, range(3))):  # fmt: skip
        for at in (*places, max(places[-1], 0)):
            for towards in (0.0, math.inf):
                with (
                    pytest.raises(NotCertifiedError, match="square roots"),
                    WrongRoots(size, at, towards),
                ):
                    arithmetic._check_roots(on(), "here")
    with WrongRoots(10**6, 0, 0.0):
        arithmetic._check_roots(on(), "here")


def test_roots_lie_between_their_neighbours() -> None:
    radicands, low, high = (probe.tolist() for probe in arithmetic._root_probes())
    for x, below, above in zip(radicands, low, high, strict=True):
        assert Fraction(below) ** 2 <= Fraction(x) <= Fraction(above) ** 2
        tight = math.nextafter(below, math.inf)
        assert above == (below if Fraction(below) ** 2 == Fraction(x) else tight)
    parities = {math.frexp(x)[1] % 2 for x in radicands}
    assert parities == {0, 1}
    assert {5e-324, sys.float_info.min, sys.float_info.max} <= set(radicands)
    assert sum(x < LEAST_NORMAL for x in radicands) >= 90
    exact = [x for x, below, above in zip(radicands, low, high, strict=True) if below == above]
    assert len(exact) >= 6
    assert sum(1.0 <= x < 2.0 for x in radicands) >= 97
    assert sum(2.0 <= x < 4.0 for x in radicands) >= 97
    assert sum(LEAST_NORMAL <= x < 2.0**-400 for x in radicands) >= 97
    assert sum(x > 2.0**400 for x in radicands) >= 97
    # Roots of as many bits as a square leaves room for, at both ends of a binade.
    for square in (1.0, 2.25, 9.0, (1.0 + 2.0**-26) ** 2, (2.0 - 2.0**-25) ** 2):
        assert {square, math.nextafter(square, 0.0), math.nextafter(square, 16.0)} <= set(radicands)


# -- products --------------------------------------------------------------------------------------


class WrongProduct(TorchFunctionMode):
    """The n-th matrix product is made by another rule."""

    def __init__(self, nth: int | None, rule: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.nth, self.rule, self.met = nth, rule, 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if getattr(func, "__name__", "") != "matmul":
            return func(*args, **(kwargs or {}))
        self.met += 1
        wrong = self.nth in (None, self.met - 1)
        with torch._C.DisableTorchFunction():
            return self.rule(*args) if wrong else args[0] @ args[1]


def off(row: int, column: int, towards: float) -> Callable[[Tensor, Tensor], Tensor]:
    def product(a: Tensor, b: Tensor) -> Tensor:
        result = a @ b
        entry = result[row, column].clone()
        result[row, column] = torch.nextafter(entry, torch.full_like(entry, towards))
        return result

    return product


def strassen(a: Tensor, b: Tensor) -> Tensor:
    if a.shape[0] % 2 or a.shape[1] % 2 or b.shape[1] % 2:
        return a @ b
    (p, q), (r, s) = ((h.chunk(2, 1)) for h in a.chunk(2, 0))
    (e, f), (g, h) = ((t.chunk(2, 1)) for t in b.chunk(2, 0))
    m = [(p + s) @ (e + h), (r + s) @ e, p @ (f - h), s @ (g - e), (p + q) @ h,
         (r - p) @ (e + f), (q - s) @ (g + h)]  # fmt: skip
    top = torch.cat((m[0] + m[3] - m[4] + m[6], m[2] + m[4]), 1)
    return torch.cat((top, torch.cat((m[1] + m[3], m[0] - m[1] + m[2] + m[5]), 1)), 0)


def scaled_integers(a: Tensor, b: Tensor) -> Tensor:
    """53 bits below the largest entry of every row and column."""
    one, two = a.abs().amax(1, keepdim=True), b.abs().amax(0, keepdim=True)
    grain = 2.0**-53
    return ((a / one / grain).round() * grain) @ ((b / two / grain).round() * grain) * one * two


def without_denormals(a: Tensor, b: Tensor) -> Tensor:
    result = a @ b
    return result.where(result.abs() >= LEAST_NORMAL, 0.0)


def truncated(a: Tensor, b: Tensor) -> Tensor:
    exact = [[sum(Fraction(x) * Fraction(y) for x, y in zip(row, column, strict=True) if x and y)
              for column in b.mT.tolist()] for row in a.tolist()]  # fmt: skip
    rows = [[neighbours(Fraction(v))[v < 0] for v in row] for row in exact]
    return torch.tensor(rows, dtype=torch.float64)


RULES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "float32": lambda a, b: (a.float() @ b.float()).double(),
    "short inputs": lambda a, b: (a + a * 2.0**30 - a * 2.0**30) @ b,
    "39 bits": lambda a, b: (a + a * 2.0**14 - a * 2.0**14) @ b,
    "Strassen": strassen,
    "scaled integers": scaled_integers,
    "without denormals": without_denormals,
    "truncated": truncated,
}


@pytest.mark.parametrize("name", RULES)
def test_products_by_another_rule_are_seen(name: str) -> None:
    ones = torch.ones(8, 8, dtype=torch.float64)
    with pytest.raises(NotCertifiedError, match="matri"), WrongProduct(None, RULES[name]):
        arithmetic._check_products(ones)


def test_one_wrong_entry_of_a_product_is_seen() -> None:
    ones = torch.ones(6, 6, dtype=torch.float64)
    with WrongProduct(None, torch.matmul) as met:
        arithmetic._check_products(ones)
    assert met.met == 7
    for nth in range(met.met):
        for row, column in ((0, 0), (5, 5), (0, 5), (3, 1)):
            for towards in (-math.inf, math.inf):
                with (
                    pytest.raises(NotCertifiedError, match="matri"),
                    WrongProduct(nth, off(row, column, towards)),
                ):
                    arithmetic._check_products(ones)


# -- the whole -------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 3])
def test_the_self_test_runs_every_check(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, tuple[int, ...]]] = []

    def noted(name: str) -> Callable[..., None]:
        def check(one: Tensor | None = None, where: str = "") -> None:
            if one is not None:
                assert one.dtype == torch.float64
                assert bool((one == 1.0).all())
            seen.append((name, () if one is None else tuple(one.shape)))

        return check

    for name in ("floats", "arithmetic", "quotients", "roots", "products"):
        monkeypatch.setattr(arithmetic, f"_check_{name}", noted(name))
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    widths: list[int] = []

    class Watch(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
        ) -> Any:
            result = func(*args, **(kwargs or {}))
            if getattr(func, "__name__", "") == "mul":
                widths.append(result.numel())
            return result

    with Watch():
        arithmetic.self_test()
    assert seen == [("floats", ()), ("arithmetic", (64,)), ("quotients", (64,)), ("roots", (64,)),
                    ("products", (24, 24))]  # fmt: skip
    # Torch gives a thread 2^15 entries at a time.
    assert [w >= (1 << 15) * threads for w in widths] == ([] if threads == 1 else [True])
    if threads > 1:
        for lane in (0, (1 << 15) * 2 + 1):
            with (
                pytest.raises(NotCertifiedError, match="worker thread"),
                Faulty(("mul",), flushed(LEAST_NORMAL), lane),
            ):
                arithmetic.self_test()


x86 = pytest.mark.skipif(
    platform.machine() != "x86_64" or sys.platform != "linux", reason="glibc's layout on x86-64"
)
# Bits of the control register.
FLUSH, ZEROS, DOWN, UP, TO_ZERO = 1 << 15, 1 << 6, 1 << 13, 1 << 14, 3 << 13


@contextmanager
def control(bits: int) -> Iterator[None]:
    """The register's bits set, in this thread: of vector operations alone, as fesetround is not."""
    libm = ctypes.CDLL("libm.so.6")
    before, changed = ctypes.create_string_buffer(64), ctypes.create_string_buffer(64)
    libm.fegetenv(before)
    libm.fegetenv(changed)
    register = int.from_bytes(changed.raw[28:32], "little") | bits
    changed[28:32] = register.to_bytes(4, "little")
    libm.fesetenv(changed)
    try:
        yield
    finally:
        libm.fesetenv(before)


@x86
@pytest.mark.parametrize("bits", [FLUSH, ZEROS, FLUSH | ZEROS, DOWN, UP, TO_ZERO])
def test_each_mode_of_the_processor_is_seen_by_each_check(bits: int) -> None:
    for check in (arithmetic._check_floats, lambda: arithmetic._check_arithmetic(on(), "here")):
        check()
        with control(bits), pytest.raises(NotCertifiedError, match="denormal|round"):
            check()
        check()
