# SPDX-License-Identifier: MIT
"""The gate: no speed is reported for a result that is not the definition's."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from benchmarks.problems import Runner

MODES = ("forward", "gradient")


@dataclass(frozen=True)
class Tolerance:
    """Largest relative errors: of any value, and of any parameter's gradient in its norm."""

    values: float
    gradients: float


# Float32 on the CPU, where torch's grouped convolutions reach 1e-4; TensorFloat-32 and bfloat16
# operands are allowed on a GPU.
TOLERANCE = {"cpu": Tolerance(5e-4, 1e-3), "cuda": Tolerance(2e-3, 1e-2)}


@dataclass(frozen=True)
class Verdict:
    """Errors against the definition in float64, and whether they are within the tolerance."""

    values: float
    gradients: float
    green: bool

    def __str__(self) -> str:
        return f"values off by {self.values:.1e}, gradients by {self.gradients:.1e}"


def judge(runner: Runner, device_type: str, modes: tuple[str, ...] = MODES) -> Verdict:
    """Take a step with a gradient and two without, beside the definition in float64.

    The second and third step start from the iterates that the ones before them left, so a wrong
    update shows as well as a wrong value. Where no ``forward`` is timed, none is judged.
    """
    twin = runner.twin()
    before = {name: leaf.grad.clone() for name, leaf in runner.parameters.items()}
    values, pairs = 0.0, []
    for step in ("gradient", "forward", "forward") if "forward" in modes else ("gradient",):
        got = runner.read(getattr(runner, step)())
        values = max(values, _distance(got, runner.read(getattr(twin, step)()), entrywise=True))
    for name, leaf in runner.parameters.items():
        pairs.append((leaf.grad - before[name], twin.parameters[name].grad))
    gradients = max((_distance(got, want) for got, want in pairs), default=0.0)
    limit = TOLERANCE[device_type]
    return Verdict(values, gradients, values <= limit.values and gradients <= limit.gradients)


def _distance(got: Tensor, want: Tensor, *, entrywise: bool = False) -> float:
    """Relative distance; infinite for NaN, and where the definition is zero and ``got`` is not."""
    difference = got.double() - want.double()
    size = want.double().abs() if entrywise else want.double().norm()
    error = difference.abs() if entrywise else difference.norm()
    relative = (error / size).where(error > 0, 0.0).max().item() if error.numel() else 0.0
    return relative if relative == relative and bool(got.isfinite().all()) else float("inf")
