# SPDX-License-Identifier: MIT
"""What rigour costs in certified accuracy: a rigorous certificate beside the float estimate.

    python -m benchmarks.level_gap --checkpoint runs/mnist --data mnist.npz

The estimate is what libraries without proofs report: float32 logits, converged power iteration, and
Proposition 2 rounded to nearest. Prints both accuracies, in percent of all test inputs, at the
radii of the checkpoint's recipe and at the radius, of all, where they differ most.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

import lmtfast as lf
from lmtfast.checkpoint import load_checkpoint
from lmtfast.data import Dataset, load_dataset
from lmtfast.margin import prop2_radius

BATCH = 1000


@torch.no_grad()
def estimated_radii(model: torch.nn.Module, data: Dataset) -> np.ndarray:
    """Radii by the float estimate, 0 where the prediction is wrong. Shape ``(inputs,)``."""
    bound = lf.NetworkBound(model, data.input_shape, engine="operator").rescan()
    assert bound.head_weight is not None
    radii = [
        prop2_radius(model(x), y, bound.features, bound.head_weight)
        for x, y in zip(data.x_test.split(BATCH), data.y_test.split(BATCH), strict=True)
    ]
    return torch.cat(radii).double().numpy()


def largest_gap(certified: np.ndarray, estimated: np.ndarray) -> tuple[float, float]:
    """The largest lead, in points, of the estimate's accuracy at any radius, and that radius."""
    radii = np.unique(np.concatenate([certified, estimated]))
    radii = np.concatenate([[0.0], radii[radii > 0]])
    lead = [(estimated > r).mean() - (certified > r).mean() for r in radii]
    worst = int(np.argmax(lead))
    return 100.0 * float(lead[worst]), float(radii[worst])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--data")
    parser.add_argument("--out", type=Path, help="also write the table to this CSV file")
    chosen = parser.parse_args(arguments)
    saved = load_checkpoint(chosen.checkpoint)
    spread = saved.config.input_range
    data = load_dataset(chosen.data or saved.config.data, input_range=spread)
    model = saved.model().eval()
    certificate = lf.certify(
        model, (data.x_test, data.y_test), input_shape=data.input_shape, input_range=spread
    )
    certified, estimated = certificate.radius, estimated_radii(model, data)
    gap, where = largest_gap(certified, estimated)
    table = ["radius,rigorous,estimate"]
    for eps in (*saved.config.certify_radii, where):
        shares = [100.0 * (r > eps).mean() for r in (certified, estimated)]
        table.append(f"{eps:.6g},{shares[0]:.2f},{shares[1]:.2f}")
    text = "\n".join(table) + "\n"
    sys.stdout.write(text)
    sys.stdout.write(f"largest difference {gap:.4f} points, in the last row\n")
    if chosen.out is not None:
        chosen.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
