# SPDX-License-Identifier: MIT
"""Extra peak memory of one forward and backward, beyond the inputs and their gradients.

On the CPU in a process of its own (``python -m benchmarks.memory SHAPE PROVIDER THREADS``), from
the kernel's own count of resident pages: the high-water mark is reset just before the call, and
what an earlier call keeps is added. On a GPU from the allocator.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.problems import LossProblem, Runner
from benchmarks.providers import PROVIDERS

ROOT = Path(__file__).resolve().parents[1]
# Every block of a page or more is mapped by itself and goes back when freed, MKL's buffers too.
EXACT = {
    "MALLOC_MMAP_THRESHOLD_": "4096",
    "MALLOC_TOP_PAD_": "0",
    "MALLOC_ARENA_MAX": "1",
    "MKL_DISABLE_FAST_MM": "1",
}
# Loads every library and starts every thread, so that neither is counted.
WARM_UP = "8 x 10 x 16"


def resident_bytes(field: str) -> int:
    """Of this process: ``VmRSS`` or ``RssAnon`` (now), ``VmHWM`` (largest since the last reset)."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def host_extra(runner: Runner) -> int:
    """Growth of this process's resident pages by a gradient step. Meant for a fresh process."""
    trim = ctypes.CDLL(None).malloc_trim
    trim(0)
    fresh = resident_bytes("RssAnon")
    # Pages of code that the first call reads in are resident too, but no memory of the call's.
    runner.gradient()
    trim(0)
    kept = max(0, resident_bytes("RssAnon") - fresh)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = resident_bytes("VmRSS")
    runner.gradient()
    return kept + resident_bytes("VmHWM") - before


def device_extra(runner: Runner) -> int:
    """Growth of the allocated memory of the device during the call."""
    runner.gradient()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    runner.gradient()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def measure_in_subprocess(shape: str, provider: str) -> int:
    """:func:`host_extra` in a process of its own, with as many threads as this one."""
    threads = str(torch.get_num_threads())
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", shape, provider, threads],
        cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, **EXACT},
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1] if done.stderr else "no output")
    return int(done.stdout)


def main(shape: str, provider: str, threads: str) -> None:
    torch.set_num_threads(int(threads))
    cpu, make = torch.device("cpu"), PROVIDERS[provider].runner
    make(LossProblem(WARM_UP, cpu)).gradient()
    print(host_extra(make(LossProblem(shape, cpu))))


if __name__ == "__main__":
    main(*sys.argv[1:])
