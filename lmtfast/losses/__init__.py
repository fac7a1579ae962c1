# SPDX-License-Identifier: MIT
"""Training losses on a Lipschitz bound, and the schedules of their eps."""

from lmtfast.losses.members import MEMBERS, Member
from lmtfast.losses.objective import margin_cross_entropy
from lmtfast.losses.perturbation import perturbed_eps
from lmtfast.losses.schedule import (
    ConstantSchedule,
    LinearSchedule,
    LogSchedule,
    RampSchedule,
    Schedule,
)

__all__ = [
    "MEMBERS",
    "ConstantSchedule",
    "LinearSchedule",
    "LogSchedule",
    "Member",
    "RampSchedule",
    "Schedule",
    "margin_cross_entropy",
    "perturbed_eps",
]
