# SPDX-License-Identifier: MIT
"""Every rule against a truth of its own: mpmath for slopes, dense matrices for linear maps, counted
windows for maximum pools."""

from __future__ import annotations

import math
from fractions import Fraction

import mpmath as mp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lmtfast as lf
from lmtfast.errors import LmtfastError, NotCertifiedError, UnsupportedLayerError
from lmtfast.rules import OPERATION_RULES
from lmtfast.rules.copying import COPYING
from lmtfast.tracing import trace_model
from tests.cases import (
    AVERAGES,
    COPIES,
    LINEAR,
    RANDOM_CONVS,
    Lambda,
    Layer,
    Parallel,
    layer_bounds,
    seen,
    unit_matrix,
)  # fmt: skip
from tests.oracles import rayleigh_exceeds, svd_norm

BATCH = 30


def constants(modules: list[nn.Module], shape: tuple[int, ...]) -> list[float]:
    """The constant each nonlinear module gets, from one trace."""
    layers = [Layer(str(i), lambda m=m: m, shape, np.empty) for i, m in enumerate(modules)]
    net = Parallel(layers).double().eval()
    graph = trace_model(net, (net.length,)).graph
    found = {name: c for name, _, c in graph.notes}
    return [found[f"layers.{i}"] for i in range(len(modules))]


def assert_sound(layer: Layer, upper: float, tightness: float | None = 1e-9) -> None:
    """No tolerance on the bound's side; an inexact matrix only witnesses up to its own rounding."""
    matrix = layer.matrix()
    norm = svd_norm(matrix)
    if layer.exact:
        assert not rayleigh_exceeds(matrix, upper), f"{layer.name}: {upper!r} < {norm!r}"
    else:
        assert upper >= norm * (1 - 1e-13), f"{layer.name}: {upper!r} < {norm!r}"
    if tightness is not None:
        assert upper <= norm * (1 + tightness), f"{layer.name}: {upper!r} > {norm!r}"


def batches(layers: tuple[Layer, ...]) -> list[tuple[Layer, ...]]:
    return [layers[i : i + BATCH] for i in range(0, len(layers), BATCH)]


# -- linear layers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("start", range(0, len(RANDOM_CONVS), BATCH))
def test_random_convolutions(start: int) -> None:
    layers = RANDOM_CONVS[start : start + BATCH]
    for layer, upper in zip(layers, *layer_bounds(layers, {}), strict=True):
        assert_sound(layer, upper)


CHAINS = tuple(x for x in LINEAR if x.name not in ("outer broadcast", "a(x) - a(x)"))


@pytest.mark.parametrize("start", range(0, len(CHAINS), BATCH))
def test_linear_maps_and_their_compositions(start: int) -> None:
    layers = CHAINS[start : start + BATCH]
    for layer, upper in zip(layers, *layer_bounds(layers, {}), strict=True):
        assert_sound(layer, upper)


def test_a_linear_map_through_a_slice_is_bounded_by_its_parts() -> None:
    (layer,) = [x for x in LINEAR if x.name == "outer broadcast"]
    assert_sound(layer, lf.certified_bound(layer.build(), layer.shape).total, tightness=None)


def test_a_map_that_cancels_has_bound_zero() -> None:
    (layer,) = [x for x in LINEAR if x.name == "a(x) - a(x)"]
    assert lf.certified_bound(layer.build(), layer.shape).total < 1e-12


NAMELESS = tuple(x for x in COPIES if x.name == "concatenation with itself")
NAMED = tuple(x for x in COPIES if x not in NAMELESS)


@pytest.mark.parametrize("start", range(0, len(NAMED), BATCH))
def test_copying_operations(start: int) -> None:
    layers = NAMED[start : start + BATCH]
    for layer, upper in zip(layers, *layer_bounds(layers, {}), strict=True):
        assert_sound(layer, upper, 1e-12)


def test_a_region_of_joins_alone_has_its_norm() -> None:
    (layer,) = NAMELESS
    assert_sound(layer, lf.certified_bound(layer.build(), layer.shape).total)


def test_every_copying_rule_has_a_case() -> None:
    used = set()
    for layer in COPIES:
        program = trace_model(layer.build(), layer.shape).program
        used |= {str(n.target) for n in program.graph.nodes if n.op == "call_function"}
    # Other spellings of calls that have a case, which export does not emit.
    other = {
        "aten.flatten.using_ints", "aten.movedim.intlist",
        "aten._unsafe_view.default", "aten.reshape.default", "aten.unflatten.int", "aten.t.default",
        "aten.squeeze.default", "aten.squeeze.dims", "aten.transpose.int", "aten.narrow.default",
        "aten.swapaxes.default", "aten.native_channel_shuffle.default", "aten.view.default",
        "aten.upsample_nearest1d.default", "aten.upsample_nearest2d.default",
        "aten.upsample_nearest3d.default", "aten.reflection_pad1d.default",
        "aten.reflection_pad2d.default", "aten.replication_pad1d.default",
        "aten.replication_pad2d.default",
    }  # fmt: skip
    assert set(COPYING) - used <= other


@pytest.mark.parametrize("start", range(0, len(AVERAGES), BATCH))
def test_average_pools_and_reductions(start: int) -> None:
    layers = AVERAGES[start : start + BATCH]
    for layer, upper in zip(layers, *layer_bounds(layers, {}), strict=True):
        assert_sound(layer, upper, tightness=None)
        assert upper <= 1.7 * svd_norm(layer.matrix()), layer.name


@pytest.mark.parametrize(
    ("module", "size", "constant"),
    [
        (nn.AvgPool2d(8), 8, 0.125),
        (nn.AvgPool2d(2), 8, 0.5),
        (nn.AvgPool2d(3, 2), 9, 2 / 3),
        (nn.MaxPool2d(2), 8, 1.0),
        (nn.MaxPool2d(3, 2), 9, 2.0),
        # lmt.md 1.3: ceil_mode makes one window more than the paper's count, so 2 per axis.
        (nn.MaxPool2d(3, 2, ceil_mode=True), 4, 2.0),
    ],
)
def test_pooling_constants_of_the_paper(module: nn.Module, size: int, constant: float) -> None:
    total = lf.certified_bound(module.eval(), (1, size, size)).total
    assert constant <= total <= constant * (1 + 1e-12)


MAX_POOLS: list[tuple[nn.Module, tuple[int, ...]]] = [
    *(
        (nn.MaxPool2d(k, s, p, d, ceil_mode=c), (1, *n))
        for n, k, s, p, d in (
            ((5, 5), 3, 1, 1, 1), ((6, 7), 3, 2, 1, 2), ((7, 5), (2, 4), (1, 2), (0, 2), 1),
            ((3, 3), 5, 1, 2, 1), ((2, 2), 4, 2, 2, 1), ((8, 8), 2, 3, 0, 3), ((4, 4), 3, 2, 0, 1),
        )
        for c in (False, True)
    ),
    (nn.MaxPool1d(4, 1), (2, 6)),
    (nn.MaxPool1d(2, 2, ceil_mode=True), (2, 5)),
    (nn.MaxPool3d(2, 1), (1, 3, 3, 2)),
    (nn.AdaptiveMaxPool1d(4), (1, 7)),
    (nn.AdaptiveMaxPool2d((3, 2)), (1, 5, 7)),
    (nn.AdaptiveMaxPool2d(4), (1, 3, 3)),
    (nn.AdaptiveMaxPool3d(2), (1, 3, 3, 5)),
]  # fmt: skip


def test_max_pools_count_the_windows_that_exist() -> None:
    for module, shape in MAX_POOLS:
        (constant,) = constants([module], shape)
        # An entry above all others is the maximum of exactly the windows that hold it.
        covered = (unit_matrix(module, shape) > 0.5).sum(0).max()
        assert covered <= constant**2 <= covered * (1 + 1e-15), (module, shape)


# -- nonlinearities --------------------------------------------------------------------------------


def _sigmoid(x: mp.mpf) -> mp.mpf:
    return 1 / (1 + mp.exp(-x))


def _top(derivative, guess: str) -> mp.mpf:  # noqa: ANN001
    return abs(derivative(mp.findroot(lambda t: mp.diff(derivative, t), mp.mpf(guess))))


def _gelu_tanh(x: mp.mpf) -> mp.mpf:
    root, kappa = mp.sqrt(2 / mp.pi), mp.mpf("0.044715")
    inner = root * (x + kappa * x**3)
    slope = root * (1 + 3 * kappa * x**2)
    return (1 + mp.tanh(inner)) / 2 + x / 2 * mp.sech(inner) ** 2 * slope


def _mish(x: mp.mpf) -> mp.mpf:
    soft = mp.log(1 + mp.exp(x))
    return mp.tanh(soft) + x * mp.sech(soft) ** 2 * _sigmoid(x)


def _silu(x: mp.mpf) -> mp.mpf:
    return _sigmoid(x) * (1 + x * (1 - _sigmoid(x)))


# (module, largest slope, exact)
SLOPES: list[tuple[nn.Module, object]] = [
    (nn.ReLU(), 1), (nn.ReLU6(), 1), (nn.Tanh(), 1), (nn.Sigmoid(), "1/4"), (nn.LogSigmoid(), 1),
    (nn.Hardtanh(), 1), (nn.Hardtanh(-0.3, 7.0), 1), (nn.Hardsigmoid(), "1/6"),
    (nn.Hardswish(), "3/2"), (nn.Softsign(), None),
    (nn.LeakyReLU(), 1), (nn.LeakyReLU(2.5), "5/2"), (nn.LeakyReLU(-3.0), 3),
    (nn.ELU(), 1), (nn.ELU(0.5), 1), (nn.ELU(1.3), mp.mpf(1.3)), (nn.ELU(-2.5), "5/2"),
    (nn.CELU(), 1), (nn.CELU(0.3), 1), (nn.CELU(7.0), 1),
    (nn.SELU(), lambda: mp.mpf("1.0507009873554804934193349852946")
     * mp.mpf("1.6732632423543772848170429916717")),
    (nn.GELU(), lambda: (1 + mp.erf(1)) / 2 + mp.exp(-1) / mp.sqrt(mp.pi)),
    (nn.GELU("tanh"), lambda: _top(_gelu_tanh, "1.4185")),
    (nn.SiLU(), lambda: _top(_silu, "2.4")), (nn.Mish(), lambda: _top(_mish, "1.49")),
    (nn.Softplus(), 1), (nn.Softplus(3.0, 25.0), 1),
    (Lambda(lambda m, x: torch.erf(x)), lambda: 2 / mp.sqrt(mp.pi)),
    (Lambda(lambda m, x: torch.sin(x)), 1), (Lambda(lambda m, x: torch.cos(x)), 1),
    (Lambda(lambda m, x: torch.atan(x)), 1), (Lambda(lambda m, x: x.abs()), 1),
    (Lambda(lambda m, x: x.clamp(-0.2, 0.4)), 1), (Lambda(lambda m, x: x.clamp(min=0.1)), 1),
    (Lambda(lambda m, x: x.clamp_max(0.1)), 1), (Lambda(lambda m, x: x.clone().relu_()), 1),

]  # fmt: skip
SUPPORTED = [(m, t) for m, t in SLOPES if t is not None]


@pytest.fixture(scope="module")
def slope_constants() -> list[float]:
    return constants([m for m, _ in SUPPORTED], (3,))


def test_slopes_are_the_maximum_of_the_derivative_rounded_up(slope_constants: list[float]) -> None:
    with mp.workdps(40):
        for (module, truth), constant in zip(SUPPORTED, slope_constants, strict=True):
            exact = truth() if callable(truth) else mp.mpf(eval_fraction(truth))
            assert mp.mpf(constant) >= exact, module
            assert mp.mpf(constant) <= exact * (1 + mp.mpf("1e-9")), module


def eval_fraction(text: object) -> mp.mpf:
    if isinstance(text, str):
        a, b = text.split("/")
        return mp.mpf(a) / mp.mpf(b)
    return mp.mpf(text)


def test_no_difference_quotient_exceeds_a_slope(slope_constants: list[float]) -> None:
    generator = torch.Generator().manual_seed(1)
    for (module, _), constant in zip(SUPPORTED, slope_constants, strict=True):
        x = torch.randn(20000, generator=generator, dtype=torch.float64) * 3
        gap = torch.rand(20000, generator=generator, dtype=torch.float64) * 0.5 + 1e-3
        y = x + gap
        with torch.no_grad():
            fx, fy = module(x.clone()), module(y.clone())
        # The functions are accurate to a few units in the last place of numbers below 64: their
        # difference is off by less than 64 * 2^-49, and nothing is granted to the constant.
        assert bool(((fy - fx).abs() <= constant * (y - x) + 2.0**-43).all()), module
        steepest = float(((fy - fx).abs() / (y - x)).max())
        assert steepest >= 0.85 * constant, (module, steepest)


@pytest.mark.parametrize(
    "module",
    [
        nn.CELU(-1.0), nn.Softplus(-1.0), nn.Softplus(1.0, 10.0), nn.Softplus(5.0, 1.0),
        nn.Softplus(0.1),
        nn.Hardshrink(), nn.Threshold(0.1, 20.0), nn.Softsign(), nn.Tanhshrink(), nn.GLU(),
        Lambda(lambda m, x: torch.ops.aten.elu(x, 1.0, 1.0, -1.0)),
        Lambda(lambda m, x: torch.softmax(x, 1)), Lambda(lambda m, x: torch.sign(x)),
        Lambda(lambda m, x: torch.round(x)), Lambda(lambda m, x: x.sqrt()),
        Lambda(lambda m, x: x.log()), Lambda(lambda m, x: x**2), Lambda(lambda m, x: torch.tan(x)),
    ],
    ids=lambda m: type(m).__name__,
)  # fmt: skip
def test_slopes_without_a_global_constant_are_refused(module: nn.Module) -> None:
    # Tanhshrink is x - tanh(x): sound through the sum rule, with 2 for a slope of 1.
    if isinstance(module, nn.Tanhshrink):
        assert lf.certified_bound(module.eval(), (4,)).total == 2.0
        return
    with pytest.raises(UnsupportedLayerError, match="do this|Do this"):
        lf.trace(module, (4,))


def test_rrelu_in_eval_mode_is_a_leaky_relu_or_refused() -> None:
    module = nn.RReLU(0.5, 3.0).eval()
    try:
        total = lf.certified_bound(module, (4,)).total
    except UnsupportedLayerError:
        return
    assert total >= 1.75


@pytest.mark.parametrize("slopes", [[0.25], [0.5, -3.0, 1.5], [0.0, 0.0, 0.0], [-0.5, 1.0, 0.9]])
def test_prelu_is_the_larger_of_one_and_its_slopes(slopes: list[float]) -> None:
    module = nn.PReLU(len(slopes)).double()
    module.weight.data.copy_(torch.tensor(slopes))
    truth = max(1.0, *map(abs, slopes))
    assert lf.certified_bound(module.eval(), (3, 2)).total == truth


def test_sort_topk_and_extremes_are_isometries_at_worst() -> None:
    for function in (
        lambda m, x: x.sort(1)[0],
        lambda m, x: x.sort(-1, descending=True)[0],
        lambda m, x: x.topk(2, 1)[0],
        lambda m, x: x.amax((1, 2)),
        lambda m, x: x.min(2)[0],
        lambda m, x: torch.maximum(x, torch.tensor(0.5)),
        lambda m, x: torch.minimum(x, torch.zeros(4, dtype=x.dtype)),
    ):
        assert lf.certified_bound(Lambda(function).eval(), (3, 4)).total == 1.0


# -- factors that round ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("factors", "shape"),
    [((0.1, 0.3), (3,)), ((0.1,) * 5, (3,)), ((1 / 3, 7.0, 1e-8), (2,)), ((1e-200, 1e-200), (2,)),
     ((5e-324, 0.5), (2,)), ((1e-150,) * 3, (2,))],
)  # fmt: skip
def test_products_of_factors_never_round_down(
    factors: tuple[float, ...], shape: tuple[int, ...]
) -> None:
    def product(m: Lambda, x: Tensor) -> Tensor:
        for factor in factors:
            x = x * factor
        return x

    truth = abs(math.prod(map(Fraction, factors)))
    total = lf.certified_bound(Lambda(product).eval(), shape).total
    assert Fraction(total) >= truth > 0


def test_factors_on_a_layer_are_refused_or_bounded_but_never_vanish() -> None:
    layer = nn.Linear(3, 3, bias=False).double()
    layer.weight.data.copy_(torch.eye(3))
    for factors in ((1e-300, 1e-30), (1e300, 1e300), (2.0**-1000, 2.0**-70)):
        module = Lambda(lambda m, x, f=factors: m.a(x) * f[0] * f[1], a=layer)
        with pytest.raises(NotCertifiedError):
            lf.certified_bound(module.eval(), (3,))
    module = Lambda(lambda m, x: m.a(x) * 0.1 * 0.3, a=layer)
    bound = lf.certified_bound(module.eval(), (3,))
    assert 0.1 * 0.3 <= bound.total <= 0.03 * (1 + 1e-9)
    assert bound.head_weight is not None


def test_the_same_scale_many_times_cannot_underflow_unseen() -> None:
    scale = torch.full((2,), 1e-170, dtype=torch.float64)
    module = Lambda(lambda m, x: torch.relu(m.a(x * m.s * m.s)), a=nn.Linear(2, 2), s=scale)
    module = module.double().eval()
    module.s = scale
    with pytest.raises(NotCertifiedError):
        lf.certified_bound(module, (2,))
    assert lf.certified_bound(Lambda(lambda m, x: x * m.s * m.s, s=scale).eval(), (2,)).total > 0


def test_division_by_a_number_is_not_its_rounded_reciprocal() -> None:
    for divisor in (3.0, -7.0, 0.1, 255.0, 5e-324, 2.0**-1074):
        module = Lambda(lambda m, x, d=divisor: x / d).eval()
        try:
            total = lf.certified_bound(module, (2,)).total
        except LmtfastError:
            continue
        assert Fraction(total) >= 1 / Fraction(abs(divisor)) if math.isfinite(total) else True


def test_every_operation_with_a_rule_exists() -> None:
    from lmtfast.weights import operation

    for target in OPERATION_RULES:
        assert operation(target) is not None


def test_functional_and_module_forms_agree() -> None:
    weight = nn.Parameter(torch.randn(4, 3, 3, 3, dtype=torch.float64))
    conv = nn.Conv2d(3, 4, 3, 2, 1, bias=False).double()
    conv.weight.data.copy_(weight.data)
    functional = Lambda(lambda m, x: F.conv2d(x, m.w, stride=2, padding=1), w=weight)
    shape = (3, 6, 6)
    assert (
        lf.certified_bound(functional.eval(), shape).total
        == lf.certified_bound(conv.eval(), shape).total
    )
    assert seen("conv", conv, shape).shape == shape
