# SPDX-License-Identifier: MIT
"""What a certificate loses by the route its norms take, and what exact proofs would cost.

    python -m benchmarks.norm_routes wrn-16-4            torus and Gram iteration, per layer
    python -m benchmarks.norm_routes wrn-28-10 --costs   operations of the exact proofs alone
    python -m benchmarks.norm_routes wrn-28-10 --prove blocks.1.conv1    time of one exact proof

Ratios are to a converged Lanczos value, which the banded proof exceeds by 2e-7 (ADR 0016). Gram
iteration (Delattre et al., ICML 2023) squares the symbol's Gram matrices: on the library's torus it
is an upper bound of the torus bound in exact arithmetic; at the image's own size, as published, it
bounds no zero-padded convolution. Weights are random; radii scale with the product over the layers.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.networks import NETWORKS, build_network
from lmtfast.backends.reference import effective_weight
from lmtfast.graph import Conv, Region
from lmtfast.plan import trace
from lmtfast.verified.budget import Allowance
from lmtfast.verified.convolution import Geometry, banded_form
from lmtfast.verified.polyphase import polyphase
from lmtfast.verified.region import lanczos_norm, operator_norm_upper
from lmtfast.verified.torus import torus_norm_upper
from lmtfast.weights import Weights, named_tensors

STEPS = (6, 10)  # squarings; the first is what the paper's experiments use
LANCZOS = (200, 1e-9)  # steps and tolerance


def symbols(taps: Sequence[tuple[tuple[int, ...], Tensor]], size: Sequence[int]) -> Tensor:
    """A(w) on half of a grid. Shape ``(frequencies, rows, columns)``, complex128."""
    grid = torch.tensor(list(itertools.product(range(size[0] // 2 + 1), *map(range, size[1:]))))
    offsets = torch.tensor([offset for offset, _ in taps])
    turns = (grid.double() / torch.tensor(size)) @ offsets.double().T
    phases = torch.polar(torch.ones_like(turns), 2.0 * math.pi * turns)
    weights = torch.stack([matrix for _, matrix in taps])
    return torch.einsum("ft,tab->fab", phases, weights.to(torch.complex128))


def gram_iteration(matrices: Tensor, steps: int) -> float:
    """The largest of the bounds ``|G_steps|_F ** (2 ** -steps)``."""
    matrices = matrices if matrices.shape[1] >= matrices.shape[2] else matrices.mH
    logs = torch.zeros(len(matrices), dtype=torch.float64)
    for _ in range(steps):
        size = torch.linalg.matrix_norm(matrices)
        matrices = matrices / size[:, None, None]
        logs = 2.0 * (logs + size.log())
        matrices = matrices.mH @ matrices
    logs = logs + torch.linalg.matrix_norm(matrices).log()
    return math.exp(float(logs.max()) / 2**steps)


def losses(region: Region, op: Conv, weights: Weights) -> list[float]:
    """Torus, Gram iteration on it by steps, and at the image's size, over the Lanczos value."""
    kernel = effective_weight(op, weights)
    exact = lanczos_norm(region, weights, *LANCZOS)
    taps, coarse = polyphase(kernel, stride=op.stride, padding=op.padding, dilation=op.dilation)
    inputs, outputs = coarse(op.in_shape[1:]), op.out_shape[1:]
    upper = torus_norm_upper(taps, input_extent=inputs, output_extent=outputs).upper
    ends = [[q[a] for q, _ in taps] for a in range(len(inputs))]
    size = [
        max(m - min(q), n + max(q), m, n) for m, n, q in zip(inputs, outputs, ends, strict=True)
    ]
    around, own = symbols(taps, size), symbols(taps, inputs)
    bounds = [upper, *(gram_iteration(around, s) for s in STEPS), gram_iteration(own, STEPS[0])]
    return [bound / exact for bound in bounds]


def operations(op: Conv) -> float:
    """Float64 operations of the banded proof."""
    low = tuple(p for p, _ in op.padding)
    geometry = Geometry(
        op.in_shape[1:], op.out_shape[1:], op.kernel, op.stride, op.dilation, low
    )  # fmt: skip
    form = banded_form(geometry, op.out_shape[0] // op.groups, op.in_shape[0] // op.groups)
    return form.operations * op.groups


def prove(region: Region, weights: Weights) -> str:
    """Time and excess of the banded proof of one operator."""
    wall, cpu = time.perf_counter(), time.process_time()
    allowance = Allowance(math.inf, math.inf)
    upper = operator_norm_upper(region, weights, method="banded", allowance=allowance).upper
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    excess = upper / lanczos_norm(region, weights, *LANCZOS) - 1.0
    threads = torch.get_num_threads()
    return f"  proved in {wall:.0f} s, {cpu:.0f} s of CPU, {threads} threads, excess {excess:.2g}"


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("network", choices=sorted(NETWORKS))
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--costs", action="store_true", help="only count operations")
    only.add_argument("--prove", metavar="LAYER", help="prove this layer and no other")
    chosen = parser.parse_args()
    shape = NETWORKS[chosen.network].input_shape
    model = build_network(chosen.network).eval()
    weights = Weights(named_tensors(model), dtype=torch.float64)
    total, ratios, started = 0.0, [1.0] * (2 + len(STEPS)), time.process_time()
    for region in trace(model, shape).operators:
        op = region.primitive if isinstance(region, Region) else None
        if not isinstance(op, Conv) or math.prod(op.kernel) == 1:
            continue
        assert isinstance(region, Region)
        if chosen.prove not in (None, region.name):
            continue
        count = operations(op)
        total += count
        line = f"{region.name:32} {'x'.join(map(str, op.out_shape)):12} {count / 1e12:8.3f} TFLOP"
        if chosen.prove:
            line += prove(region, weights)
        elif not chosen.costs:
            found = losses(region, op, weights)
            ratios = [a * b for a, b in zip(ratios, found, strict=True)]
            line += "".join(f"{100 * (r - 1):9.4f} %" for r in found)
        print(line, flush=True)
    if not total:
        parser.error(f"{chosen.network} has no 3 x 3 convolution named {chosen.prove}")
    print(f"exact proofs together: {total / 1e12:.1f} TFLOP")
    if not chosen.costs and not chosen.prove:
        names = ("torus", *(f"Gram iteration, {s} steps" for s in STEPS), "the same at own size")
        for name, ratio in zip(names, ratios, strict=True):
            print(f"{name}: radius {1 / ratio:.4f} of that with exact norms")
    print(f"{time.process_time() - started:.0f} s of CPU")


if __name__ == "__main__":
    main()
