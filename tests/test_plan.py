# SPDX-License-Identifier: MIT
"""Plans are values: frozen, hashable, picklable, printable, and tied to one structure."""

from __future__ import annotations

import dataclasses
import pickle

import pytest
import torch
from torch import nn

import lmtfast as lf
from lmtfast.errors import StalePlanError
from lmtfast.plan import make_plan
from lmtfast.table import FIELDS
from lmtfast.tracing import trace_model
from tests.networks import ARCHITECTURES, IMAGE, WideBlock


@pytest.fixture(scope="module")
def block() -> tuple[nn.Module, lf.BoundPlan]:
    model = nn.Sequential(WideBlock(2, 3, 2), nn.Flatten(), nn.Linear(12, 2)).eval()
    return model, lf.trace(model, (2, 4, 4))


GOLDEN = """\
region        kind    in     out    bucket  engine         backend    rule
0.bn1         scale   2x4x4  2x4x4  0       closed form    reference  scale
0.conv1       conv    2x4x4  3x2x2  1       operator       reference  conv + row scale
0.conv2       conv    3x2x2  3x2x2  2       operator       reference  conv
0.shortcut    conv    2x4x4  3x2x2  3       operator       reference  conv
2             linear  12     2      4       operator       reference  linear
0             relu                                                    1
0             relu                                                    1
5 operators in 5 buckets; head: 2; backend: reference (a plan without a bound); input (2, 4, 4); """


def test_a_printed_plan_documents_the_network(block: tuple[nn.Module, lf.BoundPlan]) -> None:
    text = str(block[1])
    lines = [" ".join(line.split()) for line in text.splitlines()]
    wanted = [" ".join(line.split()) for line in GOLDEN.splitlines()]
    assert [line.replace("0.conv1+0.bn2", "0.conv1") for line in lines[:-1]] == wanted[:-1]
    assert lines[-1].startswith(wanted[-1])


def test_plans_are_values(block: tuple[nn.Module, lf.BoundPlan]) -> None:
    model, plan = block
    again = lf.trace(model, (2, 4, 4))
    assert plan == again
    assert hash(plan) == hash(again)
    assert plan.fingerprint == again.fingerprint
    loaded = pickle.loads(pickle.dumps(plan))
    assert loaded == plan
    assert loaded.fingerprint == plan.fingerprint
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.backend = "other"  # type: ignore[misc]
    assert {plan: 1}[again] == 1


def test_another_structure_is_another_plan(block: tuple[nn.Module, lf.BoundPlan]) -> None:
    model, plan = block
    others = [
        lf.trace(nn.Sequential(*model[:2]), (2, 4, 4)),
        lf.trace(nn.Sequential(WideBlock(2, 3, 1), nn.Flatten()), (2, 4, 4)),
    ]
    for other in others:
        assert other != plan
        assert other.fingerprint != plan.fingerprint
    for changed in (nn.Sequential(*model, nn.ReLU()), nn.Sequential(*model[:2], nn.Linear(12, 3))):
        with pytest.raises(StalePlanError):
            plan.check_fresh(changed)
    plan.check_fresh(model)


def test_values_do_not_enter_a_plan(block: tuple[nn.Module, lf.BoundPlan]) -> None:
    model, plan = block
    for parameter in model.parameters():
        parameter.data.mul_(2)
    assert lf.trace(model, (2, 4, 4)).fingerprint == plan.fingerprint


def test_rows_of_the_table_have_one_width() -> None:
    for build in ARCHITECTURES.values():
        plan = lf.trace(build(), IMAGE)
        assert all(len(row) == len(FIELDS) for row in plan.table.rows)
        assert len(plan.table.rows) == len(plan.operators) == len(plan.engines)
        assert sorted(set(plan.table.buckets)) == list(range(plan.table.n_buckets))
        text = str(plan)
        assert all(o.name in text for o in plan.operators)


def test_equal_layers_share_a_bucket() -> None:
    model = nn.Sequential(*(nn.Conv2d(2, 2, 3, padding=1) if i % 2 == 0 else nn.ReLU()
                            for i in range(6)))  # fmt: skip
    assert lf.trace(model, (2, 5, 5)).table.buckets == (0, 0, 0)


def test_names_of_operators_are_unique() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    graph = trace_model(nn.Sequential(model, model, nn.Linear(3, 3)), (3,)).graph
    plan = make_plan(nn.Linear(1, 1), graph, engine="operator", backend="reference")
    names = [o.name for o in plan.operators]
    assert len(names) == len(set(names))
    assert torch.tensor(len(names)) > 0
