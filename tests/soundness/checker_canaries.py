# SPDX-License-Identifier: MIT
"""Bugs seeded in certificate files, their verification and the checker."""

from __future__ import annotations

from tests.soundness.canary import Canary

CANARIES = (
    Canary(
        "the checker carries roundings through mixing maps",
        "lmtfast/check_execution.py",
        'kept = bool(step["diagonal"]) and source.late < LATE',
        "kept = source.late < LATE",
        ("tests/soundness/test_recursion_terms.py", "tests/soundness/test_roundings.py"),
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
            "tests/soundness/test_checker_terms.py",
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
            "tests/soundness/test_checker_terms.py",
            "tests/test_check.py",
            "tests/test_check_tampering.py",
        ),
    ),
    Canary(
        "the checker compares no weights",
        "lmtfast/check.py",
        '        same = [[*got.shape], sha256(got.tobytes())] == network["weights"][name]\n',
        "        same = True\n",
        (
            "tests/test_check.py",
            "tests/test_check_tampering.py",
        ),
    ),
    Canary(
        "the checker rounds denormal lengths to nearest",
        "lmtfast/check.py",
        "np.nextafter(np.ldexp(root, exponent), np.inf)",
        "np.ldexp(root, exponent)",
        (
            "tests/soundness/test_checker.py::"
            "test_lengths_and_distances_are_never_below_the_exact_ones",
        ),
    ),
    Canary(
        "the checker forgets that a border copies",
        "lmtfast/check.py",
        "c / math.sqrt(times) * (1 - 2.0**-50)",
        "c",
        ("tests/test_check_borders.py::test_norms_are_those_of_the_matrix_entry_by_entry",),
    ),
    Canary(
        "the checker closes circles that are read beyond their border",
        "lmtfast/check.py",
        'if mode != "circular" or (s * (m - 1) + d * (k - 1) >= reads.shape).any():',
        'if mode != "circular":',
        ("tests/test_check_borders.py::test_outputs_beyond_the_border_are_on_no_circle",),
    ),
    Canary(
        "the checker takes strided circles for whole ones",
        "lmtfast/check.py",
        "step = s if (m * s == n).all() else s**0",
        "step = s",
        ("tests/test_check_borders.py::test_norms_are_those_of_the_matrix_entry_by_entry",),
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
)
