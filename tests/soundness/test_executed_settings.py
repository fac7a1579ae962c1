# SPDX-License-Identifier: MIT
"""Executions under a profile: the same bits under every global setting, or refused by name."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

import lmtfast as lf
from lmtfast.errors import LmtfastError, NotCertifiedError
from lmtfast.tracing import trace_model
from tests.classifiers import UNIT
from tests.soundness.test_precision_settings import (
    HOSTILE,
    SETTINGS,
    SHAPE,
    assert_identical,
    inputs,
    network,
    x86,
)

execution = pytest.importorskip("lmtfast.execution")
profiles = pytest.importorskip("lmtfast.profiles")
AUTOCAST = tuple(name for name in SETTINGS if "autocast" in name)


@cache
def logits(profile: str) -> Tensor:
    return execution.run(network(), inputs(), profile=profile)


def certificate(profile: str) -> lf.Certificate:
    return lf.certify(
        network(), inputs(), input_shape=SHAPE, input_range=UNIT, semantics=f"executed({profile})"
    )


@cache
def undisturbed(profile: str) -> lf.Certificate:
    return certificate(profile)


def check(name: str, profile: str) -> None:
    expected, stated = logits(profile), undisturbed(profile)
    with SETTINGS[name]():
        if name in AUTOCAST:
            with pytest.raises(NotCertifiedError, match="autocast"):
                execution.run(network(), inputs(), profile=profile)
            with pytest.raises(NotCertifiedError, match="autocast"):
                certificate(profile)
            return
        try:
            found, again = execution.run(network(), inputs(), profile=profile), certificate(profile)
        except LmtfastError as error:
            refusal = error
        else:
            assert torch.equal(found, expected)
            assert_identical(again, stated)
            return
    assert all((refusal.expected, refusal.got, refusal.where, refusal.remedy))


@pytest.mark.parametrize("name", [*AUTOCAST, "matmul precision medium", "TF32 for every backend"])
def test_a_setting_changes_no_bit_of_an_execution(name: str) -> None:
    check(name, "fp32a64")


@pytest.mark.slow
@pytest.mark.parametrize("profile", profiles.PROFILES)
@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_changes_no_bit_of_an_execution(name: str, profile: str) -> None:
    check(name, profile)


@pytest.mark.parametrize("name", profiles.REFUSED)
def test_what_no_profile_describes_is_refused_by_name(name: str) -> None:
    with pytest.raises(NotCertifiedError) as caught:
        execution.run(network(), inputs(), profile=name)
    assert name in str(caught.value)
    with pytest.raises(NotCertifiedError):
        certificate(name)


@x86
@pytest.mark.parametrize("profile", profiles.PROFILES)
def test_no_execution_in_a_hostile_environment(profile: str) -> None:
    runner = execution.Execution(
        network(), trace_model(network(), SHAPE), profiles.PROFILES[profile]
    )
    assert torch.equal(runner(inputs()), logits(profile))
    for environment in HOSTILE.values():
        with environment(), pytest.raises(NotCertifiedError):
            runner(inputs())
