"""Behaviour 6: Metric objects of torchmetrics, which count and synchronise by themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lite.errors import ConfigError
from lite.trainer import Callback
from lite.trainer.callbacks import ModelCheckpoint
from tests.support.processes import run_distributed
from tests.trainer.modules import Recorder, Tiny, numbers, trainer

torchmetrics = pytest.importorskip("torchmetrics")


class Counting(Tiny):
    """The sum of all rows seen, as a Metric, in training and validation."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options
        self.seen, self.val_seen = torchmetrics.SumMetric(), torchmetrics.MeanMetric()

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        self.seen(batch[:, 0].float())
        self.log("seen", self.seen, on_step=False, on_epoch=True, **self.options)
        return self.loss(batch)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.val_seen.update(torch.arange(len(batch)) + 4.0 * batch_idx)
        self.log("val_seen", self.val_seen)


def two_epochs(batch_size: int) -> list[dict[str, float]]:
    """9 rows to train on and 5 to validate on: batches are ragged, and of two ranks the second has none at the end."""
    seen = Recorder()
    run = trainer(max_epochs=2, strategy="ddp", callbacks=[seen])
    run.fit(Counting(), numbers(9, batch_size), numbers(5, batch_size))
    return [*seen.seen, {k: float(v) for k, v in run.callback_metrics.items()}]


def test_behaviour_6_metrics_are_computed_at_the_epochs_end_and_reset(tmp_path: Path) -> None:
    """Over all batches and ranks, each sample once; also when a run goes on in the middle of an epoch."""
    rows = [float(batch[:, 0].float().sum()) for batch in numbers(9, 4)]
    one = two_epochs(4)
    assert one[-1]["seen"] == pytest.approx(sum(rows), rel=1e-6)  # float32, added up batch by batch
    assert [m["val_seen"] for m in one] == [2.0, 2.0, 2.0]
    for rank in run_distributed(two_epochs, 2):
        assert rank[-1]["seen"] == pytest.approx(sum(rows), rel=1e-6)
    events = trainer(limit_val_batches=0).steps(Counting(), numbers(9, 4), events=("batch",))
    next(events).trainer.save_checkpoint(tmp_path / "a.ckpt")
    events.close()
    again = trainer(limit_val_batches=0)
    again.fit(Counting(), numbers(9, 4), ckpt_path=tmp_path / "a.ckpt")
    assert float(again.callback_metrics["seen"]) == one[-1]["seen"]


class Saving(Callback):
    """Saves at the end of each batch of training and validation and of each epoch, also before it is over with."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.saved = folder, 0

    def on_validation_batch_end(self, trainer: Any, *args: Any) -> None:
        self.saved += 1
        trainer.save_checkpoint(self.folder / f"{self.saved}.ckpt")

    on_train_batch_end = on_train_epoch_end = on_validation_batch_end


class Stepping(Counting):
    """Logs the newest batch's value too."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        self.seen(batch[:, 0].float())
        self.log("seen", self.seen, on_step=True, on_epoch=True)
        return self.loss(batch)


def test_behaviour_41_metrics_count_once_in_a_resumed_run(tmp_path: Path) -> None:
    """Saved wherever a batch or an epoch ends, also where nobody logs them between the resume and the epoch's end."""

    def fit(*callbacks: Callback, path: Path | None = None, **options: Any) -> dict[str, float]:
        run = trainer(max_epochs=2, callbacks=list(callbacks), **options)
        run.fit(Stepping(), numbers(11, 4), numbers(5, 4), ckpt_path=path)
        return {k: float(v) for k, v in run.callback_metrics.items()}

    saving = Saving(tmp_path)
    whole = fit(saving)
    last = float(list(numbers(11, 4))[-1][:, 0].float().sum())
    assert whole["seen_step"] == pytest.approx(
        last, rel=1e-6
    )  # what the last batch gave, not what a reset Metric gives
    assert saving.saved == 2 * (3 + 2 + 1)
    for number in range(1, saving.saved + 1):
        assert fit(path=tmp_path / f"{number}.ckpt") == whole, number
    stopped = trainer(max_epochs=2, max_steps=2)
    stopped.fit(Stepping(), numbers(11, 4), numbers(5, 4))
    stopped.save_checkpoint(tmp_path / "stopped.ckpt")
    assert fit(path=tmp_path / "stopped.ckpt") == whole


def test_behaviour_6_the_attribute_is_found_or_asked_for() -> None:
    """A Metric that is no part of the module would neither move nor be reset."""
    run = trainer(limit_val_batches=0)
    run.fit(Counting(metric_attribute="seen"), numbers())
    assert "seen" in run.callback_metrics
    with pytest.raises(ConfigError, match="metric_attribute='other'"):
        trainer(limit_val_batches=0).fit(Counting(metric_attribute="other"), numbers())

    class Loose(Tiny):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            self.log("loose", torchmetrics.SumMetric())
            return self.loss(batch)

    with pytest.raises(ConfigError, match=r"set it as self\.NAME in __init__"):
        trainer(limit_val_batches=0).fit(Loose(), numbers())


@pytest.mark.filterwarnings("ignore:nothing is left to train")
def test_a_run_that_goes_on_from_its_cut_off_end_has_reset_metrics(tmp_path: Path) -> None:
    """As the run had that ended there, though a longer one goes on with their sums."""

    class Means(Tiny):
        def __init__(self) -> None:
            super().__init__()
            self.mean = torchmetrics.MeanMetric()

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            self.mean(float(self.global_step))
            self.log("mean", self.mean, on_step=False, on_epoch=True)
            return self.loss(batch)

    for path in (None, tmp_path / "step=2.ckpt"):
        saves, module = ModelCheckpoint(tmp_path, "{step}"), Means()
        run = trainer(max_steps=2, limit_val_batches=0, callbacks=saves, enable_checkpointing=True)
        run.fit(module, numbers(), ckpt_path=path)
        assert (float(run.callback_metrics["mean"]), module.mean.update_called) == (0.5, False)
