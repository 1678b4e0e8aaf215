"""`SimpleProfiler`: how often each hook and step ran, and how long."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import Any

from lite.trainer.profilers.base import Profiler


class SimpleProfiler(Profiler):
    """Counts calls and adds up their seconds; prints a table when a run is over."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.calls: dict[str, int] = {}

    @contextmanager
    def profile(self, name: str) -> Any:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
            self.calls[name] = self.calls.get(name, 0) + 1

    def describe(self, trainer: Any) -> None:
        """Print the table, the slowest first."""
        if not self.seconds or not trainer.is_global_zero:
            return
        width = max(len(name) for name in self.seconds)
        print(f"{'hook':<{width}}  {'calls':>8}  {'seconds':>10}")
        for name, spent in sorted(self.seconds.items(), key=lambda item: -item[1]):
            print(f"{name:<{width}}  {self.calls[name]:>8}  {spent:>10.4f}")
