"""What a logger is; it reduces no values, and it is called on rank 0, except where a method says otherwise."""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from lite import collectives
from lite.errors import ConfigError, shown
from lite.storage import is_url, locate


class Logger(ABC):
    """Writes numbers somewhere. Subclasses need `log_metrics` alone.

    Lightning's form does as well: `log_hyperparams` and `save`, by which Lite and the Trainer call, go on to
    `log_hyperparameters` and `flush` where a subclass does not override them. A Lite without Trainer calls no `save`.
    """

    takes_tensors: ClassVar[bool] = True
    """Whether values may be one-element tensors, to be read when they are written out; else they come as numbers."""

    @property
    def name(self) -> str | None:
        """The kind of run."""
        return None

    @property
    def version(self) -> int | str | None:
        """Which run of this kind."""
        return None

    @property
    def save_dir(self) -> str | None:
        """Where runs of every kind lie, or None where it writes no files."""
        return None

    @property
    def root_dir(self) -> str | None:
        """Where runs of this kind lie, or None."""
        return None

    @property
    def log_dir(self) -> str | os.PathLike[str] | None:
        """Where this run lies, or None."""
        return None

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

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """As `log_hyperparameters`, by Lightning's name, on rank 0, whoever calls; also for a Namespace or dataclass.

        Raises:
            ConfigError: `params` is none of these.
        """
        if self._writes():
            self.log_hyperparameters(as_params(params), *args, **kwargs)

    def log_graph(self, model: Any, input_array: Any = None) -> None:  # noqa: B027 - few loggers draw it
        """Take the model's graph. A Trainer calls it once, before the model is set up."""

    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:  # noqa: B027 - few loggers keep them
        """A Trainer's ModelCheckpoint, which is passed, has saved."""

    def go_on_in(self, log_dir: str) -> None:  # noqa: B027 - not every logger has folders
        """A run goes on that wrote into `log_dir`: write there too, if it is another version of this logger, none was
        asked for, and nothing has been written yet."""

    def flush(self) -> None:  # noqa: B027 - not every logger buffers
        """Write out what is buffered."""

    def save(self) -> None:
        """As `flush`, by Lightning's name."""
        self.flush()

    def finalize(self, status: str) -> None:
        """A Trainer's run is over, and another may follow.

        Args:
            status: "success"; "failed" after an exception; "finished" after a signal that saved; "interrupted" where
                `trainer.steps` was left.
        """
        self.save()

    def close(self) -> None:
        """Write everything and release what is open."""
        self.flush()

    def _writes(self) -> bool:
        return collectives.rank() == 0


class Ignored:
    """Stands for an `experiment` where nothing is written: has every method, and each does nothing."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return ignore

    def __getitem__(self, index: Any) -> Ignored:
        return self

    def __setitem__(self, index: Any, value: Any) -> None:
        pass


def ignore(*args: Any, **kwargs: Any) -> None:
    """Do nothing."""


def as_params(params: Any) -> dict[str, Any]:
    """Settings as a dict.

    Raises:
        ConfigError: They are neither a mapping, a Namespace, a dataclass nor None.
    """
    if params is None:
        return {}
    if isinstance(params, Mapping):
        return dict(params)
    if isinstance(params, argparse.Namespace):
        return dict(vars(params))
    if dataclasses.is_dataclass(params) and not isinstance(params, type):
        return dataclasses.asdict(params)
    raise ConfigError(f"log_hyperparams got params={shown(params)}; pass a dict, a Namespace or a dataclass.")


def next_version(folder: str | os.PathLike[str]) -> int:
    """The first number above those of the folder's version_0, version_1, ..."""
    storage, place, _ = locate(os.fspath(folder) or os.curdir)
    taken = [int(match[1]) for name in storage.names(place) if (match := re.fullmatch(r"version_([0-9]+)", name))]
    return max(taken, default=-1) + 1


def is_version_in(log_dir: str, folder: str | os.PathLike[str]) -> bool:
    """Whether it is a numbered version among those in the folder."""
    parent, name = os.path.split(os.path.abspath(log_dir))
    return re.fullmatch(r"version_\d+", name) is not None and parent == os.path.abspath(folder)


def check_folder(argument: str, folder: str | os.PathLike[str]) -> None:
    """Refuse a folder that can't be made or written to. A nameless file in what is there of its path tells.

    Of a URL no more is known than that there is a package for its kind.

    Args:
        argument: What the user gave.
        folder: Where files will lie.

    Raises:
        ConfigError: It can't.
        MissingExtraError: It is a URL, and fsspec or what it needs for this kind of URL is not installed.
    """
    if is_url(folder):
        locate(folder)
        return
    folder = Path(folder)
    there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise ConfigError(
            f"{argument}: the folder {str(folder)!r} can't be {'written to' if there == folder else 'made'} ({error}); "
            "give one that rank 0's process may write to."
        ) from error
