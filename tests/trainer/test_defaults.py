"""The Trainer with what it has by default (a bar, a sanity check, a logger, checkpoints), on one process and on two."""

from __future__ import annotations

import csv
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from lite.loggers import CSVLogger
from lite.trainer import Trainer
from lite.trainer.callbacks import ModelCheckpoint
from tests.support.processes import run_distributed
from tests.trainer.modules import Tiny, numbers


class Logs(Tiny):
    """Logs with and without synchronisation."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.log("shared", loss, prog_bar=True, on_step=True, on_epoch=True, sync_dist=True)
        if self.global_rank == 1 or batch_idx % 2:
            self.log("some", 1.0 + self.global_rank, sync_dist=True)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("own", self.loss(batch))


def fit(folder: str, batch_size: int) -> dict[str, Any]:
    """What files there are in the end, what was written, and what was told."""
    saves = ModelCheckpoint(filename="{step}", save_top_k=-1, every_n_train_steps=5, save_last=True)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        run = Trainer(
            accelerator="cpu",
            default_root_dir=folder,
            logger=CSVLogger(folder, "runs"),
            callbacks=saves,
            max_epochs=2,
            accumulate_grad_batches=4,
            log_every_n_steps=3,
        )
        run.fit(Logs(), numbers(160, batch_size), numbers(7, batch_size))
    names = sorted(os.listdir(os.path.dirname(saves.best_model_path)))
    written = Path(folder, "runs", "version_0", "metrics.csv").read_text() if run.is_global_zero else ""
    losses = [row["shared_step"] for row in csv.DictReader(written.splitlines()) if row["shared_step"]]
    own = [str(warning.message) for warning in told if "log('own')" in str(warning.message)]
    return {"names": names, "losses": [float(loss) for loss in losses], "own": own, "steps": run.global_step}


def test_two_processes_save_and_log_what_one_does(tmp_path: Path) -> None:
    """A bar looks on rank 0 alone; what is due is due on all, with accumulation, and keys that one rank alone logs."""
    one = fit(str(tmp_path / "one"), 4)
    first, second = run_distributed(fit, str(tmp_path / "two"), 2)
    assert one["names"] == ["last.ckpt", "step=10.ckpt", "step=15.ckpt", "step=20.ckpt", "step=5.ckpt"]
    assert (one["steps"], len(one["losses"])) == (20, 6)
    for rank in (first, second):
        assert (rank["names"], rank["steps"]) == (one["names"], one["steps"])
    assert first["losses"] == pytest.approx(one["losses"], rel=1e-12)
    assert one["own"] == []
    assert len(first["own"]) == len(second["own"]) == 1  # the sanity check before it doesn't use the word up
    assert "without sync_dist=True" in first["own"][0]
