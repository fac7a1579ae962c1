# SPDX-License-Identifier: MIT
"""Lipschitz bounds, Lipschitz-margin training and robustness certificates for PyTorch networks.

Names load on first use (PEP 562), so importing the package imports neither torch nor anything else.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "AttackReport": "attack_report",
    "BoundPlan": "plan",
    "Budget": "verified.budget",
    "Certificate": "certificate",
    "Level": "level",
    "LipschitzBound": "bound",
    "NetworkBound": "estimation",
    "attack": "attacking",
    "available_backends": "backends",
    "certified_bound": "guarantee",
    "certify": "certification",
    "conv_spectral_norm": "guarantee",
    "load_certificate": "certificate",
    "margin_cross_entropy": "losses",
    "register_backend": "backends",
    "register_rule": "rules.registry",
    "spectral_norm": "guarantee",
    "trace": "plan",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])


if TYPE_CHECKING:
    from lmtfast.attack_report import AttackReport as AttackReport
    from lmtfast.attacking import attack as attack
    from lmtfast.backends import available_backends as available_backends
    from lmtfast.backends import register_backend as register_backend
    from lmtfast.bound import LipschitzBound as LipschitzBound
    from lmtfast.certificate import Certificate as Certificate
    from lmtfast.certificate import load_certificate as load_certificate
    from lmtfast.certification import certify as certify
    from lmtfast.estimation import NetworkBound as NetworkBound
    from lmtfast.guarantee import certified_bound as certified_bound
    from lmtfast.guarantee import conv_spectral_norm as conv_spectral_norm
    from lmtfast.guarantee import spectral_norm as spectral_norm
    from lmtfast.level import Level as Level
    from lmtfast.losses import margin_cross_entropy as margin_cross_entropy
    from lmtfast.plan import BoundPlan as BoundPlan
    from lmtfast.plan import trace as trace
    from lmtfast.rules.registry import register_rule as register_rule
    from lmtfast.verified.budget import Budget as Budget
