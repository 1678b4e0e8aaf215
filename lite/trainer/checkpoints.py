"""A Trainer's checkpoint files: which one a path or a word stands for, and writing one; what they hold is elsewhere."""

from __future__ import annotations

import os
import warnings
from typing import Any

from lite.errors import ConfigError, UsageError
from lite.trainer import checkpointing
from lite.trainer.foreign import foreign_globals
from lite.trainer.run import newest_checkpoint
from lite.trainer.view import View


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
        if storage_options is not None:
            raise ConfigError(
                f"save_checkpoint(storage_options={storage_options!r}) is not supported; put options of a storage into "
                "fsspec's configuration (fsspec.config.conf, or FSSPEC_<PROTOCOL>_<OPTION> in the environment)."
            )
        if self.module is None:
            raise UsageError("save_checkpoint: there is no model yet; call fit, validate, test or predict first.")
        self.lite.save(path, checkpointing.dump(self, weights_only), rng=False)

    def _read_for_fit(
        self, ckpt_path: str | os.PathLike[str] | None, weights_only: bool | None
    ) -> dict[str, Any] | None:
        self.ckpt_path = self._find_checkpoint(ckpt_path, fitting=True)
        if self.ckpt_path is None:
            return None
        with foreign_globals():
            content: dict[str, Any] = self.lite.load(self.ckpt_path, weights_only=weights_only is not False)
        return content

    def _find_checkpoint(self, given: Any, *, fitting: bool) -> str | None:
        """The path that "best", "last", "auto" and the like stand for."""
        if given is None:
            if fitting and "SLURM_JOB_ID" in os.environ:
                return newest_checkpoint([self.default_root_dir], named="hpc_ckpt")
            return None
        if given in ("auto", "hpc"):
            return newest_checkpoint(self.checkpoint_folders(), named="hpc_ckpt" if given == "hpc" else None)
        if given == "last":
            found = newest_checkpoint(self.checkpoint_folders(), named="last")
            if found is None:
                warnings.warn("ckpt_path='last': there is no last checkpoint yet; the run begins anew.", stacklevel=4)
            return found
        if given == "best":
            callbacks = self.checkpoint_callbacks
            if not callbacks or not callbacks[0].best_model_path:
                raise ConfigError("ckpt_path='best': this Trainer has saved no checkpoint; give the path of one.")
            return str(callbacks[0].best_model_path)
        return str(os.fspath(given))
