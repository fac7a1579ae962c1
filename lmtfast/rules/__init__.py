# SPDX-License-Identifier: MIT
"""Lipschitz rules. Importing the package fills the registry; :mod:`lmtfast.tracing` consults it."""

from lmtfast.rules import copying, elementwise, joining, linear, pooling
from lmtfast.rules.registry import (
    MODULE_RULES,
    OPERATION_RULES,
    SINGLE,
    TracedCall,
    register_rule,
)

__all__ = [
    "MODULE_RULES",
    "OPERATION_RULES",
    "SINGLE",
    "TracedCall",
    "copying",
    "elementwise",
    "joining",
    "linear",
    "pooling",
    "register_rule",
]
