# SPDX-License-Identifier: MIT
"""The script for GPU machines, without one: its stages, what becomes of a bad one, its summary."""

from __future__ import annotations

import dataclasses
import sys
import time
from contextlib import nullcontext

import pytest
import torch

from benchmarks import gpu_check, kernel_profile, kernel_tour, training_step
from benchmarks.cases import CASES
from benchmarks.gpu_check import Outcome, Stage, check, judged, stages, training_lines
from benchmarks.networks import NETWORKS, build_network, layers_of
from benchmarks.peers import PerLayer
from benchmarks.piggy_back import PiggyBack
from benchmarks.problems import BoundProblem, UnavailableError
from benchmarks.providers import PROVIDERS
from benchmarks.report import Row, read_rows, write_rows
from benchmarks.run import CaseRun
from benchmarks.timing import graph_sampler, queued_sampler

CPU = torch.device("cpu")


def stage(code: str, *, seconds: float = 20.0, proof: str = "") -> Stage:
    return Stage("a stage", (sys.executable, "-c", code), seconds, "log.txt", proof)


def test_a_bad_stage_is_reported_and_the_rest_goes_on(tmp_path, capsys):
    groups = [
        (stage("print('fine')", proof="fine"), stage("print('wrong'); raise SystemExit(3)")),
        (stage("import time; print('slow', flush=True); time.sleep(60)", seconds=2.0),),
        (Stage("a tool", (), 5.0, "log.txt", "", reason="the tool is missing"),),
        (stage("print('nothing')", proof="proved"), stage("print('last')")),
    ]
    started = time.monotonic()
    outcomes = check(groups, tmp_path, minutes=1.0)
    assert time.monotonic() - started < 20
    assert [o.status for o in outcomes] == [
        "done", "failed", "out of time", "left out", "failed", "done",
    ]  # fmt: skip
    text = (tmp_path / gpu_check.SUMMARY).read_text()
    for part in ("exit status 3: wrong", "slow", "the tool is missing", "lacks 'proved'"):
        assert part in text
    assert "===== a stage\nfine\n" in (tmp_path / "log.txt").read_text()
    assert "out of time" in capsys.readouterr().out


def test_no_stage_starts_when_the_time_is_over(tmp_path):
    (outcome,) = check([(stage("print('never')"),)], tmp_path, minutes=0.0)
    assert (outcome.status, outcome.remark) == ("left out", "no time was left")


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_stages_fit_into_the_limits(tmp_path, monkeypatch, device, quick):
    monkeypatch.setattr(gpu_check, "find", lambda tool: f"/tools/{tool}")
    groups = stages(device, quick, tmp_path)
    every = [s for group in groups for s in group]
    # The logs, the summary and the tables.
    tables = {"speed.csv", "training.csv", "profile.csv", "summary.md"}
    tables |= {"compiled/speed.csv", "compiled/training.csv"}
    assert len(tables | {s.log for s in every}) <= 8
    assert (
        sum(max(s.seconds for s in group) for group in groups if "compiled" not in group[0].name)
        <= 60 * gpu_check.MINUTES
    )
    names = [s.name for s in every]
    assert len(set(names)) == len(names)
    for tool in gpu_check.TOOLS:
        (found,) = (s for s in every if s.name == f"sanitizer {tool}")
        assert bool(found.command) == (device == "cuda")
        assert found.command or found.reason
    if device == "cuda":
        assert any(s.command[-2:] == ("-m", "gpu") for s in every)


def test_missing_tools_are_named(monkeypatch):
    monkeypatch.setattr(gpu_check, "find", lambda tool: None)
    monkeypatch.setattr(gpu_check, "output", lambda *command: "")
    build = gpu_check.build_stage("cuda")
    assert "no nvcc" in build.name
    assert build.environment["CMAKE_ARGS"] == "-DLMTFAST_CUDA=OFF"
    sanitizer = gpu_check.sanitizer_stage("memcheck", "cuda", 60)
    assert not sanitizer.command
    assert "not on this machine" in sanitizer.reason


@pytest.mark.parametrize(("capability", "architecture"), [("9.0", "90a-real"), ("8.6", "86-real")])
def test_the_build_is_for_this_gpu(monkeypatch, capability, architecture):
    monkeypatch.setattr(gpu_check, "find", lambda tool: "/tools/nvcc")
    monkeypatch.setattr(gpu_check, "output", lambda *command: capability)
    build = gpu_check.build_stage("cuda")
    assert f"-DCMAKE_CUDA_ARCHITECTURES={architecture}" in build.environment["CMAKE_ARGS"]
    assert build.environment["CUDACXX"] == "/tools/nvcc"


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("cuda: loss lmt: ran\n========= ERROR SUMMARY: 0 errors\n", "done"),
        ("cuda: loss lmt: ran\n========= RACECHECK SUMMARY: 0 hazards displayed\n", "done"),
        ("cuda: loss lmt: ran\n========= ERROR SUMMARY: 2 errors\n", "failed"),
        ("cuda: not available: no GPU\n========= ERROR SUMMARY: 0 errors\n", "failed"),
        ("Device not supported\n", "failed"),
    ],
)
def test_a_sanitizer_is_clean_only_if_kernels_ran(monkeypatch, text, status):
    monkeypatch.setattr(gpu_check, "find", lambda tool: f"/tools/{tool}")
    sanitizer = gpu_check.sanitizer_stage("memcheck", "cuda", 60)
    assert judged(sanitizer, text, 0, 1.0).status == status
    assert judged(sanitizer, text, None, 1.0).status == "out of time"


def test_the_summary_shows_ours_beside_the_first(tmp_path):
    def row(op: str, provider: str, status: str, ms: float | None, faster: float | None) -> Row:
        return Row(op, "net", "gradient", provider, "", status, "", "graph", 5, ms, ms, ms, faster)

    speed = [
        row("bound", "per layer", "ok", 2.0, 1.0),
        row("bound", "GloRo, 5 iterations", "ok", 9.0, 0.2),
        row("bound", "lmtfast symbol (cuda)", "ok", 0.1, 20.0),
        row("bound", "lmtfast symbol (triton)", "red", None, None),
    ]
    training = [row("step", "plain", "ok", 20.0, 1.0), row("step", "auto", "ok", 20.2, 20 / 20.2)]
    write_rows(tmp_path / "speed.csv", {}, speed)
    write_rows(tmp_path / "training.csv", {}, training)
    outcome = Outcome(stage(""), "done", "a | b", 1.0)
    text = gpu_check.summary([outcome], tmp_path, 3.0)
    assert "| a stage | done | 1 | a / b |" in text
    assert "per layer 2 ms; lmtfast symbol (cuda) 0.1 ms, 20x; RED OR FAILED" in text
    assert list(training_lines(tmp_path / "training.csv")) == [
        "net, gradient: plain 20 ms (1.0000); auto 20.2 ms (1.0100)"
    ]


class Device:
    """A device whose clock moves by a second per call; stands in for ``torch.cuda``."""

    now = 0.0
    slept = 0

    def __init__(self, *_: object, **__: object) -> None:
        self.calls: list[object] = []

    def step(self) -> None:
        Device.now += 1.0

    def record(self) -> None:
        self.at = Device.now

    def elapsed_time(self, end: Device) -> float:
        return 1e3 * (end.at - self.at)

    def replay(self) -> None:
        Device.now += Device.captured

    def nothing(self, *_: object) -> Device:
        return self

    def __enter__(self) -> Device:
        self.begun = Device.now
        return self

    def __exit__(self, *_: object) -> None:
        Device.captured, Device.now = Device.now - self.begun, self.begun

    synchronize = wait_stream = nothing


@pytest.fixture
def device(monkeypatch):
    def spin(cycles: int) -> None:
        Device.slept = cycles

    for name in ("Event", "CUDAGraph", "Stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, Device)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", Device)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "_sleep", spin)
    return Device()


@pytest.mark.parametrize("copies", [1, 3])
def test_device_samples_are_seconds_per_call(device, copies):
    calls = [device.step] * copies
    assert graph_sampler(calls)() == pytest.approx(1.0)
    # Short for the host, so repeated within the graph.
    assert Device.captured > copies
    assert queued_sampler(calls)() == pytest.approx(1.0)


def test_a_queued_sample_starts_behind_a_spin_that_outlasts_the_host(device):
    def slow() -> None:
        time.sleep(0.02)

    queued_sampler([slow])
    assert Device.slept >= 2 * 0.02 * 1e9


@pytest.mark.gpu
@pytest.mark.parametrize("case", [c for c in CASES if "quick" in c.suites], ids=lambda c: c.name)
def test_what_runs_on_a_gpu_is_right_there(case):
    prepared = CaseRun(case, torch.device("cuda"))
    wrong = {n: why for n, why in prepared.refused.items() if why[0] != "not available"}
    assert not wrong
    assert prepared.runners


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["forward", "gradient"])
@pytest.mark.parametrize("backend", ["reference", "triton", "cuda"])
def test_a_step_replays_in_a_graph(backend, mode):
    problem = BoundProblem("wrn-10-1", torch.device("cuda"))
    try:
        runner = PROVIDERS[f"lmtfast auto ({backend})"].runner(problem)
    except UnavailableError as error:
        pytest.skip(str(error))
    graph_sampler([getattr(runner, mode)])()
    captured, eager = runner.bound.state.iterates.clone(), runner.clone()
    assert torch.isfinite(captured).all()
    torch.testing.assert_close(
        runner.read(runner.forward()), eager.read(eager.forward()), rtol=1e-3, atol=0.0
    )


def test_riding_iterates_converge_to_the_norms_of_the_layers():
    model = build_network("wrn-10-1")
    layers = layers_of(model, NETWORKS["wrn-10-1"].input_shape)
    rider = PiggyBack(model, layers).eval()
    x = torch.randn(2, *NETWORKS["wrn-10-1"].input_shape)
    plain = model(x)
    for _ in range(100):
        logits, norms = rider(x)
        norms.log().sum().backward()
        rider.advance()
    torch.testing.assert_close(logits, plain)
    peer = PerLayer(model, layers)
    for _ in range(100):
        wanted = dict(zip(peer.names, peer.forward().tolist(), strict=True))
    kinds = {layer.name: layer.kind for layer in layers}
    names = [n for n in peer.names if kinds[n] == "conv"]
    names += [n for n in peer.names if kinds[n] == "scale"]
    for name, norm in zip(names, norms.tolist(), strict=True):
        assert norm == pytest.approx(wanted[name], rel=2e-3), name


def test_a_training_step_is_timed_with_and_without_the_bound(tmp_path, monkeypatch):
    (case,) = (c for c in training_step.CASES if "quick" in c.suites)
    kept = [v for v in case.variants if v.name in ("plain", "auto", "piggy-back", "auto (triton)")]
    kept.append(training_step.Variant("broken", "auto", "no such backend"))
    case = training_step.StepCase(case.network, 2, tuple(kept), case.suites)
    monkeypatch.setattr(training_step, "CASES", (case,))
    training_step.main(["--suite", "quick", "--seconds", "0", "--out", str(tmp_path)])
    rows = {row["provider"]: row for row in read_rows(tmp_path / training_step.FILE)[1]}
    for name in ("plain", "auto", "piggy-back"):
        assert rows[name]["status"] == "ok", rows[name]["reason"]
        assert float(rows[name]["median_ms"]) > 0
    assert rows["broken"]["status"] == "not available"
    assert "no such backend" in rows["broken"]["reason"]


def test_a_training_step_moves_weights_and_iterates():
    case = training_step.StepCase("wrn-10-1", 2, (), ())
    step = training_step.TrainingStep(case, training_step.Variant("", piggy_back=True), CPU)
    weight = step.head.weight.detach().clone()
    iterates = [v.detach().clone() for v in step.rider.iterates()]
    assert step().isfinite()
    assert not torch.equal(weight, step.head.weight)
    for before, after in zip(iterates, step.rider.iterates(), strict=True):
        assert after.norm().item() == pytest.approx(1.0, rel=1e-4)
        assert not torch.equal(before, after)


def test_the_tour_visits_every_operation(capsys):
    kernel_tour.main(["--device", "cpu", "--only", "loss lmt++"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[-1] for line in lines] == ["ran"] * len(kernel_tour.LOSS_SHAPES)
    names = [name for name, _ in kernel_tour.visits("native", CPU)]
    assert len(set(names)) == len(names)
    for part in ("bound operator", "bound symbol", "bound separable", "loss gloro", "pairs"):
        assert any(part in name for name in names)


def test_the_profile_lists_what_a_step_launches(tmp_path, capsys, monkeypatch):
    (case,) = (c for c in CASES if c.name in kernel_profile.PROFILED["quick"])
    kept = ("plain, K x K Gram", "lmtfast (reference)", "lmtfast (native)")
    monkeypatch.setattr(kernel_profile, "CASES", (dataclasses.replace(case, providers=kept),))
    kernel_profile.main(["--suite", "quick", "--out", str(tmp_path)])
    lines = (tmp_path / kernel_profile.FILE).read_text().splitlines()
    assert lines[0] == ",".join(kernel_profile.FIELDS)
    assert lines[1:]
    assert all("lmtfast (native)" in line for line in lines[1:])
    assert "launches" in capsys.readouterr().out
