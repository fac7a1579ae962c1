# SPDX-License-Identifier: MIT
"""Bugs seeded behind the norms: rules, logits and radii."""

from __future__ import annotations

from tests.soundness.canary import Canary

CANARIES = (
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
        "a sum with a constant passes for the tensor itself",
        "lmtfast/rules/joining.py",
        "    return replace(parts[0])\n",
        "    return parts[0]\n",
        ("tests/soundness/test_sorted_pairs.py",),
    ),
    Canary(
        "two copies of an entry count as one",
        "lmtfast/builder.py",
        "if op.copies > 1 else float(op.copies)",
        "if op.copies > 2 else 1.0",
        ("tests/test_rules.py", "tests/test_audit.py", "tests/test_random_graphs.py"),
    ),
    Canary(
        "a steep activation counts as 1",
        "lmtfast/rules/elementwise.py",
        "    return _apply(call, SILU_SLOPE)\n",
        "    return _apply(call, 1.0)\n",
        ("tests/test_rules.py", "tests/test_audit.py"),
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
            "tests/soundness/test_radius_rounding.py",
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
        (
            "tests/soundness/test_hostile_enclosure.py",
            "tests/test_enclosure.py",
        ),
    ),
    Canary(
        "nonlinear calls do not amplify",
        "lmtfast/enclosure/registry.py",
        "        total = outward(constant * (length_up(source.local) + self.carried(source)))\n",
        "        total = outward(length_up(source.local) + self.carried(source))\n",
        (
            "tests/soundness/test_hostile_enclosure.py",
            "tests/test_enclosure.py",
        ),
    ),
    Canary(
        "the batch norm's rounding is forgotten",
        "lmtfast/enclosure/linear.py",
        (
            "    own = rounded(scaled, 8.0) + rounded(value) + gain.abs() * (shifted.abs() * 2"
            " * UNIT_ROUNDOFF)\n"
        ),
        "    own = torch.zeros_like(scaled)\n",
        (
            "tests/soundness/test_hostile_enclosure.py",
            "tests/test_enclosure.py",
        ),
    ),
    Canary(
        "a sum's own rounding is forgotten",
        "lmtfast/enclosure/joining.py",
        "    local = rounded(value)\n    carried",
        "    local = torch.zeros_like(value)\n    carried",
        (
            "tests/soundness/test_hostile_enclosure.py",
            "tests/test_enclosure.py",
        ),
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
