"""Metrics as a CSV file, with nothing beyond the standard library."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lite.errors import ConfigError
from lite.loggers.base import Logger, check_folder


class CSVLogger(Logger):
    """Writes `metrics.csv` into `root_dir/name/version_N`.

    Args:
        root_dir: Where runs are kept.
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
        self.name = name
        self._root = os.fspath(root_dir)
        self._folder = Path(root_dir) / name
        self._version = version
        self._flush_every = flush_every
        self._rows: list[dict[str, Any]] = []
        self._columns: list[str] = []

    @property
    def version(self) -> str:
        """The run's folder name."""
        if self._version is None:
            taken = [int(p.name[8:]) for p in self._folder.glob("version_*") if p.name[8:].isdigit()]
            self._version = max(taken, default=-1) + 1
        return f"version_{self._version}" if isinstance(self._version, int) else self._version

    @property
    def log_dir(self) -> Path:
        """Where this run writes."""
        return self._folder / self.version

    @property
    def path(self) -> Path:
        """The metrics file."""
        return self.log_dir / "metrics.csv"

    def check(self) -> None:
        # A free version's folder is new.
        check_folder(f"root_dir={self._root!r}", self._folder if self._version is None else self.log_dir)

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        self._rows.append({"step": step, **metrics})
        if len(self._rows) >= self._flush_every:
            self.flush()

    def log_hyperparameters(self, params: Mapping[str, Any]) -> None:
        self.log_dir.mkdir(parents=True, exist_ok=True)
        (self.log_dir / "hyperparameters.json").write_text(json.dumps(dict(params), indent=2, default=str) + "\n")

    def flush(self) -> None:
        """Append the buffered rows; columns that are new rewrite the file, which is whole at every moment."""
        if not self._rows:
            return
        rows = [{k: v.item() if isinstance(v, Tensor) else v for k, v in row.items()} for row in self._rows]
        new = [key for row in rows for key in row if key not in self._columns]
        self.log_dir.mkdir(parents=True, exist_ok=True)
        if not new:
            with open(self.path, "a", newline="") as file:
                csv.DictWriter(file, self._columns).writerows(rows)
        else:
            before: list[dict[str, Any]] = []
            if self.path.exists():
                with open(self.path, newline="") as file:
                    before = list(csv.DictReader(file))
            self._columns = list(dict.fromkeys([*(before[0] if before else ()), *self._columns, *new]))
            beside = self.path.with_suffix(".tmp")
            with open(beside, "w", newline="") as file:
                writer = csv.DictWriter(file, self._columns)
                writer.writeheader()
                writer.writerows(before + rows)
            os.replace(beside, self.path)
        self._rows.clear()
