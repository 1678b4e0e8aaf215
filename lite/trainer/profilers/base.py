"""What is put around the hooks and steps of a run where a profiler is asked for, and nowhere otherwise."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any


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
