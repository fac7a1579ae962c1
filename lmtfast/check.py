# SPDX-License-Identifier: MIT
"""Checks a certificate against the weights with NumPy alone: ``python check.py CERT WEIGHTS``.

Shares nothing with the library that wrote the file, and may be copied anywhere. Trusted: IEEE 754
binary64 in round to nearest, roots within one unit in the last place, and matrix products that sum
in some order (K products err by at most gamma(K) times the sum of their sizes). Checked:

1. The file is whole, canonical, and agrees with its own hashes and counts.
2. The weights are those its network names, and its fingerprint is of this network and them.
3. Every operator's norm is at most the stored c. T is its matrix, g is slightly below c^2, L any
   factor a solver gives: E = g I - T T^T - L L^T implies |T|^2 <= g + |E|. Blocks of E are computed,
   their rounding is bounded, and |E| is at most the largest row sum of its blocks' norms. L fills
   the band of T T^T along the image; a group, a position or an axis that stands alone is proved alone.
4. The network's constants follow from the norms, and the radii from the stored logits, strictly.

Scalar bounds are made of fewer than 2^20 nonnegative terms; the factor SAFE covers their rounding.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import math
import sys
import zipfile
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

UNCHECKED = (
    "Not checked, because it needs the library, the model and the inputs (lmtfast verify): that "
    "the network described is the model's, the logits are the inputs', and the labels are right."
)
ARRAYS = {
    "label": "<i8", "logit_error": "<f8", "logits": "<f8", "margin_lower": "<f8",
    "prediction": "<i8", "prediction_radius": "<f8",
}  # fmt: skip
KEYS = set(
    "arrays assumptions classes counts delta features fingerprint head_sha256 input_range "
    "input_shape level method network norm operators program_sha256 requested_method schema "
    "semantics slack total versions weights_sha256".split()
)
WITHIN = "an operator that can be proved again within this checker's limits"
VERIFY = "use lmtfast verify, which knows more proofs"
UNIT, SAFE = 2.0**-53, 1.0 + 2.0**-20
GAP = 2.0**-26  # g = c^2 (1 - GAP); certificates hold at least twice that
TINY = 2.0**-900  # above all that underflow can add to numbers scaled to one
CHUNK, LINE = 512, 256  # inner indices summed at once; least order of a block
OPERATIONS, ENTRIES = 2.0**43, 2**27  # most that one proof may take and hold
Array = np.ndarray
Rows = tuple[list[int], list[tuple[int, int]], Callable[[int], Array]]


class Finding(Exception):
    """Why a certificate is not accepted. Kinds: file, claim, and limit (nothing was shown)."""

    def __init__(self, kind: str, expected: str, got: Any, where: str, remedy: str = "") -> None:
        self.kind, self.where = kind, where
        remedy = remedy or "do not rely on this certificate; certify the model again"
        super().__init__(f"{kind}: expected {expected}; got {got}; at {where}. Do this: {remedy}")


def need(holds: Any, expected: str, got: Any, where: str, kind: str = "file") -> None:
    """Raise a finding unless something holds."""
    if not holds:
        raise Finding(kind, expected, str(got)[:200], where)


# -- files -----------------------------------------------------------------------------------------


def canonical(item: Any) -> str:
    return json.dumps(item, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def sha256(content: str | bytes) -> str:
    data = content.encode("ascii") if isinstance(content, str) else content
    return hashlib.sha256(data).hexdigest()


def refuse_float(text: str) -> Any:
    raise Finding("file", "floats in hexadecimal", text, "header")


def number(item: Any, where: str) -> float:
    """A float in its one hexadecimal form."""
    value = float.fromhex(item) if isinstance(item, str) else 0.0
    need(value.hex() == item and not math.isnan(value), "a hexadecimal float", item, where)
    return value


def zipped(arrays: dict[str, Array]) -> bytes:
    """The one file that holds these arrays."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(arrays):
            info = zipfile.ZipInfo(f"{name}.npy")
            info.create_system, info.external_attr = 3, 0o644 << 16
            archive.writestr(info, encoded(arrays[name]))
    return buffer.getvalue()


def encoded(array: Array) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


def read_certificate(content: bytes) -> tuple[dict[str, Any], dict[str, Array]]:
    """Header and arrays of a certificate file."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        names = [n.removesuffix(".npy") for n in archive.namelist()]
        need(set(names) <= {*ARRAYS, "header"}, "known arrays", names, "file")
        arrays = {n: np.load(io.BytesIO(archive.read(f"{n}.npy"))) for n in names}
    need(zipped(arrays) == content, "the one encoding of its arrays", "other bytes", "file")
    text = bytes(arrays.pop("header")).decode("ascii")
    header = json.loads(text, parse_float=refuse_float, parse_constant=refuse_float)
    need(canonical(header) == text, "canonical JSON, no key twice", "another form", "header")
    need(header["schema"] != 1, "schema 2", "schema 1, which has nothing to check", "header")
    need(type(header["schema"]) is int and header["schema"] == 2, "schema 2", "another", "header")
    seal = header.pop("seal")
    need(seal == sha256(canonical(header)), "the header's own hash", seal, "seal")
    need(set(header) == KEYS, "the keys of schema 2", sorted(set(header) ^ KEYS), "header")
    need({*ARRAYS, "label"} == {*arrays, "label"}, "all arrays", sorted(arrays), "file")
    for name, array in arrays.items():
        fits = array.dtype.str == ARRAYS[name] and array.ndim == 1
        need(fits and header["arrays"][name] == sha256(encoded(array)), "its hash", "other", name)
    need(header["arrays"].keys() == arrays.keys(), "the hash of every array", "others", "arrays")
    return header, arrays


def read_weights(path: Path) -> dict[str, Array]:
    """Arrays of an npz or safetensors file as float64, without the prefix of checkpoints."""
    raw = path.read_bytes()
    if raw[:2] == b"PK":
        with np.load(io.BytesIO(raw)) as archive:
            return {n: archive[n].astype("<f8") for n in archive.files}
    kinds = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4"}
    found, start = {}, 8 + int.from_bytes(raw[:8], "little")
    for name, entry in json.loads(raw[8:start]).items():
        if entry.get("dtype") in kinds:
            low, high = entry["data_offsets"]
            array = np.frombuffer(raw[start + low : start + high], kinds[entry["dtype"]])
            if entry["dtype"] == "BF16":
                array = (array.astype("<u4") << 16).view("<f4")
            found[name.removeprefix("model/")] = array.astype("<f8").reshape(entry["shape"])
    return found


# -- operators -------------------------------------------------------------------------------------


class Tensors:
    """The tensors of a network by their description; with ``absolute`` their sizes."""

    def __init__(self, arrays: dict[str, Array], absolute: bool = False) -> None:
        self.arrays, self.absolute = arrays, absolute

    def size(self, value: Any) -> Any:
        return np.abs(value) if self.absolute else value

    def gain(self, node: Any, name: str = "gain") -> float:
        return float(self.size(number(node[name], name)))

    def get(self, ref: Any) -> Array:
        """At most 5 roundings: a sum, a root that counts twice, a quotient."""
        if "array" in ref:
            return np.asarray(self.size(self.arrays[ref["array"]]))
        if "values" in ref:
            values = [number(v, "constant") for v in ref["values"]]
            return np.asarray(self.size(np.array(values, "<f8").reshape(ref["shape"])))
        inside = Tensors(self.arrays).get(ref["variance"]) + number(ref["eps"], "eps")
        return np.asarray((self.get(ref["weight"]) if ref["weight"] else 1.0) / np.sqrt(inside))

    def scale(self, item: Any) -> Array:
        """A factor or its reciprocal."""
        return np.asarray(1.0 / self.get(item["ref"]) if item["inverse"] else self.get(item["ref"]))

    def acting(self, node: Any, weight: Array, sides: Any) -> Array:
        """A kernel times its gain and the scales of its rows and columns, broadcast as sides."""
        for side, scales in zip(sides, (node["rows"], node["columns"]), strict=True):
            for factor in map(self.scale, scales):
                weight = weight * factor.reshape(side if factor.size > 1 else ())
        return weight * self.gain(node)

    def matrix(self, node: Any) -> Array:
        """The acting matrix of a linear node."""
        weight = self.get(node["weight"])
        fits = weight.shape == (node["out"][-1], node["in"][-1])
        need(fits, "a matrix of this shape", weight.shape, "linear")
        weight, identity = self.acting(node, weight, ((-1, 1), (1, -1))), self.gain(node, "identity")
        return weight + identity * np.eye(*weight.shape) if identity else weight

    def kernel(self, node: Any) -> Array:
        """The acting kernel ``(groups, rows, columns, taps)``; of the adjoint if transposed."""
        groups, swap, size = node["groups"], node["transposed"], node["kernel"]
        rows, columns = (node["in"][0], node["out"][0])[:: 1 if swap else -1]
        weight = self.get(node["weight"])
        fits = weight.shape == (rows, columns // groups, *size) and rows % groups == 0
        need(fits and columns % groups == 0, "a kernel of this shape", weight.shape, "conv")
        weight = weight.reshape(groups, rows // groups, columns // groups, -1)
        sides = ((groups, -1, 1, 1), (groups, 1, -1, 1))[:: -1 if swap else 1]
        weight, identity = self.acting(node, weight, sides), self.gain(node, "identity")
        if identity:
            at = [p[0] // d for p, d in zip(node["padding"], node["dilation"], strict=True)]
            exact = all(p[0] == a * d for p, a, d in zip(node["padding"], at, node["dilation"]))
            same = node["in"] == node["out"] and set(node["stride"]) == {1} and not swap
            need(exact and same, "the shape of x + conv(x)", node["padding"], "conv")
            channel = np.arange(weight.shape[1])
            weight[:, channel, channel, np.ravel_multi_index(at, size)] += identity
        return weight


def pairs(node: Any) -> list[tuple[Array, Array]]:
    """For every tap of a convolution, the positions of columns and of rows that it connects."""
    large, small = (node["in"][1:], node["out"][1:])[:: -1 if node["transposed"] else 1]
    fields, axes = [node[k] for k in ("kernel", "stride", "padding", "dilation")], []
    for n, m, k, s, p, d in zip(large, small, *fields, strict=True):
        need(min(k, s, d) > 0 <= min(p), "positive geometry", (k, s, p, d), "conv")
        reads = [s * np.arange(m) - p[0] + d * t for t in range(k)]
        reads = [r % n for r in reads] if node["circular"] else reads
        inside = [(r >= 0) & (r < n) for r in reads]
        axes.append([(r[i], np.flatnonzero(i)) for r, i in zip(reads, inside, strict=True)])
    found = []
    for chosen in itertools.product(*axes):
        p = q = np.zeros(1, dtype=np.int64)
        for (i, o), n, m in zip(chosen, large, small, strict=True):
            p, q = (p[:, None] * n + i).ravel(), (q[:, None] * m + o).ravel()
        found.append((p, q))
    return found


def copied(node: Any) -> Array:
    """Where every entry of a copy comes from, from runs (start, step, count); -1 is zero."""
    runs = [start + step * np.arange(count) for start, step, count in node["runs"]]
    index = np.concatenate([np.zeros(0, np.int64), *runs])
    inside = ((index >= -1) & (index < math.prod(node["in"]))).all()
    need(inside and len(index) == math.prod(node["out"]), "entries of the input", "others", "copy")
    return index


def averages(node: Any) -> list[Array]:
    """One averaging matrix per axis; their Kronecker product acts."""
    axes = [np.zeros((len(w), n)) for w, n in zip(node["windows"], node["in"], strict=True)]
    for axis, windows in zip(axes, node["windows"], strict=True):
        for row, (start, stop, count) in zip(axis, windows, strict=True):
            need(0 <= start <= stop <= len(row) and count > 0, "windows", windows, "average")
            row[start:stop] = 1.0 / count
    return axes


def folded(node: Any) -> int:
    """Roundings between a stored and an acting kernel; 0 if it acts as stored."""
    scales = len(node["rows"]) + len(node["columns"])
    return 7 * scales + 3 if scales or [node["gain"], node["identity"]] != PLAIN else 0


PLAIN = [(1.0).hex(), (0.0).hex()]


def act(node: Any, tensors: Tensors, inputs: list[Array]) -> Array:
    """One node of a region on a batch."""
    kind, x, out = node["op"], inputs[0], node.get("out")
    if kind == "add":
        return np.asarray(sum(inputs[1:], x))
    if kind == "concat":
        return np.concatenate(inputs, node["axis"] + 1)
    if kind == "linear":
        return np.asarray(x @ tensors.matrix(node).T)
    if kind == "scale":
        factor = tensors.scale(node).reshape(node["shape"]) if node["ref"] else 1.0
        return np.asarray(x * (factor * tensors.gain(node)))
    if kind == "copy":
        return np.pad(x.reshape(len(x), -1), ((0, 0), (0, 1)))[:, copied(node)].reshape(-1, *out)
    if kind == "average":
        for k, axis in enumerate(averages(node)):
            x = np.moveaxis(np.moveaxis(x, k + 1, -1) @ axis.T, -1, k + 1)
        return np.asarray((x * tensors.gain(node)).reshape(-1, *out))
    need(kind == "conv", "a known operation", kind, "network")
    kernel, swap, groups = tensors.kernel(node), node["transposed"], node["groups"]
    x = x.reshape(len(x), groups, x.shape[1] // groups, -1)
    y = np.zeros((len(x), groups, out[0] // groups, math.prod(out[1:])))
    for t, (p, q) in enumerate(pairs(node)):
        if swap:
            y[..., p] += kernel[..., t].swapaxes(1, 2) @ x[..., q]
        else:
            y[..., q] += kernel[..., t] @ x[..., p]
    return y.reshape(-1, *out)


def image(region: Any, tensors: Tensors, x: Array) -> Array:
    """A region on a batch."""
    values: list[Array] = []
    for k, node in enumerate(region["nodes"]):
        need(all(-1 <= i < k for i in node["inputs"]), "earlier nodes", node["inputs"], "network")
        values.append(act(node, tensors, [x if i < 0 else values[i] for i in node["inputs"]]))
    return values[-1] if values else x


# -- proofs ----------------------------------------------------------------------------------------


def length(a: Array) -> float:
    """Bound on the Frobenius norm."""
    return math.sqrt(float(np.sum(a * a))) * (1.0 + (a.size + 8) * UNIT)


def gamma(count: float) -> float:
    return count * UNIT / (1.0 - count * UNIT) * SAFE


def product(a: Array, b: Array) -> tuple[Array, int]:
    """a b^T, and how many roundings a term of it can go through."""
    total, inner = np.zeros((len(a), len(b))), a.shape[1]
    for k in range(0, inner, CHUNK):
        total += a[:, k : k + CHUNK] @ b[:, k : k + CHUNK].T
    return total, min(inner, CHUNK) + inner // CHUNK + 2


def residual(rows: Rows, g: float, exponent: int) -> float:
    """Bound on |E| for T scaled by 2^-exponent; infinite or NaN where there is no proof."""
    orders, spans, make = rows
    meet = [[max(a[0], b[0]) < min(a[1], b[1]) for b in spans] for a in spans]
    first = [min([j for j in range(i) if meet[i][j]], default=i) for i in range(len(orders))]
    work = sum(n * sum(orders[first[i] : i + 1]) ** 2 for i, n in enumerate(orders))
    if work > OPERATIONS or max(orders, default=0) ** 2 > ENTRIES:
        raise Finding("limit", WITHIN, f"{work:.2g} operations", "a proof", VERIFY)
    blocks: dict[int, Array] = {}
    factor: dict[int, dict[int, Array]] = {}
    inverse: dict[int, Array] = {}
    sums = [0.0] * len(orders)
    for i, n in enumerate(orders):
        blocks[i], factor[i] = np.ldexp(make(i), -exponent), {}
        for j in range(first[i], i + 1):
            low, high = max(spans[i][0], spans[j][0]), min(spans[i][1], spans[j][1])
            a, b = (blocks[k][:, max(low - spans[k][0], 0) : max(high - spans[k][0], 0)] for k in (i, j))
            gram, depth = product(a, b)
            e = g * np.eye(n) - gram if i == j else -gram
            error = gamma(depth) * length(a) * length(b)
            error += UNIT * float(np.abs(np.diagonal(e)).max(initial=0.0))
            size, depth = length(e), 1
            for k in sorted(factor[i].keys() & factor[j].keys()):
                part, more = product(factor[i][k], factor[j][k])
                e, depth = e - part, depth + more
                size += length(factor[i][k]) * length(factor[j][k])
            if i == j:
                factor[i][i] = np.linalg.cholesky(e)
                inverse[i] = np.linalg.inv(factor[i][i])
            else:
                factor[i][j] = e @ inverse[j].T
            part, more = product(factor[i][j], factor[j][j])
            size += length(factor[i][j]) * length(factor[j][j])
            error += length(e - part) + gamma(depth + more) * size
            for row in {i, j}:
                sums[row] += error
        for k in [k for k in factor if k < min(first[i + 1 :], default=i)]:
            del factor[k], blocks[k], inverse[k]
    return max(sums, default=0.0) * SAFE + TINY


def prove(rows: Rows, c: float, where: str, lost: float = 0.0, gap: float = GAP) -> None:
    """Show that |T| + lost is at most c, or raise."""
    exponent = math.frexp(c)[1] if c < math.inf else 0
    g, bound = math.ldexp(c, -exponent) ** 2 * (1.0 - gap), math.inf
    if c == 0.0 or c == math.inf:
        zero = c > 0.0 or not (lost or any(rows[2](i).any() for i in range(len(rows[0]))))
        return need(zero, "a zero operator", "another", where, "claim")
    try:
        bound = residual(rows, g, exponent)
    except np.linalg.LinAlgError:
        pass
    room = (Fraction(c) - Fraction(lost)) / Fraction(2) ** exponent if lost < math.inf else -1
    shown = bound < math.inf and room > 0 and Fraction(g) + Fraction(bound) <= room**2
    need(shown, f"a norm of at most {c!r}", "no proof", where, "claim")


def dense(t: Array) -> Rows:
    """A matrix as one block, by its shorter side."""
    t = t if len(t) <= t.shape[1] else t.T
    return [len(t)], [(0, t.shape[1])], lambda i: t


def banded(kernel: Array, taps: list[tuple[Array, Array]], large: Any, small: Any) -> Rows:
    """A convolution's matrix in lines of its smaller side, every entry put in its place."""
    if kernel.shape[0] * math.prod(small) > kernel.shape[1] * math.prod(large):
        taps = [(q, p) for p, q in taps]
        return banded(kernel.swapaxes(0, 1), taps, small, large)
    (c, d), line, other = kernel.shape[:2], math.prod(small[1:]), math.prod(large[1:])
    step = max(1, -(-LINE // max(1, c * line)))
    starts = range(0, small[0], step)
    chosen = [[(q // line >= s) & (q // line < s + step) for _, q in taps] for s in starts]
    reads = [np.concatenate([p[k] for (p, _), k in zip(taps, mask, strict=True)]) // other
             for mask in chosen]  # fmt: skip
    ends = [(int(r.min()), int(r.max()) + 1) if r.size else (0, 0) for r in reads]
    counts = [min(step, small[0] - s) for s in starts]

    def make(i: int) -> Array:
        low, high = ends[i]
        block = np.zeros((counts[i], line, high - low, other, c, d))
        for t, (p, q) in enumerate(taps):
            p, q = p[chosen[i][t]], q[chosen[i][t]]
            block[q // line - starts[i], q % line, p // other - low, p % other] += kernel[:, :, t]
        return block.transpose(0, 1, 4, 2, 3, 5).reshape(counts[i] * line * c, -1)

    spans = [(a * other * d, b * other * d) for a, b in ends]
    return [n * line * c for n in counts], spans, make


def in_range(nodes: Any, tensors: Tensors, c: float, where: str) -> None:
    """Refuse products of weights that could overflow, or lose to underflow what matters to c."""
    spread = 0.0
    for node in nodes:
        factors = [tensors.gain(node, k) for k in ("gain", "identity") if k in node]
        scales = [*node.get("rows", ()), *node.get("columns", ()), *([node] if node.get("ref") else ())]
        factors += [np.abs(tensors.scale(s)).max(initial=0.0) for s in scales]
        factors += [np.abs(tensors.get(node["weight"])).max(initial=0.0)] if "weight" in node else []
        spread += sum(math.log2(max(1.0, abs(f))) for f in factors)
    if not (spread < 400 and (c == 0.0 or c > 2.0**-64)):
        raise Finding("limit", WITHIN, "extreme weights", where, VERIFY)


def check_norm(operator: Any, c: float, arrays: dict[str, Array]) -> None:
    """Prove that the norm of an operator is at most c."""
    tensors, sizes, where = Tensors(arrays), Tensors(arrays, True), operator["name"]
    need(c >= 0, "a nonnegative norm", c, where, "claim")
    if "opaque" in operator:
        raise Finding("limit", WITHIN, operator["opaque"], where, VERIFY)
    if "slope" in operator:
        largest = float(np.max(np.abs(tensors.get(operator["slope"])), initial=1.0))
        return need(largest <= c, f"at most {c}", largest, where, "claim")
    nodes = operator["nodes"]
    node = nodes[0] if len(nodes) == 1 else {"op": "region"}
    kind = "region" if node.get("circular") else node["op"]
    if kind not in ("conv", "linear") or folded(node):
        in_range(nodes, tensors, c, where)
    if kind == "linear":
        lost = gamma(folded(node)) * length(sizes.matrix(node))
        prove(dense(tensors.matrix(node)), c, where, lost)
    elif kind == "conv":
        taps, kernel, majorant = pairs(node), tensors.kernel(node), sizes.kernel(node)
        ends = (node["in"][1:], node["out"][1:])[:: -1 if node["transposed"] else 1]
        lost = gamma(folded(node)) * sum(length(m) for m in np.moveaxis(majorant, -1, 0)) * SAFE
        for part in kernel:  # every tap moves positions one to one
            single = len(taps) == 1
            prove(dense(part[:, :, 0]) if single else banded(part, taps, *ends), c, where, lost)
    elif kind == "scale":
        largest = float(np.abs(act(node, tensors, [np.ones((1, *node["in"]))])).max(initial=0.0))
        need(largest * (1 + 2.0**-48) <= c, f"at most {c}", largest, where, "claim")
    elif kind == "copy":
        index = copied(node)
        copies = int(np.bincount(index[index >= 0], minlength=1).max())
        need(c == math.inf or copies <= Fraction(c) ** 2, f"{c}^2 copies", copies, where, "claim")
    else:
        shape, entries, depth = operator["in"], math.prod(operator["in"]), 16
        if entries * math.prod(operator["out"]) > ENTRIES:
            raise Finding("limit", WITHIN, f"{operator['out']} from {shape} entries", where, VERIFY)
        for n in nodes:  # roundings of an entry, generously
            inner = math.prod(n.get("kernel", [1])) * sum(n.get("in", [0]))
            depth += inner + 16 + len(n["inputs"]) + (folded(n) if "rows" in n else 0)
        parts = []
        for k in range(0, entries, max(1, 2**22 // entries)):
            some = np.eye(min(2**22 // entries or 1, entries - k), entries, k).reshape(-1, *shape)
            parts.append([image(operator, t, some).reshape(len(some), -1) for t in (tensors, sizes)])
        matrix, majorant = (np.concatenate([p[k] for p in parts]) for k in (0, 1))
        prove(dense(matrix), c, where, gamma(2 * depth) * length(majorant))


# -- the network and its inputs --------------------------------------------------------------------


def up(value: float, zero: bool) -> float:
    return 0.0 if zero else math.nextafter(value, math.inf)


def compose(tape: Any, norms: list[float]) -> list[float]:
    """Value of every instruction of the tape, rounded up."""
    values: list[float] = []
    for op, *args in tape:
        if op == "constant":
            values.append(number(args[0], "tape"))
            continue
        source = norms if op == "sigma" else values
        known = all(type(k) is int and 0 <= k < len(source) for k in args)
        need(known and len(args) == 1 + (op != "sigma"), "earlier instructions", args, "tape")
        a, b = source[args[0]], source[args[-1]]
        if op == "mul":
            a = up(a * b, 0.0 in (a, b))
        elif op == "add":
            a = up(a + b, a == b == 0.0)
        elif op == "hypot":
            squares = up(up(a * a, a == 0.0) + up(b * b, b == 0.0), a == b == 0.0)
            a = up(math.sqrt(squares), squares == 0.0)
        else:
            need(op in ("max", "sigma"), "a known instruction", op, "tape")
            a = max(a, b)
        values.append(a)
    return values


def distances(head: Array, error: Array, c: int) -> Array:
    """Upper bounds of the lengths of w_c - w_j."""
    d = head - head[c]
    exponent = math.frexp(float(np.abs(d).max(initial=0.0)))[1]
    found = np.sqrt(np.square(np.ldexp(d, -exponent)).sum(1)) + 2.0**-400
    found = np.ldexp(found * (1 + (d.shape[1] + 8) * 2.0**-52), exponent) + error + error[c]
    found = np.where((d == 0).all(1) & (error + error[c] == 0), 0.0, found * (1 + 2.0**-50))
    found[c] = 0.0
    return np.asarray(found)


def check_samples(header: Any, arrays: dict[str, Array], scale: float, reach: Any) -> None:
    """Judge every prediction, margin and radius from the stored logits."""
    label, error, logits, margin, c, radius = (arrays.get(n) for n in sorted(ARRAYS))
    n, k = len(radius), header["classes"]
    sizes = {len(a) for a in (error, margin, c, radius, *([] if label is None else [label]))}
    need(sizes == {n} and len(logits) == n * k, "arrays of one length", sizes, "file")
    for a in (c, *([] if label is None else [label])):
        need(((a >= 0) & (a < k)).all(), f"classes below {k}", a, "file")
    z, rows = logits.reshape(n, k), np.arange(n)
    known = np.isfinite(z).all(1) & np.isfinite(error) & (error >= 0)
    low = np.nextafter(z[rows, c] - error, -np.inf)
    gap = np.nextafter(low[:, None] - np.nextafter(z + error[:, None], np.inf), -np.inf)
    gap[rows, c] = np.inf
    most = np.where(known, np.maximum(gap.min(1, initial=np.inf), 0.0), 0.0)
    need((~known | (z[rows, c] == z.max(1, initial=-np.inf))).all(), "the largest logit", "another",
         "predictions", "claim")  # fmt: skip
    need(((margin >= 0) & (margin <= most)).all(), "margins of the logits", "larger ones", "margins",
         "claim")  # fmt: skip
    fine = radius == 0
    for one in np.unique(c):
        at, length = c == one, reach(int(one))
        change = np.where((length == 0) | (scale == 0), 0.0, np.nextafter(scale * length, np.inf))
        moved = np.where(change == 0, 0.0, np.nextafter(radius[at, None] * change, np.inf))
        fine[at] |= (radius[at] > 0) & (moved < gap[at]).all(1) & known[at] & (most[at] > 0)
    need(fine.all(), "radii below what the margins allow", np.flatnonzero(~fine)[:3], "radii", "claim")
    right = np.ones(n, bool) if label is None else c == label
    counts = {"certified": int(((radius > 0) & right).sum()), "total": n,
              "constant": int(np.isinf(radius).sum())}  # fmt: skip
    counts["refused"] = n - counts["certified"]
    counts |= {} if label is None else {"correct": int(right.sum())}
    need(header["counts"] == counts, str(counts), header["counts"], "counts")


def check_network(header: Any, arrays: dict[str, Array], weights: dict[str, Array]) -> Any:
    """Yield the checks of a certificate, one after the other, as functions."""
    level, delta, network = header["level"], number(header["delta"], "delta"), header["network"]
    need(level == "rigorous" and delta == 0 or level == "probabilistic" and 0 < delta < 1,
         "a level and its delta", (level, delta), "level")  # fmt: skip
    need((header["semantics"], header["norm"]) == ("ideal", "l2"), "ideal, l2", "another", "norm")
    low, high = (number(x, "input_range") for x in header["input_range"])
    need(-math.inf < low < high < math.inf, "a range", (low, high), "input_range")
    stated = {a.split(":")[0] for a in header["assumptions"]}
    need({"A1", "A2", "A3", "A4", "A5"} <= stated, "assumptions A1 to A5", stated, "assumptions")
    need(network["input"] == header["input_shape"], "the network's input", "another", "input_shape")
    identity = canonical([header["program_sha256"], network, header["weights_sha256"]])
    need(sha256(identity) == header["fingerprint"], "the fingerprint", "another", "fingerprint")
    for name, (shape, digest) in network["weights"].items():
        got = weights.get(name)
        same = got is not None and list(got.shape) == shape and sha256(got.tobytes()) == digest
        need(same, "the certified weights", "others or none", name)
    norms = [number(x, name) for name, _, x in header["operators"]]
    names = [operator["name"] for operator in network["operators"]]
    need(names == [row[0] for row in header["operators"]], "a norm each", names, "operators")
    for operator, c in zip(network["operators"], norms, strict=True):
        yield lambda operator=operator, c=c: check_norm(operator, c, weights)
    values = compose(network["tape"], norms)
    constants = {k: number(header[k], k) for k in ("features", "total")}
    for key, value in constants.items():
        need(value >= values[network[key]], f"at least {values[network[key]]!r}", value, key, "claim")
    used = {a[1] for a in network["tape"] if a[0] == "sigma"}
    need(used == set(range(len(norms))), "every operator on the tape", used, "tape")
    head, error = np.zeros((header["classes"], 0)), np.zeros(header["classes"])
    if network["head"] is not None:
        (node,) = network["operators"][network["head"]]["nodes"]
        head, majorant = (Tensors(weights, a).matrix(node) for a in (False, True))
        error = gamma(folded(node)) * np.sqrt(np.square(majorant).sum(1)) * SAFE
    need(len(head) == header["classes"] > 0, "a row per class", len(head), "head")
    away = np.where(np.eye(len(head)) > 0, 0.0, math.nextafter(math.sqrt(2.0), 2.0))
    scale = constants["total" if network["head"] is None else "features"]
    yield lambda: check_samples(header, arrays, scale, lambda c: away[c] if network["head"] is None
                                else distances(head, error, c))  # fmt: skip


def check(certificate: str | Path, weights: str | Path) -> list[Finding]:
    """Everything that keeps a certificate from being accepted; empty if it is accepted."""
    found: list[Finding] = []
    try:
        header, arrays = read_certificate(Path(certificate).read_bytes())
        with np.errstate(all="ignore"):
            for step in check_network(header, arrays, read_weights(Path(weights))):
                try:
                    step()
                except Finding as finding:
                    found.append(finding)
    except Finding as finding:
        found.append(finding)
    except Exception as error:  # whatever a hostile file makes fail is a refusal
        got = f"{type(error).__name__}: {error}"
        found.append(Finding("file", "a certificate and its weights", got, str(certificate)))
    return found


def main(arguments: list[str]) -> int:
    """Exit code 0: accepted; 1: not; 2: wrong usage."""
    if len(arguments) != 2:
        sys.stderr.write("usage: check.py CERTIFICATE WEIGHTS (.npz or .safetensors)\n")
        return 2
    found = check(*arguments)
    lines = [*map(str, found), "not accepted" if found else f"accepted: {arguments[0]}", UNCHECKED]
    sys.stdout.write("\n".join(lines) + "\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
