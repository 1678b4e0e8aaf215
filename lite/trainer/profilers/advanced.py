"""`AdvancedProfiler`: the functions that each hook and step calls, by Python's cProfile."""

from __future__ import annotations

import cProfile
import io
import pstats
from contextlib import contextmanager
from typing import Any

from lite.trainer.profilers.base import Profiler


class AdvancedProfiler(Profiler):
    """Profiles each hook and step by cProfile; prints the functions that took longest when a run is over.

    Args:
        line_count_restriction: Functions (a number, or a share of them) that are printed for each.
    """

    def __init__(self, line_count_restriction: float = 20) -> None:
        self.profiles: dict[str, cProfile.Profile] = {}
        self._lines = line_count_restriction
        self._running: cProfile.Profile | None = None

    @contextmanager
    def profile(self, name: str) -> Any:
        outer, mine = self._running, self.profiles.setdefault(name, cProfile.Profile())
        if outer is not None:  # one at a time can run: a hook within a step is not the step's
            outer.disable()
        self._running = mine
        mine.enable()
        try:
            yield
        finally:
            mine.disable()
            self._running = outer
            if outer is not None:
                outer.enable()

    def summary(self) -> str:
        """The tables as text."""
        parts = []
        for name, profile in self.profiles.items():
            text = io.StringIO()
            pstats.Stats(profile, stream=text).sort_stats("cumulative").print_stats(self._lines)
            parts.append(f"{name}\n{text.getvalue().strip()}")
        return "\n\n".join(parts)

    def describe(self, trainer: Any) -> None:
        """Print them on rank 0."""
        if self.profiles and trainer.is_global_zero:
            print(self.summary())
