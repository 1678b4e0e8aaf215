"""What `import lite` adds to `import torch`: milliseconds (median over fresh interpreters, in turn) and modules."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from typing import Any

from benchmarks.harness import arguments, finish

CODE = """
import sys, time
start = time.perf_counter()
import torch, numpy
torch_only = time.perf_counter() - start
before = set(sys.modules)
start = time.perf_counter()
import lite
print(torch_only * 1e3, (time.perf_counter() - start) * 1e3, len(set(sys.modules) - before))
"""


def main() -> None:
    options = arguments(__doc__, repeats=11)
    # As a user's second run finds it: with the bytecode that the first one has written.
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    lines = []
    for _ in range(options.repeats + 1):
        done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True, env=environ)
        lines.append([float(part) for part in done.stdout.split()])
    del lines[0]
    torch_ms, lite_ms, modules = (statistics.median(column) for column in zip(*lines, strict=True))
    print(f"import torch, numpy: {torch_ms:.0f} ms; import lite adds {lite_ms:.1f} ms and {modules:.0f} modules")
    row: dict[str, Any] = {"case": "import", "torch_ms": torch_ms, "lite_ms": lite_ms, "modules": modules}
    finish([row], options.json)


if __name__ == "__main__":
    main()
