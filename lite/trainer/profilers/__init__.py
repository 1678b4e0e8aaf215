"""Profilers, by the names that `Trainer(profiler=...)` takes."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from lite.errors import ConfigError
from lite.trainer.profilers.advanced import AdvancedProfiler
from lite.trainer.profilers.base import Profiler
from lite.trainer.profilers.pytorch import PyTorchProfiler
from lite.trainer.profilers.simple import SimpleProfiler

__all__ = ["AdvancedProfiler", "Profiler", "PyTorchProfiler", "SimpleProfiler", "make_profiler"]

_NAMED: dict[str, type[Profiler]] = {
    "simple": SimpleProfiler,
    "advanced": AdvancedProfiler,
    "pytorch": PyTorchProfiler,
}


class _Adapted(Profiler):
    """Another package's profiler, of which only `profile` is needed."""

    def __init__(self, profiler: Any) -> None:
        self._profiler = profiler

    def profile(self, name: str) -> AbstractContextManager[Any]:
        context: AbstractContextManager[Any] = self._profiler.profile(name)
        return context


def make_profiler(given: Any) -> Profiler | None:
    """The profiler that the argument names.

    Raises:
        ConfigError: It names none.
    """
    if given is None or isinstance(given, Profiler):
        return given
    if isinstance(given, str) and given in _NAMED:
        return _NAMED[given]()
    if hasattr(given, "profile"):
        return _Adapted(given)
    raise ConfigError(
        f"profiler={given!r} is not known; use {', '.join(map(repr, _NAMED))}, or an object with profile(name)."
    )
