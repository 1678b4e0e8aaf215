"""A Trainer's checkpoint files: which one a path or a word stands for, and writing one; what they hold is elsewhere."""

from __future__ import annotations

import os
import re
import sys
import warnings
from contextlib import nullcontext
from typing import Any

from lite.errors import ConfigError, UsageError
from lite.trainer.checkpoints import contents
from lite.trainer.checkpoints.finding import newest_checkpoint, sibling_versions
from lite.trainer.checkpoints.foreign import foreign_globals
from lite.trainer.loggers import agree_on_versions, checkpoint_folder
from lite.trainer.state import TrainerStatus
from lite.trainer.together import meet
from lite.trainer.view import View

# What the names of the files begin with among which the newest is meant.
_BEGINNINGS = {"auto": "", "last": "last", "hpc": "hpc_ckpt"}
_BESIDE_LOGS = re.compile(r"^(.+)[/\\]checkpoints[/\\][^/\\]+$")


class Checkpoints(View):
    """The side of `Trainer` that has to do with files of checkpoints."""

    ckpt_path: str | None

    def save_checkpoint(
        self, path: str | os.PathLike[str], weights_only: bool = False, storage_options: Any = None
    ) -> None:
        """Write a checkpoint, whole or not at all. Collective: call on all ranks, also where rank 0 alone writes.

        Args:
            path: A file ("x.ckpt"); without a suffix a directory that every rank writes its part of. URLs too.
            weights_only: Leave out what only a resumed training needs.
            storage_options: None; how a URL is reached is said by fsspec's own settings.
        """
        meet(self, "trainer.save_checkpoint() was called", "Call it on all ranks; rank 0 alone writes the file.")
        if storage_options is not None:
            raise ConfigError(
                f"save_checkpoint(storage_options={storage_options!r}) is not supported; put options of a storage into "
                "fsspec's configuration (fsspec.config.conf, or FSSPEC_<PROTOCOL>_<OPTION> in the environment)."
            )
        if self.module is None:
            raise UsageError("save_checkpoint: there is no model yet; call fit, validate, test or predict first.")
        if self.is_global_zero and self.state.status is TrainerStatus.RUNNING:
            for logger in self.loggers:  # a run that goes on from the file has the rows before it
                logger.save()
        checkpoint = contents.dump(self, weights_only)
        told = self.fit_loop.epoch_loop.has_mixed_gradients  # by `dump`, in the Trainer's words
        with warnings.catch_warnings() if told else nullcontext():
            if told:
                warnings.filterwarnings("ignore", "lite.save came within an accumulation window")
            self.lite.save(path, checkpoint, rng=False)

    def _begin_from(self, given: Any, *, fitting: bool, goes_on: bool = False) -> None:
        """Set `ckpt_path`, for this run. One that goes on writes where the checkpoint's run has written."""
        self.ckpt_path = self._find_checkpoint(given, fitting=fitting)
        match = None if self.ckpt_path is None else _BESIDE_LOGS.match(self.ckpt_path)
        if goes_on and match is not None:
            for logger in self.loggers:
                logger.go_on_in(match[1])
            agree_on_versions(self.loggers)
            self._log_dir = None  # it is agreed on anew

    def _read_checkpoint(self, weights_only: bool | None) -> dict[str, Any] | None:
        if self.ckpt_path is None:
            return None
        with foreign_globals():
            content: dict[str, Any] = self.lite.load(self.ckpt_path, weights_only=weights_only is not False)
        return content

    def _find_checkpoint(self, given: Any, *, fitting: bool) -> str | None:
        """The path that "best", "last", "auto" and the like stand for. Collective where it is such a word.

        Raises:
            ConfigError: There is no best one.
        """
        if given is None:
            if not fitting or "SLURM_JOB_ID" not in os.environ:
                return None
            found = newest_checkpoint([self.default_root_dir], named=_BEGINNINGS["hpc"])
            if found is not None:
                self.lite.print(f"a job of SLURM's goes on from {found}", file=sys.stderr)
            return found
        if given == "best":
            found = next((c.best_model_path for c in self.checkpoint_callbacks if c.best_model_path), None)
            if found is None:
                raise ConfigError("ckpt_path='best': this Trainer has saved no checkpoint; give the path of one.")
            return str(found)
        if given not in _BEGINNINGS:
            return str(os.fspath(given))
        found = newest_checkpoint(self._searched_folders(), named=_BEGINNINGS[given])
        if found is not None:
            self.lite.print(f"ckpt_path={given!r}: {found}", file=sys.stderr)
            return found
        what = "the run begins anew" if fitting else "the weights stay as they are"
        text = f"ckpt_path={given!r}: there is no {'last ' if given == 'last' else ''}checkpoint yet; {what}."
        if given == "auto" and fitting:  # the first run of many
            self.lite.print(text, file=sys.stderr)
        else:
            warnings.warn(text, stacklevel=4)
        return None

    def _searched_folders(self) -> list[str]:
        """Where checkpoints of this script's runs may lie; those beside a logger's files, of all its versions."""
        folders = self.checkpoint_folders()
        beside = checkpoint_folder(self.logger, self.default_root_dir) if self.loggers else None
        if beside is not None and any(getattr(c, "dirpath", None) in (None, beside) for c in self.checkpoint_callbacks):
            folders = [*folders, *sibling_versions(beside)]
        return folders
