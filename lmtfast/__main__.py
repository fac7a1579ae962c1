# SPDX-License-Identifier: MIT
"""``python -m lmtfast``: the command line."""

import sys

from lmtfast.cli import main

sys.exit(main())
