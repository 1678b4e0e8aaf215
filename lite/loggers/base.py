"""What a logger is; it neither reduces values nor knows of ranks: whoever calls it does so on rank 0."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any


class Logger(ABC):
    """Writes numbers somewhere. Values may be one-element tensors, which are read only when they are written out."""

    @abstractmethod
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Take one row of numbers."""

    def log_hyperparameters(self, params: Mapping[str, Any]) -> None:  # noqa: B027 - not every logger keeps them
        """Take the run's settings."""

    def flush(self) -> None:  # noqa: B027 - not every logger buffers
        """Write out what is buffered."""

    def close(self) -> None:
        """Write everything and release what is open."""
        self.flush()
