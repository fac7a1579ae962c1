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
BORDERS: Any = {"circular": "wrap", "reflect": "reflect", "replicate": "edge"}
UNIT, SAFE = 2.0**-53, 1.0 + 2.0**-20  # SAFE covers the rounding of fewer than 2^20 terms
GAP, TINY = 2.0**-26, 2.0**-200  # g = c^2 (1 - GAP), stored norms hold twice; above any underflow
CHUNK, LINE = 512, 256  # inner indices summed at once; least order of a block
OPERATIONS, ENTRIES = 2.0**43, 2**26  # most that one proof may take, and a composite may have
Array = Any  # np.ndarray


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
            np.save(member := io.BytesIO(), arrays[name], allow_pickle=False)
            archive.writestr(info, member.getvalue())
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
        """Roundings, at most: a sum, a root (counts twice), two quotients, a product, a cast."""
        if "ref" in ref:
            return self.note(1.0 / self.get(ref["ref"])) if ref["inverse"] else self.get(ref["ref"])
        if "array" in ref:
            return self.note(self.arrays[ref["array"]])
        inside = Weights(self.arrays).get(ref["variance"]) + number(ref["eps"])
        root = self.note(1.0 / np.sqrt(inside))
        return self.get(ref["weight"]) * root if ref["weight"] else root

    def kernel(self, node: Any) -> Array:
        """The acting kernel ``(groups, rows, columns, taps)``; a matrix is one group and tap."""
        at, groups, taps = -(node["op"] == "linear"), node.get("groups", 1), node.get("kernel", [1])
        shape = (groups, node["out"][at] // groups, node["in"][at] // groups, math.prod(taps))
        gain, identity = (self.note(number(node[key])) for key in ("gain", "identity"))
        weight = gain * self.get(node["weight"]).reshape(shape)
        for key, side in (("rows", (groups, -1, 1, 1)), ("columns", (groups, 1, -1, 1))):
            for factor in map(self.get, node[key]):
                weight = weight * factor.reshape(side if factor.size > 1 else ())
        if identity:
            channel, tap = np.arange(shape[1]), np.ravel_multi_index(node.get("centre", [0]), taps)
            weight[:, channel, channel, tap] += identity
        return weight


def pairs(axes: Array) -> list[tuple[Array, Array]]:
    """For every tap of a convolution, the positions of columns and of rows that it connects."""
    (n, m, k, s, p, d), found = axes, []
    first = (s * np.moveaxis(np.indices(m), 0, -1) - p).reshape(-1, len(n))
    for tap in np.ndindex(*k):
        reads = first + d * tap
        rows = np.flatnonzero(((reads >= 0) & (reads < n)).all(1))
        found.append((np.ravel_multi_index(reads[rows].T, n), rows))
    return found


def stencil(node: Any) -> tuple[list[tuple[Array, Array]], Array, int, int, bool]:
    """The pairs of every tap; for :func:`torus`, per axis: extents in and out, kernel, stride,
    border in front, dilation; how often outputs and inputs of these repeat; whether they are
    circles. A border copies, and a convolution without one reads it. One that goes around makes
    circles: the operator is theirs if strides divide them, else repeats outputs of stride 1."""
    ends, low = (node["in"][1:], node["out"][1:]), [before for before, _ in node["padding"]]
    axes = np.array([*ends, node["kernel"], node["stride"], low, node["dilation"]], np.int64)
    (n, m, k, s, p, d), mode = axes, node.get("mode")
    need(min(*s, *d) > 0 and np.abs(axes / 2.0**31).max() < 1, "steps above 0", "others", "conv")
    if mode is None:
        return pairs(axes), axes, 1, 1, False
    reads = np.pad(np.arange(n.prod()).reshape(n), node["padding"], BORDERS[mode])
    wide, copies = np.array([reads.shape, m, k, s, 0 * p, d]), np.bincount(reads.ravel()).max()
    taps = [(reads.ravel()[columns], rows) for columns, rows in pairs(wide)]
    if mode != "circular" or (s * (m - 1) + d * (k - 1) >= reads.shape).any():
        return taps, wide, copies, copies, False
    step = s if (m * s == n).all() else s**0
    return taps, np.array([n, m, k, step, p, d]), np.prod(-(-(s * (m - 1) + 1) // n)), copies, True


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
            factor = weights.get(node).reshape(node["shape"]) if node["ref"] else 1.0
            y = y * np.broadcast_to(factor * weights.note(number(node["gain"])), y.shape)  # no more
        elif kind == "copy":
            index = np.concatenate([a + step * np.arange(n) for a, step, n in node["runs"]])
            y = np.pad(y.reshape(len(y), -1), ((0, 0), (0, 1)))[:, index].reshape(-1, *out)
        elif kind == "average":
            for a, windows in enumerate(node["windows"], 1):
                y = np.stack([y.take(range(i, j), a).sum(a) / n for i, j, n in windows], a)
            y = (y * weights.note(number(node["gain"]))).reshape(-1, *out)
        else:
            kernel, groups = weights.kernel(node), node["groups"]
            y = y.reshape(len(y), groups, -1, math.prod(y.shape[2:]))
            total = np.zeros((len(y), groups, out[0] // groups, math.prod(out[1:])))
            for t, (p, q) in enumerate(stencil(node)[0]):
                total[..., q] += kernel[..., t] @ y[..., p]
            y = total.reshape(-1, *out)
        values.append(y)
    return values[-1] if values else x


def length(a: Array, axis: int | None = None) -> Any:
    """Bound on the Euclidean length, also where squares underflow or the length is denormal."""
    exponent = math.frexp(float(np.abs(a).max(initial=0.0)))[1]
    root, zero = np.sqrt(np.square(np.ldexp(a, -exponent)).sum(axis)), (a == 0.0).all(axis)
    root = root * (1.0 + (a.size // max(1, zero.size) + 8) * UNIT) + 2.0**-400
    return np.where(zero, 0.0, np.nextafter(np.ldexp(root, exponent), np.inf))


def gamma(count: float) -> float:
    return count * UNIT / (1.0 - count * UNIT) * SAFE


def product(a: Array, b: Array) -> tuple[Array, int]:
    total, inner = np.zeros((len(a), len(b))), a.shape[1]
    for k in range(0, inner, CHUNK):
        total += a[:, k : k + CHUNK] @ b[:, k : k + CHUNK].T
    return total, min(inner, CHUNK) + inner // CHUNK + 2


def residual(rows: Any, g: float, exponent: int, where: str) -> float:
    """Bound on |E| for T scaled by 2^-exponent; L has blocks where T T^T has, and between."""
    orders, spans, make = rows
    meet = [[max(a[0], b[0]) < min(a[1], b[1]) for b in spans] for a in spans]
    first = [min([j for j in range(i) if meet[i][j]], default=i) for i in range(len(orders))]
    work = sum(float(n) * sum(orders[first[i] : i + 1]) ** 2 for i, n in enumerate(orders))
    need(work < OPERATIONS, WITHIN, f"{work:.2g} operations", where, "limit")
    (blocks, factor, inverse), sums = (dict[int, Any]() for _ in "TLI"), np.zeros(len(orders))
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
    """Show |T| + lost <= c, or raise; T whole, or orders and columns of blocks and their maker."""
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


def banded(kernel: Array, taps: list[tuple[Array, Array]], large: Any, small: Any) -> Any:
    """A convolution's matrix in lines of its smaller side, every entry put in its place."""
    if kernel.shape[0] * math.prod(small) > kernel.shape[1] * math.prod(large):
        return banded(kernel.swapaxes(0, 1), [(q, p) for p, q in taps], small, large)
    (c, d), line, places = kernel.shape[:2], max(1, math.prod(small[1:])), math.prod(small)
    step = line * max(1, -(-LINE // max(1, c * line)))
    starts = range(0, places, step)
    counts = [min(step, places - start) for start in starts]
    picked = [[(p[k], q[k] - i) for p, q in taps for k in [q // step * step == i]] for i in starts]
    reads = [np.concatenate([p for p, _ in some]) for some in picked]
    ends = [(int(r.min()), int(r.max()) + 1) if r.size else (0, 1) for r in reads]

    def make(i: int) -> Array:
        block = np.zeros((counts[i], ends[i][1] - ends[i][0], c, d))
        for t, (p, q) in enumerate(picked[i]):
            block[q, p - ends[i][0]] += kernel[:, :, t]
        return block.transpose(0, 2, 1, 3).reshape(counts[i] * c, -1)

    return [n * c for n in counts], [(a * d, b * d) for a, b in ends], make


def torus(axes: Any, kernel: Array, c: float, where: str, lost: float, around: bool) -> bool:
    """Whether |A(w)| + lost <= c is shown at every w of a torus: a tap at d t - p = s q + r moves
    phase r by q places; on circles of M - q, m + q, M, m places or more (M in, m out) no tap
    reaches around, and T is part of a circular convolution of norm max |A(w)|, A the symbol; it is
    the whole of one on circles of M places if it goes ``around``."""
    n, m, k, s, p, d = axes
    (q, r), large, power = np.divmod(d * [*np.ndindex(*k)] - p, s), -(-n // s), -math.frexp(c)[1]
    kept = ((-m < q) & (q < large)).all(1) | around  # others meet nothing
    q, r, weight = q[kept], r[kept], np.ldexp(np.moveaxis(kernel, -1, 0)[kept], power)
    size = large if around else np.maximum(large - q.min(0, initial=0), m + q.max(0, initial=0))
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


def check_norm(region: Any, c: float, arrays: dict[str, Array]) -> None:
    weights, sizes, where = Weights(arrays), Weights(arrays, True), region["name"]
    need("opaque" not in region, WITHIN, region.get("opaque"), where, "limit")
    if "nodes" not in region:  # a learned slope, or a copying call by how often it copies
        slope = sizes.get(region["slope"]) if "slope" in region else np.sqrt(region["copies"])
        least = float(np.max(slope, initial=1.0)) * (1.0 + 2.0**-48)
        return need(least <= c, f"a constant of at least {least}", c, where, "claim")
    node = region["nodes"][0] if len(region["nodes"]) == 1 else {"op": "region"}
    kind, lost, proofs = node["op"], 0.0, []
    if kind == "linear":
        lost = gamma(roundings(node)) * length(sizes.kernel(node))
        proofs = [weights.kernel(node)[0, ..., 0]]
    elif kind == "conv":  # groups stand side by side
        (taps, grid, times, copies, around), kernel = stencil(node), weights.kernel(node)
        total = sum(map(length, sizes.kernel(node).T)) * any(p.size for p, _ in taps) * SAFE
        terms = roundings(node) + len(taps) * (copies > 1)  # taps that meet in one entry add up
        lost, low = gamma(terms) * total * math.sqrt(copies), c / math.sqrt(times) * (1 - 2.0**-50)
        ends, rest = (node["in"][1:], node["out"][1:]), (low, where, lost, around)
        proofs = [banded(k, taps, *ends) for k in kernel if not (total and torus(grid, k, *rest))]
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
            values.append(abs(number(*args)))
            continue
        source = norms if op == "sigma" else values
        known = [type(k) is int and 0 <= k < len(source) for k in args]
        need(
            op in (*steps, "sigma") and known == [True] * (1 + (op != "sigma")), "a tape", args, op
        )
        a, b = source[args[0]], source[args[-1]]
        found = steps.get(op, max)(a, b)
        if op in ("add", "hypot", "mul") and not (found == 0.0 == min(a, b)):  # may underflow to 0
            found = math.nextafter(found * (1.0 + 2.0**-50), math.inf)
        values.append(found)
    return values


def apart(head: Array, error: Array, c: int) -> Array:
    """Bound on the distances of all rows from one; differences that are denormal are exact."""
    return (length(head - head[c], 1) * (1.0 + 4.0 * UNIT) + (error + error[c])) * (1.0 + 2.0**-50)


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
        at, far = c == one, np.where(np.arange(k) == one, 0.0, away(int(one)))
        reach = np.where((far == 0) | (scale == 0), 0.0, np.nextafter(scale * far, np.inf))
        moved = np.where(reach == 0, 0.0, np.nextafter(radius[at, None] * reach, np.inf))
        moved = np.nextafter(moved + drift(far, radius[at, None]), np.inf) if drift else moved
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
    drift, beside = None, Path(__file__).with_name("check_execution.py")
    if header["semantics"] != "ideal":
        drift = runpy.run_path(str(beside))["drift"](header, Weights(weights).get, values, length)
    if network["head"] is None:
        root = math.nextafter(math.sqrt(2.0), 2.0)
        return check_samples(header, arrays, number(header["total"]), lambda c: root, drift)
    (node,) = operators[network["head"]]["nodes"]
    head, majorant = (Weights(weights, a).kernel(node)[0, ..., 0] for a in (False, True))
    need(node["op"] == "linear" and len(head) == classes, "one row per class", len(head), "head")
    error, scale = length(majorant, 1) * gamma(roundings(node)), number(header["features"])
    return check_samples(header, arrays, scale, lambda c: apart(head, error, c), drift)


@contextlib.contextmanager
def collecting(found: list[Finding], where: str) -> Any:
    """Whatever fails, also what a hostile file makes fail, is a finding."""
    try:
        yield
    except Exception as error:
        unread = Finding("file", "a certificate and its weights", repr(error)[:200], where)
        found.append(error if isinstance(error, Finding) else unread)


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
