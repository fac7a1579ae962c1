# SPDX-License-Identifier: MIT
"""What a figure depends on besides the code: processor, versions, load, and measured ceilings."""

from __future__ import annotations

import os
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
FLAGS = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_tile")


@dataclass(frozen=True)
class Ceilings:
    """Measured here: bytes per second of a large copy, read and written, and multiply rates."""

    copy: float
    matmul: float
    label: str

    def seconds(self, moved: float, operations: float) -> float:
        """The speed of light: no version that moves and computes as much is faster."""
        return max(moved / self.copy, operations / self.matmul)


def output(*command: str) -> str:
    """What a command prints, or nothing if it cannot run."""
    if shutil.which(command[0]) is None:
        return ""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


def version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def processor() -> tuple[str, list[str]]:
    """Model name and the vector extensions that matter."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return platform.processor(), []
    fields = dict(
        (part.strip() for part in line.split(":", 1)) for line in text.splitlines() if ":" in line
    )
    present = fields.get("flags", "").split()
    return fields.get("model name", platform.machine()), [f for f in FLAGS if f in present]


def header(device: torch.device) -> dict[str, str]:
    """Lines that stand above every table of results."""
    name, flags = processor()
    # A copy without its history is told its commit.
    told = os.environ.get("LMTFAST_COMMIT", "unknown")
    commit = output("git", "rev-parse", "--short=12", "HEAD") or told
    changed = output("git", "status", "--porcelain", "--untracked-files=no", "--", ":!benchmarks")
    lines = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit + (" with local changes" if changed else ""),
        "processor": f"{name}, {os.cpu_count()} cores, {' '.join(flags)}",
        "threads": str(torch.get_num_threads()),
        "load": f"{os.getloadavg()[0]:.2f} at the start",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "numpy": version("numpy"),
    }
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        driver = output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        lines["gpu"] = (
            f"{card.name}, {card.multi_processor_count} multiprocessors, "
            f"{card.L2_cache_size / 2**20:.0f} MiB L2, {card.total_memory / 2**30:.0f} GiB"
        )
        lines["driver"] = f"{driver}, CUDA {torch.version.cuda}"
    return lines


def _seconds(call: Callable[[], object], device: torch.device, repeats: int = 5) -> float:
    times = []
    for _ in range(repeats + 1):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def measure_ceilings(device: torch.device, *, quick: bool = False) -> Ceilings:
    """A copy far larger than any cache, and a large product of random float32 matrices."""
    on_gpu = device.type == "cuda"
    copy = _copy_rate(1 << (20 if quick else 30 if on_gpu else 28), device)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if on_gpu else before)
    matmul = _matmul_rate(256 if quick else 8192 if on_gpu else 2048, device)
    torch.set_float32_matmul_precision(before)
    return Ceilings(copy, matmul, "TensorFloat-32" if on_gpu else "float32")


def _copy_rate(entries: int, device: torch.device) -> float:
    source = torch.rand(entries, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _seconds(lambda: target.copy_(source), device)


def _matmul_rate(n: int, device: torch.device) -> float:
    a, b = (torch.randn(n, n, device=device) for _ in range(2))
    return 2 * n**3 / _seconds(lambda: torch.mm(a, b), device)
