"""`PyTorchProfiler`: torch's own profiler over a run, with the hooks and steps named in it."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from typing import Any

import torch

from lite.trainer.profilers.base import Profiler


class PyTorchProfiler(Profiler):
    """Runs torch.profiler from a run's first hook to its end; prints the operators that took longest.

    Args:
        dirpath: A folder for the trace of each rank, for chrome://tracing or Perfetto; None writes none.
        row_limit: Operators that are printed.
        sort_by: What they are sorted by.
        **options: Further arguments of `torch.profiler.profile` (activities, record_shapes, with_stack, ...).

    Source: https://docs.pytorch.org/docs/stable/profiler.html
    """

    def __init__(
        self,
        dirpath: str | os.PathLike[str] | None = None,
        row_limit: int = 20,
        sort_by: str = "self_cpu_time_total",
        **options: Any,
    ) -> None:
        self._dirpath = None if dirpath is None else os.fspath(dirpath)
        self._row_limit, self._sort_by, self._options = row_limit, sort_by, options
        self.profiler: torch.profiler.profile | None = None
        self._is_running = False

    def profile(self, name: str) -> AbstractContextManager[Any]:
        if not self._is_running:
            self.profiler = torch.profiler.profile(**self._options)
            self.profiler.start()
            self._is_running = True
        return torch.profiler.record_function(name)

    def describe(self, trainer: Any) -> None:
        """Stop, write the trace, and print the table on rank 0."""
        if not self._is_running or self.profiler is None:
            return
        self._is_running = False
        self.profiler.stop()
        if self._dirpath is not None:
            os.makedirs(self._dirpath, exist_ok=True)
            self.profiler.export_chrome_trace(os.path.join(self._dirpath, f"trace-{trainer.global_rank}.json"))
        if trainer.is_global_zero:
            print(self.profiler.key_averages().table(sort_by=self._sort_by, row_limit=self._row_limit))
