# SPDX-License-Identifier: MIT
"""Compiled spectral calls write their outputs whole and nothing else, and read what they wrote."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.spectral_cases import CASES, diagonals
from tests.test_contract_spectral import PAIRS, Provider, Run

# Between them: the ends of tiles, groups, scales and identity, a shared weight, 16-bit gradients,
# matrices beside convolutions.
BRIEF = ("identity_groups", "wide, bfloat16, tap-major", "heads, mixed dtypes")
NAMES = (*BRIEF, "tied", "strided", "tall", "depthwise", "scaled_transposed")
NETWORKS = {name: CASES[name] for name in NAMES} | {"diagonals": diagonals()}


class Allocations:
    """Memory that a call asks for: filled with what must not be used, between guards."""

    BAND, GUARD = 64, 0x5A
    # NaN in every type of float and -1 in every integer; numbers so large that sums stay finite.
    FILLS = (0xFF, 0x7C)

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fill: int) -> None:
        self.whole: list[Tensor] = []
        self.fill = fill
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
            monkeypatch.setattr(owner, name, self.guarded(getattr(owner, name)))

    def guarded(self, original):
        empty = torch.empty

        def allocate(*args, **options):
            plain = original(*args, **options)
            size = plain.numel() * plain.element_size()
            whole = empty(size + 2 * self.BAND, dtype=torch.uint8, device=plain.device)
            whole.fill_(self.GUARD)
            whole[self.BAND : self.BAND + size] = self.fill
            self.whole.append(whole)
            inner = whole[self.BAND : self.BAND + size].view(plain.dtype)
            return inner.as_strided(plain.shape, plain.stride())

        return allocate

    def check(self) -> None:
        assert self.whole
        for whole in self.whole:
            around = torch.cat([whole[: self.BAND], whole[-self.BAND :]])
            assert (around == self.GUARD).all()


@pytest.mark.parametrize(
    ("provider", "engine", "case"),
    [
        pytest.param(
            p, e, case, id=f"{p.backend}-{e}-{case}",
            marks=[pytest.mark.slow] * (p.slow and case not in BRIEF),
        )
        for p, e in PAIRS for case in NETWORKS
    ],
)  # fmt: skip
def test_memory_that_a_call_asks_for(
    provider: Provider, engine: str, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with provider.using():
        run = Run(provider, engine, NETWORKS[case])
        state, grad = run.start(), torch.ones(len(run.network.regions))

        def results() -> list[Tensor]:
            sigmas, new, saved = run.step(state)
            return [sigmas, new, saved.cpu(), *run.vjp(saved, grad)]

        want = results()
        for fill in Allocations.FILLS:
            with monkeypatch.context() as patch:
                allocations = Allocations(patch, fill)
                got = results()
                allocations.check()
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
