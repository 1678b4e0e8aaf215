"""Loggers with the arguments and attributes that Lightning's have; what they write with is in `lite.loggers`.

They may be called on any rank, before there is a Trainer, too, and write on rank 0 alone.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from lite import collectives, loggers
from lite.data.transfer import move_to_device
from lite.errors import ConfigError
from lite.loggers.base import Ignored, check_folder, ignore, is_version_in, next_version
from lite.loggers.csv import CSVLogger as _CSV
from lite.loggers.tensorboard import TensorBoardLogger as _TensorBoard
from lite.storage import joined, locate
from lite.trainer.hparams import as_yaml
from lite.trainer.utilities.rank_zero import rank_zero_only

__all__ = ["CSVLogger", "DummyLogger", "Logger", "TensorBoardLogger", "rank_zero_experiment"]

FOLDER = "lite_logs"


class Logger(loggers.Logger):
    """A base for loggers in Lightning's form, which get numbers and no tensors.

    The Trainer calls it on rank 0, whether its methods are decorated by `rank_zero_only` or not.
    """

    takes_tensors: ClassVar[bool] = False

    _is_rank_zero: bool | None = None

    def _writes(self) -> bool:
        if self._is_rank_zero is None:  # asked once: it is asked at each row
            self._is_rank_zero = rank_zero_only.rank == 0
        return self._is_rank_zero


def rank_zero_experiment(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates an `experiment` so that it ignores what it is told on other ranks than 0."""

    @functools.wraps(fn)
    def experiment(self: Any) -> Any:
        return fn(self) if rank_zero_only.rank == 0 else Ignored()

    return experiment


class DummyLogger(Logger):
    """Has every method and writes nothing; what `self.logger` is with `fast_dev_run`."""

    @property
    def name(self) -> str:
        return ""

    @property
    def version(self) -> str:
        return ""

    @property
    def experiment(self) -> Any:
        """Ignores what it is told."""
        return Ignored()

    def log_metrics(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing."""

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing."""

    def __getitem__(self, index: Any) -> DummyLogger:
        return self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return ignore


class _Run(Logger):
    """A run that lies in save_dir/name/version_N; it stands before the class that writes."""

    takes_tensors = True

    def _place(
        self, save_dir: str | os.PathLike[str], name: str | None, version: int | str | None, prefix: str
    ) -> None:
        if version is not None and (isinstance(version, bool) or not isinstance(version, (int, str))):
            raise ConfigError(f"version={version!r} must be a number or a name; leave it out for the next free number.")
        self._save_dir, self._name, self._version = os.fspath(save_dir), name or "", version
        self._is_free = version is None
        self._prefix = f"{prefix}-" if prefix else ""
        self.hparams: dict[str, Any] = {}

    @property
    def name(self) -> str:
        return self._name

    @property
    def version(self) -> int | str:
        """The number, the first that is free where none was given, or the name."""
        if self._version is None:
            self._version = next_version(self.root_dir)
        return self._version

    @property
    def save_dir(self) -> str:
        return self._save_dir

    @property
    def root_dir(self) -> str:
        return joined(os.path.expandvars(os.path.expanduser(self._save_dir)), self._name)

    @property
    def log_dir(self) -> str:
        return joined(self.root_dir, _folder_of(self.version))

    def take_version(self, version: int | str) -> None:
        """Be the run that rank 0 takes this for."""
        self._version = version

    @property
    def _has_written(self) -> bool:
        raise NotImplementedError

    def go_on_in(self, log_dir: str) -> None:
        if self._is_free and not self._has_written and is_version_in(log_dir, self.root_dir):
            self.take_version(int(os.path.basename(log_dir)[8:]))

    def check(self) -> None:
        # A free version's folder is new.
        check_folder(f"save_dir={self._save_dir!r}", self.root_dir if self._version is None else self.log_dir)

    def _prefixed(self, metrics: Mapping[str, Any]) -> Mapping[str, Any]:
        return {f"{self._prefix}{name}": value for name, value in metrics.items()} if self._prefix else metrics

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        if self._writes():
            super().log_metrics(self._prefixed(metrics), step)  # type: ignore[safe-super]  # the writing class's

    def _write_hparams(self, params: Mapping[str, Any]) -> None:
        self.hparams.update(params)
        storage, file, _ = locate(joined(self.log_dir, "hparams.yaml"))
        storage.write(file, as_yaml(self.hparams))


class CSVLogger(_Run, _CSV):
    """Writes `metrics.csv` and `hparams.yaml` into save_dir/name/version_N.

    Args:
        save_dir: Where runs are kept.
        name: A folder for this kind of run; may be empty or None.
        version: The run's number or name; None takes the first number that is free.
        prefix: What names of metrics begin with, and a "-" after it.
        flush_logs_every_n_steps: Rows that are kept before they are written.

    Raises:
        ConfigError: An argument is of another kind.
    """

    def __init__(
        self,
        save_dir: str | os.PathLike[str],
        name: str | None = FOLDER,
        version: int | str | None = None,
        prefix: str = "",
        flush_logs_every_n_steps: int = 100,
    ) -> None:
        every = flush_logs_every_n_steps
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ConfigError(f"flush_logs_every_n_steps={every!r} must be a whole number of at least 1.")
        super().__init__(save_dir, name or "", version, every)
        self._place(save_dir, name, version, prefix)

    @property
    def _has_written(self) -> bool:
        return bool(self._rows or self._columns)

    def log_hyperparameters(self, params: Mapping[str, Any]) -> None:
        self._write_hparams(params)


class TensorBoardLogger(_Run, _TensorBoard):
    """Writes event files that TensorBoard reads, and `hparams.yaml`, into save_dir/name/version_N.

    Args:
        save_dir: Where runs are kept.
        name: A folder for this kind of run; may be empty or None.
        version: The run's number or name; None takes the first number that is free.
        log_graph: Whether the model's graph is traced, with `example_input_array`.
        default_hp_metric: Whether hyperparameters without a metric get one, "hp_metric"; else TensorBoard shows none.
        prefix: What names of metrics begin with, and a "-" after it.
        sub_dir: A folder for the event files within the run's.
        **kwargs: Further arguments of torch's SummaryWriter.

    Raises:
        MissingExtraError: tensorboard is not installed.
    """

    def __init__(
        self,
        save_dir: str | os.PathLike[str],
        name: str | None = FOLDER,
        version: int | str | None = None,
        log_graph: bool = False,
        default_hp_metric: bool = True,
        prefix: str = "",
        sub_dir: str | os.PathLike[str] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(save_dir, **kwargs)
        self._place(save_dir, name, version, prefix)
        self._draws, self._default_hp_metric = log_graph, default_hp_metric
        self.sub_dir = None if sub_dir is None else os.fspath(sub_dir)

    @property
    def _has_written(self) -> bool:
        return self._open is not None

    @property
    def log_dir(self) -> str:
        return super().log_dir if self.sub_dir is None else joined(super().log_dir, self.sub_dir)

    def log_hyperparameters(self, params: Mapping[str, Any], metrics: Any = None, step: int | None = None) -> None:
        """Take the run's settings.

        Args:
            params: These.
            metrics: The numbers that runs with other settings are compared by, or the one that "hp_metric" is.
            step: Their step.
        """
        from torch.utils.tensorboard.summary import hparams

        self._write_hparams(params)
        if metrics is None:
            metrics = {"hp_metric": -1} if self._default_hp_metric else {}
        elif not isinstance(metrics, Mapping):
            metrics = {"hp_metric": metrics}
        if not metrics:
            return
        self.log_metrics(metrics, step)
        named = {name: float(value) for name, value in self._prefixed(metrics).items()}
        for summary in hparams(dict(_flat(params)), named):  # type: ignore[no-untyped-call]
            self.writer._get_file_writer().add_summary(summary, step)

    def log_graph(self, model: Any, input_array: Any = None) -> None:
        """Trace the model's forward, where `log_graph` is on."""
        if not self._draws or not self._writes():
            return
        inputs = model.example_input_array if input_array is None else input_array
        if not isinstance(inputs, (Tensor, tuple)):
            warnings.warn(
                f"TensorBoardLogger(log_graph=True) draws no graph: {type(model).__name__}.example_input_array is "
                f"{'not set' if inputs is None else f'a {type(inputs).__name__}'}; set it to a tensor, or to a tuple "
                "of forward's arguments.",
                stacklevel=2,
            )
            return
        first = next(model.parameters(), None)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # torch 2.13's add_graph is made of torch.jit
            self.writer.add_graph(model, inputs if first is None else move_to_device(inputs, first.device))


def agree_on_versions(runs: list[Any]) -> None:
    """Every rank's loggers are in rank 0's folders. Collective: call on all ranks."""
    mine = [run.version if isinstance(run, _Run) else None for run in runs] if collectives.rank() == 0 else []
    for run, version in zip(runs, collectives.broadcast(mine), strict=False):  # rank 0 alone may have some
        if isinstance(run, _Run) and version is not None:
            run.take_version(version)


def checkpoint_folder(logger: Any, root: str) -> str:
    """Where checkpoints of a run with this logger lie.

    Args:
        logger: The first one, or None.
        root: The Trainer's `default_root_dir`.
    """
    folder, name, version = (getattr(logger, part, None) for part in ("save_dir", "name", "version"))
    if (folder, name, version) == (None, None, None):
        return os.path.join(getattr(logger, "log_dir", None) or root, "checkpoints")
    parts = (str(name or ""), "" if version is None else _folder_of(version), "checkpoints")
    return os.path.join(os.path.expandvars(os.path.expanduser(folder or root)), *parts)


def _folder_of(version: int | str) -> str:
    return f"version_{version}" if isinstance(version, int) else version


def _flat(params: Mapping[str, Any], start: str = "") -> Any:
    """Settings as TensorBoard takes them: those within others as "outer/inner", objects as text."""
    for key, value in params.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{start}{key}/")
        else:
            plain = isinstance(value, (bool, int, float, str))
            yield f"{start}{key}", value if plain else str(value)
