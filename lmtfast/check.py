# SPDX-License-Identifier: MIT
"""Checks a certificate against its weights with NumPy alone: ``python check.py CERT WEIGHTS``.

Shares nothing with the library; may be copied anywhere. Trusted: IEEE 754 binary64, roots within a
unit in the last place, cosines within four, matrix products that sum in some order. Checked: the
file is whole and canonical; it names these weights; every norm is at most the stored c; constants
follow from the norms, and the radii, strictly, from the stored enclosure of the logits.

With an operator's matrix T, g slightly below c^2, any factor L, and E = g I - T T^T - L L^T, |T|^2
<= g + |E|. E is computed by blocks with a bound on its rounding (K products in any order err by
gamma(K) times the sum of their sizes); |E| is at most the largest row sum of its blocks' lengths.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import json
import math
import runpy
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

NOT_CHECKED = "not checked (lmtfast verify does): whose network, logits and labels these are"
ARRAYS = ("label", "logit_error", "logits", "margin_lower", "prediction", "prediction_radius")
DTYPES = {"header": "|u1", "label": "<i8", "prediction": "<i8"}
KINDS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4"}
WITHIN = "an operator that can be proved again within this checker's limits"
PLAIN = ["0x1.0000000000000p+0", "0x0.0p+0"]  # gain and identity of a kernel that acts as stored
UNIT, SAFE = 2.0**-53, 1.0 + 2.0**-20  # SAFE covers the rounding of fewer than 2^20 terms
GAP, TINY = 2.0**-26, 2.0**-200  # g = c^2 (1 - GAP), stored norms hold twice; above any underflow
CHUNK, LINE = 512, 256  # inner indices summed at once; least order of a block
OPERATIONS, ENTRIES = 2.0**43, 2**26  # most that one proof may take, and a composite may have
Array = Any  # np.ndarray
Rows = tuple[list[int], list[tuple[int, int]], Any]  # orders, columns, and what makes blocks


class Finding(Exception):
    """Why a certificate is not accepted: "file", "claim", or "limit" (cannot be proved here)."""

    def __init__(self, kind: str, expected: str, got: Any, where: str) -> None:
        self.kind, self.where = kind, where
        remedy = "use lmtfast verify" if kind == "limit" else "do not use this file; certify again"
        super().__init__(f"{kind}: expected {expected}; got {got}; at {where}. Do this: {remedy}")


def need(holds: Any, expected: str, got: Any, where: str, kind: str = "file") -> None:
    if not holds:
        raise Finding(kind, expected, str(got)[:200], where)


def canonical(item: Any) -> str:
    return json.dumps(item, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def sha256(content: str | bytes) -> str:
    return hashlib.sha256(content if isinstance(content, bytes) else content.encode()).hexdigest()


def number(item: Any, where: str = "header") -> float:
    """A float in its one hexadecimal form; refuses 1.0, 1e400 and NaN."""
    value = float.fromhex(item) if isinstance(item, str) else math.nan
    need(value.hex() == item and not math.isnan(value), "a hexadecimal float", item, where)
    return value


def encoded(array: Array) -> bytes:
    np.save(buffer := io.BytesIO(), array, allow_pickle=False)
    return buffer.getvalue()


def members(content: bytes) -> dict[str, bytes]:
    """The members of a zip file, which hold no more than it does: nothing here inflates."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        sizes = [math.inf if i.compress_type else i.file_size for i in archive.infolist()]
        need(sum(sizes) < len(content), "stored members side by side", "others", "file")
        return {n.removesuffix(".npy"): archive.read(n) for n in {*archive.namelist()}}


def read_certificate(content: bytes) -> tuple[dict[str, Any], dict[str, Array]]:
    raw = members(content)  # npy headers, 128 bytes, are compared below and never parsed
    need({*ARRAYS, "header"} >= {*raw}, "known arrays", sorted(raw), "file")
    arrays = {n: np.frombuffer(b, DTYPES.get(n, "<f8"), offset=128) for n, b in raw.items()}
    with zipfile.ZipFile(buffer := io.BytesIO(), "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(arrays):
            info = zipfile.ZipInfo(f"{name}.npy")
            info.create_system, info.external_attr = 3, 0o644 << 16
            archive.writestr(info, encoded(arrays[name]))
    need(buffer.getvalue() == content, "the one encoding of its arrays", "other bytes", "file")
    text = bytes(arrays.pop("header")).decode("ascii")
    header = json.loads(text, parse_float=number, parse_constant=number)
    need(canonical(header) == text, "canonical JSON, no key twice", "another form", "header")
    need(canonical(header["schema"]) == "2", "schema 2", header["schema"], "header")
    need(len(header) == 24 and {*arrays} >= {*ARRAYS[1:]}, "all of schema 2", "others", "header")
    need(header.pop("seal") == sha256(canonical(header)), "the header's hash", "another", "seal")
    need(header["arrays"] == {n: sha256(raw[n]) for n in arrays}, "hashes", "others", "arrays")
    return header, arrays


def read_weights(path: Path) -> dict[str, Array]:
    """Arrays of an npz or safetensors file as float64, without the prefix of checkpoints."""
    raw = path.read_bytes()
    if raw[:2] == b"PK":
        return {n: np.load(io.BytesIO(b)).astype("<f8") for n, b in members(raw).items()}
    found, start, room = {}, 8 + int.from_bytes(raw[:8], "little"), len(raw)
    for name, entry in json.loads(raw[8:start]).items():
        if entry.get("dtype") in KINDS:
            low, high = entry["data_offsets"]
            array = np.frombuffer(raw[start + low : start + high], KINDS[entry["dtype"]])
            need((room := room - array.nbytes) >= 0, "arrays that do not overlap", "others", name)
            array = (array.astype("<u4") << 16).view("<f4") if entry["dtype"] == "BF16" else array
            found[name.removeprefix("model/")] = array.astype("<f8").reshape(entry["shape"])
    return found


class Weights:
    """Resolves a network's weights, or with ``absolute`` their absolute values."""

    def __init__(self, arrays: dict[str, Array], absolute: bool = False) -> None:
        self.arrays, self.absolute, self.spread = arrays, absolute, 0.0

    def note(self, value: Any) -> Array:
        """A factor; ``spread`` collects how far a product can get from 1, as a power of two."""
        value = np.array(value, "<f8")
        self.spread += float(np.ptp(np.log2(np.append(np.abs(value[value != 0]), 1.0))))
        return np.abs(value) if self.absolute else value

    def get(self, ref: Any) -> Array:
        """At most 6 roundings: a sum, a root that counts twice, a quotient, a product, a cast."""
        if "array" in ref:
            return self.note(self.arrays[ref["array"]])
        inside = Weights(self.arrays).get(ref["variance"]) + number(ref["eps"])
        root = self.note(1.0 / np.sqrt(inside))
        return self.get(ref["weight"]) * root if ref["weight"] else root

    def scale(self, item: Any) -> Array:
        value = self.get(item["ref"])
        return self.note(1.0 / value) if item["inverse"] else value

    def kernel(self, node: Any) -> Array:
        """The acting kernel ``(groups, rows, columns, taps)``; a matrix is one group and tap."""
        at, groups, taps = -(node["op"] == "linear"), node.get("groups", 1), node.get("kernel", [1])
        shape = (groups, node["out"][at] // groups, node["in"][at] // groups, math.prod(taps))
        gain, identity = (self.note(number(node[key])) for key in ("gain", "identity"))
        weight = gain * self.get(node["weight"]).reshape(shape)
        for key, side in (("rows", (groups, -1, 1, 1)), ("columns", (groups, 1, -1, 1))):
            for factor in map(self.scale, node[key]):
                weight = weight * factor.reshape(side if factor.size > 1 else ())
        if identity:
            channel, tap = np.arange(shape[1]), np.ravel_multi_index(node.get("centre", [0]), taps)
            weight[:, channel, channel, tap] += identity
        return weight


def axes_of(node: Any) -> list[Any]:
    """Per axis: extents in and out, kernel, stride, zeros in front, dilation. A matrix has one."""
    low = [p[0] for p in node.get("padding", [[0, 0]])]
    kernel, stride, dilation = (node.get(k, [1]) for k in ("kernel", "stride", "dilation"))
    need(min(*stride, *dilation) > 0, "steps above 0", "others", "conv", "claim")
    ends = (node["in"][1:], node["out"][1:]) if node["op"] == "conv" else ([1], [1])
    return [*zip(*ends, kernel, stride, low, dilation, strict=True)]


def pairs(axes: list[Any]) -> list[tuple[Array, Array]]:
    """For every tap of a convolution, the positions of columns and of rows that it connects."""
    found, connected = [], []
    for n, m, k, s, p, d in axes:
        reads = [s * np.arange(m) - p + d * t for t in range(k)]
        inside = [(r >= 0) & (r < n) for r in reads]
        connected.append([(r[i], np.flatnonzero(i)) for r, i in zip(reads, inside, strict=True)])
    for chosen in itertools.product(*connected):
        p = q = np.zeros(1, dtype=np.int64)
        for (i, o), (n, m, *_) in zip(chosen, axes, strict=True):
            p, q = (p[:, None] * n + i).ravel(), (q[:, None] * m + o).ravel()
        found.append((p, q))
    return found


def sources(node: Any) -> Array:
    """What every entry of a copy reads within its channel; -1 for zeros."""
    return np.concatenate([start + step * np.arange(n) for start, step, n in node["runs"]])


def roundings(node: Any) -> int:
    """Roundings between a stored and an acting kernel; 0 if it acts as stored."""
    scales = len(node.get("rows", ())) + len(node.get("columns", ()))
    return 9 * scales + 3 if scales or [node.get("gain"), node.get("identity")] != PLAIN else 0


def image(region: Any, weights: Weights, x: Array) -> Array:
    values: list[Array] = []
    for node in region["nodes"]:
        inputs = [x if i < 0 else values[i] for i in node["inputs"]]
        kind, y, out = node["op"], inputs[0], node.get("out")
        if kind == "add":
            y = sum(inputs[1:], y)
        elif kind == "concat":
            y = np.concatenate(inputs, node["axis"] + 1)
        elif kind == "linear":
            y = y @ weights.kernel(node)[0, ..., 0].T
        elif kind == "scale":
            factor = weights.scale(node).reshape(node["shape"]) if node["ref"] else 1.0
            y = y * np.broadcast_to(factor * weights.note(number(node["gain"])), y.shape)  # no more
        elif kind == "copy":
            channels = node.get("channels", 1)
            y = np.pad(y.reshape(len(y), channels, -1), ((0, 0), (0, 0), (0, 1)))
            y = y[..., sources(node)].reshape(-1, *out)
        elif kind == "average":
            for a, windows in enumerate(node["windows"], 1):
                y = np.stack([y.take(range(i, j), a).sum(a) / n for i, j, n in windows], a)
            y = (y * weights.note(number(node["gain"]))).reshape(-1, *out)
        else:
            kernel, groups = weights.kernel(node), node["groups"]
            y = y.reshape(len(y), groups, -1, math.prod(y.shape[2:]))
            total = np.zeros((len(y), groups, out[0] // groups, math.prod(out[1:])))
            for t, (p, q) in enumerate(pairs(axes_of(node))):
                total[..., q] += kernel[..., t] @ y[..., p]
            y = total.reshape(-1, *out)
        values.append(y)
    return values[-1] if values else x


def length(a: Array) -> float:
    exponent = math.frexp(float(np.abs(a).max(initial=0.0)))[1]
    root = math.sqrt(float(np.sum(np.square(np.ldexp(a, -exponent)))))
    found = math.ldexp(root * (1.0 + (a.size + 8) * UNIT), exponent)
    return math.nextafter(found, math.inf) if root else 0.0  # a denormal was rounded


def gamma(count: float) -> float:
    return count * UNIT / (1.0 - count * UNIT) * SAFE


def product(a: Array, b: Array) -> tuple[Array, int]:
    total, inner = np.zeros((len(a), len(b))), a.shape[1]
    for k in range(0, inner, CHUNK):
        total += a[:, k : k + CHUNK] @ b[:, k : k + CHUNK].T
    return total, min(inner, CHUNK) + inner // CHUNK + 2


def residual(rows: Rows, g: float, exponent: int, where: str) -> float:
    """Bound on |E| for T scaled by 2^-exponent; L has blocks where T T^T has, and between."""
    orders, spans, make = rows
    meet = [[max(a[0], b[0]) < min(a[1], b[1]) for b in spans] for a in spans]
    first = [min([j for j in range(i) if meet[i][j]], default=i) for i in range(len(orders))]
    work = sum(float(n) * sum(orders[first[i] : i + 1]) ** 2 for i, n in enumerate(orders))
    need(work < OPERATIONS, WITHIN, f"{work:.2g} operations", where, "limit")
    blocks, factor, inverse = (dict[int, Any]() for _ in "TLI")  # rows of T and L, and L_ii^-1
    sums = np.zeros(len(orders))
    for i, n in enumerate(orders):
        blocks[i], factor[i] = np.ldexp(make(i), -exponent), {}
        for j in range(first[i], i + 1):
            low, high = max(spans[i][0], spans[j][0]), min(spans[i][1], spans[j][1])
            cuts = [slice(max(0, low - spans[k][0]), max(0, high - spans[k][0])) for k in (i, j)]
            a, b = blocks[i][:, cuts[0]], blocks[j][:, cuts[1]]
            gram, depth = product(a, b)
            e = g * np.eye(n) - gram if i == j else -gram
            error = gamma(depth) * length(a) * length(b)
            error += UNIT * float(np.abs(np.diagonal(e)).max(initial=0.0))
            size, depth = length(e), 1
            for k in sorted((factor[i].keys() & factor[j].keys()) | {j}):
                if k == j:
                    factor[i][j] = np.linalg.cholesky(e) if i == j else e @ inverse[j].T
                part, more = product(factor[i][k], factor[j][k])
                size += length(factor[i][k]) * length(factor[j][k])
                e, depth = e - part, depth + more
            error += length(e) + gamma(depth) * size
            sums[list({i, j})] += error
        inverse[i] = np.linalg.inv(factor[i][i])
        for k in [k for k in factor if k < min(first[i + 1 :], default=i)]:
            del blocks[k], factor[k], inverse[k]
    return float(np.max(sums, initial=0.0)) * SAFE + TINY  # unlike max, keeps NaN


def prove(rows: Any, c: float, where: str, lost: float) -> None:
    """Show that |T| + lost is at most c, or raise; T in rows of blocks, or whole."""
    if not isinstance(rows, tuple):
        rows = [min(rows.shape)], [(0, max(rows.shape))], [min(rows, rows.T, key=len)].__getitem__
    if c in (0.0, math.inf):
        zero = c > 0.0 or not (lost or any(rows[2](i).any() for i in range(len(rows[0]))))
        return need(zero, "a zero operator", "another", where, "claim")
    exponent = math.frexp(c)[1]
    g, bound = math.ldexp(c, -exponent) ** 2 * (1.0 - GAP), math.inf
    with contextlib.suppress(np.linalg.LinAlgError):
        bound = residual(rows, g, exponent, where)
    room = math.ldexp(c - lost, -exponent) * (1.0 - 2.0**-50)
    shown = room > 0.0 and (g + bound) * (1.0 + 2.0**-50) <= room * room * (1.0 - 2.0**-50)
    need(shown, f"a norm of at most {c!r}", "no proof", where, "claim")


def banded(kernel: Array, taps: list[tuple[Array, Array]], large: Any, small: Any) -> Rows:
    """A convolution's matrix in lines of its smaller side, every entry put in its place."""
    if kernel.shape[0] * math.prod(small) > kernel.shape[1] * math.prod(large):
        return banded(kernel.swapaxes(0, 1), [(q, p) for p, q in taps], small, large)
    (c, d), line, other = kernel.shape[:2], math.prod(small[1:]), math.prod(large[1:])
    step = max(1, -(-LINE // max(1, c * line)))
    blocks = range(-(-small[0] // step))
    picked = [[(p[k], q[k]) for p, q in taps for k in [q // line // step == i]] for i in blocks]
    reads = [np.concatenate([p // other for p, _ in some]) for some in picked]
    ends = [(int(r.min()), int(r.max()) + 1) if r.size else (0, 1) for r in reads]
    counts = [min(step, small[0] - i * step) for i in blocks]

    def make(i: int) -> Array:
        block = np.zeros((counts[i], line, ends[i][1] - ends[i][0], other, c, d))
        for t, (p, q) in enumerate(picked[i]):
            at = (q // line - i * step, q % line, p // other - ends[i][0], p % other)
            block[at] += kernel[:, :, t]
        return block.transpose(0, 1, 4, 2, 3, 5).reshape(counts[i] * line * c, -1)

    return [n * line * c for n in counts], [(a * other * d, b * other * d) for a, b in ends], make


def circle(axes: list[Any], n: list[int], reads: Array) -> tuple[Any, int] | None:
    """A convolution that reads position (x + a) mod n at x, as one on circles of n places, and how
    often an output occurs in it: once with strides that divide the circles; else it is a part of
    repeated outputs of stride 1. None if it reads anything else."""
    first = np.unravel_index(max(int(reads[0]), 0), n)
    around = np.ix_(*((a + np.arange(x[0])) % b for a, b, x in zip(first, n, axes, strict=True)))
    inside = all(p == 0 and s * (m - 1) + d * (k - 1) < wide for wide, m, k, s, p, d in axes)
    if not inside or not np.array_equal(reads, np.ravel_multi_index(around, n).ravel()):
        return None
    whole = all(m * s == b for (_, m, _, s, _, _), b in zip(axes, n, strict=True))
    times = [-(-(s * (m - 1) + 1) // b) for (_, m, _, s, _, _), b in zip(axes, n, strict=True)]
    turned = zip(axes, n, first, strict=True)
    grid = [(b, m, k, s if whole else 1, -int(a), d) for (_, m, k, s, _, d), b, a in turned]
    return grid, 1 if whole else math.prod(times)


def torus(axes: Any, kernel: Array, c: float, where: str, lost: float, around: bool) -> bool:
    """Whether |A(w)| + lost <= c is shown at every w of a torus: a tap at d t - p = s q + r
    moves phase r by q places; on a circle of M - q, m + q, M, m places or more (M in, m out) no tap
    reaches around, so T is part of a circular convolution of norm max |A(w)|, A the symbol. What
    goes ``around`` already is one, on circles of M places."""
    taps = [[divmod(d * t - p, s) for t in range(k)] for _, _, k, s, p, d in axes]
    q, r = np.moveaxis(np.array(list(itertools.product(*taps))), -1, 0)
    large, small = np.array([(-(-n // s), m) for n, m, _, s, _, _ in axes]).T
    kept = ((-small < q) & (q < large)).all(1) | around  # others meet nothing
    size = np.maximum(large - q[kept].min(0, initial=0), small + q[kept].max(0, initial=0))
    size, power = large if around else size, -math.frexp(c)[1]
    weight = np.ldexp(np.moveaxis(kernel, -1, 0) * kept[:, None, None], power)
    wide = np.dstack([weight * (r == x).all(1)[:, None, None] for x in np.unique(r, axis=0)])
    half, turn = np.ndindex(size[0] // 2 + 1, *size[1:]), math.lcm(*size)  # A(-w) is conjugate
    work = math.prod(map(float, size)) * (128.0 + 2 * min(wide.shape[1:])) ** 3
    # Both parts: an angle within 16 units, its cosine within 8, and a sum of products.
    error = 1.5 * gamma(len(q) + 64) * sum(map(length, weight)) + math.ldexp(lost, power) + TINY
    with contextlib.suppress(Finding):
        need(work < OPERATIONS, WITHIN, work, where, "limit")
        for w in half if len(q) > 1 else [0 * size]:  # one tap: the same at every frequency
            angle = 2.0 * math.pi * (q @ (w * (turn // size)) % turn) / turn
            a, b = (np.tensordot(part, wide, 1) for part in (np.cos(angle), np.sin(angle)))
            prove(np.block([[a, -b], [b, a]]), math.ldexp(c, power), where, error)
        return True
    return False


def single(region: Any) -> tuple[Any, Any]:
    """A region's one node, and the copy in front of it: one that every channel of a convolution's
    input has, such as a border. Else a node of another kind, and no copy."""
    *front, node = region["nodes"]
    for copy in front:
        known = [[-1], [0]] == [n["inputs"] for n in region["nodes"]] and copy["op"] == "copy"
        alike = known and copy.get("channels") == copy["in"][0] and copy["out"] == node.get("in")
        if not alike or node["op"] != "conv":
            return {"op": "region"}, None
    return node, front[0] if front else None


def check_norm(region: Any, c: float, arrays: dict[str, Array]) -> None:
    weights, sizes, where = Weights(arrays), Weights(arrays, True), region["name"]
    need("opaque" not in region, WITHIN, region.get("opaque"), where, "limit")
    if "nodes" not in region:  # a learned slope, or a copying call by how often it copies
        least = math.sqrt(region["copies"]) if "copies" in region else math.nan
        if "slope" in region:
            least = float(np.max(sizes.get(region["slope"]), initial=1.0))
        least *= 1.0 + 2.0**-48
        return need(least <= c, f"a constant of at least {least}", c, where, "claim")
    node, copy = single(region)
    kind, lost, proofs = node["op"], 0.0, []
    if kind in ("conv", "linear"):  # a tap moves positions one to one; groups stand side by side
        axes, kernel, most = axes_of(node), weights.kernel(node), 1
        grid, times, around, terms = axes, 1, False, roundings(node)
        taps, ends = pairs(axes), [[x[side] for x in axes] for side in (0, 1)]
        if copy:  # taps that meet in an entry of T add up there
            reads, ends[0], terms = sources(copy), copy["in"][1:], terms + len(taps)
            taps = [(reads[p][reads[p] >= 0], q[reads[p] >= 0]) for p, q in taps]
            most = times = int(np.bincount(reads[reads >= 0]).max(initial=1))
            if found := circle(axes, ends[0], reads):
                (grid, times), around = found, True
        met = any(len(p) > 0 for p, _ in taps)  # whether a tap ever meets the image
        total = sum(map(length, np.moveaxis(sizes.kernel(node), -1, 0))) * SAFE * met
        lost, low = gamma(terms) * total * math.sqrt(most), c / math.sqrt(times) * (1.0 - 2.0**-50)
        for k in kernel:
            if kind == "linear" or not torus(grid, k, low, where, lost, around):
                proofs.append(banded(k, taps, *ends))
    elif kind == "scale":
        least = float(image(region, sizes, np.ones((1, *node["in"]))).max(initial=0.0))
        need(least * (1 + 2.0**-48) <= c, f"a norm of at least {least}", c, where, "claim")
    else:
        shape, entries, depth = region["in"], math.prod(region["in"]), 16
        need(entries * math.prod(region["out"]) <= ENTRIES, WITHIN, f"{shape}", where, "limit")
        for n in region["nodes"]:  # roundings of an entry, generously
            inner = math.prod(n.get("kernel", [1])) * sum(n.get("in", [0]))
            depth += 2 * inner + 16 + len(n["inputs"]) + roundings(n)
        step, images = max(1, 2**22 // entries), []
        for k in range(0, entries, step):
            units = np.eye(min(step, entries - k), entries, k).reshape(-1, *shape)
            weights, sizes = Weights(arrays), Weights(arrays, True)
            images.append([image(region, w, units) for w in (weights, sizes)])
        both = [np.concatenate(p).reshape(entries, -1) for p in zip(*images, strict=True)]
        lost, proofs = gamma(2 * depth) * length(both[1]), [both[0]]
    plain = kind in ("conv", "linear") and not roundings(node)
    need(plain or sizes.spread < 900, WITHIN, "extreme weights", where, "limit")
    for rows in proofs:
        prove(rows, c, where, lost)


def compose(tape: Any, norms: list[float]) -> list[float]:
    steps: Any = {"add": float.__add__, "hypot": math.hypot, "max": max, "mul": float.__mul__}
    values: list[float] = []
    for op, *args in tape:
        if op == "constant":
            values.append(number(*args))
            need(values[-1] >= 0.0, "a constant of at least 0", args, "tape")
            continue
        source = norms if op == "sigma" else values
        known = op in (*steps, "sigma") and len(args) == 1 + (op != "sigma")
        known = known and all(type(k) is int and 0 <= k < len(source) for k in args)
        need(known, "earlier instructions", args, "tape")
        a, b = source[args[0]], source[args[-1]]
        found = steps.get(op, max)(a, b)
        if op in ("add", "hypot", "mul") and not (found == 0.0 == min(a, b)):  # may underflow to 0
            found = math.nextafter(found * (1.0 + 2.0**-50), math.inf)
        values.append(found)
    return values


def apart(head: Array, error: Array, c: int) -> Array:
    d, rounded = head - head[c], error + error[c]
    exponent = math.frexp(float(np.abs(d).max(initial=0.0)))[1]
    found = np.sqrt(np.square(np.ldexp(d, -exponent)).sum(1)) + 2.0**-400
    found = np.nextafter(np.ldexp(found * (1 + (d.shape[1] + 8) * 2.0**-52), exponent), np.inf)
    found += rounded
    found[((d == 0).all(1) & (rounded == 0)) | (np.arange(len(head)) == c)] = 0.0
    return np.where(found == 0.0, 0.0, np.nextafter(found * (1 + 2.0**-50), np.inf))


def check_samples(header: Any, arrays: Any, scale: float, away: Any, drift: Any = None) -> None:
    label, error, logits, margin, c, radius = (arrays.get(n) for n in ARRAYS)
    n, k, label = len(radius), header["classes"], c if label is None else label
    fits = {len(a) for a in (label, error, margin, c, radius)} == {n} and len(logits) == n * k
    fits = fits and ((c >= 0) & (c < k) & (label >= 0) & (label < k)).all()
    need(fits, "arrays that fit together", n, "arrays")
    z, rows = logits.reshape(n, k), np.arange(n)
    known = np.isfinite(z).all(1) & np.isfinite(error) & (error >= 0)
    low = np.nextafter(z[rows, c] - error, -np.inf)
    gap = np.nextafter(low[:, None] - np.nextafter(z + error[:, None], np.inf), -np.inf)
    gap[rows, c] = np.inf
    most = np.where(known, np.maximum(gap.min(1, initial=np.inf), 0.0), 0.0)
    fine = {"predictions": ~known | (z[rows, c] == z.max(1, initial=-np.inf)), "radii": radius == 0}
    fine["margins"] = (margin >= 0) & (margin <= most) & ((margin > 0) | (radius == 0))
    for one in np.unique(c):
        at, far = c == one, away(int(one))
        reach = np.where((far == 0) | (scale == 0), 0.0, np.nextafter(scale * far, np.inf))
        moved = np.where(reach == 0, 0.0, np.nextafter(radius[at, None] * reach, np.inf))
        if drift is not None:
            moved = np.nextafter(moved + drift(far, radius[at, None]), np.inf)
        fine["radii"][at] |= (radius[at] > 0) & (moved < gap[at]).all(1) & (most[at] > 0)
    for what, judged in fine.items():
        need(judged.all(), "what the logits say", np.flatnonzero(~judged)[:3], what, "claim")
    sure, right = int(((radius > 0) & (c == label)).sum()), int((c == label).sum())
    counts = {"certified": sure, "constant": int(np.isinf(radius).sum()), "refused": n - sure}
    counts |= {"total": n} | ({"correct": right} if "label" in arrays else {})
    need(header["counts"] == counts, str(counts), header["counts"], "counts")


def judge(header: Any, arrays: Any, weights: dict[str, Array], found: list[Finding]) -> None:
    """Check a certificate that is whole; what fails is appended or raised."""
    network, delta, classes = header["network"], number(header["delta"]), header["classes"]
    low, high = map(number, header["input_range"])
    fits = {"rigorous": delta == 0.0, "probabilistic": 0.0 < delta < 1.0}.get(header["level"])
    fits = fits and (header["norm"], type(classes)) == ("l2", int)
    fits = fits and [a[:2] for a in header["assumptions"]][:5] == ["A1", "A2", "A3", "A4", "A5"]
    fits = fits and network["input"] == header["input_shape"] and -math.inf < low < high < math.inf
    need(fits, "level, delta, norm, range, assumptions that fit together", "others", "header")
    identity = canonical([header["program_sha256"], network, header["weights_sha256"]])
    need(header["fingerprint"] == sha256(identity), "the network's", "another", "fingerprint")
    weights = {name: weights.get(name, np.zeros(0)) for name in network["weights"]}  # and no others
    for name, got in weights.items():
        same = [[*got.shape], sha256(got.tobytes())] == network["weights"][name]
        need(same and np.isfinite(got).all(), "the certified weights, finite", "others", name)
    norms = [number(x, name) for name, _, x in header["operators"]]
    names, operators = [name for name, _, _ in header["operators"]], network["operators"]
    used = {a[1] for a in network["tape"] if a[0] == "sigma"}
    named = [o["name"] for o in operators] == names and used == set(range(len(norms)))
    need(named and min(norms, default=0.0) >= 0, "one norm per operator", names, "operators")
    for region, c in zip(operators, norms, strict=True):
        with collecting(found, region["name"]):
            check_norm(region, c, weights)
    values = compose(network["tape"], norms)
    for k in ("features", "total"):
        need(number(header[k]) >= values[network[k]], "a larger constant", header[k], k, "claim")
    drift = None
    if header["semantics"] != "ideal":
        part = runpy.run_path(str(Path(__file__).with_name("check_execution.py")))
        drift = part["drift"](header, Weights(weights).scale, values)
    if network["head"] is None:
        away = np.where(np.eye(classes), 0.0, math.nextafter(math.sqrt(2.0), 2.0))
        return check_samples(header, arrays, number(header["total"]), away.__getitem__, drift)
    (node,) = operators[network["head"]]["nodes"]
    head, majorant = (Weights(weights, a).kernel(node)[0, ..., 0] for a in (False, True))
    need(node["op"] == "linear" and len(head) == classes, "one row per class", len(head), "head")
    error, scale = np.array([*map(length, majorant)]), number(header["features"])
    error *= gamma(roundings(node))
    return check_samples(header, arrays, scale, lambda c: apart(head, error, c), drift)


@contextlib.contextmanager
def collecting(found: list[Finding], where: str) -> Any:
    """Whatever fails, also what a hostile file makes fail, is a finding."""
    try:
        yield
    except Finding as finding:
        found.append(finding)
    except Exception as error:
        found.append(Finding("file", "a certificate and its weights", repr(error)[:200], where))


def check(certificate: str | Path, weights: str | Path) -> list[Finding]:
    """Everything that keeps a certificate from being accepted; empty if it is accepted."""
    found: list[Finding] = []
    with np.errstate(all="ignore"), collecting(found, str(certificate)):
        judge(*read_certificate(Path(certificate).read_bytes()), read_weights(Path(weights)), found)
    return found


def main(arguments: list[str]) -> int:
    """Exit code 0: accepted; 1: not; 2: wrong usage."""
    if len(arguments) != 2:
        sys.stderr.write("usage: check.py CERTIFICATE WEIGHTS (.npz or .safetensors)\n")
        return 2
    found = check(*arguments)
    lines = [*map(str, found), "not accepted" if found else f"accepted: {arguments[0]}"]
    sys.stdout.write("\n".join([*lines, NOT_CHECKED]) + "\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
