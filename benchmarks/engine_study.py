# SPDX-License-Identifier: MIT
"""What each engine's estimate is worth along training, and what it costs.

    python -m benchmarks.engine_study train mnist --data mnist.npz --out DIR
    python -m benchmarks.engine_study train wrn-16-1 --data cifar10.npz --out DIR
    python -m benchmarks.engine_study certify mnist --data mnist.npz --out DIR
    python -m benchmarks.engine_study costs --backend reference --out DIR
    python -m benchmarks.engine_study report --out DIR

``train`` repeats the loop of :func:`lmtfast.training.train`, which has no place for a probe, and
compares the sigma of every layer with the layer's converged norm at the same weights. It appends
finished runs to ``runs.csv`` and ``errors.csv``, skips those it finds there, and keeps the trained
weights in ``models/``, which ``certify`` reads. ``costs`` times the engines on single layers and
whole networks, ``report`` draws the plots and writes the tables.
"""

from __future__ import annotations

import argparse
import copy
import csv
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lmtfast as lf
from benchmarks.engine_costs import COST_COLUMNS, measure
from benchmarks.engine_report import MACHINE_COLUMNS, write_report
from benchmarks.machine import header
from benchmarks.symbol_supremum import supremum
from lmtfast.config import TrainConfig
from lmtfast.data import Dataset, batches, load_dataset
from lmtfast.engines import polyphase
from lmtfast.estimation import NetworkBound
from lmtfast.graph import Operator, Region
from lmtfast.losses import margin_cross_entropy
from lmtfast.models import build_model
from lmtfast.recipes import load_recipe
from lmtfast.table import CLOSED_FORM
from lmtfast.training import EVALUATION_BATCH, radius_estimate
from lmtfast.verified.region import lanczos_norm
from lmtfast.weights import Weights, named_tensors

LANCZOS_STEPS = 400
FIRST_PROBE = 50


@dataclass(frozen=True)
class Case:
    """A training run to study.

    Args:
        config: The run; engine and seed are replaced.
        probe_every: Steps between two probes, prime to every rescan interval so that probes meet
            every phase of it.
        samples: Training inputs used, from the first on.
        variants: Names in ``VARIANTS`` to train.
    """

    config: TrainConfig
    probe_every: int
    samples: int
    variants: tuple[str, ...]


@dataclass(frozen=True)
class Variant:
    """An engine, after how many steps it searches afresh (0: never), and power steps per step."""

    engine: str
    rescan_every: int = 0
    power_steps: int = 1


VARIANTS: Mapping[str, Variant] = {
    "operator": Variant("operator"),
    "symbol": Variant("symbol"),
    "separable": Variant("separable"),
    "auto": Variant("auto"),
    "symbol, rescan 100": Variant("symbol", 100),
    "symbol, rescan 10": Variant("symbol", 10),
    "symbol, rescan 4": Variant("symbol", 4),
    "symbol, rescan 2": Variant("symbol", 2),
    "symbol, rescan 1": Variant("symbol", 1),
    "symbol, 4 steps": Variant("symbol", power_steps=4),
    "symbol, 16 steps": Variant("symbol", power_steps=16),
    "symbol, 16 steps, rescan 100": Variant("symbol", 100, 16),
    "symbol, 16 steps, rescan 50": Variant("symbol", 50, 16),
}
TRAINED = (
    "operator", "symbol", "separable", "auto", "symbol, 16 steps, rescan 50", "symbol, rescan 1",
)  # fmt: skip
TRACKING = tuple(name for name in VARIANTS if name.startswith("symbol"))
CASES: Mapping[str, Case] = {
    "mnist": Case(
        load_recipe("mnist-lmt", epochs=5), probe_every=167, samples=60_000, variants=TRAINED
    ),
    "mnist-600": Case(
        load_recipe("mnist-lmt", epochs=1), probe_every=29, samples=30_000, variants=TRACKING
    ),
    "wrn-16-1": Case(
        TrainConfig(
            model="wide-resnet",
            model_options={"depth": 16, "width": 1},
            epochs=3,
            batch_size=50,
            lr=3e-3,
            lr_milestones=(2,),
            eps=0.1,
        ),
        probe_every=67,
        samples=10_000,
        variants=TRAINED,
    ),
}
KEY = ("case", "variant", "seed")
RUN_COLUMNS = (
    *KEY, "engines", "same_as", "steps", "accuracy", "features", "features_estimate",
    "median_radius", "median_radius_correct", "mean_radius", "bound_ms_per_step",
    "rescan_ms_per_step", "step_ms", "torch",
)  # fmt: skip
CERTIFICATE_COLUMNS = (
    *KEY, "level", "inputs", "accuracy", "features", "median_radius", "median_radius_correct",
)  # fmt: skip
ERROR_COLUMNS = (
    *KEY, "step", "layer", "kind", "positions", "engine", "since_rescan", "sigma", "norm", "error",
    "supremum", "tracking_error",
)  # fmt: skip


class Table:
    """A CSV file that grows by whole runs."""

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        self.path, self.columns = path, tuple(columns)

    def rows(self) -> list[dict[str, str]]:
        if not self.path.exists():
            return []
        with self.path.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))

    def write(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Replace the file in one move, so that a killed process leaves the old one."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fresh = self.path.with_suffix(".new")
        with fresh.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        fresh.replace(self.path)

    def put(self, key: Mapping[str, str], rows: Iterable[Mapping[str, Any]]) -> None:
        """Write the rows of one run in place of those it had."""
        kept = [r for r in self.rows() if any(r[k] != v for k, v in key.items())]
        self.write([*kept, *rows])


def layers_of(bound: NetworkBound) -> Iterator[tuple[int, Region, str]]:
    """Index, region and engine of every operator that an engine runs."""
    for i, (op, name) in enumerate(zip(bound.plan.operators, bound.plan.engines, strict=True)):
        if name != CLOSED_FORM and isinstance(op, Region):
            yield i, op, name


def positions(operator: Operator) -> int:
    """Output positions of a convolution's forward stencil; 1 for a matrix."""
    form = polyphase.conv_form(operator) if isinstance(operator, Region) else None
    return 1 if form is None else math.prod(form.out_extent)


@torch.no_grad()
def probe(
    model: nn.Module, bound: NetworkBound, estimate: lf.LipschitzBound, state: torch.Tensor
) -> Iterator[dict[str, Any]]:
    """Per layer the sigma that training used and what the same weights converge to.

    Args:
        model: The network, with the weights of the estimate.
        bound: The bound that made the estimate.
        estimate: What the bound returned in this step.
        state: The packed iterates after it.

    Yields:
        The columns of ``errors.csv`` that belong to a layer.
    """
    tensors = {name: tensor.detach() for name, tensor in named_tensors(model).items()}
    weights = Weights(tensors, dtype=torch.float64)
    offsets = bound.state.offsets
    for i, region, engine in layers_of(bound):
        sigma = float(estimate.per_operator[region.name])
        norm = lanczos_norm(region, weights, steps=LANCZOS_STEPS)
        row = {
            "layer": region.name, "kind": region.kind, "positions": positions(region),
            "engine": engine, "sigma": sigma, "norm": norm, "error": sigma / norm - 1.0,
        }  # fmt: skip
        if engine == "symbol":
            top = supremum(region, weights, state[offsets[i] : offsets[i + 1]])
            row |= {"supremum": top, "tracking_error": sigma / top - 1.0}
        yield row


@torch.no_grad()
def outcome(model: nn.Module, data: Dataset, bound: NetworkBound) -> dict[str, float]:
    """Test accuracy, and radii from the converged norms of all layers in float64."""
    model.eval()
    logits = torch.cat([model(part) for part in data.x_test.split(EVALUATION_BATCH)]).double()
    converged = NetworkBound(copy.deepcopy(model).double(), data.input_shape, engine="operator")
    exact = converged.rescan()
    radius = radius_estimate(logits, data.y_test, exact)
    correct = logits.argmax(1) == data.y_test
    return {
        "accuracy": float(correct.double().mean()),
        "features": float(exact.features),
        "features_estimate": float(bound(update=False).features),
        "median_radius": float(radius.median()),
        "median_radius_correct": float(radius[correct].median()) if bool(correct.any()) else 0.0,
        "mean_radius": float(radius.mean()),
    }


def run(
    case: Case, variant: Variant, seed: int, data: Dataset, backend: str | None
) -> tuple[nn.Module, dict[str, Any], list[dict[str, Any]]]:
    """Train once; returns the network, its row of ``runs.csv`` and its rows of ``errors.csv``."""
    config, errors, step = case.config, [], 0
    seconds = {"bound": 0.0, "rescan": 0.0, "step": 0.0}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = network(case, data)
        bound = NetworkBound(model, data.input_shape, engine=variant.engine, backend=backend)
        optimizer = torch.optim.Adam(model.parameters(), lr=config.lr, fused=True)
        steps_per_epoch = math.ceil(len(data.x_train) / config.batch_size)
        for epoch in range(config.epochs):
            model.train()
            for group in optimizer.param_groups:
                group["lr"] = config.lr_at(epoch)
            order = batches(
                data.x_train, data.y_train, batch_size=config.batch_size, seed=seed, epoch=epoch
            )
            for index, (x, y) in enumerate(order):
                began = time.perf_counter()
                logits = model(x)
                forward = time.perf_counter()
                if variant.rescan_every and step and step % variant.rescan_every == 0:
                    bound.rescan()
                searched = time.perf_counter()
                if variant.power_steps > 1:
                    bound.converge(variant.power_steps - 1)
                estimate = bound()
                bounded = time.perf_counter()
                eps = config.eps_at(epoch + index / steps_per_epoch)
                loss = margin_cross_entropy(logits, y, estimate, eps=eps, scaling=config.scaling)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                paused = time.perf_counter()
                step += 1
                if step >= FIRST_PROBE and (step - FIRST_PROBE) % case.probe_every == 0:
                    since = (step - 1) % variant.rescan_every if variant.rescan_every else step
                    rows = probe(model, bound, estimate, bound.state.iterates)
                    errors += [{"step": step, "since_rescan": since, **row} for row in rows]
                resumed = time.perf_counter()
                optimizer.step()
                seconds["rescan"] += searched - forward
                seconds["bound"] += bounded - searched
                seconds["step"] += time.perf_counter() - began - (resumed - paused)
    row = {
        "engines": engines_of(bound), "steps": step, **outcome(model, data, bound),
        "bound_ms_per_step": 1e3 * seconds["bound"] / step,
        "rescan_ms_per_step": 1e3 * seconds["rescan"] / step,
        "step_ms": 1e3 * seconds["step"] / step, "torch": torch.__version__,
    }  # fmt: skip
    return model, row, errors


def engines_of(bound: NetworkBound) -> str:
    return " ".join(name for _, _, name in layers_of(bound))


def network(case: Case, data: Dataset) -> nn.Module:
    """The case's network with fresh weights."""
    return build_model(
        case.config.model,
        input_shape=data.input_shape,
        classes=data.classes,
        options=case.config.model_options,
    )


def planned_engines(case: Case, variant: Variant, data: Dataset) -> str:
    """The engines a variant would run now: a run recorded with others is out of date."""
    return engines_of(NetworkBound(network(case, data), data.input_shape, engine=variant.engine))


def study(
    name: str,
    data: Dataset,
    out: Path,
    *,
    variants: Sequence[str],
    seeds: Sequence[int],
    backend: str | None = None,
) -> None:
    """Train every variant with every seed, except what ``out`` holds already.

    A variant whose plan equals that of a recorded one would repeat it bit for bit: its rows are
    copied, and ``same_as`` names the other.
    """
    case = CASES[name]
    runs, errors = Table(out / "runs.csv", RUN_COLUMNS), Table(out / "errors.csv", ERROR_COLUMNS)
    for seed in seeds:
        for label in variants:
            variant, key = VARIANTS[label], {"case": name, "variant": label, "seed": str(seed)}
            engines = planned_engines(case, variant, data)
            recorded = [r for r in runs.rows() if r["case"] == name and r["seed"] == str(seed)]
            recorded = [r for r in recorded if r["engines"] == engines]
            if any(r["variant"] == label for r in recorded):
                continue
            twins = [r for r in recorded if r["variant"] in VARIANTS]
            same = (
                replace(VARIANTS[r["variant"]], engine=variant.engine) == variant for r in twins
            )
            twin = next((r for r, equal in zip(twins, same, strict=True) if equal), None)
            if twin is not None:
                of_twin = {k: twin[k] for k in KEY}
                rows = [r for r in errors.rows() if all(r[k] == v for k, v in of_twin.items())]
                row = twin | {"same_as": twin["same_as"] or twin["variant"]}
            else:
                model, row, rows = run(case, variant, seed, data, backend)
                save_file(model.state_dict(), weights_file(out, key))
            errors.put(key, [{**r, **key} for r in rows])
            runs.put(key, [{**row, **key}])


def weights_file(out: Path, key: Mapping[str, str]) -> Path:
    """Where a run's weights lie."""
    folder = out / "models"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / (
        "-".join(key[k].replace(", ", "-").replace(" ", "") for k in KEY) + ".safetensors"
    )


def certify(name: str, data: Dataset, out: Path, *, inputs: int) -> None:
    """Certify the first test inputs with every trained network, at level rigorous."""
    case, table = CASES[name], Table(out / "certificates.csv", CERTIFICATE_COLUMNS)
    done = {tuple(r[k] for k in KEY) for r in table.rows()}
    for row in Table(out / "runs.csv", RUN_COLUMNS).rows():
        key = {k: row[k] for k in KEY}
        if row["case"] != name or tuple(key.values()) in done:
            continue
        model = network(case, data)
        trained = key | {"variant": row["same_as"] or row["variant"]}
        model.load_state_dict(load_file(weights_file(out, trained)))
        certificate = lf.certify(
            model.eval(), (data.x_test[:inputs], data.y_test[:inputs]),
            input_shape=data.input_shape, input_range=data.input_range,
        )  # fmt: skip
        correct = certificate.prediction == certificate.label
        table.put(key, [{
            **key, "level": certificate.level, "inputs": certificate.n_total,
            "accuracy": certificate.n_correct / certificate.n_total,
            "features": certificate.features, "median_radius": certificate.median_radius,
            "median_radius_correct": float(np.median(certificate.radius[correct])),
        }])  # fmt: skip


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train and probe")
    prove = commands.add_parser("certify", help="rigorous radii of the trained networks")
    prove.add_argument("--inputs", type=int, default=10_000, help="test inputs, from the first on")
    for command in (train, prove):
        command.add_argument("case", choices=CASES)
        command.add_argument("--data", required=True, help=".npz file as lmtfast train takes it")
    train.add_argument("--variants", nargs="+", choices=VARIANTS, help="default: the case's")
    train.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    costs = commands.add_parser("costs", help="time the engines layer by layer")
    report = commands.add_parser("report", help="plots and tables from the CSV files")
    for command in (train, costs):
        command.add_argument("--backend", default="reference")
    for command in (train, prove, costs):
        command.add_argument("--threads", type=int, default=1)
    for command in (train, prove, costs, report):
        command.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def main() -> None:
    args = parse()
    if args.command == "report":
        write_report(args.out)
        return
    torch.set_num_threads(args.threads)
    did = " ".join(str(vars(args)[k]) for k in ("command", "case", "backend") if k in args)
    lines = [{"command": did, "key": k, "value": v} for k, v in header(torch.device("cpu")).items()]
    Table(args.out / "machine.csv", MACHINE_COLUMNS).put({"command": did}, lines)
    if args.command == "costs":
        costs = Table(args.out / "costs.csv", COST_COLUMNS)
        for subject, rows in measure(args.backend):
            costs.put({"backend": args.backend, **subject}, rows)
        return
    case, whole = CASES[args.case], load_dataset(args.data)
    x, y = whole.x_train[: case.samples], whole.y_train[: case.samples]
    data = Dataset(x, y, whole.x_test, whole.y_test, whole.name)
    if args.command == "certify":
        certify(args.case, data, args.out, inputs=args.inputs)
        return
    variants = args.variants or case.variants
    study(args.case, data, args.out, variants=variants, seeds=args.seeds, backend=args.backend)


if __name__ == "__main__":
    main()
