# SPDX-License-Identifier: MIT
"""The supremum of a symbol's norm, searched for more thoroughly than any rescan does."""

from __future__ import annotations

import torch

from lmtfast.engines import polyphase, symbol
from lmtfast.engines.frequency import scan_candidates
from lmtfast.graph import Region
from lmtfast.table import CANDIDATES
from lmtfast.weights import Weights

# A symbol norm counts as the supremum once ten alternations gain less than this fraction.
SETTLED, SUPREMUM_STEPS = 2e-5, 400
# Grid points per axis and degree, and power steps at each of them.
DENSITY, STEPS = 6, 48
# Frequencies of the fine grid that the search climbs from, and peaks that it climbs to the end.
POOL, PEAKS = 64, 4 * CANDIDATES


@torch.no_grad()
def supremum(region: Region, weights: Weights, state: torch.Tensor) -> float:
    """Largest symbol norm that the tracked state or a thorough search climbs to, in float64.

    The search has a finer grid than a rescan and more power steps, starting points and peaks, so
    that it does not overlook what a rescan overlooks.
    """
    form = polyphase.conv_form(region)
    assert form is not None
    acting = polyphase.kernel(region, weights).detach()
    w, x = scan_candidates(form, acting, POOL, density=DENSITY, steps=STEPS)
    w, x = w.repeat(1, -(-PEAKS // w.shape[1]), 1), x.repeat(1, -(-PEAKS // x.shape[1]), 1)
    w, x = symbol.best_peaks(form, acting, w, x, PEAKS)
    anchor, starts = w.new_zeros(form.groups, form.axes), [state.double()]
    for own_w, own_x in zip(w.split(CANDIDATES, 1), x.split(CANDIDATES, 1), strict=True):
        starts.append(symbol.pack(own_w, own_x, anchor))
    return max(climbed(region, weights, start) for start in starts)


def climbed(region: Region, weights: Weights, state: torch.Tensor) -> float:
    """The norm at which the alternation settles."""
    reached = 0.0
    for done in range(SUPREMUM_STEPS):
        result = symbol.step(region, weights, state, update=True)
        state = result.state
        if done % 10 == 0:
            before, reached = reached, float(result.sigma)
            if reached <= before * (1.0 + SETTLED):
                break
    return reached
