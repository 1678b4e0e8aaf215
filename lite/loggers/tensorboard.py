"""Metrics for TensorBoard (extra: tensorboard)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lite.errors import MissingExtraError
from lite.loggers.base import Ignored, Logger, check_folder
from lite.storage import is_url


class TensorBoardLogger(Logger):
    """Writes event files that TensorBoard reads.

    Args:
        log_dir: The run's folder.
        **options: Further arguments of torch's SummaryWriter.

    Raises:
        MissingExtraError: tensorboard is not installed.
    """

    def __init__(self, log_dir: str | os.PathLike[str], **options: Any) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise MissingExtraError(
                "TensorBoardLogger needs tensorboard; install it with: pip install lite[tensorboard]"
            ) from error
        self._log_dir = os.fspath(log_dir)
        self._options = options
        self._make_writer = SummaryWriter
        self._open: Any = None

    @property
    def log_dir(self) -> str:
        """Where this run writes."""
        return self._log_dir

    @property
    def save_dir(self) -> str | None:
        return self.log_dir

    @property
    def experiment(self) -> Any:
        """The SummaryWriter on rank 0; elsewhere something that ignores what it is told."""
        return self.writer if self._writes() else Ignored()

    @property
    def writer(self) -> Any:
        """The SummaryWriter, made at the first write, so that only rank 0 makes a file."""
        if self._open is None:
            self._open = self._make_writer(self.log_dir, **self._options)
        return self._open

    def check(self) -> None:
        if not is_url(self.log_dir):  # TensorBoard writes to cloud storage too
            check_folder(f"log_dir={self.log_dir!r}", Path(self.log_dir))

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        for name, value in metrics.items():
            if isinstance(value, Mapping):
                self.writer.add_scalars(name, value, step)
            else:
                self.writer.add_scalar(name, value, step)

    def log_hyperparameters(
        self, params: Mapping[str, Any], metrics: Mapping[str, Any] | None = None, step: int | None = None
    ) -> None:
        """Take the run's settings.

        Args:
            params: These.
            metrics: The numbers that runs with other settings are compared by.
            step: Their step.
        """
        plain = {k: v if isinstance(v, (bool, int, float, str)) else str(v) for k, v in params.items()}
        self.writer.add_hparams(plain, dict(metrics or {}), run_name=".", global_step=step)

    def flush(self) -> None:
        if self._open is not None:
            self._open.flush()

    def close(self) -> None:
        if self._open is not None:
            self._open.close()
