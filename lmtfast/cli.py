# SPDX-License-Identifier: MIT
"""Entry point of the ``lmtfast`` command: finds its dependencies, turns errors into exit codes."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from lmtfast.errors import LmtfastError

EXIT_OK = 0
EXIT_VERIFICATION_FAILED = 1
EXIT_USAGE = 2
INSTALL_HINT = (
    'lmtfast: the command line needs typer and rich.\n  Do this: pip install "lmtfast[cli]"\n'
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        arguments: Words after the command's name; those of the process by default.

    Returns:
        0 when the work was done, 1 when a verification failed, 2 for wrong usage and for anything
        that prevents the work (a missing dependency, a damaged file, a diverging run).

    Example:
        >>> main(["--help"])  # doctest: +SKIP
        0
    """
    try:
        import rich  # noqa: F401
        import typer
    except ImportError:
        sys.stderr.write(INSTALL_HINT)
        return EXIT_USAGE
    from lmtfast.commands import app

    words = None if arguments is None else list(arguments)
    try:
        typer.main.get_command(app).main(args=words, prog_name="lmtfast")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else EXIT_OK
    except (LmtfastError, OSError) as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        return EXIT_USAGE
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
