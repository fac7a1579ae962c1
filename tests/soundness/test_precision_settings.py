# SPDX-License-Identifier: MIT
"""Global settings that change how numbers are computed: the same certificate, or a refusal."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import platform
import threading
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import lmtfast as lf
from lmtfast.certificate import ARRAYS
from lmtfast.errors import LmtfastError, NotCertifiedError
from lmtfast.verified.arithmetic import ensure_arithmetic, self_test
from tests.classifiers import UNIT

SHAPE = (1, 4, 4)
Setting = Callable[[], contextlib.AbstractContextManager[Any]]


def attribute(where: Any, name: str, value: Any) -> Setting:
    """An attribute of a settings object, put back afterwards."""

    @contextlib.contextmanager
    def enter() -> Iterator[None]:
        before = getattr(where, name)
        setattr(where, name, value)
        try:
            yield
        finally:
            setattr(where, name, before)

    return enter


def called(put: Callable[[Any], Any], value: Any, back: Any) -> Setting:
    @contextlib.contextmanager
    def enter() -> Iterator[None]:
        put(value)
        try:
            yield
        finally:
            put(back)

    return enter


def autocast(dtype: torch.dtype) -> Setting:
    return lambda: torch.autocast("cpu", dtype=dtype)


def both(*settings: Setting) -> Setting:
    @contextlib.contextmanager
    def enter() -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for setting in settings:
                stack.enter_context(setting())
            yield

    return enter


MATMUL, CUDNN, MKLDNN = torch.backends.cuda.matmul, torch.backends.cudnn, torch.backends.mkldnn
SETTINGS: dict[str, Setting] = {
    "matmul precision high": called(torch.set_float32_matmul_precision, "high", "highest"),
    "matmul precision medium": called(torch.set_float32_matmul_precision, "medium", "highest"),
    "TF32 in matmul": attribute(MATMUL, "allow_tf32", True),
    "TF32 in cuDNN": attribute(CUDNN, "allow_tf32", True),
    "reduced reductions in fp16": attribute(MATMUL, "allow_fp16_reduced_precision_reduction", True),
    "reduced reductions in bf16": attribute(MATMUL, "allow_bf16_reduced_precision_reduction", True),
    "fp16 accumulation": attribute(MATMUL, "allow_fp16_accumulation", True),
    "TF32 for every backend": attribute(torch.backends, "fp32_precision", "tf32"),
    "bf16 in oneDNN convolutions": attribute(MKLDNN.conv, "fp32_precision", "bf16"),
    "bf16 in oneDNN products": attribute(MKLDNN.matmul, "fp32_precision", "bf16"),
    "no oneDNN": lambda: MKLDNN.flags(enabled=False),
    "no NNPACK": called(torch.backends.nnpack.set_flags, False, True),
    "cuDNN benchmark": attribute(CUDNN, "benchmark", True),
    "no cuDNN": attribute(CUDNN, "enabled", False),
    "cuDNN deterministic": attribute(CUDNN, "deterministic", True),
    "deterministic algorithms": called(torch.use_deterministic_algorithms, True, False),
    "autocast to bf16": autocast(torch.bfloat16),
    "autocast to fp16": autocast(torch.float16),
    "autocast and TF32": both(autocast(torch.bfloat16), attribute(CUDNN, "allow_tf32", True)),
    "default dtype float64": called(torch.set_default_dtype, torch.float64, torch.float32),
    "default dtype bf16": called(torch.set_default_dtype, torch.bfloat16, torch.float32),
    "default dtype fp16": called(torch.set_default_dtype, torch.float16, torch.float32),
    "default device meta": lambda: torch.device("meta"),
    "inference mode": torch.inference_mode,
    "no gradients": torch.no_grad,
    "anomaly detection": lambda: torch.autograd.set_detect_anomaly(True),
    "two threads": called(torch.set_num_threads, 2, 1),
    "NumPy that raises": lambda: np.errstate(all="raise"),
    "parameters swapped on conversion": called(
        torch.__future__.set_swap_module_params_on_conversion, True, False),
    "no math attention": called(torch.backends.cuda.enable_math_sdp, False, True),
}  # fmt: skip


@cache
def network() -> nn.Module:
    torch.manual_seed(6)
    layers = (nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3))
    return nn.Sequential(*layers).eval()


@cache
def inputs() -> torch.Tensor:
    return torch.rand(4, *SHAPE)


def certificate() -> lf.Certificate:
    return lf.certify(network(), inputs(), input_shape=SHAPE, input_range=UNIT)


@cache
def undisturbed() -> lf.Certificate:
    return certificate()


def assert_identical(a: lf.Certificate, b: lf.Certificate) -> None:
    for field in dataclasses.fields(lf.Certificate):
        first, second = getattr(a, field.name), getattr(b, field.name)
        if field.name in ARRAYS and first is not None:
            first, second = first.tobytes(), second.tobytes()
        assert first == second, field.name


def test_there_are_twenty_four_settings() -> None:
    assert len(SETTINGS) >= 24


def check(name: str) -> None:
    undisturbed()
    network(), inputs()
    with SETTINGS[name]():
        try:
            found = certificate()
        except LmtfastError as error:
            refusal = error
        else:
            assert_identical(found, undisturbed())
            return
    # Refused by name, never under a label that is not its own.
    assert all((refusal.expected, refusal.got, refusal.where, refusal.remedy))


@pytest.mark.parametrize("name", tuple(SETTINGS)[::3])
def test_a_setting_changes_no_bit_of_a_certificate(name: str) -> None:
    check(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_changes_no_bit_of_a_certificate(name: str) -> None:
    check(name)


# -- arithmetic that is not IEEE 754 ---------------------------------------------------------------

LIBM = ctypes.CDLL(None)
MODES = {"down": 0x400, "up": 0x800, "toward zero": 0xC00}
x86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="x86-64's control register")


def rounding(mode: int) -> Setting:
    return called(LIBM.fesetround, mode, 0)


flushed = called(torch.set_flush_denormal, True, False)
HOSTILE: dict[str, Setting] = {
    "denormals flushed": flushed,
    **{f"rounding {name}": rounding(mode) for name, mode in MODES.items()},
    **{f"flushed, rounding {n}": both(flushed, rounding(mode)) for n, mode in MODES.items()},
    **{f"rounding {n}, autocast": both(autocast(torch.bfloat16), rounding(mode))
       for n, mode in MODES.items()},
    "flushed, deterministic": both(
        flushed, called(torch.use_deterministic_algorithms, True, False)),
    "flushed, default float64": both(
        flushed, called(torch.set_default_dtype, torch.float64, torch.float32)),
}  # fmt: skip


@x86
def test_twelve_hostile_environments_are_detected() -> None:
    """At every entrance, also where the long self-test has passed before."""
    assert len(HOSTILE) >= 12
    self_test()
    ensure_arithmetic(torch.device("cpu"))
    undisturbed().verify(network(), inputs())
    entrances: tuple[Callable[[], object], ...] = (
        self_test,
        lambda: ensure_arithmetic(torch.device("cpu")),
        certificate,
        lambda: undisturbed().verify(network(), inputs()),
    )
    for name, environment in HOSTILE.items():
        for entrance in entrances:
            with environment(), pytest.raises(NotCertifiedError, match="denormal|round"):
                entrance()
        self_test()
        assert name


@x86
def test_a_hostile_setting_of_another_thread_is_that_threads_own() -> None:
    """Control registers belong to threads: one that flushes is refused, the others go on."""
    found: list[str] = []

    def hostile() -> None:
        torch.set_flush_denormal(True)
        try:
            ensure_arithmetic(torch.device("cpu"))
        except NotCertifiedError:
            found.append("refused")

    thread = threading.Thread(target=hostile)
    thread.start()
    thread.join()
    assert found == ["refused"]
    ensure_arithmetic(torch.device("cpu"))


class Batches:
    """One batch, and a setting that stays in force when it has been read."""

    def __init__(self, setting: Setting, stack: contextlib.ExitStack) -> None:
        self.setting, self.stack = setting, stack

    def __iter__(self) -> Iterator[torch.Tensor]:
        yield inputs()
        self.stack.enter_context(self.setting())


def test_the_setting_changes_after_the_bound_and_before_the_samples() -> None:
    """An iterable of batches runs code of its own between the proof and the logits."""
    quiet = undisturbed()
    with contextlib.ExitStack() as stack:
        data = Batches(both(autocast(torch.bfloat16), SETTINGS["no oneDNN"]), stack)
        found = lf.certify(network(), data, input_shape=SHAPE, input_range=UNIT)
        assert_identical(found, quiet)


@x86
@pytest.mark.parametrize("name", ["denormals flushed", "rounding up"])
def test_a_hostile_setting_after_the_bound_is_detected(name: str) -> None:
    network(), inputs()
    with contextlib.ExitStack() as stack:
        data = Batches(HOSTILE[name], stack)
        with pytest.raises(NotCertifiedError, match="denormal|round"):
            lf.certify(network(), data, input_shape=SHAPE, input_range=UNIT)
