# SPDX-License-Identifier: MIT
"""The documents: every Python block runs, in order per file; every local link leads somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.readme_table import with_tables

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [
    *ROOT.glob("*.md"),
    *sorted((ROOT / "docs").rglob("*.md")),
    *(ROOT / folder / "README.md" for folder in ("csrc", "benchmarks")),
]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
NAMES = [str(path.relative_to(ROOT)) for path in DOCUMENTS]


def python_blocks(path: Path) -> list[tuple[int, str]]:
    """Line and source of every block, for tracebacks that point into the document."""
    text = path.read_text(encoding="utf-8")
    return [(text.count("\n", 0, m.start(1)), m.group(1)) for m in BLOCK.finditer(text)]


@pytest.mark.parametrize("name", [n for n in NAMES if python_blocks(ROOT / n)])
@pytest.mark.usefixtures("registries")
def test_blocks_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    space: dict[str, object] = {"__name__": "document"}
    for line, source in python_blocks(ROOT / name):
        exec(compile("\n" * line + source, str(ROOT / name), "exec"), space)


@pytest.mark.parametrize("name", NAMES)
def test_local_links_exist(name: str) -> None:
    path = ROOT / name
    for target in LINK.findall(path.read_text(encoding="utf-8")):
        file, _, anchor = target.partition("#")
        if "://" in target or target.startswith("mailto:"):
            continue
        linked = (path.parent / file).resolve() if file else path
        assert linked.exists(), target
        if anchor:
            heads = re.findall(r"^#+ (.+)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in heads}
            assert anchor in slugs, target


def test_results_come_from_files() -> None:
    """README's tables are what benchmarks/readme_table.py writes."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert with_tables(readme) == readme, "run: python -m benchmarks.readme_table"
