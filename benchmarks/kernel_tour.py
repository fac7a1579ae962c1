# SPDX-License-Identifier: MIT
"""Runs every compiled operation once at small shapes, for a memory or race checker to watch.

    compute-sanitizer --tool memcheck python -m benchmarks.kernel_tour --device cuda

Prints one line per operation and backend, with the reason where a backend does not run it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn

import lmtfast as lf
from benchmarks.pieces import LibraryPairs, PairProblem
from benchmarks.problems import LossProblem, MarginLoss, UnavailableError, reasons
from benchmarks.providers import BACKENDS, ENGINES
from lmtfast.backends import providing
from lmtfast.backends.margin_reference import margin_members

# Odd sizes, a stride that does not divide, groups, dilation, one tap, batch norm, a residual.
LOSS_SHAPES = ("3 x 2 x 5", "33 x 10 x 17", "5 x 300 x 65", "3 x 5000 x 7")
PAIR_SHAPES = ("7 x 7 x 5", "5 x 40 x 33", "9 x 300 x 65")


class SmallNet(nn.Module):
    """Every geometry that a kernel distinguishes, on a few channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
        self.residual = nn.Conv2d(8, 8, 3, padding=1)
        self.layers = nn.Sequential(
            nn.Conv2d(8, 12, 3, stride=2, padding=1), nn.ReLU(),
            nn.Conv2d(12, 12, 3, padding=2, dilation=2, groups=3), nn.ReLU(),
            nn.Conv2d(12, 17, 1, stride=2), nn.ReLU(),
            nn.Conv2d(17, 5, 4, padding=1), nn.ReLU(), nn.Flatten(),
        )  # fmt: skip
        self.head = nn.Linear(5 * 2 * 2, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).relu()
        return self.head(self.layers(x + self.residual(x)))


def visits(backend: str, device: torch.device) -> Iterator[tuple[str, Callable[[], object]]]:
    """Name and call of every operation of a backend."""

    def bound(engine: str, channels_last: bool) -> None:
        model = SmallNet().eval().to(device)
        if channels_last:
            model = model.to(memory_format=torch.channels_last)
        made = lf.NetworkBound(model, (3, 11, 9), engine=engine, backend=backend)
        if not made.plan.table.compiled:
            raise UnavailableError("it runs no step of this network; the reference would")
        with torch.no_grad():
            made()
        made().total.backward()

    def loss(shape: str, member: str) -> None:
        runner = MarginLoss(LossProblem(shape, device), backend, member)
        runner.gradient()

    def pairs(shape: str) -> None:
        module = providing(backend, "pair_norm_forward", "pair norms")
        LibraryPairs(PairProblem(shape, device), module).gradient()

    for engine in ENGINES:
        yield f"bound {engine}", lambda e=engine: bound(e, False)
        yield f"bound {engine}, channels last", lambda e=engine: bound(e, True)
    for member in margin_members():
        for shape in LOSS_SHAPES:
            yield f"loss {member} {shape}", lambda s=shape, m=member: loss(s, m)
    for shape in PAIR_SHAPES:
        yield f"pairs {shape}", lambda s=shape: pairs(s)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernel_tour", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--only", default="", help="operations whose name contains this")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    wanted = [b for b in BACKENDS if b != "reference" and (device.type == "cpu") == (b == "native")]
    for backend in wanted:
        status = lf.available_backends()[backend]
        if not status.available:
            print(f"{backend}: not available: {status.reason}", flush=True)
            continue
        for name, call in visits(backend, device):
            if options.only not in name:
                continue
            try:
                with reasons():
                    call()
                    if device.type == "cuda":
                        torch.cuda.synchronize()
            except UnavailableError as error:
                print(f"{backend}: {name}: not available: {error}", flush=True)
            else:
                print(f"{backend}: {name}: ran", flush=True)


if __name__ == "__main__":
    main()
