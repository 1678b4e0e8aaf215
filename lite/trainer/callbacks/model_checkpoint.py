"""`ModelCheckpoint`: saves when its schedule says so, keeps the best or the newest; the Trainer writes the files."""

from __future__ import annotations

import copy
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from lite import collectives
from lite.checkpoint.reading import remove
from lite.errors import ConfigError, choose, some
from lite.storage import is_url, joined, sweep_locks
from lite.trainer.callbacks.base import Checkpoint
from lite.trainer.callbacks.naming import checkpoint_name, expanded, fields_of, free_name
from lite.trainer.callbacks.ranking import (
    as_score,
    best_of,
    is_better,
    is_newer,
    lies_in,
    lost,
    may_go,
    places_of,
    worst_of,
)
from lite.trainer.callbacks.save_schedule import SaveSchedule
from lite.trainer.loggers import checkpoint_folder
from lite.trainer.logging.monitored import looks_at_epoch_ends, may_still_come, monitored, nobody_logged


class ModelCheckpoint(Checkpoint):
    """Saves after epochs, validations, steps or spans of time, and keeps the best, the newest, or all.

    Args:
        dirpath: The folder or URL; None is save_dir/name/version_N/checkpoints of the first logger, or
            `checkpoints` in `default_root_dir`.
        filename: The name without suffix, with {epoch}, {step} and metrics in it, "{epoch}-{val_loss:.2f}" say.
        monitor: The metric by which checkpoints are compared, or "step" or "epoch"; None keeps the newest.
        verbose: Whether to tell of each save.
        save_last: True also writes "last.ckpt" each time; "link" lets it point to the newest one (at a URL, where there
            are no links, it is written as with True).
        save_top_k: How many are kept; -1 all, 0 none.
        save_weights_only: Leave out what only a resumed training needs.
        mode: "min" or "max": which metric is better.
        auto_insert_metric_name: Whether "{epoch}" becomes "epoch=3" or "3".
        every_n_train_steps: Save after every so many optimizer steps.
        train_time_interval: Save when so much time has passed, by rank 0's clock; on several processes it is looked at
            when a row is due for the loggers (`log_every_n_steps`).
        every_n_epochs: Save after every so many epochs, or validations of such epochs; the default, 1.
        save_on_train_epoch_end: At the end of training epochs, or after validation; None: at the end of epochs where
            one validation belongs to each, else after validation.
        save_on_exception: Whether to save when an exception ends the run (on one process).
        enable_version_counter: Whether a name that is taken gets "-v1"; otherwise it is overwritten.

    Attributes:
        best_model_path, best_model_score: The best checkpoint.
        last_model_path: The newest "last".
        best_k_models: Paths and scores of those that are kept.
        kth_best_model_path: The worst of them.
    """

    CHECKPOINT_JOIN_CHAR: ClassVar[str] = "-"
    CHECKPOINT_EQUALS_CHAR: ClassVar[str] = "="
    CHECKPOINT_NAME_LAST: ClassVar[str] = "last"
    FILE_EXTENSION: ClassVar[str] = ".ckpt"
    STARTING_VERSION: ClassVar[int] = 1

    def __init__(
        self,
        dirpath: str | os.PathLike[str] | None = None,
        filename: str | None = None,
        monitor: str | None = None,
        verbose: bool = False,
        save_last: bool | str | None = None,
        save_top_k: int = 1,
        save_weights_only: bool = False,
        mode: str = "min",
        auto_insert_metric_name: bool = True,
        every_n_train_steps: int | None = None,
        train_time_interval: timedelta | None = None,
        every_n_epochs: int | None = None,
        save_on_train_epoch_end: bool | None = None,
        save_on_exception: bool = False,
        enable_version_counter: bool = True,
    ) -> None:
        _check(save_top_k, save_last, monitor, every_n_train_steps, train_time_interval, every_n_epochs)
        self.monitor, self.verbose = monitor, verbose
        self.mode = choose("ModelCheckpoint's mode", mode, ["min", "max"])
        self.save_last, self.save_top_k, self.save_weights_only = save_last, save_top_k, save_weights_only
        self.auto_insert_metric_name = auto_insert_metric_name
        self.save_on_exception, self.enable_version_counter = save_on_exception, enable_version_counter
        by_epoch = not every_n_train_steps and train_time_interval is None
        self.schedule = SaveSchedule(
            every_n_train_steps or 0,
            every_n_epochs if every_n_epochs is not None else int(by_epoch),
            None if train_time_interval is None else train_time_interval.total_seconds(),
        )
        self._train_time_interval = train_time_interval
        self._save_on_train_epoch_end = save_on_train_epoch_end
        self._given_dirpath = None if dirpath is None else os.fspath(dirpath)
        self.dirpath: str | None = expanded(self._given_dirpath)
        self.filename = filename
        self.best_k_models: dict[str, Tensor] = {}
        self.best_model_path = self.kth_best_model_path = self.last_model_path = ""
        self.best_model_score: Tensor | None = None
        self.current_score: Tensor | None = None
        self.kth_value = torch.tensor(lost(mode))
        self._asked_at = 0
        self._last_saved = ""
        self._last_is_due = False  # the file that comes before it is being written, or was before a kill
        self._next_last = ""  # where it goes, if known
        self._instead_of: dict[str, Any] = {}  # of what a file takes the place, while it is written or gone on with
        self._resumed: frozenset[str] = frozenset()  # where the file lies that the run goes on from
        self._told: set[str] = set()  # fields of names that nobody has logged

    @property
    def state_key(self) -> str:
        """Names the settings, so that several live together."""
        settings = {
            "monitor": self.monitor,
            "mode": self.mode,
            "every_n_train_steps": self.every_n_train_steps,
            "every_n_epochs": self.every_n_epochs,
            "train_time_interval": self._train_time_interval,
        }
        return f"{type(self).__qualname__}{settings!r}"

    @property
    def every_n_epochs(self) -> int:
        """Epochs between two saves, 0 where they don't count."""
        return self.schedule.every_n_epochs

    @property
    def every_n_train_steps(self) -> int:
        """Optimizer steps between two saves, 0 where they don't count."""
        return self.schedule.every_n_steps

    # ---- when

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage == "fit":
            if self._given_dirpath is None:
                self.dirpath = collectives.broadcast(checkpoint_folder(trainer.logger, trainer.default_root_dir))
            self._last_is_due, self._next_last, self._instead_of = False, "", {}
            self._resumed = places_of(trainer.ckpt_path)  # now: a link may point elsewhere later
            if trainer.is_global_zero and self.dirpath and not self._is_off(trainer):
                sweep_locks(self.dirpath)
        self.schedule.begin()
        self._asked_at = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if self.schedule.seen is None and not trainer.fit_loop.is_unsettled:
            self.schedule.seen = trainer.global_step
        by, old = self._instead_of.get("by", ""), self._instead_of.get("old", [])
        self._instead_of = {}
        # A kill came before their removal. Only by the file itself is it known to have been written.
        if not self._is_off(trainer) and lies_in(by, self._resumed):
            for path in old:
                if not is_newer(path, trainer.ckpt_path):  # or it is another run's, of that name
                    self._remove(trainer, path)
        if self._next_last and self.last_model_path not in ("", self._next_last):
            newer = collectives.broadcast(is_newer(self.last_model_path, trainer.ckpt_path))
            self.last_model_path = "" if newer else self.last_model_path

    def after_batch(self, trainer: Any, *, validated: bool) -> None:
        if self._is_off(trainer):
            return
        by_validation = validated and not self.goes_by_epochs(trainer)
        due = self.schedule.after_batch(trainer.global_step, trainer.current_epoch, validated=by_validation)
        if due or self._is_time(trainer):
            self._save(trainer)
        elif self._last_is_due:
            self._finish_last(trainer)

    def after_epoch(self, trainer: Any) -> None:
        if self._is_off(trainer) or not self.goes_by_epochs(trainer):
            return
        if self.schedule.after_epoch(trainer.global_step, trainer.current_epoch):
            self._save(trainer)
        elif self._last_is_due:
            self._finish_last(trainer)

    def next_look(self, global_step: int) -> float:
        return self.schedule.next_look(global_step)

    def goes_by_epochs(self, trainer: Any) -> bool:
        """Whether saves by epochs come at their ends, not after validation."""
        return looks_at_epoch_ends(trainer, self._save_on_train_epoch_end)

    def _is_time(self, trainer: Any) -> bool:
        """Whether rank 0's clock has struck; ranks ask each other as often as they talk anyway."""
        schedule, stepped = self.schedule, trainer.fit_loop.progress.stepped
        if schedule.interval_s is None or schedule.saved == trainer.global_step:
            return False
        if trainer.world_size == 1:
            return schedule.struck()
        if stepped % trainer.ranks_talk_every or stepped == self._asked_at:
            return False
        self._asked_at = stepped
        return collectives.any_rank(schedule.struck() and trainer.is_global_zero)

    def _is_off(self, trainer: Any) -> bool:
        return bool(trainer.fast_dev_run) or trainer.sanity_checking

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        if not self.save_on_exception or not trainer.training or self._is_off(trainer):
            return
        if self.schedule.saved == trainer.global_step:
            return
        if trainer.world_size > 1:
            warnings.warn("save_on_exception: the other ranks can't take part in a save now; nothing is.", stacklevel=2)
            return
        path = self.format_checkpoint_name({**trainer.callback_metrics, **_counters(trainer)})
        self._write(trainer, path)

    # ---- what

    def _save(self, trainer: Any) -> None:
        metrics = {**trainer.callback_metrics, **_counters(trainer)}
        if self.monitor is not None and self.save_top_k:
            value = self.score(trainer)
            if value is None:
                return  # the first validation is still to come
            metrics[self.monitor] = value
        else:
            value = None
        score = None if value is None else as_score(torch.as_tensor(value), self.mode)
        before = copy.copy(self.schedule), self._last_is_due, self._next_last
        try:
            self.schedule.done(trainer.global_step)  # so the file itself says so, too
            if self.save_last:
                self._last_is_due, self._next_last = True, self._last_path(metrics)
            if score is not None:
                self._save_if_among_best(trainer, metrics, score)
            elif self.save_top_k:
                self._save_newest(trainer, metrics)
            if self.save_last:
                self._save_last(trainer, self._next_last, {"current_score": score})
        except BaseException:
            self.schedule, self._last_is_due, self._next_last = before
            raise
        self.current_score = score

    def score(self, trainer: Any) -> Any:
        """The monitor's value, the same on all ranks; None where it may still be logged. Collective.

        Raises:
            ConfigError: Nobody has logged it, on all ranks.
        """
        assert self.monitor is not None
        if self.monitor in (counters := _counters(trainer)):
            return counters[self.monitor]
        value = monitored(trainer, self.monitor)
        if value is None and not may_still_come(trainer):
            text = nobody_logged(trainer, f"ModelCheckpoint(monitor={self.monitor!r})")
            raise ConfigError(f"{text} Log it by self.log({self.monitor!r}, ...), or monitor another.")
        return value

    def _save_if_among_best(self, trainer: Any, metrics: dict[str, Any], value: Tensor) -> None:
        models, mode = dict(self.best_k_models), self.mode
        full = 0 < self.save_top_k <= len(models)
        if full and not is_better(value, models[self.kth_best_model_path], mode):
            if self.verbose:
                self._tell(trainer, f"{self.monitor} = {value:g} is not among the best {self.save_top_k}")
            return
        removed = self.kth_best_model_path if full else None
        if removed is not None:
            del models[removed]
        path = self._path(trainer, metrics, but=removed)
        models[path] = value
        best = best_of(models, mode)
        changes = {"best_k_models": models, "best_model_path": best, "best_model_score": models[best]}
        if self.save_top_k == -1 or 0 < self.save_top_k <= len(models):
            worst = worst_of(models, mode)
            changes |= {"kth_best_model_path": worst, "kth_value": models[worst]}
        if self.verbose:
            self._tell(trainer, f"{self.monitor} = {value:g}: saved {path}")
        self._write(trainer, path, instead_of=removed, current_score=value, **changes)

    def _save_newest(self, trainer: Any, metrics: dict[str, Any]) -> None:
        before = self.best_model_path
        path = self._path(trainer, metrics, but=before if self.save_top_k == 1 else None)
        instead_of = before if self.save_top_k == 1 else None
        self._write(trainer, path, instead_of=instead_of, current_score=None, best_model_path=path)

    def _finish_last(self, trainer: Any) -> None:
        """The run that is gone on with had saved, and not yet its "last"."""
        self._last_saved = self._last_saved or trainer.ckpt_path or ""
        path = self._next_last or self._last_path({**trainer.callback_metrics, **_counters(trainer)})
        self._save_last(trainer, path, {})

    def _last_path(self, metrics: dict[str, Any]) -> str:
        """Where the next "last" goes."""
        path = self.format_checkpoint_name(metrics, self.CHECKPOINT_NAME_LAST)
        if self.enable_version_counter:
            path = free_name(path, self.FILE_EXTENSION, self.STARTING_VERSION, self._next_last or self.last_model_path)
        found: str = collectives.broadcast(path)
        return found

    def _save_last(self, trainer: Any, path: str, changes: dict[str, Any]) -> None:
        before = self.last_model_path
        changes = {**changes, "_last_is_due": False, "_next_last": "", "last_model_path": path}
        if self.save_last == "link" and self._last_saved and self.save_top_k and not is_url(path + self._last_saved):
            with self._changing(changes):
                if trainer.is_global_zero:
                    _link(self._last_saved, path)
                trainer.lite.barrier()
            self._remove_other(trainer, before, path)
        else:
            self._write_file(trainer, path, before, changes)

    def _write(self, trainer: Any, path: str, instead_of: str | None = None, **changes: Any) -> None:
        self._write_file(trainer, path, instead_of, {**changes, "_last_saved": path})

    def _write_file(self, trainer: Any, path: str, instead_of: str | None, changes: dict[str, Any]) -> None:
        """Write a file, then remove the one of which it takes the place.

        Args:
            trainer: Who writes it.
            path: Its path.
            instead_of: That other's, if any; may be `path`.
            changes: What this callback's attributes are from then on, and in the file.
        """
        old = [instead_of] if instead_of and instead_of != path else []
        with self._changing(changes), self._changing({"_instead_of": {"by": path, "old": old}}, back=True):
            trainer.save_checkpoint(path, self.save_weights_only)
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.after_save_checkpoint(self)
        self._remove_other(trainer, instead_of, path)

    @contextmanager
    def _changing(self, changes: dict[str, Any], *, back: bool = False) -> Iterator[None]:
        """Attributes have those values within the block and, unless it fails or `back`, after it."""
        before = {name: getattr(self, name) for name in changes}
        vars(self).update(changes)
        try:
            yield
        except BaseException:
            back = True
            raise
        finally:
            if back:
                vars(self).update(before)

    def _remove_other(self, trainer: Any, old: str | None, new: str) -> None:
        if old and old != new:
            self._remove(trainer, old)

    def _remove(self, trainer: Any, path: str) -> None:
        """Remove a checkpoint that need not be kept; never the one resumed from, nor one that lies elsewhere."""
        if not trainer.is_global_zero or not self.dirpath:
            return
        if may_go(path, self.dirpath, self._resumed):
            remove(path)

    # ---- names

    def format_checkpoint_name(
        self, metrics: dict[str, Any], filename: str | None = None, ver: int | None = None
    ) -> str:
        """The path of a checkpoint with these metrics."""
        template = filename if filename is not None else self.filename
        equals, join = self.CHECKPOINT_EQUALS_CHAR, self.CHECKPOINT_JOIN_CHAR
        name = checkpoint_name(
            template or f"{{epoch}}{join}{{step}}", metrics, equals if self.auto_insert_metric_name else None
        )
        name += f"{join}v{ver}" if ver is not None else ""
        name += self.FILE_EXTENSION
        return name if self.dirpath is None else joined(self.dirpath, name)

    def _path(self, trainer: Any, metrics: dict[str, Any], but: str | None = None) -> str:
        missing = sorted(fields_of(self.filename or "") - metrics.keys() - self._told)
        if missing:
            self._told.update(missing)
            warnings.warn(
                f"ModelCheckpoint(filename={self.filename!r}): nobody has logged {some(missing)}, which counts "
                f"0 in names; there are {', '.join(map(repr, metrics))}.",
                stacklevel=2,
            )
        path = self.format_checkpoint_name(metrics)
        if self.enable_version_counter:
            path = free_name(path, self.FILE_EXTENSION, self.STARTING_VERSION, but or "")
        found: str = collectives.broadcast(path)
        return found

    def to_yaml(self, filepath: str | os.PathLike[str] | None = None) -> None:
        """Write the kept checkpoints and their scores into a file."""
        if filepath is None:
            assert self.dirpath is not None
            filepath = os.path.join(self.dirpath, "best_k_models.yaml")
        lines = [f"{path}: {float(score)}\n" for path, score in self.best_k_models.items()]
        Path(filepath).write_text("".join(lines))

    def _tell(self, trainer: Any, text: str) -> None:
        trainer.lite.print(f"ModelCheckpoint: {text}", file=sys.stderr)

    # ---- state

    def state_dict(self) -> dict[str, Any]:
        return {
            "monitor": self.monitor,
            "best_model_score": self.best_model_score,
            "best_model_path": self.best_model_path,
            "current_score": self.current_score,
            "dirpath": self.dirpath,
            "best_k_models": dict(self.best_k_models),
            "kth_best_model_path": self.kth_best_model_path,
            "kth_value": self.kth_value,
            "last_model_path": self._next_last or self.last_model_path,
            "seen_step": self.schedule.seen,
            "saved_step": self.schedule.saved,
            "last_is_due": self._last_is_due,
            "last_before": self.last_model_path,
            "instead_of": dict(self._instead_of),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.schedule.seen = state_dict.get("seen_step")
        self.schedule.saved = state_dict.get("saved_step", -1)
        last_was_due = state_dict.get("last_is_due", False)
        self._last_is_due = bool(self.save_last) and last_was_due
        self.best_model_path = str(state_dict["best_model_path"])
        if state_dict.get("dirpath", self.dirpath) != self.dirpath:
            warnings.warn(
                f"the checkpoint was saved with dirpath={state_dict.get('dirpath')!r} and this ModelCheckpoint has "
                f"{self.dirpath!r}: those that were kept there are left alone.",
                stacklevel=4,
            )
            return
        self.best_model_score = state_dict["best_model_score"]
        self.current_score = state_dict.get("current_score")
        self.kth_best_model_path = str(state_dict.get("kth_best_model_path", ""))
        self.kth_value = state_dict.get("kth_value", self.kth_value)
        self.best_k_models = {str(p): torch.as_tensor(v) for p, v in state_dict.get("best_k_models", {}).items()}
        self.last_model_path = str(state_dict.get("last_model_path", ""))
        if last_was_due:
            self._next_last = self.last_model_path if self._last_is_due else ""
            self.last_model_path = str(state_dict.get("last_before", ""))
        self._instead_of = dict(state_dict.get("instead_of", {}))


def _check(
    top_k: Any, save_last: Any, monitor: str | None, steps: int | None, interval: Any, epochs: int | None
) -> None:
    """Refuse settings that are wrong or contradict each other."""
    if isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < -1:
        raise ConfigError(f"save_top_k={top_k!r} must be -1 (all), 0 (none) or a number of checkpoints.")
    for name, value in (("every_n_train_steps", steps), ("every_n_epochs", epochs)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
            raise ConfigError(f"{name}={value!r} must be a whole number of at least 0.")
    if interval is not None and not isinstance(interval, timedelta):
        raise ConfigError(f"train_time_interval={interval!r} must be a timedelta; use timedelta(minutes=...).")
    if bool(steps) + bool(epochs) + (interval is not None) > 1:
        raise ConfigError(
            f"every_n_train_steps={steps!r}, every_n_epochs={epochs!r}, train_time_interval={interval!r}: give one of "
            "them, and use several ModelCheckpoints for more."
        )
    if monitor is None and top_k not in (-1, 0, 1):
        raise ConfigError(f"save_top_k={top_k} needs a monitor to compare by; without one it is -1, 0 or 1.")
    if save_last not in (None, True, False, "link"):
        raise ConfigError(f"save_last={save_last!r} is not known; use True, False or 'link'.")


def _counters(trainer: Any) -> dict[str, int]:
    return {"epoch": trainer.current_epoch, "step": trainer.global_step}


def _link(target: str, path: str) -> None:
    """Let `path` point to `target`, or to what that points to, in one moment."""
    folder, name = os.path.split(path)
    folder, target = os.path.realpath(folder), os.path.realpath(target)
    if target == os.path.join(folder, name):
        return
    beside = f"{path}.tmp"
    if os.path.lexists(beside):
        os.remove(beside)
    os.symlink(os.path.relpath(target, folder), beside)
    os.replace(beside, path)
