# SPDX-License-Identifier: MIT
"""The engine study trains as the library does, probes against dense matrices, and resumes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import engine_costs, engine_report, engine_study
from benchmarks.engine_study import Case, Variant
from lmtfast.config import TrainConfig
from lmtfast.data import Dataset
from lmtfast.estimation import NetworkBound
from lmtfast.graph import Region
from lmtfast.training import train
from lmtfast.weights import Weights, named_tensors
from tests.oracles import svd_norm

CONFIG = TrainConfig(
    model="digits",
    model_options={"channels": (3, 4), "hidden": 6},
    epochs=2,
    batch_size=8,
    lr=1e-2,
    lr_milestones=(1,),
    eps=0.3,
)
TOY = Case(CONFIG, probe_every=7, samples=40, variants=("operator", "symbol", "auto"))


@pytest.fixture(scope="module")
def data() -> Dataset:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(40, 1, 8, 8, generator=generator)
    return Dataset(x, torch.arange(40) % 4, x, torch.arange(40) % 4, name="toy")


@pytest.fixture
def case(monkeypatch: pytest.MonkeyPatch) -> Case:
    monkeypatch.setattr(engine_study, "CASES", {"toy": TOY})
    monkeypatch.setattr(engine_study, "FIRST_PROBE", 2)
    return TOY


def dense_norm(region: Region, weights: Weights) -> float:
    from lmtfast.backends.reference import matvec, vector_shape

    eye = torch.eye(torch.Size(vector_shape(region)).numel(), dtype=torch.float64)
    columns = [matvec(region, weights, v.reshape(vector_shape(region))).reshape(-1) for v in eye]
    return svd_norm(torch.stack(columns, 1))


def symbol_norm(kernel: torch.Tensor, points: int = 65) -> float:
    """Largest singular value over a frequency grid, stride 1."""
    taps = torch.arange(kernel.shape[-1], dtype=torch.float64)
    grid = torch.linspace(0, 2 * torch.pi, points, dtype=torch.float64)
    phases = torch.exp(-1j * grid[:, None] * taps)
    symbols = torch.einsum("ocyx,ay,bx->aboc", kernel.to(phases.dtype), phases, phases)
    return float(torch.linalg.matrix_norm(symbols, 2).max())


def test_the_loop_is_the_one_of_train(case: Case, data: Dataset) -> None:
    # Probing and reading the clock must not change a weight.
    model, row, _ = engine_study.run(case, Variant("operator"), 3, data, None)
    expected = train(replace(CONFIG, seed=3, engine="operator"), data).model
    for (name, mine), theirs in zip(
        model.state_dict().items(), expected.state_dict().values(), strict=True
    ):
        assert torch.equal(mine, theirs), name
    assert row["steps"] == 10


def test_probe_against_dense_matrices(case: Case, data: Dataset) -> None:
    torch.manual_seed(1)
    model = engine_study.network(case, data)
    bound = NetworkBound(model, data.input_shape, engine="symbol", backend="reference")
    estimate = bound()
    rows = list(engine_study.probe(model, bound, estimate, bound.state.iterates))
    weights = Weights({n: t.detach() for n, t in named_tensors(model).items()}, dtype=torch.float64)
    assert [r["engine"] for r in rows] == ["symbol", "symbol", "operator", "operator"]
    assert [r["positions"] for r in rows] == [64, 16, 1, 1]
    for (_, region, _), row in zip(engine_study.layers_of(bound), rows, strict=True):
        assert row["norm"] == pytest.approx(dense_norm(region, weights), rel=1e-6)
        assert row["error"] == pytest.approx(row["sigma"] / row["norm"] - 1, abs=1e-12)
    top = symbol_norm(model.conv1.weight.detach().double())
    assert top * (1 - 1e-9) <= rows[0]["supremum"] <= top * 1.01
    assert rows[0]["tracking_error"] <= 1e-6


def test_a_study_resumes_and_copies_equal_plans(
    case: Case, data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def study() -> list[dict[str, str]]:
        engine_study.study("toy", data, tmp_path, variants=case.variants, seeds=[0])
        return engine_report.read(tmp_path / "runs.csv")

    rows = study()
    assert [r["variant"] for r in rows] == ["operator", "symbol", "auto"]
    # All maps are small, so auto plans one of the other two.
    assert rows[2]["same_as"] in {"operator", "symbol"}
    errors = engine_report.read(tmp_path / "errors.csv")
    assert {int(r["step"]) for r in errors} == {2, 9}
    assert len(errors) == 3 * 2 * 4
    monkeypatch.setattr(engine_study, "run", None)  # nothing may be trained again
    assert study() == rows
    text = engine_report.tables(tmp_path)
    assert "| toy | symbol | 1 |" in text
    assert engine_report.with_tables("a" + engine_report.BEGIN + "b" + engine_report.END, "c") == (
        "a" + engine_report.BEGIN + "c" + engine_report.END
    )


def test_rescans_are_counted(case: Case, data: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    searched, rescan = [], NetworkBound.rescan
    monkeypatch.setattr(NetworkBound, "rescan", lambda b: searched.append(1) or rescan(b))
    variant = Variant("symbol", rescan_every=4, power_steps=2)
    _, row, errors = engine_study.run(case, variant, 0, data, "reference")
    # After 4 and 8 of 10 steps, and once for the radii at the end.
    assert len(searched) == 3
    assert row["rescan_ms_per_step"] > 0
    assert [r["since_rescan"] for r in errors[::4]] == [1, 0]


def test_costs_have_a_row_per_engine() -> None:
    model = engine_costs.Beside(2, 2)
    rows = list(
        engine_costs.costs_of(
            model, (2, 5, 5), ("operator", "symbol"), "reference", copies=2, seconds=0.0
        )
    )
    assert [r["engine"] for r in rows] == ["operator", "symbol"]
    assert all(min(r["step_ms"], r["forward_ms"]) > 0 for r in rows)
    assert "2.0" not in engine_report.cost_table([])
