# SPDX-License-Identifier: MIT
"""R01 to R22: defects known from other Lipschitz libraries, each of which must be impossible here.

Those of convolutions (R08, R09, R16, R18) are in ``test_peer_convolutions.py``.

Where it is short, a test first does what the other library did and shows that its case catches it.
"""

from __future__ import annotations

import ast
import math
import re
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lmtfast as lf
from lmtfast.enclosure import enclose
from lmtfast.errors import (
    CertificateError,
    InputDomainError,
    LmtfastError,
    NonFiniteError,
    NotCertifiedError,
    UnsupportedLayerError,
)
from lmtfast.nn import Normalize
from lmtfast.radius import radius_lower
from lmtfast.tracing import trace_model
from lmtfast.verified.matrix import matrix_norm_upper
from lmtfast.verified.moment import normal_draw
from tests.classifiers import certified, exact_radius_squared, hand_made
from tests.oracles import norm_is_at_most, rayleigh_exceeds
from tests.soundness.constructions import dense
from tests.soundness.nets import linear, sequence
from tests.soundness.polygons import exact_logits
from tests.soundness.traced import Traced


def power_iteration(weight: Tensor, start: Tensor, steps: int = 10, eps: float = 0.0) -> float:
    """As peers write it: normalise with an epsilon, report the last length."""
    v, sigma = start, 0.0
    for _ in range(steps):
        u = weight @ v
        u = u / (u.norm() + eps)
        v = weight.T @ u
        sigma = float(v.norm())
        v = v / (v.norm() + eps)
    return sigma


def total(model: nn.Module, shape: tuple[int, ...]) -> float:
    return float(lf.certified_bound(model.eval(), shape).total)


# -- R01, R07: ties --------------------------------------------------------------------------------


def test_r01_ties_are_never_certified() -> None:
    """Also not where every logit equals the maximum, at any size of the constant."""
    bound = hand_made(torch.randn(3, 2).double(), 1e-30)
    value = torch.tensor([[0.0] * 3, [2.0, 2.0, 1.0], [1.0, 2.0, 2.0]], dtype=torch.float64)
    masked = torch.where(value == value.amax(1, keepdim=True), -math.inf, value)
    assert bool((value.amax(1) - masked.amax(1) > 0).all())  # what masking equals would certify
    assert radius_lower(value, torch.zeros_like(value), bound)[1].tolist() == [0.0] * 3
    # The attack: collapse all logits to the same value.
    model = nn.Linear(2, 3, bias=False).eval()
    assert certified(model, torch.zeros(1, 2)).prediction_radius.tolist() == [0.0]
    model = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 3, bias=False)).eval()
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.fill_(-1.0)
    assert certified(model, torch.rand(5, 2)).prediction_radius.tolist() == [0.0] * 5


def test_r07_a_constant_of_zero_is_no_licence() -> None:
    """Neither a duplicated row nor an underflow makes a margin infinite."""
    x = torch.tensor([[0.5, 0.25]], dtype=torch.float64)
    twin = certified(linear([[2.0, 0.0], [2.0, 0.0], [0.0, 1.0]]).eval(), x)
    assert twin.prediction_radius.tolist() == [0.0]
    for scale in (1e-30, 1e-170, 2.0**-1000):
        tiny = certified(linear([[2.0 * scale, 0.0], [0.0, scale]]).eval(), x)
        assert float(torch.tensor(scale).float() ** 2) == 0.0  # its square underflows in float32
        square = exact_radius_squared(tiny_rows(scale), torch.zeros(2).double(), x[0])[1]
        assert Fraction(float(tiny.prediction_radius[0])) ** 2 < square
        assert tiny.n_constant == 0


def tiny_rows(scale: float) -> Tensor:
    return torch.tensor([[2.0 * scale, 0.0], [0.0, scale]], dtype=torch.float64)


# -- R02, R03: scales ------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-5, 1e-12, 1e-23, 1e-30, 2.0**-140, 1e30])
def test_r02_no_epsilon_shrinks_the_norm_of_small_weights(scale: float) -> None:
    weight = scale * torch.eye(2)
    stored = float(weight[0, 0])
    if scale < 1.0:
        assert power_iteration(weight, torch.ones(2) / 2**0.5, eps=1e-9) < 0.9999999 * stored
    layer = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(weight)
    assert stored <= total(layer, (2,)) <= stored * (1 + 1e-9)
    # The estimate is no bound, but it has no epsilon either.
    if 1e-12 <= scale <= 1e12:
        assert lf.NetworkBound(layer, (2,)).converge(20).total.item() == pytest.approx(
            stored, rel=1e-5
        )


def test_r03_moving_powers_of_two_between_layers_changes_nothing() -> None:
    """Squares of entries of 2^-76 underflow in float32: a norm of 0 would certify everything."""
    generator = torch.Generator().manual_seed(3)
    first, last = (torch.randn(s, generator=generator) for s in ((6, 4), (3, 6)))
    x = torch.rand(5, 4, generator=generator)
    model = nn.Sequential(nn.Linear(4, 6, bias=False), nn.ReLU(), nn.Linear(6, 3, bias=False))
    traced = Traced(model, (4,))
    found = []
    for shift in (0, 10, 60, 85, 100):
        with torch.no_grad():
            model[0].weight.copy_(torch.ldexp(first, torch.tensor(-shift)))
            model[2].weight.copy_(torch.ldexp(last, torch.tensor(shift)))
        small = model[0].weight.detach()
        assert (float(small.square().sum()) == 0.0) == (shift > 80)
        bound = traced.bound()
        assert not rayleigh_exceeds(small.double().numpy(), float(bound.features))
        found.append((float(bound.total), *(r for _, r in traced.radii(x))))
    assert max(found[0][1:]) > 0.0
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-6)


# -- R04, R05, R22: power iteration and where it starts --------------------------------------------


def test_r04_power_iteration_is_a_lower_estimate_and_never_certifies() -> None:
    """On a slow spectrum it stands still below the truth; more steps do not return the first."""
    n = 64
    weight = torch.diag(1.0 - torch.arange(n).double() / 4096)
    start = torch.ones(n).double() / n**0.5
    previous, now, steps = 0.0, power_iteration(weight, start, 1), 1
    while now - previous > 1e-4:
        steps += 1
        previous, now = now, power_iteration(weight, start, steps)
    assert now < 0.999  # an absolute change of 1e-4 stops here
    model = linear(weight).eval()
    assert 1.0 <= total(model, (n,)) <= 1.0 + 1e-9
    one, many = (float(lf.NetworkBound(model, (n,)).converge(k).total) for k in (1, 300))
    assert one < many < 1.0
    with pytest.raises(NotCertifiedError):
        lf.certify(model, torch.rand(1, n), input_shape=(n,), input_range=(0, 1), level="estimate")
    value = torch.zeros(1, n, dtype=torch.float64)
    with pytest.raises(NotCertifiedError):
        radius_lower(value, value, lf.NetworkBound(model, (n,)).converge(5))


def test_r05_no_start_vector_hides_the_largest_singular_value() -> None:
    """All-ones is orthogonal to the top vector of [1, -1]; of the trap it never leaves a block."""
    ones = torch.ones(2).double() / 2**0.5
    weight = torch.tensor([[1.0, -1.0], [0.0, 0.0]], dtype=torch.float64)
    assert float((weight @ ones).norm()) == 0.0
    assert Fraction(total(linear(weight), (2,))) ** 2 >= 2
    # Rows at right angles, of length 1024 sqrt(2) and sqrt(2); powers of two, so that it stays 0.
    trap = torch.tensor([[1024.0, -1024.0], [1.0, 1.0]], dtype=torch.float64)
    assert power_iteration(trap, ones, 1000) < 1.5
    model = linear(trap)
    assert (
        2 * 1024**2 <= Fraction(total(model, (2,))) ** 2 <= 2 * 1024**2 * (1 + Fraction(1, 10**8))
    )
    # Nor does an iterate that a checkpoint brings.
    network = lf.NetworkBound(model, (2,))
    network.load_state_dict(
        {k: v.new_full(v.shape, 2.0**-0.5) if v.is_floating_point() else v
         for k, v in network.state_dict().items()}
    )  # fmt: skip
    assert network(update=False).total.item() < 1.5
    assert total(model, (2,)) > 1448.0


def test_r22_starts_are_gaussian_not_signs() -> None:
    """A vector of signs is orthogonal to (e_1 + e_2) with probability one half."""
    draws = normal_draw((400, 2))
    assert bool((draws.sum(1) != 0.0).all())
    assert bool((draws.diff(dim=1) != 0.0).all())
    assert len(draws.abs().unique()) == 800
    model = linear(np.eye(4) + 500.0 * np.outer([1, 1, 0, 0], [1, 1, 0, 0]))
    network = lf.NetworkBound(model, (4,))
    network.state.reseed(0)
    assert len(network.state.iterates.abs().unique()) == 4
    traced = Traced(model, (4,))
    assert all(traced.bound(level="probabilistic").total >= 1001.0 for _ in range(50))


# -- R06: layers nobody knows ----------------------------------------------------------------------


class Unknown(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x


@pytest.mark.parametrize("layer", [Unknown(), nn.LayerNorm(4), nn.Softmax(1), nn.Bilinear(4, 4, 4)])
def test_r06_unknown_layers_are_refused_by_name(layer: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(4, 4), layer).eval()
    for call in (lambda: lf.certified_bound(model, (4,)), lambda: lf.NetworkBound(model, (4,))):
        with pytest.raises(LmtfastError) as caught:
            call()
        assert isinstance(caught.value, UnsupportedLayerError) or isinstance(layer, nn.Bilinear)


class Skip(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = linear(3.0 * np.eye(2))

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.relu(self.layer(x))


def test_r06_topology_pools_and_batch_norm_count() -> None:
    assert total(Skip(), (2,)) >= 4.0
    assert total(nn.Sequential(nn.MaxPool2d(3, 2), nn.Flatten()), (1, 5, 5)) >= 2.0
    norm = nn.BatchNorm1d(2).double()
    norm.running_var.fill_(0.25)
    square = 1 / (Fraction(0.25) + Fraction(norm.eps))
    assert Fraction(total(norm, (2,))) ** 2 >= square


# -- R10, R11, R19: what is left from training -----------------------------------------------------


def test_r10_a_bound_is_of_the_weights_as_they_are() -> None:
    """torch's spectral_norm: not initialised in eval mode, frozen there, stale after an edit."""
    layer = nn.Linear(3, 3, bias=False)
    wrapped = nn.utils.parametrizations.spectral_norm(layer).eval()
    with torch.no_grad():
        wrapped.parametrizations.weight.original.copy_(torch.diag(torch.tensor([1.0, 5.0, 9.0])))
    acting = wrapped.weight.detach().double().numpy()
    assert not norm_is_at_most(acting, 1.001)  # not one, although it is called normalised
    assert not rayleigh_exceeds(acting, total(wrapped, (3,)))
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.ReLU(), nn.Linear(3, 2, bias=False))
    x = torch.rand(4, 3)
    certificate = certified(model.eval(), x)
    before = total(model, (3,))
    with torch.no_grad():
        model[0].weight.mul_(2.0)
    assert total(model, (3,)) >= 1.999 * before
    with pytest.raises(CertificateError):
        certificate.verify(model, x)


def test_r11_averaged_iterates_and_averaged_weights() -> None:
    """The mean of two unit vectors is short: an estimate that trusts its length is 6 % low."""
    model = linear(np.diag([3.0, 1.0, 0.5]))
    network = lf.NetworkBound(model, (3,))
    network.converge(50)
    before = network(update=False).total.item()
    other = torch.tensor([0.766, 0.643, 0.0], dtype=network.state.iterates.dtype)
    mean = (network.state.iterates.abs() + other) / 2
    assert float(mean.norm()) < 0.95
    network.state.iterates.mul_(0.94)
    assert network(update=False).total.item() == pytest.approx(before, rel=1e-6)
    network.state.iterates.copy_(mean)
    assert total(model, (3,)) >= 3.0
    average = torch.optim.swa_utils.AveragedModel(model).eval().module
    with torch.no_grad():
        average.weight.mul_(4.0)
    assert total(average, (3,)) >= 12.0
    assert total(model, (3,)) < 3.1


def test_r19_an_exported_network_is_bounded_not_trusted() -> None:
    """Layers that were Lipschitz while training may be plain after export."""
    layer = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4, bias=False))
    for _ in range(200):
        layer(torch.rand(1, 4))
    assert total(layer, (4,)) < 1.01
    nn.utils.parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
    with torch.no_grad():
        layer.weight.mul_(7.0 / torch.linalg.matrix_norm(layer.weight, 2))
    assert not rayleigh_exceeds(layer.weight.detach().double().numpy(), total(layer, (4,)))
    assert total(layer, (4,)) > 6.9


# -- R12, R13: what torch's own norms return -------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_r12_nan_is_not_swallowed(bad: float) -> None:
    weight = torch.tensor([[bad, 0.0], [0.0, 1.0]], dtype=torch.float64)
    with pytest.raises(NonFiniteError):
        matrix_norm_upper(weight)
    model = linear(np.eye(2)).eval()
    with torch.no_grad():
        model.weight.copy_(weight)
    for call in (
        lambda: lf.certified_bound(model, (2,)),
        lambda: certified(model, torch.rand(1, 2)),
    ):
        with pytest.raises(NonFiniteError):
            call()
    fine = linear(np.eye(2)).eval()
    with pytest.raises((NonFiniteError, InputDomainError)):
        certified(fine, torch.tensor([[bad, 0.5]], dtype=torch.float64))


@pytest.mark.parametrize("exponent", [-1070, -600, -149, 120, 600, 1015])
def test_r13_extreme_values_keep_their_norm(exponent: int) -> None:
    case = dense("extreme", np.ldexp(np.array([[3.0, 4.0], [-4.0, 3.0], [0.0, 0.0]]), exponent),
                 Fraction(25) * Fraction(4) ** exponent)  # fmt: skip
    found = matrix_norm_upper(torch.from_numpy(case.weight)).upper
    assert not case.understated_by(found)
    # Below the normal range a float has no relative accuracy.
    assert case.within(found, 1e-9) or exponent < -1022
    assert not case.understated_by(total(linear(case.weight), (2,)))


# -- R14, R15: layers that are said to be 1-Lipschitz ----------------------------------------------


def test_r14_rows_of_length_one_are_not_a_head_of_norm_one() -> None:
    model = linear([[1.0, 0.0], [-1.0, 0.0]])
    x = torch.tensor([[0.25, 0.0]], dtype=torch.float64)
    result = certified(model.eval(), x)
    # The gap 0.5 closes at distance 0.25, not at 0.5 / sqrt(2).
    assert 0.25 * (1 - 1e-6) < result.prediction_radius[0] < 0.25 < 0.5 / math.sqrt(2)
    assert Fraction(result.total) ** 2 >= 2


def test_r15_a_truncated_exponential_is_above_one_and_multiplies() -> None:
    """I + A + A^2 / 2 with A skew: its square is 1 + a^4 / 4, and every layer multiplies."""
    a, layers = 0.25, 9
    step = np.array([[1 - a * a / 2, a], [-a, 1 - a * a / 2]])
    square = 1 + Fraction(a) ** 4 / 4
    model = sequence(*(layer for _ in range(layers) for layer in (linear(step), nn.ReLU())))
    assert Fraction(total(model, (2,))) ** 2 >= square**layers > 1
    # Without the ReLUs that is the network's constant exactly.
    model = sequence(*(linear(step) for _ in range(layers)))
    assert Fraction(total(model, (2,))) ** 2 >= square**layers


# -- R17: units ------------------------------------------------------------------------------------


def test_r17_radii_are_in_pixels() -> None:
    """20 deviations: the normalisation is a layer, its smallest deviation the one that counts."""
    x = torch.full((2, 1), 0.75, dtype=torch.float64)
    rows = [[1.0, 0.25], [0.0, 0.5]]
    normalise = Normalize([0.5, 0.5], [1.0, 1.0])
    traced = Traced(sequence(normalise, nn.Flatten(), linear(rows)), (2, 1))
    for i in range(20):
        std = [2.0 ** -(i % 4) * (1 + i // 8 / 32), 2.0 ** -(i // 4)]
        normalise.std.copy_(torch.tensor(std).reshape(normalise.std.shape))
        # Exact in rationals: the distance of the rows once they are divided by the deviations.
        gap = [(Fraction(v) - Fraction(w)) / Fraction(s)
               for v, w, s in zip(*rows, std, strict=True)]  # fmt: skip
        margin = sum(g * (Fraction(0.75) - Fraction(0.5)) for g in gap)
        square = margin**2 / sum(g * g for g in gap)
        radius = Fraction(traced.radii(x)[0][1])
        assert radius**2 < square
        if std[0] == std[1]:
            assert radius**2 >= square * (1 - Fraction(1, 10**6))
        assert Fraction(float(traced.bound().features)) >= 1 / Fraction(min(std))


def test_r17_the_input_range_is_declared_and_kept() -> None:
    model = linear(np.eye(2)).eval()
    with pytest.raises(TypeError, match="input_range"):
        lf.certify(model, torch.rand(1, 2), input_shape=(2,))
    with pytest.raises(InputDomainError):
        certified(model, torch.tensor([[0.5, 1.5]], dtype=torch.float64))


# -- R20: logits that depend on how they are computed ----------------------------------------------


def test_r20_logits_of_every_batch_size_are_enclosed() -> None:
    """Neither batch size nor autocast moves value and error so that the exact logits escape."""
    generator = torch.Generator().manual_seed(5)
    model = nn.Sequential(nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 3)).eval()
    traced, x = trace_model(model, (32,)), torch.rand(256, 32, generator=generator)
    truth = [exact_logits(model, row) for row in x[:7].tolist()]
    for batch in (1, 7, 256):
        value, error = enclose(model, traced, x[:batch])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixed = enclose(model, traced, x[:batch])
        assert torch.equal(value, mixed[0])
        assert torch.equal(error, mixed[1])
        for row, v, e in zip(truth, value.tolist(), error.tolist(), strict=False):
            for exact, centre, width in zip(row, v, e, strict=True):
                assert abs(exact - Fraction(centre)) <= Fraction(width)
        # The module's own float32 logits are outside: they are not what is certified.
        own = model(x[:batch]).detach().double()
        assert bool(((own - value).abs() > error).any())


def test_r20_rounding_of_the_centre_is_subtracted() -> None:
    """Biases of 1e6 hide a margin of 1e-12: its sign is not known in float64, so no radius."""
    model = linear([[0.1, 0.3], [0.3, 0.1]], [1e6, 1e6]).eval()
    x = torch.tensor([[0.5, 0.5 - 1e-12]], dtype=torch.float64)
    assert certified(model, x).prediction_radius.tolist() == [0.0]


# -- R21: tests that look away ---------------------------------------------------------------------

TOLERANT = re.compile(r"approx|allclose|isclose|assert_close|atol|rtol")


def test_r21_assertions_on_bounds_have_no_tolerance() -> None:
    """A line of the suite that asserts a bound from below is exact: no closeness in either file."""
    folder = Path(__file__).parent
    for path in sorted(folder.glob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Assert) and path.name != Path(__file__).name:
                assert not TOLERANT.search(ast.unparse(node)), (path.name, node.lineno)


def test_r21_nothing_is_unpickled() -> None:
    package = Path(lf.__file__).parent
    for path in package.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert "weights_only=False" not in text, path
        assert not re.search(r"^\s*(import|from) pickle|torch\.load\(|allow_pickle=True", text,
                             re.MULTILINE), path  # fmt: skip


def test_r21_a_bound_too_small_by_one_unit_is_seen() -> None:
    case = dense("3-4-5", np.outer([3.0, 4.0], [1.0, 2.0, 2.0]), 225)
    for judge in (lambda b: not norm_is_at_most(case.weight, b), case.understated_by):
        assert judge(math.nextafter(15.0, 0.0))
        assert not judge(15.0)
