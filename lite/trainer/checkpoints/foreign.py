"""Files that PyTorch Lightning (1.8, 2.x) wrote: read without running their code, and what their counters mean."""

from __future__ import annotations

import argparse
import os
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import Any

import torch

from lite.checkpoint.reading import read
from lite.trainer.progress import Progress

_ATTRIBUTE_DICTS = (
    "pytorch_lightning.utilities.parsing.AttributeDict",
    "lightning.pytorch.utilities.parsing.AttributeDict",
    "lightning_lite.utilities.data.AttributeDict",
    "lightning_fabric.utilities.data.AttributeDict",
    "lightning.fabric.utilities.data.AttributeDict",
)


@contextmanager
def foreign_globals() -> Iterator[None]:
    """Within the block, `torch.load(weights_only=True)` reads the few classes of those files as plain ones of ours."""
    stand_ins: list[Any] = [(OrderedDict, name) for name in _ATTRIBUTE_DICTS]
    stand_ins += [(PurePosixPath, "pathlib.PosixPath"), (PurePosixPath, "pathlib._local.PosixPath")]
    stand_ins += [(argparse.Namespace, "argparse.Namespace")]
    with torch.serialization.safe_globals(stand_ins):
        yield


def read_checkpoint(path: str | os.PathLike[str], *, weights_only: bool = True) -> dict[str, Any]:
    """The content of a checkpoint of ours or of Lightning's."""
    with foreign_globals():
        return read(path, weights_only=weights_only)[0]


def progress_of_foreign(checkpoint: dict[str, Any], progress: Progress) -> None:
    """Take epoch and steps from a checkpoint of Lightning's."""
    progress.updates = int(checkpoint.get("global_step", 0))
    fit = checkpoint.get("loops", {}).get("fit_loop", {})
    epochs = fit.get("epoch_progress", {}).get("current", {})
    batches = fit.get("epoch_loop.batch_progress", {})
    progress.epoch = int(epochs.get("processed", epochs.get("completed", checkpoint.get("epoch", -1) + 1)))
    progress.batches = int(batches.get("total", {}).get("completed", progress.updates))
    progress.stepped = int(fit.get("epoch_loop.state_dict", {}).get("_batches_that_stepped", progress.updates))
    in_epoch = int(batches.get("current", {}).get("completed", 0))
    if in_epoch and not batches.get("is_last_batch", True) and epochs.get("processed") == epochs.get("completed"):
        warnings.warn(
            f"the checkpoint is of the middle of epoch {progress.epoch}, and Lightning's files don't say which samples "
            "were used; the epoch begins anew.",
            stacklevel=5,
        )
