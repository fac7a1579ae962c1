# SPDX-License-Identifier: MIT
"""Where probabilistic bounds have their randomness: fresh, or from a hash of everything."""

from __future__ import annotations

import copy
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import lmtfast as lf
from lmtfast import check
from lmtfast.certificate import HASHED
from lmtfast.errors import ArgumentError, CertificateError
from lmtfast.verified import drawn
from lmtfast.verified.drawn import hashed_entropy
from lmtfast.verified.moment import normal_draw

SHAPE = (2, 6, 6)


def network() -> nn.Module:
    torch.manual_seed(3)
    layers = (nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.ReLU())
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(16, 3)).eval()


def drawn_words(model: nn.Module, monkeypatch: pytest.MonkeyPatch, **options: Any) -> list[bytes]:
    """The first bytes of every operator's draw."""
    found: list[bytes] = []
    own = drawn.moment_norm_upper

    def recorded(*args: Any, entropy: Any, **kwargs: Any) -> float:
        found.append(entropy(32))
        return own(*args, entropy=entropy, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(drawn, "moment_norm_upper", recorded)
        lf.certified_bound(model, SHAPE, level="probabilistic", **options)
    return found


def certified(model: nn.Module, **options: Any) -> Any:
    data = torch.rand(4, *SHAPE, generator=torch.Generator().manual_seed(1))
    return lf.certify(
        model, data, input_shape=SHAPE, input_range=(0, 1), level="probabilistic", **options
    )


def test_a_hash_gives_the_same_bytes_twice_and_others_to_every_operator(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first, second = (drawn_words(network(), monkeypatch, draw="hash") for _ in range(2))
    assert first == second
    assert len(set(first)) == 2
    fresh = [drawn_words(network(), monkeypatch) for _ in range(2)]
    assert len({*first, *fresh[0], *fresh[1]}) == 6


@pytest.mark.parametrize("delta", [2.0**-100, 0.3])
def test_the_draws_of_a_network_share_its_delta(
    delta: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares = []
    own = drawn.moment_norm_upper

    def recorded(*args: Any, delta: float, **kwargs: Any) -> float:
        shares.append(Fraction(delta))
        return own(*args, delta=delta, **kwargs)

    monkeypatch.setattr(drawn, "moment_norm_upper", recorded)
    bound = lf.certified_bound(network(), SHAPE, level="probabilistic", delta=delta)
    assert len(shares) == 2
    assert delta * 0.99 < sum(shares) <= delta
    assert bound.delta == delta


@pytest.mark.parametrize("name", ["0.weight", "2.weight", "5.bias"])
def test_one_bit_of_any_tensor_gives_every_operator_another_draw(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, other = network(), network()
    value = other.state_dict()[name].reshape(-1)[:1]
    value.copy_(torch.nextafter(value, torch.full_like(value, 9.0)))
    words = [drawn_words(m, monkeypatch, draw="hash") for m in (model, other)]
    assert len({*words[0], *words[1]}) == 4


def test_settings_and_geometry_give_another_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    other = network()
    other[2].padding = (1, 0)
    other[5] = nn.Linear(8, 3)
    words = [
        drawn_words(network(), monkeypatch, draw="hash"),
        drawn_words(network(), monkeypatch, draw="hash", delta=2.0**-101),
        drawn_words(other.eval(), monkeypatch, draw="hash"),
    ]
    assert len({w for several in words for w in several}) == 6


def test_a_hash_needs_a_probability_nobody_can_search_for() -> None:
    delta = 2.0**-100 * (1 + 2.0**-52)
    with pytest.raises(ArgumentError, match=r"2\*\*-100"):
        lf.certified_bound(network(), SHAPE, level="probabilistic", draw="hash", delta=delta)
    with pytest.raises(ArgumentError, match=r"2\*\*-100"):
        certified(network(), draw="hash", delta=delta)
    with pytest.raises(ArgumentError, match="fresh, hash"):
        lf.certified_bound(network(), SHAPE, level="probabilistic", draw="seed")


def test_commitments_are_not_confused() -> None:
    texts = [("ab",), ("a", "b"), ("b", "a"), ("", "ab"), ("ab", ""), ()]
    assert len({hashed_entropy(*t)(16) for t in texts}) == len(texts)
    long, short = hashed_entropy("x")(64), hashed_entropy("x")(16)
    assert long[:16] == short
    draws = [normal_draw((50_000,), hashed_entropy(text)) for text in ("x", "y")]
    assert not torch.equal(*draws)
    assert torch.equal(draws[0], normal_draw((50_000,), hashed_entropy("x")))
    assert all(abs(float(d.std()) - 1.0) < 0.02 and abs(float(d.mean())) < 0.03 for d in draws)


def test_a_certificate_says_which_draw_and_verifies(tmp_path: Path) -> None:
    model = network()
    norms = []
    for _ in range(2):
        hashed = certified(model, draw="hash")
        assert {m for _, m, _ in hashed.operators} == {"hashed moment", "cholesky"}
        assert HASHED in hashed.assumptions
        assert (hashed.level, hashed.delta) == ("probabilistic", 2.0**-100)
        lf.load_certificate(hashed.save(tmp_path / "hashed.npz")).verify(model)
        norms.append(hashed.operators)
    assert norms[0] == norms[1]
    for _ in range(3):
        fresh = certified(model)
        assert {m for _, m, _ in fresh.operators} == {"moment", "cholesky"}
        assert HASHED not in fresh.assumptions
        fresh.verify(model)


def test_a_hashed_certificate_belongs_to_its_weights_and_draw() -> None:
    model, forged = network(), certified(network(), draw="hash")
    name, method, norm = forged.operators[0]
    less = ((name, method, norm * (1.0 - 2.0**-23)), *forged.operators[1:])
    for fields in ({"operators": less}, {"assumptions": forged.assumptions[:-1]}):
        twin = copy.copy(forged)
        for key, value in fields.items():
            object.__setattr__(twin, key, value)
        with pytest.raises(CertificateError):
            twin.verify(model)


def test_the_checker_accepts_both(tmp_path: Path) -> None:
    model = network()
    arrays = {n: t.double().numpy() for n, t in model.state_dict().items()}
    np.savez(tmp_path / "weights.npz", **arrays)
    for draw in ("fresh", "hash"):
        path = certified(model, draw=draw).save(tmp_path / f"{draw}.npz")
        assert check.check(path, tmp_path / "weights.npz") == []
