"""The ways of starting processes."""

from __future__ import annotations

from lite.launchers.base import Launcher, in_notebook
from lite.launchers.elastic import ElasticLauncher
from lite.launchers.inline import InlineLauncher

__all__ = ["ElasticLauncher", "InlineLauncher", "Launcher", "in_notebook"]
