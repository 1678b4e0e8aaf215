"""How long each hook takes: put around the table of hooks where a profiler is asked for, and nowhere otherwise."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from lite.errors import ConfigError


class Profiler:
    """Base of profilers: `profile(name)` is a context around one call."""

    def profile(self, name: str) -> AbstractContextManager[Any]:
        """A context around what is called `name`."""
        raise NotImplementedError

    def wrap_hook(self, name: str, owner: Any, method: Callable[..., Any]) -> Callable[..., Any]:
        """The method within `profile("[Owner].hook")`."""
        label = f"[{type(owner).__name__}].{name}"

        def profiled(*args: Any) -> Any:
            with self.profile(label):
                return method(*args)

        return profiled

    def describe(self, trainer: Any) -> None:
        """The run is over."""


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
    if given == "simple":
        return SimpleProfiler()
    if hasattr(given, "profile"):
        return _Adapted(given)
    raise ConfigError(f"profiler={given!r} is not known; use 'simple', or an object with a method profile(name).")
