"""Run scripts one after another in one process, each as `python SCRIPT ARGUMENT...` would, to import torch only once.

    python run_scripts.py '[["a.py", "--epochs", "1"], ["b.py"]]'

A line of `SEPARATOR` precedes each script's output, on rank 0. With NUM_BLOCKS=n in the environment, char_lm has n
blocks of text, as a CPU may compute bfloat16 slowly.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import sys
from pathlib import Path

SEPARATOR = "=" * 20


def main() -> None:
    num_blocks = os.environ.get("NUM_BLOCKS")
    for command in json.loads(sys.argv[1]):
        if os.environ.get("RANK", "0") == "0":
            print(SEPARATOR)
        sys.argv = command
        sys.path[0] = str(Path(command[0]).parent)
        if num_blocks:
            importlib.import_module("char_lm_model").load_data.__defaults__ = (int(num_blocks),)
        runpy.run_path(command[0], run_name="__main__")


if __name__ == "__main__":
    main()
