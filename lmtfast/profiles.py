# SPDX-License-Identifier: MIT
"""Execution profiles: how a network's arithmetic is carried out where a certificate speaks of it.

A profile fixes the storage of every tensor and the arithmetic of every call of the traced program.
Sums of products are formed in float64, in any order, with or without fused multiply-add.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from lmtfast.errors import ArgumentError, NotCertifiedError

IDEAL = "ideal"


@dataclass(frozen=True)
class Profile:
    """One way to execute a network.

    Attributes:
        name: As in ``executed(name)``.
        dtype: Name of the dtype tensors are stored in between calls.
        unit: Unit roundoff of the rounding into storage; 0 where a call's arithmetic is the storage
            already.
        underflow: Largest error of that rounding where its result is denormal.
        largest: Numbers beyond this are not relied on: the largest finite number of the storage, or
            less where calls need its range for what they form in between (the sum of an average,
            ``6 x`` of hardswish).
        assumption: What the profile rests on beside the assumptions of every certificate, or None.
    """

    name: str
    dtype: str
    unit: float
    underflow: float
    largest: float
    assumption: str | None = None

    @property
    def semantics(self) -> str:
        """The profile as the field ``semantics`` of a certificate names it."""
        return f"executed({self.name})"


PROFILES: Mapping[str, Profile] = MappingProxyType(
    {
        "fp64": Profile("fp64", "float64", 0.0, 0.0, 2.0**960),
        "fp32a64": Profile(
            "fp32a64", "float32", 2.0**-24, 2.0**-150, float.fromhex("0x1.fffffep+127"),
            "A6: float64 results are rounded to binary32 to nearest, with gradual underflow "
            "(tested before every run)",
        ),
    }
)  # fmt: skip
SEMANTICS = (IDEAL, *(profile.semantics for profile in PROFILES.values()))

VACUOUS = (
    "rounding in every step of a sum lets the worst case exceed the margin of any deep network "
    "(61 times for twenty convolutions in float32, 1,040 in TF32, 119,000 in bfloat16)"
)
# Names of executions that no profile describes, and why.
REFUSED: Mapping[str, str] = MappingProxyType(
    {
        "fp32": f"float32 accumulation: {VACUOUS}",
        "tf32": f"TF32 products, which read ten bits of a factor: {VACUOUS}",
        "bf16": f"bfloat16: {VACUOUS}",
        "fp16": f"float16: {VACUOUS}",
        "int8": "integer quantisation, which is another function than the stored parameters'",
        "autocast": f"autocast, which picks a dtype per call: {VACUOUS}",
        "amp": f"mixed precision, which picks a dtype per call: {VACUOUS}",
    }
)
ALIASES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "half": "fp16"}


def get_profile(name: str) -> Profile:
    """The profile of this name.

    Raises:
        NotCertifiedError: The name is of an execution of which nothing can be certified.
        ArgumentError: There is no such profile.

    Example:
        >>> get_profile("fp32a64").semantics
        'executed(fp32a64)'
    """
    if name in PROFILES:
        return PROFILES[name]
    short = ALIASES.get(str(name).lower(), str(name).lower())
    if short in REFUSED:
        raise NotCertifiedError(
            f"an execution profile, one of {', '.join(PROFILES)}",
            f"{name!r}, {REFUSED[short]}",
            "profile",
            "use fp32a64: float32 storage, every call in float64, one rounding",
        )
    raise ArgumentError(
        f"an execution profile, one of {', '.join(PROFILES)}", repr(name), "profile", "pick one"
    )


def profile_of(semantics: str) -> Profile | None:
    """The profile that a certificate's ``semantics`` names; None for ``"ideal"``.

    Raises:
        NotCertifiedError, ArgumentError: As :func:`get_profile`, or another text.

    Example:
        >>> profile_of("ideal") is None
        True
    """
    if semantics == IDEAL:
        return None
    inside = str(semantics).removeprefix("executed(")
    if inside == semantics or not inside.endswith(")"):
        raise ArgumentError(
            f"semantics, one of {', '.join(SEMANTICS)}", repr(semantics), "semantics", "pick one"
        )
    return get_profile(inside.removesuffix(")"))
