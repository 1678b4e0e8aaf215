"""Metrics as a CSV file, with nothing beyond the standard library; at a URL with fsspec."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lite.errors import ConfigError
from lite.loggers.base import Ignored, Logger, as_params, check_folder, is_version_in, next_version
from lite.storage import is_url, joined, locate


class CSVLogger(Logger):
    """Writes `metrics.csv` into `root_dir/name/version_N`.

    Args:
        root_dir: Where runs are kept: a folder, or a URL that fsspec knows.
        name: A folder for this kind of run; may be empty.
        version: The run's number or name; None takes the first number that is free.
        flush_every: Rows that are kept before they are written; tensors stay on their device until then.

    Raises:
        ConfigError: `flush_every` is not a whole number of at least 1.
    """

    def __init__(
        self, root_dir: str | os.PathLike[str], name: str = "", version: int | str | None = None, flush_every: int = 100
    ) -> None:
        if isinstance(flush_every, bool) or not isinstance(flush_every, int) or flush_every < 1:
            raise ConfigError(f"flush_every={flush_every!r} must be a whole number of at least 1.")
        self._name = name
        self._root = os.fspath(root_dir)
        self._folder = joined(self._root, name) if name else self._root
        self._version = version
        self._is_free = version is None
        self._flush_every = flush_every
        self._rows: list[dict[str, Any]] = []
        self._columns: list[str] = []

    @property
    def name(self) -> str:
        return self._name

    @property
    def save_dir(self) -> str:
        return self._root

    @property
    def root_dir(self) -> str:
        return self._folder

    @property
    def version(self) -> int | str:
        """The run's folder name."""
        return self._folder_name()

    @property
    def log_dir(self) -> Path | str:
        """Where this run writes: a Path, or a URL."""
        return _place(joined(self._folder, self._folder_name()))

    @property
    def path(self) -> Path | str:
        """The metrics file."""
        return _place(self._file("metrics.csv"))

    @property
    def experiment(self) -> Any:
        """Takes rows and settings, on rank 0; elsewhere it ignores what it is told."""
        return CSVExperiment(self) if self._writes() else Ignored()

    def _number(self) -> int | str:
        if self._version is None:
            self._version = next_version(self._folder)
        return self._version

    def _folder_name(self) -> str:
        number = self._number()
        return f"version_{number}" if isinstance(number, int) else number

    def _file(self, name: str) -> str:
        return joined(os.fspath(self.log_dir), name)

    def go_on_in(self, log_dir: str) -> None:
        if self._is_free and not self._rows and not self._columns and is_version_in(log_dir, self._folder):
            self._version = int(os.path.basename(log_dir)[8:])

    def check(self) -> None:
        # A free version's folder is new.
        check_folder(f"root_dir={self._root!r}", self._folder if self._version is None else self.log_dir)

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        self.add_row(metrics, step)

    def add_row(self, metrics: Mapping[str, Any], step: int | None) -> None:
        """Take a row under the names that it has."""
        self._rows.append({"step": step, **metrics})
        if len(self._rows) >= self._flush_every:
            self.flush()

    def log_hyperparameters(self, params: Mapping[str, Any]) -> None:
        storage, file, _ = locate(self._file("hyperparameters.json"))
        storage.write(file, json.dumps(dict(params), indent=2, default=str) + "\n")

    def flush(self) -> None:
        """Append the buffered rows; columns that are new rewrite the file, which is whole at every moment."""
        if not self._rows:
            return
        rows = [{k: v.item() if isinstance(v, Tensor) else v for k, v in row.items()} for row in self._rows]
        new = [key for row in rows for key in row if key not in self._columns]
        storage, file, _ = locate(self._file("metrics.csv"))
        written = storage.kind(file) is not None
        if new or not written:
            before: list[dict[str, Any]] = []
            if written:
                before = list(csv.DictReader(io.StringIO(storage.read(file).decode(), newline="")))
            self._columns = list(dict.fromkeys([*(before[0] if before else ()), *self._columns, *new]))
            storage.write(file, self._as_text(before + rows, header=True))
        else:
            storage.append(file, self._as_text(rows, header=False))
        self._rows.clear()

    def _as_text(self, rows: list[dict[str, Any]], *, header: bool) -> str:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self._columns)
        if header:
            writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()


def _place(path: str) -> Path | str:
    return path if is_url(path) else Path(path)


class CSVExperiment:
    """What `CSVLogger.experiment` gives: the file, without the logger's prefix.

    Args:
        logger: Whose file it is.
    """

    def __init__(self, logger: CSVLogger) -> None:
        self._logger = logger

    @property
    def log_dir(self) -> str:
        """Where the run lies."""
        return os.fspath(self._logger.log_dir)

    @property
    def metrics_file_path(self) -> str:
        """The metrics file."""
        return os.fspath(self._logger.path)

    def log_metrics(self, metrics_dict: Mapping[str, Any], step: int | None = None) -> None:
        """Take one row of numbers."""
        self._logger.add_row(metrics_dict, step)

    def log_hparams(self, params: Any) -> None:
        """Take the run's settings."""
        self._logger.log_hyperparameters(as_params(params))

    def save(self) -> None:
        """Write out what is buffered."""
        self._logger.flush()
