"""Run scripts one after another in one process, each as `python SCRIPT ARGUMENT...` would, to import torch only once.

    python run_scripts.py '[["a.py", "--epochs", "1"], ["b.py"]]'

A line of `SEPARATOR` precedes each script's output.
"""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

SEPARATOR = "=" * 20


def main() -> None:
    for command in json.loads(sys.argv[1]):
        print(SEPARATOR)
        sys.argv = command
        sys.path[0] = str(Path(command[0]).parent)
        runpy.run_path(command[0], run_name="__main__")


if __name__ == "__main__":
    main()
