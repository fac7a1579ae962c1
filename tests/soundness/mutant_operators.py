# SPDX-License-Identifier: MIT
"""Small changes to a source file: cosmic-ray's operators, and those that proofs of bounds call for.

cosmic-ray changes arithmetic, comparisons, numbers, signs and booleans. The bounds here are written
as calls (``add_up(a, b)``), so five operators more drop a term or a factor, forget a rounding or a
root, take the smaller for the larger, and round the other way. Annotations,
error messages and ``zip(strict=True)`` stay.
"""

from __future__ import annotations

import ast
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

COSMIC = (
    *(f"ReplaceBinaryOperator_{pair}" for pair in (
        "Add_Sub", "Sub_Add", "Mul_Div", "Div_Mul", "Pow_Mul", "FloorDiv_Div", "Mod_FloorDiv",
        "LShift_RShift", "RShift_LShift", "BitAnd_BitOr", "BitOr_BitAnd")),
    *(f"ReplaceComparisonOperator_{pair}" for pair in (
        "Lt_LtE", "LtE_Lt", "Gt_GtE", "GtE_Gt", "Eq_NotEq", "NotEq_Eq")),
    "ReplaceUnaryOperator_Delete_USub", "ReplaceUnaryOperator_Delete_Not",
    "ReplaceTrueWithFalse", "ReplaceFalseWithTrue", "ReplaceAndWithOr", "ReplaceOrWithAnd",
    "NumberReplacer",
)  # fmt: skip
# Calls of which one argument is left, and how many arguments may be the one.
TWO = ("add_up", "add_down", "sub_up", "sub_down", "mul_up", "mul_down", "div_up", "div_down",
       "raised_sum", "maximum", "minimum", "max", "min", "hypot_up")  # fmt: skip
ONE = ("sqrt_up", "sqrt_down", "inflate", "scale_up", "scale_down", "next_up", "next_down",
       "nextafter", "gamma_up", "up", "down", "sqrt", "abs", "raised", "ceil")  # fmt: skip
METHODS = ("abs", "sqrt", "square", "clamp_min", "clamp_max", "clamp", "clamp_")
SUMS = ("sum_up", "sum_down", "hypot_up")
SWAPS = {"max": "min", "min": "max", "amax": "amin", "amin": "amax", "maximum": "minimum",
         "minimum": "maximum", "argmax": "argmin", "ceil": "floor", "any": "all",
         "all": "any"}  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """One change of one file.

    Attributes:
        file: Relative to the repository.
        line: Where the change begins, from 1.
        before, after: The lines it changes.
        number: How many lines equal to its first stand above it.
        source: The whole changed file.
    """

    file: str
    line: int
    operator: str
    before: str
    after: str
    number: int
    source: str

    @property
    def key(self) -> tuple[str, str, str, int]:
        return (self.file, self.before, self.after, self.number)


Edit = tuple[int, int, str, Callable[[], str]]  # line, column, operator, the changed file


def mutants(file: str, sample: int | None = None, seed: int = 1) -> tuple[list[Mutant], int]:
    """Mutants of a file in the order of its lines, or a sample, and how many there are in all."""
    text = (ROOT / file).read_text(encoding="utf-8")
    quiet = list(_spans(text))
    edits = [e for e in (*_cosmic(text), *_own(text))
             if not any(low <= e[:2] < high for low, high in quiet)]  # fmt: skip
    edits.sort(key=lambda e: e[:3])
    lines = text.splitlines()
    chosen = list(range(len(edits)))
    if sample is not None and sample < len(edits):
        chosen = sorted(random.Random(f"{seed} {file}").sample(chosen, sample))
    found: list[Mutant] = []
    seen: set[str] = set()
    for line, _, operator, change in (edits[i] for i in chosen):
        source = change()
        if source == text or source in seen or not _compiles(source):
            continue
        seen.add(source)
        before, after = _difference(text, source)
        number = sum(above.strip() == lines[line - 1].strip() for above in lines[: line - 1])
        found.append(Mutant(file, line, operator, before, after, number, source))
    return found, len(edits)


def _compiles(source: str) -> bool:
    try:
        compile(source, "mutant", "exec")
    except (SyntaxError, ValueError):
        return False
    return True


def _difference(text: str, source: str) -> tuple[str, str]:
    """The lines that differ, stripped and joined."""
    old, new = text.splitlines(), source.splitlines()
    while old and new and old[0] == new[0]:
        del old[0], new[0]
    while old and new and old[-1] == new[-1]:
        del old[-1], new[-1]
    return tuple(" ".join(part.strip() for part in lines) for lines in (old, new))  # type: ignore


def _spans(text: str) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """Where nothing is changed: annotations, what is raised, and names for importers."""
    for node in ast.walk(ast.parse(text)):
        quiet: list[ast.AST | None] = []
        if isinstance(node, ast.FunctionDef):
            quiet.append(node.returns)
        elif isinstance(node, (ast.arg, ast.AnnAssign)):
            quiet.append(node.annotation)
        elif isinstance(node, ast.keyword) and node.arg == "strict":  # an assertion of zip's
            quiet.append(node.value)
        elif isinstance(node, (ast.Raise, ast.Import, ast.ImportFrom, ast.JoinedStr)):
            quiet.append(node)
        for part in quiet:
            if part is not None:
                yield ((part.lineno, part.col_offset), (part.end_lineno, part.end_col_offset))  # type: ignore


def _cosmic(text: str) -> Iterator[Edit]:
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.operators.provider import OperatorProvider

    provider = OperatorProvider()
    nodes = list(ast_nodes(get_ast(text)))
    for name in COSMIC:
        operator = provider[name]()
        places = [(node, place) for node in nodes for place in operator.mutation_positions(node)]
        for occurrence, (node, ((line, column), _)) in enumerate(places):
            if node.parent is not None and node.parent.type == "parameters":
                continue  # the star before arguments that have to be named
            yield line, column, name, lambda o=operator, k=occurrence: mutate_code(text, o, k)  # type: ignore


def _own(text: str) -> Iterator[Edit]:
    tree = ast.parse(text)
    lines = text.splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line.encode()))
    raw = text.encode()

    def at(node: ast.expr) -> tuple[int, int]:
        return (starts[node.lineno - 1] + node.col_offset,
                starts[node.end_lineno - 1] + node.end_col_offset)  # type: ignore  # fmt: skip

    def edit(node: ast.expr, operator: str, low: int, high: int, put: bytes) -> Edit:
        changed = (raw[:low] + put + raw[high:]).decode()
        return node.lineno, node.col_offset, operator, lambda: changed

    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        method = isinstance(node.func, ast.Attribute)
        name = node.func.attr if isinstance(node.func, ast.Attribute) else (
            node.func.id if isinstance(node.func, ast.Name) else "")  # fmt: skip
        low, high = at(node)
        count = 2 if name in TWO else 1 if name in ONE else 0
        plain = [a for a in node.args if not isinstance(a, (ast.Starred, ast.GeneratorExp))]
        for argument in plain[:count] if count == 1 or len(node.args) > 1 else ():
            a, b = at(argument)
            yield edit(node, "DropCall", low, high, b"(" + raw[a:b] + b")")
        if method and name in METHODS:
            a, b = at(node.func.value)  # type: ignore[attr-defined]
            yield edit(node, "DropMethod", low, high, b"(" + raw[a:b] + b")")
        if name in SWAPS:
            b = at(node.func)[1]
            yield edit(node, "SwapExtreme", b - len(name), b, SWAPS[name].encode())
        if name == "nextafter" and len(node.args) == 2:
            a, b = at(node.args[1])
            yield edit(node, "RoundOtherWay", a, b, b"-(" + raw[a:b] + b")")
        if name in SUMS and node.args and isinstance(node.args[0], ast.Tuple):
            terms = node.args[0].elts
            a, b = at(node.args[0])
            for k in range(len(terms) if len(terms) > 1 else 0):
                kept = b", ".join(raw[slice(*at(t))] for i, t in enumerate(terms) if i != k)
                yield edit(terms[k], "DropTerm", a, b, b"(" + kept + b",)")
