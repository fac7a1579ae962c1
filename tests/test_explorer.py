# SPDX-License-Identifier: MIT
"""The symbol engine's last candidate in compiled steps, once it has stalled."""

from __future__ import annotations

import pytest

from lmtfast.engines import polyphase, symbol
from tests.spectral_cases import CASES
from tests.test_contract_spectral import PAIRS, Provider, Run, assert_same_iterate


@pytest.mark.parametrize(
    "provider", [p for p, engine in PAIRS if engine == "symbol"], ids=lambda p: p.backend
)
def test_a_stalled_explorer_is_that_of_the_reference(provider: Provider) -> None:
    """It replaces a lower candidate and no higher one; either way it starts again elsewhere."""
    run = Run(provider, "symbol", CASES["identity_groups"])
    (region,), state, replaced = run.network.regions, run.start(), set[bool]()
    form = polyphase.conv_form(region)
    assert form is not None
    for _ in range(40):
        (want,) = run.reference(state)
        (*_, before), (_, x, after) = (symbol._unpack(form, s) for s in (state, want.state))
        stalled = (before.cos() - after.cos()).abs().amax(-1) > 1e-3
        # It starts at its own vector, moved on by one entry.
        same = (x[:, :-1].roll(1, -1) - x[:, -1:]).abs().amax(-1).amin(-1) < 1e-6
        found = set(same[stalled].tolist())
        if not found <= replaced:
            with provider.using():
                new = run.step(state)[1]
            assert_same_iterate("symbol", region, new, want.state)
        replaced |= found
        if replaced == {False, True}:
            return
        state = want.state.float()
    pytest.fail(f"explorers that replaced a candidate: {replaced}")
