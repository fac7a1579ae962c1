# SPDX-License-Identifier: MIT
"""The family of margin losses, by the name ``margin_cross_entropy(scaling=)`` takes.

A new variant of an existing formula is one row here. A new shift formula is one function registered
in :mod:`lmtfast.backends.margin_reference`, and appears here by itself; the contract tests run over
both.
"""

from __future__ import annotations

from dataclasses import dataclass

from lmtfast.backends.margin_reference import margin_members


@dataclass(frozen=True)
class Member:
    """One margin loss.

    Attributes:
        name: Value of ``scaling``.
        formula: The backend formula it evaluates.
        pairwise: Whether the margin of a rival uses the distance of its head row (Proposition 2);
            else every rival gets ``sqrt(2)`` times the bound of the whole network (Proposition 1).
        clean_share: Whether ``trades_weight`` blends the formula with plain cross-entropy.
        source: Where it is defined.
    """

    name: str
    formula: str
    pairwise: bool = True
    clean_share: bool = False
    source: str = ""


_SOURCES = {
    "lmt": "Tsuzuku, Sato, Sugiyama 2018, arXiv:1802.04034, Proposition 2",
    "lmt++": "the same, with the stabilising factor of the authors' code (last_fc.py, GPU branch)",
    "emma": "Hu, Leino, Wang, Fredrikson 2024, arXiv:2310.02513",
    "gloro": "Leino, Wang, Fredrikson 2021, arXiv:2102.08452",
}

MEMBERS: dict[str, Member] = {
    member.name: member
    for member in (
        *(Member(name, name, source=_SOURCES.get(name, "")) for name in margin_members()),
        Member(
            "lmt-total",
            "lmt++",
            pairwise=False,
            source="Tsuzuku, Sato, Sugiyama 2018, arXiv:1802.04034, Proposition 1",
        ),
        Member("trades", "gloro", clean_share=True, source=_SOURCES["gloro"] + ", TRADES form"),
    )
}
