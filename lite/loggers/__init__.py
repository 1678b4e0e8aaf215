"""Loggers that write a run's numbers; each is imported when it is used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lite.loggers.base import Logger

if TYPE_CHECKING:
    from lite.loggers.csv import CSVLogger
    from lite.loggers.tensorboard import TensorBoardLogger

__all__ = ["CSVLogger", "Logger", "TensorBoardLogger"]


def __getattr__(name: str) -> Any:
    if name == "CSVLogger":
        from lite.loggers.csv import CSVLogger as found
    elif name == "TensorBoardLogger":
        from lite.loggers.tensorboard import TensorBoardLogger as found  # type: ignore[assignment]
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return found
