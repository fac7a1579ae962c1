# SPDX-License-Identifier: MIT
"""Execution of networks under a profile, and how far it can be from the exact real function."""

from lmtfast.execution.runner import Execution, check_autocast, run

__all__ = ["Execution", "check_autocast", "run"]
