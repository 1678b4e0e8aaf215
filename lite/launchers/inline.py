"""Starts nothing: the processes run already, or there is only this one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from lite.launchers.base import Launcher

T = TypeVar("T")


class InlineLauncher(Launcher):
    """Calls the function here."""

    def launch(self, fn: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        return fn(*args, **kwargs)
