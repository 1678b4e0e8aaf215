"""The ways of starting processes; what torch needs for it is imported when it is used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lite.launchers.base import Launcher, in_notebook
from lite.launchers.inline import InlineLauncher

if TYPE_CHECKING:
    from lite.launchers.elastic import ElasticLauncher

__all__ = ["ElasticLauncher", "InlineLauncher", "Launcher", "in_notebook"]


def __getattr__(name: str) -> Any:
    if name == "ElasticLauncher":
        from lite.launchers.elastic import ElasticLauncher

        return ElasticLauncher
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
