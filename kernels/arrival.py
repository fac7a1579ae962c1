# SPDX-License-Identifier: MIT
"""Which program comes last, found by counting: it goes on with what the others have written."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def last_of(counter, count):
    """Whether this program is the last of ``count`` to call; to it all they wrote is visible.

    ``counter`` has been zeroed by an earlier launch.
    """
    # All threads' results are there before the program is counted.
    tl.debug_barrier()
    return tl.atomic_add(counter, 1, sem="acq_rel") == count - 1
