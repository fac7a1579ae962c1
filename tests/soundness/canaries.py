# SPDX-License-Identifier: MIT
"""Bugs seeded by hand into what certificates rest on, each with the tests that must object.

A canary replaces one piece of one file. What it makes of a bound is a number below the truth, a
certificate of another network, or an answer where a refusal is due.
"""

from __future__ import annotations

from typing import NamedTuple


class Canary(NamedTuple):
    """One replacement in one file, and what has to fail then: test files or single tests."""

    name: str
    file: str
    right: str
    wrong: str
    tests: tuple[str, ...]


CANARIES = (
    Canary(
        "quotients are rounded to nearest",
        "lmtfast/verified/rounding.py",
        "            if a * q >= p * b:\n",
        "            if True:\n",
        ("tests/test_verified_rounding.py::test_binary_operations_round_outward_and_tightly",),
    ),
    Canary(
        "an inexact root is not raised",
        "lmtfast/verified/rounding.py",
        "r if exact else r + 1",
        "r",
        ("tests/test_verified_rounding.py::test_hypot",),
    ),
    Canary(
        "gamma with half the unit roundoff",
        "lmtfast/verified/rounding.py",
        "return ratio_up(n, (1 << 53) - n) if n < 1 << 53 else math.inf",
        "return ratio_up(n, (1 << 54) - n) if n < 1 << 53 else math.inf",
        ("tests/test_verified_rounding.py::test_gamma",),
    ),
    Canary(
        "a computed sum is not inflated",
        "lmtfast/verified/rounding.py",
        "ratio_up(p * (whole - depth) * s + 2",
        "ratio_up(p * rest * s + 2",
        (
            (
                ""
                "tests/soundness/test_hostile_arithmetic.py::test_a_sum_that_lost_all_it_may_is_raised_again"
            ),
        ),
    ),
    Canary(
        "the tail of a sum of squares is lost",
        "lmtfast/verified/rounding.py",
        "total = squares[:, cut:].sum(-1)\n",
        "total = 0.0 * squares[:, cut:].sum(-1)\n",
        ("tests/test_verified_rounding.py::test_frobenius_is_an_upper_bound",),
    ),
    Canary(
        "only the smallest entry is looked at for NaN",
        "lmtfast/verified/rounding.py",
        "if not (math.isfinite(low) and math.isfinite(high)):",
        "if math.isinf(low):",
        ("tests/test_verified_matrix.py::test_non_finite_entries_are_refused",),
    ),
    Canary(
        "zero times infinity decides nothing",
        "lmtfast/verified/rounding.py",
        "return 0.0 if a == 0 or b == 0 else a * b",
        "return a * b",
        ("tests/test_verified_rounding.py::test_infinite_operands_are_unknown_bounds",),
    ),
    Canary(
        "powers of two the wrong way round",
        "lmtfast/verified/rounding.py",
        "return ratio_up(p << max(exponent, 0), q << max(-exponent, 0))",
        "return ratio_up(p << max(-exponent, 0), q << max(exponent, 0))",
        ("tests/test_verified_rounding.py::test_power_of_two_scaling",),
    ),
    Canary(
        "what prescaling loses is forgotten",
        "lmtfast/verified/rounding.py",
        "return mul_up(sqrt_up(float(count)), 2.0**-1022)",
        "return 0.0",
        ("tests/soundness/test_hostile_arithmetic.py::test_what_prescaling_rounds_away_is_known",),
    ),
    Canary(
        "the entries' own error is forgotten",
        "lmtfast/verified/matrix.py",
        "scale_up(add_up(upper, prescale_loss(len(parts) * m * n)), exponent), entry_error\n",
        "scale_up(add_up(upper, prescale_loss(len(parts) * m * n)), exponent), 0.0\n",
        ("tests/test_verified_matrix.py::test_entry_error_is_added_outward",),
    ),
    Canary(
        "the Frobenius norm of the first chunk stands for all",
        "lmtfast/verified/matrix.py",
        "squares, rows_columns = max(squares, found), max(",
        "squares, rows_columns = squares or found, max(",
        ("tests/soundness/test_hostile_arithmetic.py::test_the_largest_of_a_batch_may_come_last",),
    ),
    Canary(
        "the dense proof forgets the Gram matrix's rounding",
        "lmtfast/verified/residual.py",
        "self.squared = max(self.squared, sum_up((guess, excess, known)))",
        "self.squared = max(self.squared, sum_up((guess, excess)))",
        ("tests/soundness/test_hostile_arithmetic.py::test_the_gram_matrix_may_be_too_small",),
    ),
    Canary(
        "the dense proof forgets its residual",
        "lmtfast/verified/residual.py",
        "self.squared = max(self.squared, sum_up((guess, excess, known)))",
        "self.squared = max(self.squared, sum_up((guess, known)))",
        ("tests/soundness/test_hostile_arithmetic.py::test_no_factoriser_makes_a_low_guess_true",),
    ),
    Canary(
        "the dense proof believes its guess",
        "lmtfast/verified/residual.py",
        "self.squared = max(self.squared, sum_up((guess, excess, known)))",
        "self.squared = max(self.squared, guess)",
        ("tests/soundness/test_hostile_arithmetic.py::test_the_gram_matrix_may_be_too_small",),
    ),
    Canary(
        "the dense proof forgets the factor's rounding",
        "lmtfast/verified/residual.py",
        "                mul_up(1.0 + 2.0 * UNIT_ROUNDOFF, residual),\n",
        "",
        ("tests/soundness/test_hostile_arithmetic.py::test_no_factoriser_makes_a_low_guess_true",),
    ),
    Canary(
        "a refused member of a batch is dropped",
        "lmtfast/verified/residual.py",
        "return refused if bool(refused.any()) else None",
        "return None",
        ("tests/test_verified_matrix.py::test_chunks_agree_with_one_pass",),
    ),
    Canary(
        "complex products without their cross term",
        "lmtfast/verified/residual.py",
        "return [(1.0, real, real), (1.0, imag, imag)], [(1.0, imag, real), (-1.0, real, imag)]",
        "return [(1.0, real, real), (1.0, imag, imag)], [(1.0, imag, real), (1.0, real, imag)]",
        ("tests/test_verified_matrix.py::test_complex_batches_bound_every_member",),
    ),
    Canary(
        "the torus is as small as the image (R18)",
        "lmtfast/verified/torus.py",
        (
            "            input_extent[a] - min(q[a] for q, _ in taps),\n           "
            " output_extent[a] + max(q[a] for q, _ in taps),\n"
        ),
        "",
        ("tests/test_verified_torus.py::test_bounds_the_dense_operator_of_random_geometries",),
    ),
    Canary(
        "the torus forgets taps to the right",
        "lmtfast/verified/torus.py",
        "            output_extent[a] + max(q[a] for q, _ in taps),\n",
        "",
        ("tests/test_verified_torus.py::test_adversarial_kernels",),
    ),
    Canary(
        "the symbol's rounding is forgotten",
        "lmtfast/verified/torus.py",
        '(add_up(sqrt_up(sweep.squared), error), "cholesky")',
        '(sqrt_up(sweep.squared), "cholesky")',
        ("tests/soundness/test_hostile_arithmetic.py::test_a_symbols_sum_may_be_too_small",),
    ),
    Canary(
        "half of the half grid is skipped",
        "lmtfast/verified/torus.py",
        "if j <= tuple(-x % n for x, n in zip(j, size, strict=True)):",
        "if j < tuple(-x % n for x, n in zip(j, size, strict=True)):",
        ("tests/test_verified_torus.py::test_bounds_the_dense_operator_of_random_geometries",),
    ),
    Canary(
        "phases of one axis only",
        "lmtfast/verified/torus.py",
        "(c, s) if a == 0 else (cosine * c - sine * s, sine * c + cosine * s)",
        "(c, s) if a == 0 else (cosine * c, sine * c)",
        ("tests/test_verified_torus.py::test_bounds_the_dense_operator_of_random_geometries",),
    ),
    Canary(
        "a stride that leaves taps on one phase",
        "lmtfast/verified/polyphase.py",
        "[divmod(d * i - p, s) for i, d, p, s in zip(t, dilation, low, stride, strict=True)]",
        "[divmod(i - p, s) for i, d, p, s in zip(t, dilation, low, stride, strict=True)]",
        ("tests/test_verified_torus.py::test_bounds_the_dense_operator_of_random_geometries",),
    ),
    Canary(
        "the circle's quarters are mixed up",
        "lmtfast/verified/circle.py",
        "((c, s), (-s, c), (-c, -s), (s, -c))",
        "((c, s), (-s, c), (c, -s), (s, -c))",
        ("tests/test_verified_torus.py::test_bounds_the_dense_operator_of_random_geometries",),
    ),
    Canary(
        "the banded proof forgets the blocks' error",
        "lmtfast/verified/banded.py",
        "            gram.error(i, j),\n",
        "",
        (
            (
                ""
                "tests/soundness/test_hostile_arithmetic.py::test_a_convolutions_blocks_may_be_too_small"
            ),
        ),
    ),
    Canary(
        "the banded proof forgets products' rounding",
        "lmtfast/verified/banded.py",
        (
            "            mul_up(gamma_up(sum(n + 1 for n in inner) + 1), sum_up((size,"
            " *products))),\n"
        ),
        "",
        (
            (
                ""
                "tests/soundness/test_hostile_arithmetic.py::test_a_banded_factors_product_may_hide_what_the_guess_lacks"
            ),
        ),
    ),
    Canary(
        "the banded proof forgets the residual",
        "lmtfast/verified/banded.py",
        "            residual,\n",
        "",
        (
            (
                ""
                "tests/soundness/test_hostile_arithmetic.py::test_residuals_beside_the_diagonal_count_in_both_rows"
            ),
        ),
    ),
    Canary(
        "a band too narrow by one",
        "lmtfast/verified/convolution.py",
        "    width = max((abs(a - b) for a, b in pairs), default=0)\n",
        "    width = max(0, max((abs(a - b) for a, b in pairs), default=0) - 1)\n",
        (
            (
                ""
                "tests/test_verified_banded.py::test_blocks_of_small_integers_are_the_gram_matrix_exactly"
            ),
        ),
    ),
    Canary(
        "blocks beside the diagonal count once",
        "lmtfast/verified/banded.py",
        "            if j < i:\n                sums[j] = add_up(sums[j], found)\n",
        "",
        (
            (
                ""
                "tests/soundness/test_hostile_arithmetic.py::test_residuals_beside_the_diagonal_count_in_both_rows"
            ),
        ),
    ),
    Canary(
        "only the first pair of taps meets",
        "lmtfast/verified/convolution.py",
        (
            "            for t, u in pairs[1:]:\n                found = found +"
            " self._products[t, :, :, u]\n"
        ),
        "",
        (
            (
                ""
                "tests/test_verified_banded.py::test_blocks_of_small_integers_are_the_gram_matrix_exactly"
            ),
        ),
    ),
    Canary(
        "a border that repeats counts once",
        "lmtfast/verified/region.py",
        "return math.prod(-(-max(f, 1) // n) for f, n in sizes)",
        "return 1",
        (
            (
                ""
                "tests/test_guarantee.py::test_circular_convolutions_too_large_to_materialise_stay_bounds"
            ),
        ),
    ),
    Canary(
        "groups: the first stands for all",
        "lmtfast/verified/region.py",
        "        upper = max(upper, bound)\n",
        "        upper = upper or bound\n",
        ("tests/test_guarantee.py::test_random_convolutions_in_functional_form",),
    ),
    Canary(
        "a strided circular convolution counts as whole",
        "lmtfast/verified/region.py",
        (
            "return all(f == n and n % s == 0 for f, n, s in zip(full, extent, op.stride,"
            " strict=True))"
        ),
        "return all(f == n for f, n, s in zip(full, extent, op.stride, strict=True))",
        ("tests/test_guarantee.py::test_random_convolutions_in_functional_form",),
    ),
    Canary(
        "the geometry of a transposed convolution is not turned",
        "lmtfast/verified/region.py",
        "    if op.transposed:\n        in_extent, out_extent = out_extent, in_extent\n",
        "",
        (
            (
                ""
                "tests/soundness/test_hostile_arithmetic.py::test_estimates_of_operators_are_not_trusted"
            ),
        ),
    ),
    Canary(
        "a copy counts once however often it copies",
        "lmtfast/verified/region.py",
        "return sqrt_up(float(op.copies))",
        "return 1.0",
        (
            (
                ""
                "tests/soundness/test_hostile_arithmetic.py::test_estimates_of_operators_are_not_trusted"
            ),
        ),
    ),
    Canary(
        "a reciprocal scale is not inverted",
        "lmtfast/verified/region.py",
        "    entries = entries.reciprocal() if op.inverse else entries\n",
        "",
        ("tests/test_rules.py::test_division_by_a_number_is_not_its_rounded_reciprocal",),
    ),
    Canary(
        "folding a batch norm is taken as exact",
        "lmtfast/verified/weight_error.py",
        "    return 0 if plain else (SCALE_ROUNDINGS + 1) * scales + 3\n",
        "    return 0\n",
        (
            "tests/test_guarantee.py",
            "tests/test_verified_banded.py",
            "tests/test_audit.py",
        ),
    ),
    Canary(
        "extreme gains of batch norms round away",
        "lmtfast/verified/weight_error.py",
        "            if bool(vanished.any()):\n",
        "            if False:\n",
        (
            "tests/test_guarantee.py",
            "tests/test_audit.py",
            "tests/soundness/test_refusals.py",
        ),
    ),
    Canary(
        "lines of the other side are missed",
        "lmtfast/verified/composite.py",
        "    return (by_lines(image, region.out_shape) > 0.0).any(-1).any(1).T\n",
        "    return (by_lines(image, region.out_shape) > 0.0).all(-1).any(1).T\n",
        ("tests/test_verified_banded.py",),
    ),
    Canary(
        "sums of branches compose by the larger",
        "lmtfast/composing.py",
        "return _run(tape, sigmas, mul_up, add_up, hypot_up, max)",
        "return _run(tape, sigmas, mul_up, max, hypot_up, max)",
        (
            "tests/test_guarantee.py",
            "tests/test_audit.py",
            "tests/test_random_graphs.py",
        ),
    ),
    Canary(
        "concatenations compose by the larger",
        "lmtfast/composing.py",
        "return _run(tape, sigmas, mul_up, add_up, hypot_up, max)",
        "return _run(tape, sigmas, mul_up, add_up, max, max)",
        (
            "tests/test_guarantee.py",
            "tests/test_audit.py",
            "tests/test_random_graphs.py",
        ),
    ),
    Canary(
        "overlapping slices count as disjoint",
        "lmtfast/builder.py",
        "return all(a[1] <= b[0] for a, b in zip(spans, spans[1:], strict=False))",
        "return True",
        (
            "tests/test_rules.py",
            "tests/test_audit.py",
            "tests/test_random_graphs.py",
            "tests/test_architectures.py",
        ),
    ),
    Canary(
        "overlapping maxima count once",
        "lmtfast/rules/pooling.py",
        "    n = math.prod(max(1, m) for m in overlaps)\n",
        "    n = 1\n",
        ("tests/test_rules.py",),
    ),
    Canary(
        "an average counts as if windows never overlap",
        "lmtfast/rules/pooling.py",
        "schur = math.sqrt(float(rows.max()) * float(columns[0].max()))",
        "schur = float(columns[0].max())",
        ("tests/test_rules.py",),
    ),
    Canary(
        "alpha of a sum is ignored",
        "lmtfast/rules/joining.py",
        'return _sum(call, call["self"], call["other"], (1.0, _number(call, "alpha")))',
        'return _sum(call, call["self"], call["other"], (1.0, 1.0))',
        (
            "tests/test_rules.py",
            "tests/test_audit.py",
            "tests/test_random_graphs.py",
        ),
    ),
    Canary(
        "an unknown call counts as 1 (R06)",
        "lmtfast/tracing.py",
        '            raise call.unsupported("there is no rule for it")\n',
        "            return next(v for v in arguments.values() if isinstance(v, Value))\n",
        (
            "tests/soundness/test_refusals.py",
            "tests/test_tracing.py",
            "tests/test_rules.py",
        ),
    ),
    Canary(
        "hooks of a registered module are not seen",
        "lmtfast/tracing.py",
        "        if module._forward_hooks or module._forward_pre_hooks:\n",
        "        if False:\n",
        (
            "tests/soundness/test_refusals.py",
            "tests/test_tracing.py",
            "tests/test_nn.py",
        ),
    ),
    Canary(
        "training mode is certified (R10)",
        "lmtfast/guarantee.py",
        "        if module.training:\n",
        "        if False:\n",
        (
            "tests/test_guarantee.py",
            "tests/soundness/test_refusals.py",
            "tests/test_certification.py",
        ),
    ),
    Canary(
        "NaN weights are certified (R12)",
        "lmtfast/guarantee.py",
        "        if values and not bool(tensor.isfinite().all()):\n",
        "        if False:\n",
        (
            "tests/test_guarantee.py",
            "tests/soundness/test_refusals.py",
            "tests/test_certification.py",
        ),
    ),
    Canary(
        "delta is not shared among operators",
        "lmtfast/guarantee.py",
        "share = Level(level, div_down(level.delta, float(max(1, drawn))))",
        "share = level",
        (
            "tests/test_draws.py",
            "tests/test_guarantee.py",
        ),
    ),
    Canary(
        "the plan of another network is believed",
        "lmtfast/plan.py",
        "        if now != self.signature:\n",
        "        if False:\n",
        (
            "tests/soundness/test_stale_state.py",
            "tests/test_plan.py",
            "tests/test_guarantee.py",
        ),
    ),
    Canary(
        "ties are certified (R01)",
        "lmtfast/radius.py",
        (
            "    quotient = torch.where(room > 0, quotient, 0.0)  # a NaN margin fails the"
            " comparison\n"
        ),
        (
            "    quotient = torch.where(room == 0, math.inf, quotient)\n    margin ="
            " margin.clamp_min(5e-324)\n"
        ),
        (
            "tests/test_radius.py",
            "tests/test_certification.py",
        ),
    ),
    Canary(
        "the logits' own error is ignored",
        "lmtfast/radius.py",
        "    highest = torch.nextafter(value + error, up)\n",
        "    highest = torch.nextafter(value, up)\n",
        (
            "tests/test_radius.py",
            "tests/test_certification.py",
        ),
    ),
    Canary(
        "the radius is not rounded down",
        "lmtfast/radius.py",
        "quotient = torch.nextafter(room / reach, down).clamp_min(0.0)",
        "quotient = (room / reach).clamp_min(0.0)",
        (
            "tests/test_radius.py",
            "tests/test_certification.py",
        ),
    ),
    Canary(
        "an estimate certifies (R04)",
        "lmtfast/radius.py",
        '    if bound.level == "estimate":\n',
        "    if False:\n",
        (
            "tests/test_radius.py",
            "tests/test_certification.py",
        ),
    ),
    Canary(
        "the closest rival is the farthest",
        "lmtfast/radius.py",
        "    radius = quotient.scatter(1, own_column, math.inf).amin(1)\n",
        "    radius = quotient.scatter(1, own_column, 0.0).amax(1)\n",
        ("tests/test_radius.py",),
    ),
    Canary(
        "stored bounds are rounded to nearest",
        "lmtfast/radius.py",
        "    raised = math.ceil(math.ldexp(mantissa, CANONICAL_BITS))\n",
        "    raised = round(math.ldexp(mantissa, CANONICAL_BITS))\n",
        (
            "tests/test_radius.py",
            "tests/test_certification.py",
            "tests/test_certificate.py",
        ),
    ),
    Canary(
        "sums of products are taken as exact",
        "lmtfast/enclosure/registry.py",
        "        local = majorant * (1.0 + 4.0 * gamma) + (count + 4) * UNDERFLOW\n",
        "        local = torch.zeros_like(majorant)\n",
        ("tests/test_enclosure.py",),
    ),
    Canary(
        "carried errors are not amplified",
        "lmtfast/enclosure/registry.py",
        "        return outward(source.base * self.region_norm(source.traced))\n",
        "        return source.base\n",
        ("tests/test_enclosure.py",),
    ),
    Canary(
        "nonlinear calls do not amplify",
        "lmtfast/enclosure/registry.py",
        "        total = outward(constant * (length_up(source.local) + self.carried(source)))\n",
        "        total = outward(length_up(source.local) + self.carried(source))\n",
        ("tests/test_enclosure.py",),
    ),
    Canary(
        "the batch norm's rounding is forgotten",
        "lmtfast/enclosure/linear.py",
        (
            "    own = rounded(scaled, 8.0) + rounded(value) + gain.abs() * (shifted.abs() * 2"
            " * UNIT_ROUNDOFF)\n"
        ),
        "    own = torch.zeros_like(scaled)\n",
        ("tests/test_enclosure.py",),
    ),
    Canary(
        "a sum's own rounding is forgotten",
        "lmtfast/enclosure/joining.py",
        "    local = rounded(value)\n    carried",
        "    local = torch.zeros_like(value)\n    carried",
        ("tests/test_enclosure.py",),
    ),
    Canary(
        "what overflowed counts as known",
        "lmtfast/enclosure/logits.py",
        "    unknown = ~result.value.isfinite() | result.local.isnan()\n",
        "    unknown = result.local.isnan()\n",
        (
            "tests/test_enclosure.py",
            "tests/test_radius.py",
            "tests/test_certification.py",
        ),
    ),
    Canary(
        "autocast reaches the enclosure",
        "lmtfast/enclosure/interpreter.py",
        "            torch.autocast(x.device.type, enabled=False),\n",
        "",
        (
            "tests/test_enclosure.py",
            "tests/soundness/test_precision_settings.py",
        ),
    ),
    Canary(
        "one probe's power is not undone",
        "lmtfast/verified/moment.py",
        "(math.log2(norm) + exponent - math.log2(threshold)) / (2 * iterations)",
        "(math.log2(norm) + exponent) / (2 * iterations)",
        ("tests/test_verified_moment.py",),
    ),
    Canary(
        "the draw is the same every time",
        "lmtfast/verified/drawn.py",
        'secrets.token_bytes if draw == "fresh"',
        'bytes if draw == "fresh"',
        (
            "tests/test_draws.py",
            "tests/test_verified_moment.py",
        ),
    ),
    Canary(
        "the certificate's arrays are not hashed",
        "lmtfast/certificate_file.py",
        "        if hashlib.sha256(parts[name]).hexdigest() != hashes[name]:\n",
        "        if False:\n",
        ("tests/test_certificate.py",),
    ),
    Canary(
        "a key may occur twice",
        "lmtfast/certificate_file.py",
        "    if len(found) != len(pairs):\n",
        "    if False:\n",
        ("tests/test_certificate.py",),
    ),
    Canary(
        "other weights verify",
        "lmtfast/verification.py",
        "    if weights_sha256(named_tensors(model)) != certificate.weights_sha256:\n",
        "    if False:\n",
        (
            "tests/test_certification.py",
            "tests/test_certificate.py",
        ),
    ),
    Canary(
        "larger radii verify",
        "lmtfast/verification.py",
        "~(certificate.prediction_radius <= radius)",
        "~(certificate.prediction_radius <= 1.01 * radius)",
        (
            "tests/test_certification.py",
            "tests/test_certificate.py",
            "tests/test_audit.py",
        ),
    ),
    Canary(
        "smaller bounds verify",
        "lmtfast/verification.py",
        "        if not stored >= recomputed:\n",
        "        if False:\n",
        (
            "tests/test_certification.py",
            "tests/test_certificate.py",
            "tests/test_audit.py",
        ),
    ),
    Canary(
        "the checker forgets the residual",
        "lmtfast/check.py",
        "            error += length(e) + gamma(depth) * size\n",
        "            error += gamma(depth) * size\n",
        (
            "tests/test_check.py",
            "tests/test_check_tampering.py",
        ),
    ),
    Canary(
        "the checker accepts radii that touch",
        "lmtfast/check.py",
        "(moved < gap[at])",
        "(moved <= gap[at] * (1 + 2.0**-40))",
        (
            "tests/test_check.py",
            "tests/test_check_tampering.py",
        ),
    ),
    Canary(
        "the checker compares no weights",
        "lmtfast/check.py",
        "        same = [[*got.shape], sha256(got.tobytes())] == known\n",
        "        same = True\n",
        (
            "tests/test_check.py",
            "tests/test_check_tampering.py",
        ),
    ),
    Canary(
        "the checker believes constants",
        "lmtfast/check.py",
        (
            '        need(number(header[k]) >= values[network[k]], "a larger constant",'
            ' header[k], k, "claim")\n'
        ),
        "        pass\n",
        (
            "tests/test_check.py",
            "tests/test_check_tampering.py",
        ),
    ),
    Canary(
        "executed semantics forget the rounding into storage",
        "lmtfast/execution/recursion.py",
        (
            "        stored = mul_up(COMPOUND, self.unit) * (relative +"
            " Affine(self.pending_shift))\n"
        ),
        "        stored = Affine()\n",
        ("tests/soundness/test_executed.py",),
    ),
    Canary(
        "executed semantics run under autocast",
        "lmtfast/execution/runner.py",
        "        check_autocast()\n",
        "",
        (
            "tests/soundness/test_executed_settings.py",
            "tests/test_execution.py",
        ),
    ),
    Canary(
        "the batch norm's eps counts twice",
        "lmtfast/weights.py",
        "root = torch.sqrt(variance + ref.eps)",
        "root = torch.sqrt(variance + 2 * ref.eps)",
        (
            "tests/test_rules.py",
            "tests/test_guarantee.py",
            "tests/test_audit.py",
        ),
    ),
    Canary(
        "an attack on the sphere is not inside",
        "lmtfast/judgement.py",
        "squared_distance(a, b) <= Fraction(radius) ** 2",
        "squared_distance(a, b) < Fraction(radius) ** 2",
        ("tests/test_attack.py",),
    ),
    Canary(
        "an attack's distance in floats",
        "lmtfast/judgement.py",
        "total += (first - second) ** 2",
        "total += int(float(first - second) ** 2 * (1 + 2.0**-50))",
        ("tests/test_attack.py",),
    ),
)
