"""What a logger is; it neither reduces values nor knows of ranks: whoever calls it does so on rank 0."""

from __future__ import annotations

import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lite.errors import ConfigError


class Logger(ABC):
    """Writes numbers somewhere. Values may be one-element tensors, which are read only when they are written out."""

    @abstractmethod
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Take one row of numbers."""

    def check(self) -> None:  # noqa: B027 - not every logger can know
        """Refuse what could not be written to, before anything is logged, and leave nothing behind.

        Raises:
            ConfigError: The folder can't be made or written to, say.
        """

    def log_hyperparameters(self, params: Mapping[str, Any]) -> None:  # noqa: B027 - not every logger keeps them
        """Take the run's settings."""

    def flush(self) -> None:  # noqa: B027 - not every logger buffers
        """Write out what is buffered."""

    def save(self) -> None:
        """As `flush`, by Lightning's name."""
        self.flush()

    def close(self) -> None:
        """Write everything and release what is open."""
        self.flush()


def check_folder(argument: str, folder: Path) -> None:
    """Refuse a folder that can't be made or written to. A nameless file in what is there of its path tells.

    Args:
        argument: What the user gave.
        folder: Where files will lie.

    Raises:
        ConfigError: It can't.
    """
    there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise ConfigError(
            f"{argument}: the folder {str(folder)!r} can't be {'written to' if there == folder else 'made'} ({error}); "
            "give one that rank 0's process may write to."
        ) from error
