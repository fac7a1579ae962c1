# SPDX-License-Identifier: MIT
"""Certifies a checkpoint, attacks every radius, and keeps what the attacks found.

    python -m benchmarks.attack_check CHECKPOINT --data mnist.npz --out DIR

Writes ``attacks.csv`` (one row per attack), ``gap.csv`` (quantiles of certified radius over
attacked distance), ``curve.csv`` (certified and attacked accuracy), ``curve.png`` and
``machine.csv``. Exit code 1 if an attack landed inside a radius; the points are then in
``violations.npz``.
"""

from __future__ import annotations

import argparse
import csv
import resource
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

import lmtfast as lf
from benchmarks.machine import header, version
from lmtfast.attack_report import AttackReport, AttackRow
from lmtfast.certificate import Certificate
from lmtfast.checkpoint import load_checkpoint
from lmtfast.data import load_dataset
from lmtfast.plot import plot_certificates

SHARES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)
CURVE = np.linspace(0.0, 4.0, 41)


def write(path: Path, head: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(head)
        writer.writerows(rows)


def keep(out: Path, name: str, certificate: Certificate, report: AttackReport) -> None:
    columns = [f.name for f in fields(AttackRow)]
    figures = [{**asdict(r), "median": f"{r.median:.5g}", "seconds": f"{r.seconds:.1f}"}
               for r in report.rows]  # fmt: skip
    write(out / "attacks.csv", columns, ([row[c] for c in columns] for row in figures))
    quantiles = report.gap_quantiles(SHARES).items()
    write(out / "gap.csv", ["share", "certified/attacked"],
          ([q, f"{v:.6f}"] for q, v in quantiles))  # fmt: skip
    write(out / "curve.csv", ["radius", "certified", "attacked"],
          ([f"{r:.2f}", certificate.certified_accuracy(float(r)),
            report.attacked_accuracy(float(r))] for r in CURVE))  # fmt: skip
    plot_certificates({name: certificate}, out / "curve.png", attacked={name: report})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--slow-inputs", type=int, default=1000)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    lines = header(torch.device("cpu"))
    lines |= {p: version(p) for p in ("foolbox", "adversarial-robustness-toolbox")}
    saved = load_checkpoint(options.checkpoint)
    data = load_dataset(options.data, input_range=saved.config.input_range)
    model = saved.model()
    pair = (data.x_test[: options.limit], data.y_test[: options.limit])
    certificate = lf.certify(
        model, pair, input_shape=saved.input_shape, input_range=data.input_range
    )
    start = time.perf_counter()
    report = lf.attack(
        model, certificate, pair, slow_inputs=options.slow_inputs,
        progress=lambda name, done, total: print(
            f"{time.perf_counter() - start:7.0f} s  {name} {done}/{total}", flush=True
        ),
    )  # fmt: skip
    usage = resource.getrusage(resource.RUSAGE_SELF)
    verdict = {
        "inputs": certificate.n_total,
        "violations": len(report.violations),
        "undecided": len(report.undecided),
        "not attacked": len(report.unattacked),
        "gaps": len(report.gap),
        "weights sha256": certificate.weights_sha256,
        "seconds of the attacks": f"{time.perf_counter() - start:.0f}",
        "processor seconds in all": f"{usage.ru_utime + usage.ru_stime:.0f}",
        **{f"did not run: {name}": reason for name, reason in report.skipped},
    }
    write(options.out / "machine.csv", ["what", "value"], (lines | verdict).items())
    keep(options.out, saved.config.method, certificate, report)
    print(verdict)
    if report.violations:
        report.save_violations(options.out / "violations.npz")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
