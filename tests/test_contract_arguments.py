# SPDX-License-Identifier: MIT
"""In what form every backend takes the tensors and vectors of a spectral call, or refuses them."""

from __future__ import annotations

import pytest
import torch

from lmtfast.errors import DtypeError, ShapeError
from tests.spectral_cases import CASES
from tests.test_contract_spectral import Provider, Run, each_engine


@each_engine()
def test_tensors_are_read_whatever_their_form(provider: Provider, engine: str) -> None:
    """Lazily negated, strided and narrow tensors; a scale of any shape; others are refused."""
    with provider.using():
        run = Run(provider, engine, CASES["scaled"])
        start = run.start()
        plain = [t.bfloat16().float() for t in run.tensors]
        forms = [
            [torch._neg_view(-t) for t in plain],
            [torch.stack((t, t), -1)[..., 0] for t in plain],
            [t.bfloat16() for t in plain],
            [t.bfloat16().reshape(*t.shape, *[1] * (t.ndim == 1)) for t in plain],
        ]
        run.tensors = plain
        sigmas, new, _ = run.step(start)
        for tensors in forms:
            run.tensors = tensors
            found = run.step(start)
            torch.testing.assert_close(found[0], sigmas, rtol=1e-6, atol=0)
            torch.testing.assert_close(found[1], new, rtol=0, atol=1e-5)
        run.tensors = [t.to_sparse() for t in plain]
        with pytest.raises(DtypeError, match="Do this"):
            run.step(start)


@each_engine()
def test_vectors_of_another_size_are_refused(provider: Provider, engine: str) -> None:
    with provider.using():
        run = Run(provider, engine, CASES["scaled"])
        sigmas, _, saved = run.step(run.start())
        wanted = [True] * len(run.tensors)
        wrong = ((saved[1:], sigmas), (saved, sigmas.repeat(2)), (saved, sigmas.double()))
        for kept, grad in wrong:
            with pytest.raises((DtypeError, ShapeError), match="Do this"):
                run.module.spectral_vjp(
                    run.plan.table, run.tensors, kept, grad.to(run.device), wanted
                )
