# SPDX-License-Identifier: MIT
"""Enclosures of logits: float64 values with rigorous bounds on every rounding behind them."""

from lmtfast.enclosure import elementwise, joining, linear
from lmtfast.enclosure.interpreter import ProgramInterpreter, Recorder
from lmtfast.enclosure.logits import LogitEnclosure, enclose
from lmtfast.enclosure.registry import ERROR_RULES, Enclosed, ErrorCall, error_rule

__all__ = [
    "ERROR_RULES",
    "Enclosed",
    "ErrorCall",
    "LogitEnclosure",
    "ProgramInterpreter",
    "Recorder",
    "elementwise",
    "enclose",
    "error_rule",
    "joining",
    "linear",
]
