# SPDX-License-Identifier: MIT
"""The benchmarks measure what they say: peers against dense matrices, gate, clock, files."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from benchmarks import level_gap, memory, peers, readme_table, run
from benchmarks.cases import CASES, PLAIN, memory_limit, work
from benchmarks.gate import TOLERANCE, judge
from benchmarks.machine import Ceilings, header
from benchmarks.networks import NETWORKS, build_network, layers_of
from benchmarks.problems import BoundProblem, LossProblem, PlainLoss
from benchmarks.providers import BACKENDS, ENGINES, PROBLEMS, PROVIDERS
from benchmarks.report import FILE, Row, read_rows, text_table, write_rows
from benchmarks.timing import MAX_ROUNDS, MIN_ROUNDS, interleave
from tests.oracles import conv_matrix, svd_norm

CPU = torch.device("cpu")


class Net(nn.Module):
    """A strided convolution with a batch norm, one that stands alone, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(2, 4, 3, 2, 1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.norm2 = nn.Conv2d(4, 4, 3, 1, 1, bias=False), nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)
        for norm in (self.norm1, self.norm2):
            norm.running_var.uniform_(0.5, 2.0)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.conv1(x)).relu()
        return self.head(self.norm2(self.conv2(x) + x).mean((2, 3)))


@pytest.fixture
def net() -> tuple[nn.Module, list]:
    model = Net().eval().requires_grad_(False)
    return model, layers_of(model, (2, 6, 6))


def dense_norms(model: nn.Module, layers: list, *, folded: bool) -> dict[str, float]:
    """Norm of every layer's matrix in float64; a convolution as it runs, on its own image."""
    norms = {}
    for layer in layers:
        module = model.get_submodule(layer.name)
        gain = None
        if layer.kind == "scale" or layer.norm is not None:
            norm = model.get_submodule(layer.norm or layer.name)
            gain = (norm.weight / (norm.running_var + norm.eps).sqrt()).double().numpy()
        if layer.kind == "scale":
            norms[layer.name] = np.abs(gain).max()
            continue
        weight = module.weight.double().numpy()
        if layer.kind == "conv":
            padding = [(p, p) for p in layer.padding]
            matrix = conv_matrix(weight, layer.in_shape, layer.stride, padding)
            if folded and gain is not None:
                matrix = np.repeat(gain, len(matrix) // len(gain))[:, None] * matrix
        else:
            matrix = weight
        norms[layer.name] = svd_norm(matrix)
    return norms


def test_layers_are_read_off_the_network(net):
    _, layers = net
    assert [(x.name, x.kind, x.norm) for x in layers] == [
        ("conv1", "conv", "norm1"), ("conv2", "conv", None), ("norm2", "scale", None),
        ("head", "linear", None),
    ]  # fmt: skip
    assert layers[0].in_shape == (2, 6, 6)
    assert layers[0].out_shape == (4, 3, 3)
    assert layers[0].output_padding == (1, 1)
    assert layers[0].weights == 2 * 4 * 9
    assert layers[0].products == 2 * 4 * 9 * 9


@pytest.mark.parametrize(
    ("name", "weights", "products"),
    [("wrn-16-4", 2.74e6, 0.39e9), ("wrn-28-10", 36.5e6, 5.24e9), ("l12w512", 28.3e6, 7.25e9)],
)
def test_networks_have_the_published_sizes(name, weights, products):
    with torch.device("meta"):
        model = NETWORKS[name].build().eval()
    layers = layers_of(model, NETWORKS[name].input_shape)
    assert sum(layer.weights for layer in layers) == pytest.approx(weights, rel=1e-2)
    assert sum(layer.products for layer in layers) == pytest.approx(products, rel=1e-2)


def test_resnet_50_is_the_published_network():
    with torch.device("meta"):
        model = NETWORKS["resnet-50"].build().eval()
    assert sum(p.numel() for p in model.parameters()) == 25_557_032
    layers = layers_of(model, (3, 224, 224))
    assert len(layers) == 54
    assert sum(layer.products for layer in layers) == pytest.approx(4.09e9, rel=1e-2)


TRUE_CONVOLUTIONS = (peers.PerLayer, peers.LiResNet, peers.LiResNetOnce, peers.GloRo)


@pytest.mark.parametrize("peer", TRUE_CONVOLUTIONS, ids=lambda p: p.__name__)
@pytest.mark.parametrize("mode", ["forward", "gradient"])
def test_peers_converge_to_the_zero_padded_norm(peer, mode, net):
    model, layers = net
    wanted = dense_norms(model, layers, folded=peer.folds_norm)
    runner = peer(model, layers)
    step = getattr(runner, mode)
    for _ in range(200):
        values = step()
    for name, value in zip(runner.names, values.tolist(), strict=True):
        assert value == pytest.approx(wanted[name], rel=1e-4), name


def test_spectral_norm_of_torch_is_that_of_the_reshaped_kernel(net):
    model, layers = net
    runner = peers.TorchSpectralNorm(model, layers)
    for _ in range(200):
        values = runner.forward()
    for name, value in zip(runner.names, values.tolist(), strict=True):
        weight = model.get_parameter(f"{name}.weight").flatten(1)
        assert value == pytest.approx(torch.linalg.matrix_norm(weight, 2).item(), rel=1e-4)


def test_gram_iteration_bounds_the_circular_norm(net):
    model, layers = net
    runner = peers.GramIteration(model, layers)
    for name, value in zip(runner.names, runner.forward().tolist(), strict=True):
        layer = next(x for x in layers if x.name == name)
        weight = model.get_parameter(f"{name}.weight").double()
        if layer.kind == "conv":
            spectrum = torch.fft.fft2(weight, s=layer.in_shape[1:]).flatten(2).permute(2, 0, 1)
        else:
            spectrum = weight[None]
        norm = torch.linalg.matrix_norm(spectrum, 2).max().item()
        assert norm * (1 - 1e-5) <= value <= 1.05 * norm


def test_compiled_peers_are_their_definitions():
    """Without a code generator: what is traced is what the test is about."""
    problem = BoundProblem("l2w8", CPU)
    for peer in (peers.CompiledPerLayer, peers.CompiledLiResNet):
        plain = peer.__bases__[0](problem.model, problem.layers)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "compile", lambda f, **_: f)
            compiled = peer(problem.model, problem.layers)
        assert torch.equal(compiled.gradient(), plain.gradient())
        assert torch.equal(compiled.forward(), plain.forward())


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("shape", ["5 x 3 x 4", "7 x 40 x 6", "33 x 2 x 5"])
def test_plain_losses_are_the_library_definition(name, shape):
    problem = LossProblem(shape, CPU)
    plain = PROVIDERS[name].make(problem)
    ours = PROVIDERS["lmtfast (reference)"].make(problem)
    torch.testing.assert_close(plain.gradient(), ours.gradient())
    for leaf, tensor in plain.parameters.items():
        torch.testing.assert_close(tensor.grad, ours.parameters[leaf].grad, rtol=1e-4, atol=1e-6)


def test_a_plain_loss_that_does_not_fit_says_so(monkeypatch):
    monkeypatch.setattr("benchmarks.problems.free_bytes", lambda device: 1 << 20)
    case = next(c for c in CASES if c.name == "loss 64 x 200 x 256")
    case = dataclasses.replace(case, providers=("plain, (N, K, D) differences",))
    prepared = run.CaseRun(case, CPU)
    status, reason = prepared.refused["plain, (N, K, D) differences"]
    assert status == "not available"
    assert "GiB" in reason


@pytest.mark.parametrize(
    ("op", "shape", "names"),
    [
        ("bound", "l2w8", ("lmtfast symbol (reference)", "per layer")),
        ("loss", "9 x 40 x 6", ("lmtfast (reference)", "plain, K x K Gram")),
        ("pairs", "9 x 40 x 6", ("lmtfast (reference) pairs", "torch.cdist pairs")),
        ("compose", "l2w8", ("lmtfast (reference) tape",)),
    ],
)
def test_the_gate_is_green_for_the_reference(op, shape, names):
    problem = PROBLEMS[op](shape, CPU)
    for name in names:
        verdict = judge(PROVIDERS[name].runner(problem), "cpu")
        assert verdict.green
        assert verdict.values < 1e-5
        assert verdict.gradients < 1e-4


class Broken(peers.PerLayer):
    """A peer with one seeded defect."""

    defect = ""

    def forward(self) -> Tensor:
        before = self.iterates
        values = super().forward()
        if self.defect == "stale iterate":
            self.iterates = [v.roll(1, -1) for v in before]
        return values * 1.001 if self.defect == "value" else values

    def gradient(self) -> Tensor:
        values = super().gradient()
        leaf = next(iter(self.parameters.values()))
        if self.defect == "gradient":
            leaf.grad *= 1.01
        if self.defect == "nan":
            leaf.grad[0] = math.nan
        return values

    def twin(self) -> peers.Peer:
        other = super().twin()
        other.defect = ""
        return other


@pytest.mark.parametrize("defect", ["", "value", "stale iterate", "gradient", "nan"])
def test_the_gate_sees_a_seeded_defect(defect):
    problem = BoundProblem("l2w8", CPU)
    runner = Broken(problem.model, problem.layers)
    runner.defect = defect
    verdict = judge(runner, "cpu")
    assert verdict.green == (not defect), str(verdict)


def test_a_red_gate_has_no_times(monkeypatch):
    case = next(c for c in CASES if c.name == "loss 64 x 200 x 256")
    monkeypatch.setitem(TOLERANCE, "cpu", dataclasses.replace(TOLERANCE["cpu"], values=-1.0))
    case = dataclasses.replace(case, providers=("plain, K x K Gram", "lmtfast (cuda)"))
    rows = run.CaseRun(case, CPU).rows("gradient", Ceilings(1e9, 1e9, "float32"), 0.0)
    assert [row.status for row in rows] == ["red", "not available"]
    assert all(row.median_ms is None and row.times_faster is None for row in rows)
    assert rows[0].value_error is not None
    assert all(row.reason for row in rows)


def test_a_provider_that_breaks_does_not_hide_the_others(monkeypatch):
    case = next(c for c in CASES if c.name == "loss 64 x 200 x 256")
    case = dataclasses.replace(case, providers=("lmtfast (reference)", "plain, K x K Gram"))

    def explode(self: object, *_: object) -> None:
        raise RuntimeError("out of luck\nat line 3")

    monkeypatch.setattr("benchmarks.providers.MarginLoss", explode)
    prepared = run.CaseRun(dataclasses.replace(case, memory=False), CPU)
    assert prepared.refused == {"lmtfast (reference)": ("failed", "RuntimeError: out of luck")}
    assert list(prepared.runners) == ["plain, K x K Gram"]


def test_variants_take_turns():
    order: list[str] = []
    clock = itertools.count(1)

    def sampler(name: str):
        def sample() -> float:
            order.append(name)
            return float(next(clock))

        return sample

    taken = interleave({name: sampler(name) for name in "abc"}, seconds=0.0)
    assert order[:6] == ["a", "b", "c", "b", "c", "a"]
    assert {len(s.seconds) for s in taken.values()} == {MIN_ROUNDS}
    assert taken["a"].median == np.median(taken["a"].seconds)
    taken = interleave({"a": sampler("a")}, seconds=1e6)
    assert len(taken["a"].seconds) == MAX_ROUNDS


def test_the_floor_of_a_bound_step():
    problem = BoundProblem("l2w8", CPU)
    weights = 2 * 8 * 8 * 9
    forward, gradient = (work(problem, m, "operator") for m in ("forward", "gradient"))
    assert (forward.moved, gradient.moved) == (4 * weights, 12 * weights)
    assert (forward.operations, gradient.operations) == (4 * 36 * weights, 6 * 36 * weights)
    assert work(problem, "forward", "symbol").operations == 2 * 2 * 4 * weights
    assert work(problem, "forward", "separable").operations == 2 * 2 * 8 * weights
    assert work(problem, "forward", "circular") is None
    # The larger of the two times is the floor.
    assert Ceilings(1e3, 1e3, "float32").seconds(10.0, 20.0) == 0.02


def test_extra_memory_is_what_a_call_allocates():
    class Runner:
        def gradient(self) -> None:
            torch.ones(1 << 24)

    assert 0.98 * 2**26 <= memory.host_extra(Runner()) <= 1.1 * 2**26


def test_memory_is_measured_in_another_process():
    problem = LossProblem("64 x 200 x 256", CPU)
    extra = memory.measure_in_subprocess("64 x 200 x 256", "plain, (N, K, D) differences")
    assert extra >= 4 * problem.n * problem.k * problem.d


@pytest.mark.parametrize(
    "shape",
    [
        "256 x 10 x 2048",
        "256 x 1000 x 2048",
        pytest.param("1024 x 32768 x 2048", marks=pytest.mark.slow),
    ],
)
def test_a_margin_loss_stays_within_its_memory(shape):
    """Forward and backward take at most four times the bytes of the logits, the head's gradient
    and the distances between the classes that occur."""
    limit = memory_limit(LossProblem(shape, CPU))
    assert memory.measure_in_subprocess(shape, "lmtfast (native)") <= limit


def test_cases_name_what_exists():
    names = [(case.name, suite) for case in CASES for suite in case.suites]
    assert len(set(names)) == len(names)
    for case in CASES:
        assert {PROVIDERS[name].op for name in case.providers} == {case.op}
        assert set(case.suites) <= {"cpu", "gpu", "compiled", "quick"}
        if case.op == "bound":
            assert case.shape in NETWORKS
    # Every engine on every backend is a row of the main case, available or not.
    main = next(c for c in CASES if c.name == "bound wrn-28-10")
    assert {f"lmtfast {e} ({b})" for e in ENGINES for b in BACKENDS} <= set(main.providers)


def test_the_quick_suite_runs_and_writes_its_file(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda f, **_: f)
    case = next(c for c in CASES if c.name == "bound l2w8")
    # Triton's interpreter, which the tests switch on, is no implementation to be timed.
    case = dataclasses.replace(case, providers=tuple(p for p in case.providers if "tri" not in p))
    monkeypatch.setattr(run, "CASES", (case,))
    out = tmp_path / "quick"
    arguments = ["--suite", "quick", "--seconds", "0", "--threads", "1", "--out", str(out)]
    run.main([*arguments, "--only", "l2w8"])
    printed = capsys.readouterr().out
    head, rows = read_rows(out / FILE)
    assert {"commit", "processor", "threads", "torch", "copy", "matmul"} <= set(head)
    assert head["threads"] == "1"
    assert [(r["mode"], r["provider"]) for r in rows] == [
        (mode, name) for mode in case.modes for name in case.providers
    ]
    for row in rows:
        assert row["status"] in ("ok", "not available")
        assert bool(row["median_ms"]) == (row["status"] == "ok")
        assert bool(row["reason"]) == (row["status"] != "ok")
        assert row["provider"] in printed
    assert float(rows[0]["times_faster"]) == 1.0


def test_the_header_names_the_machine():
    lines = header(CPU)
    assert lines["torch"] == torch.__version__
    assert "cores" in lines["processor"]


def test_rows_survive_the_file(tmp_path):
    row = Row("bound", "net", "forward", "a, b", "operator", "ok", "", "host", 5, 1.0, 2.0, 3.0)
    write_rows(tmp_path / FILE, {"commit": "abc: def"}, [row])
    head, (read,) = read_rows(tmp_path / FILE)
    assert head == {"commit": "abc: def"}
    assert read["provider"] == "a, b"
    assert float(read["median_ms"]) == 2.0
    assert read["extra_bytes"] == ""
    assert "a, b" in text_table([row])


def test_the_speed_table_is_read_from_the_file(tmp_path, monkeypatch):
    def row(provider: str, status: str, ms: float | None, faster: float | None) -> Row:
        fixed = ("bound", "wrn-16-4", "gradient", provider, "operator", status)
        return Row(*fixed, "why", "host", 5, ms, ms, ms, faster)

    monkeypatch.setattr(readme_table, "ROOT", tmp_path)
    rows = [
        row("per layer", "ok", 120.0, 1.0),
        row("lmtfast symbol (native)", "ok", 2.5, 48.0),
        row("lmtfast operator (native)", "red", None, None),
    ]
    head = {"processor": "a CPU", "threads": "2", "torch": "2", "commit": "abc"}
    write_rows(tmp_path / "here" / FILE, head, rows)
    text = readme_table.speed_part(tmp_path / "here" / FILE)
    assert "a CPU; 2 threads" in text
    line = text.splitlines()[-2]
    assert line.startswith("| wrn-16-4, with gradient | 120 | – |")
    assert "| – | 2.5 (48x) |" in line


def test_a_solved_loss_is_computed_once(monkeypatch):
    problem = LossProblem("4 x 3 x 2", CPU)
    first = problem.solved
    monkeypatch.setattr(PlainLoss, "gradient", None)
    assert problem.solved is first


def test_a_network_is_the_same_every_time():
    first, second = (build_network("wrn-10-1").state_dict() for _ in range(2))
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_the_lead_of_an_estimate_is_sought_at_every_radius():
    certified, estimated = np.array([0.0, 0.9, 2.0, np.inf]), np.array([0.0, 1.0, 2.1, np.inf])
    assert level_gap.largest_gap(certified, estimated) == (25.0, 0.9)
    assert level_gap.largest_gap(estimated, estimated)[0] == 0.0
    assert level_gap.largest_gap(np.zeros(4), estimated) == (75.0, 0.0)
