"""The command line's commands and its exit codes: 0 all is well, 1 the answer is no, 2 it could not be told."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from lite.cli import checkpoint
from lite.errors import LiteError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command, as `python -m lite` does.

    Args:
        arguments: The words after `python -m lite`; None takes them from `sys.argv`.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(prog="python -m lite", description=__doc__)
    rooms = parser.add_subparsers(required=True, metavar="COMMAND")
    checkpoint.add_to(rooms)
    options = parser.parse_args(arguments)
    try:
        code: int = options.run(options)
        return code
    except (LiteError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
