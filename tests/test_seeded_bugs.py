# SPDX-License-Identifier: MIT
"""Bugs seeded by hand into the GPU kernels: each must be caught by the contract suite on a CPU."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.seeding import MODULES, TREE

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[1]
MARGIN, SPECTRAL = "tests/test_contract_margin.py", "tests/test_contract_spectral.py"
MEMORY, DIAGONAL = "tests/test_spectral_memory.py", "tests/test_contract_diagonal.py"
MIXED, EXPLORER = "tests/test_mixed_engines.py", "tests/test_explorer.py"


class Bug(NamedTuple):
    """One replacement in one file, and the contract that must object."""

    name: str
    file: str
    right: str
    wrong: str
    suite: str
    select: str


BUGS = (
    Bug(
        "triton margin: rows of strided logits", "kernels/margin_loss.py",
        "base = logits + i.to(tl.int64) * sample_stride", "base = logits + i.to(tl.int64) * k",
        MARGIN, "triton and strides",
    ),
    Bug(
        "triton margin: no mask on the classes", "kernels/margin_loss.py",
        "inside = present[:, None] & (j < k)\n    t = tl.load(target + i, present, other=0)",
        "inside = present[:, None] & (j < BLOCK_K)\n    t = tl.load(target + i, present, other=0)",
        MARGIN, "triton and shape",
    ),
    Bug(
        "triton margin: sign of the target's gradient", "kernels/margin_loss.py",
        "gradient = tl.where(at_target, -towards[:, None], gradient)",
        "gradient = tl.where(at_target, towards[:, None], gradient)",
        MARGIN, "triton and shape",
    ),
    Bug(
        "triton margin: the sample's row, not its class's", "kernels/margin_loss.py",
        "b = tl.load(rows + (u * row_stride)[:, None] + j, inside, other=0.0)",
        "b = tl.load(rows + (i * row_stride)[:, None] + j, inside, other=0.0)",
        MARGIN, "triton and shape",
    ),
    Bug(
        "triton operator: stride lost", "kernels/operator_product.py",
        "s0, s1, s2 = extents(row, STRIDE)\n        circular",
        "s0, s1, s2 = 1, 1, 1\n        circular",
        SPECTRAL, "triton-operator and steps",
    ),
    Bug(
        "triton operator: no mask behind the rows of an image", "kernels/operator_product.py",
        "reads = present & (i0 >= 0) & (i0 < l0) & (i1 >= 0) & (i1 < l1) & (i2 >= 0) & (i2 < l2)",
        "reads = present & (i0 >= 0) & (i0 < l0) & (i1 >= 0) & (i1 < l1) & (i2 >= 0)",
        SPECTRAL, "triton-operator and steps",
    ),
    Bug(
        "triton operator: no mask behind the inner rows", "kernels/operator_product.py",
        "reads[:, None] & (k < inner)[None, :],", "reads[:, None],",
        SPECTRAL, "triton-operator and steps",
    ),
    Bug(
        "triton operator: scaled before the last tile is there", "kernels/operator_product.py",
        "if last_of(counter, count):", "if last_of(counter, count - 1):",
        SPECTRAL, "triton-operator and steps",
    ),
    Bug(
        "triton operator: the adjoint does not wrap", "kernels/visit_work.py",
        'wraps = (-1, 0, 1) if row["circular"] else (0,)', "wraps = (0,)",
        SPECTRAL, "triton-operator and steps and circular",
    ),
    Bug(
        "triton operator: column scale lost", "kernels/packing.py",
        "scale = row_scale[:, None, None] * column_scale[None, :, None]",
        "scale = row_scale[:, None, None] + 0.0 * column_scale[None, :, None]",
        SPECTRAL, "triton-operator and steps and identity",
    ),
    Bug(
        "triton operator: gradient of a weight's first use only", "kernels/operator_gradient.py",
        "if (sharer > first) | (tl.load(item + 9) != 0):", "if tl.load(item + 9) != 0:",
        SPECTRAL, "triton-operator and gradients and tied",
    ),
    Bug(
        "triton operator: last tap lost in the gradient", "kernels/operator_gradient.py",
        "for t in range(0, n_taps):", "for t in range(0, n_taps - 1):",
        SPECTRAL, "triton-operator and gradients",
    ),
    Bug(
        "triton operator: no mask on the rows of a gradient", "kernels/operator_gradient.py",
        "inside = (r < row_last)[:, None] & (c < channel_last)[None, :]",
        "inside = (r < row_last + 1)[:, None] & (c < channel_last)[None, :]",
        MEMORY, "triton-operator",
    ),
    Bug(
        "triton symbol: sign of the phase", "kernels/symbol_pass.py",
        "x_re * e_re - x_im * e_im, x_re * e_im + x_im * e_re",
        "x_re * e_re + x_im * e_im, x_im * e_re - x_re * e_im",
        SPECTRAL, "triton-symbol and steps",
    ),
    Bug(
        "triton symbol: row scale lost in the adjoint", "kernels/symbol_pass.py",
        "y *= scale_of(saved, scales, group * rows + r, r < last)[:, None]", "y *= 1.0",
        SPECTRAL, "triton-symbol and steps and identity",
    ),
    Bug(
        "triton symbol: no mask on a tile's columns", "kernels/symbol_pass.py",
        "inside[:, None] & (k < columns)[None, :], DTYPES, ALIGNED,",
        "inside[:, None] & (k >= 0)[None, :], DTYPES, ALIGNED,",
        SPECTRAL, "triton-symbol and beside",
    ),
    Bug(
        "triton symbol: an explorer replaces a higher candidate", "kernels/symbol_finish.py",
        "better = tl.where(after > lowest, 1, 0) * comparable", "better = comparable",
        EXPLORER, "triton",
    ),
    Bug(
        "triton symbol: an explorer replaces nothing", "kernels/symbol_finish.py",
        "promoted = (better != 0) & (f == worst)", "promoted = (better != 0) & (f > F)",
        EXPLORER, "triton",
    ),
    Bug(
        "triton symbol: an explorer starts where it is", "kernels/symbol_finish.py",
        "restart = explorer & (stalled != 0)", "restart = explorer & (stalled > 1)",
        EXPLORER, "triton",
    ),
    Bug(
        "triton symbol: imaginary part of the gradient", "kernels/symbol_gradient.py",
        "outer = u_re[:, None] * z_re[None, :] + u_im[:, None] * z_im[None, :]",
        "outer = u_re[:, None] * z_re[None, :] - u_im[:, None] * z_im[None, :]",
        SPECTRAL, "triton-symbol and gradients",
    ),
    Bug(
        "triton matrix: exponent of the image lost", "kernels/matrix.py",
        "* power_of_two(exponent).to(tl.float64)", "* 1.0",
        SPECTRAL, "triton-symbol and steps and heads",
    ),
    Bug(
        "triton matrix: planes that it does not have", "kernels/symbol_pass.py",
        "(k < columns)[None, :] & (plane < used)[:, None], other=0.0,",
        "(k < columns)[None, :], other=0.0,",
        MEMORY, "triton-symbol and heads",
    ),
    Bug(
        "triton matrix: complex entries of a real state", "kernels/symbol_pass.py",
        "at = parts * (phase", "at = 2 * (phase",
        SPECTRAL, "triton-symbol and steps and heads",
    ),
    Bug(
        "triton matrix: no weights end the iteration", "kernels/matrix.py",
        'if (sigma > 0) & (sigma < float("inf")):', 'if sigma < float("inf"):',
        SPECTRAL, "triton-symbol and zero and head",
    ),
    Bug(
        "triton matrix: column scale lost in the row scale's gradient", "kernels/matrix.py",
        "x *= scale_of(saved, tl.load(row + COLUMN_SCALE), c, c < columns)", "x *= 1.0",
        SPECTRAL, "triton-symbol and gradients and heads",
    ),
    Bug(
        "triton separable: stride lost", "kernels/separable_grid.py",
        "p // (o1 * o2) * s0, p // o2 % o1 * s1, p % o2 * s2",
        "p // (o1 * o2) * s0, p // o2 % o1, p % o2",
        SPECTRAL, "triton-separable and steps",
    ),
    Bug(
        "triton separable: last visits of the fold lost", "kernels/separable_grid.py",
        "for v_start in range(first, last, BLOCK_VISITS):",
        "for v_start in range(first, last - 1, BLOCK_VISITS):",
        SPECTRAL, "triton-separable and steps",
    ),
    Bug(
        "triton separable: exponent of y lost", "kernels/separable_pass.py",
        "factor = power_of_two(-tl.load(norms + 2).to(tl.int32))\n    without_padding",
        "factor = 1.0\n    without_padding",
        SPECTRAL, "triton-separable and gradients",
    ),
    Bug(
        "triton separable: taps for channels in a tap-major gradient",
        "kernels/separable_gradient.py", "k = t * channels + c", "k = t * n_taps + c",
        SPECTRAL, "triton-separable and gradients and tap-major",
    ),
    Bug(
        "triton diagonal: last channels lost", "kernels/channel_scale.py",
        "for start in range(0, length, BLOCK):", "for start in range(0, length - 1, BLOCK):",
        DIAGONAL, "triton and reference",
    ),
    Bug(
        "triton diagonal: sign of the gradient", "kernels/scale_gradient.py",
        "tl.where(x < 0, -grad, grad)", "grad",
        DIAGONAL, "triton and reference",
    ),
    Bug(
        "triton diagonal: a use of another map's norm", "kernels/gradient_work.py",
        "use = [k, variance, *users.get(offset, (-1, 0)), *spans[offset], *place, length]",
        "use = [k, variance, *users.get(0, (-1, 0)), *spans[offset], *place, length]",
        DIAGONAL, "triton and reference and twice",
    ),
    Bug(
        "triton tape: second operands lost", "kernels/composition.py",
        "found = tl.where(consumer % 2 == 1, lanes(to_b, place), lanes(to_a, place))",
        "found = lanes(to_a, place)",
        SPECTRAL, "triton and composition",
    ),
    Bug(
        "cuda stencil: stride lost", "csrc/ops/cuda/stencil.h",
        "int32_t i = s.stride[a] * p.at[a] + s.dilation", "int32_t i = p.at[a] + s.dilation",
        SPECTRAL, "cuda",
    ),
    Bug(
        "cuda stencil: no mask behind the input", "csrc/ops/cuda/stencil.h",
        "if (i < 0 || i >= s.in[a]) return -1;", "if (i < 0) return -1;",
        SPECTRAL, "cuda",
    ),
    Bug(
        "cuda stencil: dilation lost", "csrc/ops/cuda/stencil.h",
        "s.dilation[a] * t.at[a] - s.pad[a];", "t.at[a] - s.pad[a];",
        SPECTRAL, "cuda",
    ),
    Bug(
        "cuda stencil: the adjoint reads between strides", "csrc/ops/cuda/stencil.h",
        "if (scaled < 0 || scaled % s.stride[a] != 0) return -1;", "if (scaled < 0) return -1;",
        SPECTRAL, "cuda",
    ),
    Bug(
        "cuda stencil: rows for channels in a tap-major weight", "csrc/ops/cuda/stencil.h",
        "tap_major ? tap * s.channels + channel", "tap_major ? tap * s.rows + channel",
        SPECTRAL, "cuda",
    ),
    Bug(
        "cuda operator: scaled when one group is there", "csrc/ops/cuda/operator.cu",
        "last_of(v.counters + w.counters, static_cast<int32_t>(blocks))",
        "last_of(v.counters + w.counters, static_cast<int32_t>(blocks / s.groups))",
        SPECTRAL, "cuda-operator and steps and groups",
    ),
    Bug(
        "cuda symbol: sign of the phase", "csrc/ops/cuda/symbol.h",
        "phase[2 * i + 1] = static_cast<float>(-sine);",
        "phase[2 * i + 1] = static_cast<float>(sine);",
        SPECTRAL, "cuda and symbol",
    ),
    Bug(
        "cuda symbol: last tap lost", "csrc/ops/cuda/symbol.h",
        "tap < s.taps; tap += kBlockThreads) {\n      begin[tap]",
        "tap + 1 < s.taps; tap += kBlockThreads) {\n      begin[tap]",
        SPECTRAL, "cuda and symbol",
    ),
    Bug(
        "cuda pass: row scale lost in the adjoint", "csrc/ops/cuda/pass.cu",
        "acting = value * scale;", "acting = value;",
        SPECTRAL, "cuda and symbol and scaled",
    ),
    Bug(
        "cuda pass: sums not brought to a tile's new exponent", "csrc/ops/cuda/pass.cu",
        "for (float& x : piece.v) x *= before;", "for (float& x : piece.v) x *= 1.0f;",
        SPECTRAL, "cuda and symbol",
    ),
    Bug(
        "cuda gradient: no mask on the last columns", "csrc/ops/cuda/gradient.cu",
        "if (i < left) to[i]", "to[i]",
        MEMORY, "cuda",
    ),
    Bug(
        "cuda diagonal: channels beyond the first of each thread lost", "csrc/ops/cuda/scales.h",
        "i < length; i += kBlockThreads", "i < length && i < kBlockThreads; i += kBlockThreads",
        DIAGONAL, "cuda and reference",
    ),
    Bug(
        "cuda diagonal: the last of equals", "csrc/ops/cuda/scales.h",
        "<< 32 | (kLast - i);\n    best = key > best ? key : best;\n  }\n  return kLast - (",
        "<< 32 | i;\n    best = key > best ? key : best;\n  }\n  return (",
        DIAGONAL, "cuda and reference",
    ),
    Bug(
        "cuda diagonal: sign of the gradient", "csrc/ops/cuda/gradient.cu",
        "x < 0.0f ? -grad : grad", "grad",
        DIAGONAL, "cuda and reference",
    ),
    Bug(
        "cuda panel: row scale lost in the adjoint", "csrc/ops/cuda/panel.h",
        "const float scale = op.rs(o);", "const float scale = 1.0f;",
        SPECTRAL, "cuda",
    ),
    Bug(
        "cuda plan: the pass has too little memory for the grid", "csrc/ops/cuda/plan.cpp",
        "header_.pass_bytes = std::max(header_.pass_bytes, kTileBytes);",
        "header_.pass_bytes = std::max(header_.pass_bytes, kTileBytes / 2);",
        SPECTRAL, "cuda-separable and steps",
    ),
    Bug(
        "cuda plan: the grid's memory in place of a head's", "csrc/ops/cuda/plan.cpp",
        "header_.pass_bytes = std::max(header_.pass_bytes, kTileBytes);",
        "header_.pass_bytes = kTileBytes;",
        MIXED, "cuda-heads and several_engines",
    ),
    Bug(
        "cuda finish: a separable operator counts as a matrix", "csrc/ops/cuda/pass_finish.cu",
        "    } else if (method == Method::kSeparable) {\n      record",
        "    } else if (method == Method::kDiagonal) {\n      record",
        MIXED, "cuda-heads and several_engines",
    ),
    Bug(
        "cuda finish: a head's column scale lost in the adjoint", "csrc/ops/cuda/pass_finish.cu",
        "static_cast<float>(sum * inverses[c]) * op.cs(column.channel)",
        "static_cast<float>(sum * inverses[c])",
        MIXED, "cuda-heads and several_engines",
    ),
    Bug(
        "cuda finish: a head goes on before its last sums are in", "csrc/ops/cuda/pass_finish.cu",
        "op.work.counters + item.group, item.tiles))",
        "op.work.counters + item.group, item.tiles - (item.tiles > 1)))",
        MIXED, "cuda-heads and several_engines",
    ),
)  # fmt: skip


def seeded(bug: Bug, text: str) -> str:
    assert text.count(bug.right) == 1, f"{bug.file} no longer has exactly one {bug.right!r}"
    return text.replace(bug.right, bug.wrong)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the native sources; a bug rebuilds only what it touches."""
    root = tmp_path_factory.mktemp("seeded")
    shutil.copy(ROOT / "CMakeLists.txt", root)
    shutil.copytree(ROOT / "csrc", root / "csrc")
    shutil.copytree(ROOT / "tests" / "csrc", root / "tests" / "csrc")
    return root


def contract(bug: Bug, **environment: str) -> subprocess.CompletedProcess[str]:
    """The contract suite on the seeded kernels, up to the first failure."""
    command = [
        sys.executable, "-m", "pytest", "-p", "tests.seeding", "-p", "no:cacheprovider", "-q", "-x",
        "--show-capture=no", bug.suite, "-k", bug.select,
    ]  # fmt: skip
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **environment}
    )


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_a_seeded_bug_is_caught(bug: Bug, tree: Path, tmp_path: Path) -> None:
    text = (ROOT / bug.file).read_text(encoding="utf-8")
    if bug.file.startswith("kernels/"):
        module = f"lmtfast.kernels.{Path(bug.file).name}"
        (tmp_path / module).write_text(seeded(bug, text), encoding="utf-8")
        result = contract(bug, **{MODULES: str(tmp_path)})
    else:
        target = tree / bug.file
        target.write_text(seeded(bug, text), encoding="utf-8")
        try:
            result = contract(bug, **{TREE: str(tree)})
        finally:
            target.write_text(text, encoding="utf-8")
    report = result.stdout[-3000:] + result.stderr[-1000:]
    # A failed assertion, or a crash: never a suite that could not start or had nothing to run.
    assert result.returncode == 1 or result.returncode < 0, report
    assert result.returncode < 0 or "FAILED" in result.stdout, report
    assert "the emulated CUDA kernels" not in report, report


@pytest.mark.parametrize(
    ("suite", "select"),
    [
        (MARGIN, "triton and strides"), (SPECTRAL, "triton and dilated"),
        (SPECTRAL, "triton and composition"), (MARGIN, "cuda and strides"),
    ],
)  # fmt: skip
def test_the_contracts_hold_without_a_bug(
    suite: str, select: str, tree: Path, tmp_path: Path
) -> None:
    """The same command on the same copies passes, so that only the bug can make it fail."""
    clean = Bug("none", "", "", "", suite, select)
    where = {TREE: str(tree)} if select.startswith("cuda") else {MODULES: str(tmp_path)}
    result = contract(clean, **where)
    assert result.returncode == 0, result.stdout[-3000:]
