# SPDX-License-Identifier: MIT
"""How much a network's proofs may cost, and which of them that pays for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lmtfast.errors import ArgumentError

# Float64 operations that two cores of a server do in a second. Nominal, so that the choice of
# proofs does not depend on the machine and a certificate can be derived again on another one.
OPERATIONS_PER_SECOND = float(1 << 35)
# Proofs so short that asking costs as much: always allowed.
FREE_OPERATIONS = float(1 << 32)


@dataclass(frozen=True)
class Budget:
    """What exact proofs of a whole network may cost; beyond it, cheaper and looser ones are used.

    Args:
        seconds: Nominal time: float64 operations over 2^35 per second, about what two cores do.
        memory: Bytes that one proof may hold at once.

    Raises:
        ArgumentError: Not two nonnegative numbers.

    Guarantee:
        None of its own: every bound is rigorous whatever the budget, only how tight it is differs.

    Source:
        Counts of the factorisations in Golub and Van Loan, Matrix Computations, 4th edition,
        section 4.3.

    Example:
        >>> import torch
        >>> import lmtfast as lf
        >>> layer = torch.nn.Conv2d(64, 64, 3, padding=1).eval()
        >>> lf.certified_bound(layer, (64, 12, 12), budget=lf.Budget(0.0)).method
        'torus'
    """

    seconds: float = 120.0
    memory: float = float(4 << 30)

    def __post_init__(self) -> None:
        for name in ("seconds", "memory"):
            if not getattr(self, name) >= 0.0:
                raise ArgumentError(
                    "a nonnegative number", repr(getattr(self, name)), f"Budget({name})",
                    "use float('inf') for no limit",
                )  # fmt: skip


@dataclass(frozen=True)
class Cost:
    """What a proof takes: floating-point operations, and bytes held at once."""

    operations: float
    memory: float


@dataclass(frozen=True)
class Allowance:
    """What one operator's exact proof may take."""

    operations: float = Budget.seconds * OPERATIONS_PER_SECOND
    memory: float = Budget.memory

    def pays(self, cost: Cost) -> bool:
        """Whether the proof is within the allowance."""
        return cost.memory <= self.memory and (
            cost.operations <= self.operations or cost.operations <= FREE_OPERATIONS
        )


def share(budget: Budget, costs: Sequence[Cost | None]) -> list[Allowance]:
    """Spend a budget on the cheapest proofs first; what is refused gets no operations.

    Args:
        budget: For all of them together.
        costs: The cheapest exact proof of every operator; None where there is none.
    """
    left = budget.seconds * OPERATIONS_PER_SECOND
    allowed = [Allowance(0.0, budget.memory)] * len(costs)
    known = [(cost.operations, i) for i, cost in enumerate(costs) if cost is not None]
    for operations, i in sorted(known):
        if operations > left:
            break
        allowed[i], left = Allowance(operations, budget.memory), left - operations
    return allowed
