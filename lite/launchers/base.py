"""One way of starting a job's processes each; a launcher knows neither devices nor models."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

from lite.errors import UsageError

T = TypeVar("T")


class Launcher(ABC):
    """Starts processes and runs a function in each."""

    @abstractmethod
    def launch(self, fn: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Run `fn(*args, **kwargs)` in every process and return what the first one returned."""

    def launch_script(self) -> NoReturn:
        """Run the whole script again in every process, and end this one when they end."""
        raise UsageError(f"{type(self).__name__} can't run a script again; pass a function: lite.launch(fn).")


def in_notebook() -> bool:
    """Whether this is an IPython session, whose functions only a fork can carry over."""
    return "IPython" in sys.modules and sys.modules["IPython"].get_ipython() is not None
