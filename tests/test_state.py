# SPDX-License-Identifier: MIT
"""The packed iterates: deterministic start, one write per step, nothing that is not finite."""

from __future__ import annotations

import math

import torch

from lmtfast.state import PowerState

OPTIONS = {"dtype": torch.float64, "device": torch.device("cpu")}


def test_the_start_is_reproducible_and_of_unit_length() -> None:
    a, b = PowerState((3, 0, 5), **OPTIONS), PowerState((3, 0, 5), **OPTIONS)
    assert torch.equal(a.iterates, b.iterates)
    assert [a.slice(i).numel() for i in range(3)] == [3, 0, 5]
    assert math.isclose(float(a.slice(2).norm()), 1.0, rel_tol=1e-12)
    b.reseed(1)
    assert not torch.equal(a.iterates, b.iterates)


def test_an_advance_replaces_all_parts_and_counts() -> None:
    state = PowerState((2, 1), **OPTIONS)
    view = state.slice(0)
    state.advance(torch.tensor([1.0, 2.0, 3.0]))
    assert state.iterates.tolist() == [1.0, 2.0, 3.0]
    assert view.tolist() == [1.0, 2.0]
    assert int(state.steps) == 1


def test_a_network_without_operators_has_an_empty_state() -> None:
    state = PowerState((), **OPTIONS)
    state.advance(torch.zeros(0))
    assert state.iterates.numel() == 0
    assert int(state.steps) == 1


def test_a_meta_state_holds_no_numbers() -> None:
    state = PowerState((4,), dtype=torch.float32, device=torch.device("meta"))
    assert state.iterates.is_meta
    state.reseed(3)


def test_the_state_round_trips() -> None:
    a, b = PowerState((3, 4), **OPTIONS), PowerState((3, 4), **OPTIONS)
    a.advance(torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0]))
    b.load_state_dict(a.state_dict())
    assert torch.equal(a.iterates, b.iterates)
    assert int(b.steps) == 1
