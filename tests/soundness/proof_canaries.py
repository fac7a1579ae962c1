# SPDX-License-Identifier: MIT
"""Bugs seeded into the proofs of norms: a bound below the truth."""

from __future__ import annotations

from tests.soundness.canary import Canary

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
        (
            "tests/soundness/test_hostile_arithmetic.py::test_the_largest_of_a_batch_may_come_anywhere",
        ),
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
)
