# SPDX-License-Identifier: MIT
"""The public names, their signatures and their documentation, examples included."""

from __future__ import annotations

import doctest
import importlib
import inspect
import io
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import lmtfast

SIGNATURES = {
    "AttackReport": None,  # made by attack
    "BoundPlan": "(graph, slots, table, engines, reasons, state_sizes, backend, backend_reason, "
    "signature)",
    "Budget": "(seconds=120.0, memory=4294967296.0)",
    "Certificate": None,  # made by certify and load_certificate, never by hand
    "Level": "(name, delta=None)",
    "LipschitzBound": None,  # made by the bounds
    "NetworkBound": "(model, input_shape, *, engine='auto', backend=None, batch_norm='running')",
    "attack": "(model, certificate, data, *, attacks=None, slow_inputs=1000, seed=0, "
    "progress=None)",
    "available_backends": "()",
    "certified_bound": "(model, input_shape, *, level='rigorous', delta=None, method='auto', "
    "budget=None, draw='fresh', device='cpu')",
    "certify": "(model, data, *, input_shape, input_range, level='rigorous', method='auto', "
    "budget=None, delta=None, draw='fresh', device='cpu', semantics='ideal', progress=None)",
    "conv_spectral_norm": "(weight, input_shape, *, stride=1, padding=0, dilation=1, groups=1, "
    "padding_mode='zeros', transposed=False, level='rigorous')",
    "load_certificate": "(path)",
    "margin_cross_entropy": "(logits, target, bound, *, eps, scaling='lmt++', reduction='mean', "
    "trades_weight=1.0, backend=None)",
    "register_backend": "(name, *, module, provides, probe)",
    "register_rule": "(layer)",
    "spectral_norm": "(module, input_shape, *, level='rigorous', delta=None)",
    "trace": "(model, input_shape)",
}
MODULES = sorted(
    info.name
    for info in pkgutil.walk_packages(lmtfast.__path__, "lmtfast.")
    if info.name not in {"lmtfast.__main__", "lmtfast._C"}
)
PUBLIC = sorted(SIGNATURES)


def bare_signature(function: object) -> str:
    signature = inspect.signature(function)  # type: ignore[arg-type]
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    return str(inspect.Signature(bare))


def test_there_are_exactly_these_names() -> None:
    assert lmtfast.__all__ == PUBLIC
    assert len(PUBLIC) == 18
    assert set(PUBLIC) <= set(dir(lmtfast))


@pytest.mark.parametrize("name", PUBLIC)
def test_signature(name: str) -> None:
    value = getattr(lmtfast, name)
    assert value.__name__ == name
    if SIGNATURES[name] is not None:
        assert bare_signature(value) == SIGNATURES[name]


def test_names_load_on_first_use() -> None:
    code = (
        "import sys, lmtfast\n"
        "assert 'torch' not in sys.modules and 'trace' not in vars(lmtfast)\n"
        "from lmtfast import trace\n"
        "assert vars(lmtfast)['trace'] is trace and 'torch' in sys.modules\n"
        "from lmtfast import *\n"
        "assert certify is lmtfast.certify\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'lipschitz'"):
        lmtfast.lipschitz  # noqa: B018


@pytest.mark.parametrize("name", PUBLIC)
def test_docstring_has_every_section(name: str) -> None:
    value = getattr(lmtfast, name)
    text = inspect.getdoc(value) or ""
    wanted = ["Guarantee:", "Example:"]
    if inspect.isclass(value):
        assert "Args:" in text or "Attributes:" in text
    else:
        signature = inspect.signature(value)
        wanted += ["Args:"] if signature.parameters else []
        wanted += ["Returns:"] if signature.return_annotation not in (None, "None") else []
    if name not in {
        "AttackReport",
        "BoundPlan",
        "Certificate",
        "LipschitzBound",
        "available_backends",
    }:
        wanted.append("Raises:")
    assert not [section for section in wanted if section not in text]
    assert ">>> " in text.partition("Example:")[2]


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.usefixtures("registries")
def test_examples_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every example in a docstring, in an empty directory. One process: torch is imported once."""
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(name)
    report = io.StringIO()
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    for test in doctest.DocTestFinder(exclude_empty=True).find(module, name):
        runner.run(test, out=report.write)
    assert runner.failures == 0, report.getvalue()
