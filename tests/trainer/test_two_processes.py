"""Several processes: behaviours 4, 9, 22, 25, 35, 41, 44 and 51, in real gloo jobs of two ranks."""

from __future__ import annotations

import csv
import io
import os
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lite import collectives
from lite.errors import ConfigError, PeerError, UsageError
from lite.loggers import CSVLogger
from lite.trainer import Callback, CombinedLoader, LightningModule
from lite.trainer.callbacks import BasePredictionWriter, EarlyStopping, ModelCheckpoint
from lite.trainer.loops.calling import Weights
from tests.support.processes import run_distributed, run_ranks
from tests.trainer.modules import Numbers, Recorder, Tiny, numbers, trainer, weights

STRATEGY = {"strategy": "ddp"}


class Everything(Tiny):
    """Epoch means, sums and extremes over ranks."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.log("loss", loss, on_step=False, on_epoch=True, sync_dist=True)
        self.log("rows", float(len(batch)), on_step=False, on_epoch=True, sync_dist=True, reduce_fx="sum")
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val", self.loss(batch), sync_dist=True)
        self.log("largest", batch.max(), sync_dist=True, reduce_fx="max")
        self.log("rank0", float(self.global_rank), rank_zero_only=True)


class AtEpochEnd(Callback):
    """What a callback sees of the metrics as an epoch ends."""

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.seen = {name: float(value) for name, value in trainer.callback_metrics.items() if name != "rank0"}


def whole_run(batch_size: int, accumulate: int) -> dict[str, Any]:
    """fit, validate, test and predict; 9, 5 and 11 rows don't divide by 2, and of the ninth one rank has none."""
    module = Everything()
    watcher = AtEpochEnd()
    run = trainer(max_epochs=2, accumulate_grad_batches=accumulate, callbacks=watcher, **STRATEGY)
    run.fit(module, numbers(9, batch_size), numbers(5, batch_size))
    metrics = {k: float(v) for k, v in run.callback_metrics.items() if k != "rank0"}
    assert watcher.seen == metrics
    test = run.test(module, numbers(5, batch_size), verbose=False)
    validated = run.validate(module, numbers(1, batch_size), verbose=False)
    validated[0].pop("rank0", None)
    predictions = run.predict(module, numbers(11, batch_size))
    together = run.predict(module, numbers(11, batch_size), gather=True)
    steps = (run.global_step, run.fit_loop.progress.batches, run.clocks()["samples"])
    return {
        "weights": weights(module),
        "metrics": metrics,
        "test": test,
        "validated": validated,
        "predictions": [p.tolist() for p in predictions],
        "together": [p.tolist() for p in together],
        "steps": steps,
    }


@pytest.mark.parametrize("accumulate", [1, 2])
def test_behaviour_44_two_processes_give_what_one_gives(accumulate: int) -> None:
    """Weights, metrics and predictions: every sample counts once, on ragged and on empty ranks too."""
    one = whole_run(4, accumulate)
    first, second = run_distributed(whole_run, 2, accumulate)
    for rank in (first, second):
        # Sums are added up in another order: a few units of 2e-16 per step.
        assert rank["weights"] == pytest.approx(one["weights"], rel=0, abs=1e-13)
        assert rank["metrics"] == pytest.approx(one["metrics"], rel=1e-12)
        assert rank["test"][0] == pytest.approx(one["test"][0], rel=1e-12)
        assert rank["validated"][0] == pytest.approx(one["validated"][0], rel=1e-12)
        assert rank["steps"] == one["steps"]
        assert [len(batch) for batch in rank["together"]] == [4, 4, 3]
        for found, expected in zip(rank["together"], one["together"], strict=True):
            assert found == pytest.approx(expected, rel=1e-12)
    assert one["metrics"]["rows"] == 9
    together = [row for a, b in zip(first["predictions"], second["predictions"], strict=False) for row in a + b]
    left = [p for side in (first, second) for p in side["predictions"][len(second["predictions"]) :]]
    together += [row for part in left for row in part]
    assert together == pytest.approx([row for p in one["predictions"] for row in p], rel=1e-12)


def sharded_run(strategy: Any, root: str, batch_size: int) -> list[Any]:
    """fit with checkpoints, test of the best one, and the second half of the fit again by another Trainer."""
    found: list[Any] = []
    options = {"enable_checkpointing": True, "strategy": strategy, "accumulate_grad_batches": 2}
    for start in (None, f"{root}/epoch=0-step=2.ckpt"):
        module = Tiny()
        keep = ModelCheckpoint(root, monitor="val", save_last=True, every_n_epochs=1, save_top_k=-1)
        run = trainer(max_epochs=3, callbacks=[keep], gradient_clip_val=0.1, **options)
        run.fit(module, numbers(16, batch_size), numbers(6, batch_size), ckpt_path=start)
        found.append([weights(module), {k: float(v) for k, v in run.callback_metrics.items()}, run.global_step])
        if start is None:
            found.append(run.test(module, numbers(6, batch_size), ckpt_path="best", verbose=False))
    return found


def test_strategies_are_there_by_the_arguments(tmp_path: Path) -> None:
    """Sharded models give what one process gives, from checkpoints of the whole model, and resume exactly."""
    one = sharded_run("auto", str(tmp_path / "one"), 4)
    assert one[2] == one[0]
    for strategy in ("fsdp", "ddp"):
        for fit, test, resumed in run_distributed(sharded_run, strategy, str(tmp_path / strategy), 2):
            assert resumed == fit
            assert fit[0] == pytest.approx(one[0][0], rel=0, abs=1e-13)
            assert fit[1]["val"] == pytest.approx(one[0][1]["val"], rel=1e-12)
            assert fit[2] == one[0][2]
            assert test[0] == pytest.approx(one[1][0], rel=1e-12)
        saved = [torch.load(tmp_path / name / "last.ckpt", weights_only=True) for name in ("one", strategy)]
        torch.testing.assert_close(saved[1]["state_dict"], saved[0]["state_dict"], rtol=0, atol=1e-13)


class Exact(Tiny):
    """Weights and rows are multiples of 1/64, so that no sum is rounded, in whatever order it is added up."""

    def __init__(self) -> None:
        super().__init__()
        self.net[1] = nn.Identity()
        self.round_weights()

    def round_weights(self) -> None:
        for parameter in self.parameters():
            parameter.data = parameter.data.mul(64).round().div(64)

    def loss(self, batch: Tensor) -> Tensor:
        return super().loss(batch.mul(8).round().div(8))

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.log("rows", float(len(batch)), on_step=False, on_epoch=True, sync_dist=True, reduce_fx="sum")
        self.log("loss", loss, on_step=False, on_epoch=True, sync_dist=True)
        return loss

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return super().predict_step(batch.mul(8).round().div(8), batch_idx)

    def on_train_batch_end(self, *args: Any) -> None:
        self.round_weights()


def exact_run(batch_size: int) -> list[Any]:
    """Every rank's part of a batch has 4, 2, 1 or no rows, by which a mean is exact too."""
    module = Exact()
    run = trainer(max_epochs=2, strategy="ddp")
    run.fit(module, numbers(10, batch_size), numbers(5, batch_size))
    found: list[Any] = [weights(module), {k: float(v) for k, v in run.callback_metrics.items()}]
    found += [run.validate(module, numbers(10, batch_size), verbose=False)]
    found += [run.test(module, numbers(9, batch_size), verbose=False)]
    return [*found, [p.tolist() for p in run.predict(module, numbers(9, batch_size), gather=True)]]


def test_a_run_at_two_processes_gives_one_processs_metrics_exactly() -> None:
    """fit, validate, test and predict, where rounding does not depend on the order: equal to the last bit."""
    one = exact_run(4)
    assert run_distributed(exact_run, 2) == [one, one]


class Writer(BasePredictionWriter):
    """Keeps what it is given."""

    def __init__(self) -> None:
        super().__init__("batch_and_epoch")
        self.batches: list[Any] = []
        self.epoch: Any = None

    def write_on_batch_end(self, trainer: Any, module: Any, prediction: Any, indices: Any, *args: Any) -> None:
        self.batches.append((indices, len(prediction)))

    def write_on_epoch_end(self, trainer: Any, module: Any, predictions: Any, indices: Any) -> None:
        self.epoch = ([len(p) for p in predictions], indices[0])


class Several(Tiny):
    """What else there is to agree on."""

    def __init__(self, case: str) -> None:
        super().__init__()
        self.case = case

    def prepare_data(self) -> None:
        if self.case == "prepare":
            raise RuntimeError("no such data")
        print("prepared")

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        if self.case == "stop" and self.global_rank == 1 and batch_idx == 1:
            self.trainer.should_stop = True
        self.log("mine", float(self.global_rank), on_step=False, on_epoch=True)
        return None if self.case == "none" else self.loss(batch)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        if self.case == "rank":
            self.log("score", float(self.global_rank) if self.current_epoch else 2.0, rank_zero_only=False)
        else:
            self.log("score", 1.0, sync_dist=True)


def agreements(folder: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    writer = Writer()
    run = trainer(callbacks=[writer], **STRATEGY)
    run.predict(Several(""), numbers(6, 2), return_predictions=False)
    found["writer"] = (writer.batches, writer.epoch)
    try:
        trainer(**STRATEGY).fit(Several("prepare"), numbers(), numbers())
    except BaseException as error:
        found["prepare"] = str(error)
    # One rank's wish to stop is everyone's at the next logging interval.
    run = trainer(max_epochs=3, log_every_n_steps=3, limit_val_batches=0, **STRATEGY)
    run.fit(Several("stop"), numbers(32, 2))
    found["stopped at"] = run.global_step
    found["local"] = float(run.callback_metrics["mine"])
    # A save in the middle of an accumulation window of two ranks.
    module, losses = Tiny(dropout=0.3), []
    run = trainer(max_epochs=2, accumulate_grad_batches=3, limit_val_batches=0, **STRATEGY)
    for _ in run.steps(module, numbers(22, 2, shuffle=True)):
        losses.append(run.global_step)
        if len(losses) == 2:
            run.save_checkpoint(f"{folder}/x.ckpt")
    again = Tiny(dropout=0.3)
    torch.randn(5)
    run = trainer(max_epochs=2, accumulate_grad_batches=3, limit_val_batches=0, **STRATEGY)
    run.fit(again, numbers(22, 2, shuffle=True), ckpt_path=f"{folder}/x.ckpt")
    found["resumed"] = weights(again) == weights(module)
    stops = EarlyStopping("score", patience=1)
    saves = ModelCheckpoint(folder, "{epoch}-{score}", monitor="score", save_top_k=-1)
    run = trainer(max_epochs=6, callbacks=[stops, saves], enable_checkpointing=True, **STRATEGY)
    run.fit(Several("early"), numbers(4, 2), numbers(4, 2))
    found["early"] = (run.current_epoch, stops.stopped_epoch, saves.best_model_path)
    return found


def test_behaviours_22_25_35_41_51_ranks_agree(tmp_path: Path) -> None:
    """On data that fails, on a stop, on early stopping, on what is saved; and each writes its own predictions."""
    with tempfile.TemporaryDirectory() as folder:
        first, second = run_distributed(agreements, folder)
    assert first["writer"] == ([([0, 1], 2), ([4], 1)], ([2, 1], [[0, 1], [4]]))
    assert second["writer"] == ([([2, 3], 2), ([5], 1)], ([2, 1], [[2, 3], [5]]))
    assert "no such data" in first["prepare"]
    assert "no such data" in second["prepare"]
    assert first["stopped at"] == second["stopped at"] == 3
    assert (first["local"], second["local"]) == (0.0, 1.0)
    assert first["resumed"] and second["resumed"]
    assert first["early"] == second["early"]
    assert first["early"][:2] == (2, 1)


class Unsynchronised(Tiny):
    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("own", float(self.global_rank))
        self.log("shared", float(self.global_rank), sync_dist=True)


def own_and_shared() -> tuple[dict[str, float], list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = trainer(**STRATEGY).validate(Unsynchronised(), numbers(3, 1), verbose=False)
    return found[0], [str(warning.message) for warning in caught]


def test_behaviour_4_values_are_a_ranks_own_unless_they_are_synchronised() -> None:
    """With a word on it in validation; a mean over ranks is weighed by their samples, here two of rank 0 and one."""
    for rank, (found, said) in enumerate(run_distributed(own_and_shared)):
        assert found == {"own": float(rank), "shared": pytest.approx(1 / 3, rel=1e-7)}
        assert [text for text in said if "sync_dist" in text] == [
            "log('own') in validation_step without sync_dist=True gives each of the 2 ranks the value of its own "
            "samples."
        ]


class Plateau(Tiny):
    """Its ranks log different numbers in each step, and a scheduler follows them."""

    def __init__(self, sync: bool) -> None:
        super().__init__()
        self.sync, self.seen = sync, []

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        self.log("x", float(batch_idx) * (1 - 3 * self.global_rank), sync_dist=self.sync, reduce_fx="sum")
        return self.loss(batch)

    def on_train_batch_end(self, *args: Any) -> None:
        rate = self.trainer.optimizers[0].param_groups[0]["lr"]
        self.seen.append((float(self.trainer.callback_metrics["x"]), rate))

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
        return [optimizer], [{"scheduler": scheduler, "monitor": "x", "interval": "step"}]


def plateaus(folder: str) -> list[Any]:
    found = []
    for sync in (True, False):
        module = Plateau(sync)
        saves = ModelCheckpoint(f"{folder}/{sync}", "{x}", monitor="x", every_n_train_steps=2)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run = trainer(callbacks=[saves], enable_checkpointing=True, log_every_n_steps=2, **STRATEGY)
            run.fit(module, numbers(8, 1))
        said = sum("'x' differs between the ranks" in str(warning.message) for warning in caught)
        found.append([module.seen, weights(module), said, saves.best_model_path.removeprefix(folder)])
    return found


def test_behaviour_4_what_decides_is_the_same_on_all_ranks(tmp_path: Path) -> None:
    """A step's value that a scheduler or a ModelCheckpoint follows: reduced with sync_dist=True, or else rank 0's."""
    (synced, own), (other_synced, other_own) = run_distributed(plateaus, str(tmp_path))
    # 0, 1, 2, 3 of rank 0 and 0, -2, -4, -6 of rank 1 add up to what falls; rank 0's own rise.
    assert synced == other_synced
    assert synced[0] == [(0.0, 0.05), (-1.0, 0.05), (-2.0, 0.05), (-3.0, 0.05)]
    assert synced[2:] == [0, "/True/x=-3.0.ckpt"]
    assert [rate for _, rate in own[0]] == [rate for _, rate in other_own[0]] == [0.05, 0.025, 0.0125, 0.00625]
    assert own[1:] == other_own[1:]
    assert own[2:] == [1, "/False/x=1.0.ckpt"]


class OneRank(Tiny):
    """Logs numbers that one of two ranks has, or that differ between them."""

    def __init__(self, rank: int = 0) -> None:
        super().__init__()
        self.rank = rank

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        if batch_idx == 1 and self.trainer.checkpoint_callbacks and self.trainer.checkpoint_callback.save_on_exception:
            raise RuntimeError("broken")
        return self.loss(batch)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        if self.rank == 0:
            self.log("one", 1.0 + self.current_epoch, rank_zero_only=True)
        elif self.global_rank == 1:
            self.log("one", 1.0 + self.current_epoch)
        self.log("falls", float(self.current_epoch) * (self.global_rank - 0.5))


class Killed(Tiny):
    """Rank 1 gets SIGTERM."""

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1 and self.global_rank == 1 and self.current_epoch == 0:
            os.kill(os.getpid(), signal.SIGTERM)


def decisions(folder: str) -> dict[str, Any]:
    """What each rank has of them; a rank that went its own way would wait for ever, or pass by."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "log\\(.* without sync_dist=True")
        return _decisions(folder)


def _decisions(folder: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    saving = {"enable_checkpointing": True, **STRATEGY}
    rank = 0

    def fitted(callbacks: Any, rank_that_logs: int = 0, **options: Any) -> Any:
        run = trainer(callbacks=callbacks, **{"max_epochs": 3, **options})
        run.fit(OneRank(rank_that_logs), numbers(8, 2), numbers(4, 2))
        return run

    for one in (0, 1):
        stops = EarlyStopping("one", patience=1, strict=False)
        saves = ModelCheckpoint(f"{folder}/one{one}", "{epoch}-{one}", monitor="one")
        run = fitted([stops, saves], one, **saving)
        rank = run.global_rank
        found[f"one {one}"] = (run.current_epoch, saves.best_model_path.removeprefix(folder), len(saves.best_k_models))
    for callback in (EarlyStopping("nothing"), ModelCheckpoint(f"{folder}/nothing", monitor="nothing")):
        try:
            fitted(callback, **(saving if isinstance(callback, ModelCheckpoint) else STRATEGY))
        except ConfigError as error:
            found[type(callback).__name__] = "nobody has logged it" in str(error)
    for quiet in (True, False):
        stops, said = EarlyStopping("falls", patience=1, log_rank_zero_only=quiet), io.StringIO()
        with redirect_stderr(said):
            run = fitted(stops, max_epochs=6, **STRATEGY)
        found[f"quiet {quiet}"] = (run.current_epoch, stops.stopping_reason, "EarlyStopping: " in said.getvalue())
    # Each rank is given folders of its own, and all take rank 0's.
    root = f"{folder}/root{rank}"
    run = fitted(None, default_root_dir=root, logger=True, **saving)
    found["root"] = (run.log_dir.removeprefix(folder), run.checkpoint_callback.best_model_path.removeprefix(folder))
    found["dirpath"] = fitted(None, default_root_dir=root, **saving).checkpoint_callback.dirpath.removeprefix(folder)
    try:
        run = trainer(default_root_dir=root, max_epochs=9, log_every_n_steps=1, limit_val_batches=0, **STRATEGY)
        run.fit(Killed(), numbers(64, 2))
    except SystemExit as ended:
        found["signal"] = (ended.code, os.listdir(f"{folder}/root0/checkpoints").count("interrupted.ckpt"))
    saves = ModelCheckpoint(f"{root}/own", save_last=True, enable_version_counter=False)
    fitted(saves, **saving)
    found["own"] = (saves.best_model_path.removeprefix(folder), saves.last_model_path.removeprefix(folder))
    # Time is looked at when a row is due.
    saves = ModelCheckpoint(f"{folder}/time", "{step}", save_top_k=-1, train_time_interval=timedelta(0))
    run = fitted(saves, max_epochs=1, log_every_n_steps=2, limit_val_batches=0, **saving)
    found["time"] = (run.global_step, [os.path.basename(path) for path in sorted(os.listdir(f"{folder}/time"))])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            fitted(ModelCheckpoint(f"{folder}/failed", save_on_exception=True), **saving)
        except RuntimeError as error:
            found["failed"] = (str(error), os.path.exists(f"{folder}/failed"))
    found["told"] = sum("the other ranks can't take part" in str(warning.message) for warning in caught)
    return found


def test_behaviours_25_28_29_decisions_are_the_same_on_all_ranks(tmp_path: Path) -> None:
    """On metrics that one rank has, or nobody; on stops that one rank alone would make; on folders and on time."""
    first, second = run_distributed(decisions, str(tmp_path))
    own = [found.pop(name) for found in (first, second) for name in ("quiet True", "quiet False")]
    assert first == second
    for one in (0, 1):
        assert first[f"one {one}"] == (2, f"/one{one}/epoch=0-one=1.0.ckpt", 1)
    assert first["EarlyStopping"] and first["ModelCheckpoint"]
    theirs = "falls was not better than 0.0 in the last 1 check"
    assert own[:2] == [(2, "another rank has stopped", False)] * 2
    assert own[2:] == [(2, theirs, False), (2, theirs, True)]
    assert first["root"][0].startswith("/root0/") and first["root"][1].startswith(first["root"][0])
    assert first["dirpath"] == "/root0/checkpoints"
    assert first["signal"] == (143, 1)
    assert first["own"] == ("/root0/own/epoch=2-step=6.ckpt", "/root0/own/last.ckpt")
    assert not (tmp_path / "root1" / "own").exists()
    assert first["time"] == (2, ["step=2.ckpt"])
    assert first["failed"] == ("broken", False)
    assert first["told"] == 1


class Gan(LightningModule):
    """Two networks, stepped by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        torch.manual_seed(2)
        self.generator, self.critic = nn.Linear(4, 4).double(), nn.Linear(4, 1).double()

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        first, second = self.optimizers()
        made = self.generator(batch)
        self.toggle_optimizer(second)
        second.zero_grad()
        self.manual_backward((self.critic(made.detach()) - self.critic(batch)).mean())
        second.step()
        self.untoggle_optimizer(second)
        self.toggle_optimizer(first)
        first.zero_grad()
        self.manual_backward(-self.critic(made).mean() + made.pow(2).mean())
        first.step()
        self.untoggle_optimizer(first)

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.generator, self.critic)]


def gan(batch_size: int) -> list[float]:
    module = Gan()
    trainer(max_epochs=2, **STRATEGY).fit(module, numbers(11, batch_size, drop_last=True))
    return weights(module)


def test_manual_optimisation_on_two_processes_equals_one_with_the_doubled_batch() -> None:
    """Two backwards per step, each through one of the networks."""
    one = gan(4)
    for rank in run_distributed(gan, 2):
        assert rank == pytest.approx(one, rel=0, abs=1e-13)


def refusals() -> list[str]:
    found = []
    try:
        trainer(limit_val_batches=0, **STRATEGY).fit(Several("none"), numbers())
    except UsageError as error:
        found.append(str(error))
    try:
        trainer(**STRATEGY).validate(Tiny(), CombinedLoader([numbers(), numbers(4)], "max_size"))
    except ConfigError as error:
        found.append(str(error))
    return found


def test_behaviour_9_none_is_refused_on_several_processes() -> None:
    """The other ranks would wait for this one's gradients."""
    for found in run_distributed(refusals):
        assert "multiplied by 0" in found[0]
        assert "counts each sample once" in found[1]


class Ragged:
    """A loader without a length, longer on rank 1."""

    def __iter__(self) -> Any:
        return iter(Numbers(8 + 4 * collectives.rank()).rows.split(4))


class Batches(Callback):
    count = 0

    def on_train_batch_end(self, *args: Any) -> None:
        self.count += 1


def uneven() -> int:
    counts = Batches()
    trainer(max_epochs=2, callbacks=[counts], limit_val_batches=0, **STRATEGY).fit(Tiny(), Ragged())
    ready = list(Numbers(8 + 4 * collectives.rank()).rows.split(4))
    with pytest.warns(UserWarning, match=r"ranks have \[2, 3\] training batches; .* on all of them after 2"):
        trainer(max_epochs=2, callbacks=[counts], limit_val_batches=0, **STRATEGY).fit(Tiny(), ready)
    return counts.count


def test_behaviour_44_training_over_uneven_ranks_does_not_hang() -> None:
    """The epoch ends when the first rank has no batch."""
    assert run_distributed(uneven) == [8, 8]


class OnlySome(Tiny):
    """Returns a weight on rank 0 alone; on the other a dict without, or the loss alone."""

    def __init__(self, other: str = "dict") -> None:
        super().__init__()
        self.other = other

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        loss = self.loss(batch)
        if self.global_rank == 0:
            return {"loss": loss, "weight": 2.0}
        return {"loss": loss} if self.other == "dict" else loss


class Forms(Tiny):
    """Returns a dict on one rank, in turn, and the loss alone on the other."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        loss = self.loss(batch)
        return {"loss": loss} if batch_idx % 2 == self.global_rank else loss


class FormsWatched(Forms):
    def on_after_backward(self) -> None:
        pass


def forms() -> tuple[list[str], list[bool], int]:
    """A weight on some ranks only; the same loss in different forms; how often a run of plain losses is asked."""
    told, same = [], []
    for settings in ({}, {"accumulate_grad_batches": 2}):
        options = {"max_epochs": 2, "limit_val_batches": 0, **settings, **STRATEGY}
        for other in ("dict", "loss"):
            try:
                trainer(**options).fit(OnlySome(other), numbers(16, 2))
            except UsageError as error:
                told.append(str(error))
        plain = Tiny()
        trainer(**options).fit(plain, numbers(16, 2))
        for kind in (Forms, FormsWatched):
            module = kind()
            trainer(**options).fit(module, numbers(16, 2))
            same.append(weights(module) == weights(plain))
    with mock.patch.object(Weights, "of", autospec=True, side_effect=Weights.of) as asked:
        trainer(max_epochs=3, limit_val_batches=0, **STRATEGY).fit(Tiny(), numbers(16, 2))
    return told, same, asked.call_count


def test_what_training_step_returns_may_differ_between_ranks() -> None:
    """A dict here and the loss alone there train on; a weight here and none there ends all of them."""
    for told, same, asked in run_distributed(forms):
        assert len(told) == 4
        assert all("on some ranks only" in text for text in told)
        assert (same, asked) == ([True] * 4, 1)


class Normed(Tiny):
    """Its batch norm's running values are each rank's own."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 1)).double()


def some_weights_and_norms(folder: str) -> tuple[str, list[float], list[float]]:
    try:
        trainer(limit_val_batches=0, **STRATEGY).fit(OnlySome(), numbers(16, 2))
    except UsageError as error:
        told = str(error)
    found: list[Any] = [[], []]
    for settings in ({}, {"accumulate_grad_batches": 4, "val_check_interval": 2}):  # validates within a window
        options = {"max_epochs": 2, "callbacks": [Recorder()], **settings, **STRATEGY}
        whole, again, batches = trainer(**options), trainer(**options), 0
        for event in whole.steps(Normed(), numbers(16, 2), numbers(8, 2)):
            batches += event.kind == "batch"
            if event.kind == "batch" and batches == 5:
                whole.save_checkpoint(f"{folder}/x.ckpt")
            if event.kind == "batch" and batches == 6:
                found[0].append(float(whole.module.net[1].running_mean[0]))
        for number, _ in enumerate(again.steps(Normed(), numbers(16, 2), numbers(8, 2), ckpt_path=f"{folder}/x.ckpt")):
            if number == 0:
                found[1].append(float(again.module.net[1].running_mean[0]))
        for values, run in zip(found, (whole, again), strict=True):
            values.append(float(run.callback_metrics["val"]))
    return told, *found


def test_weights_come_from_all_ranks_and_buffers_of_ones_own_are_resumed(tmp_path: Path) -> None:
    """A weight on some ranks alone is told at once; a resumed validation sees each rank's own running values."""
    for told, whole, again in run_distributed(some_weights_and_norms, str(tmp_path)):
        assert "on some ranks only" in told
        assert whole == again


class OnlyThere(Tiny):
    """Logs on rank 1 alone."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        if self.global_rank == 1:
            self.log("most", batch_idx, on_epoch=True, reduce_fx=torch.max, sync_dist=True)
        return self.loss(batch)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        if self.global_rank == 1:
            self.log("there", torch.tensor(5.0, dtype=torch.float64), sync_dist=True)


def logs_on_one_rank(folder: str) -> list[Any]:
    run = trainer(max_epochs=2, log_every_n_steps=2, logger=CSVLogger(folder, flush_every=1), **STRATEGY)
    run.fit(OnlyThere(), numbers(16, 2), numbers(8, 2))
    metrics = {name: (float(value), value.dtype) for name, value in run.callback_metrics.items()}
    return [metrics, run.validate(OnlyThere(), numbers(8, 2), verbose=False)]


def test_what_one_rank_alone_logs_with_sync_dist_is_everyones(tmp_path: Path) -> None:
    """In rank 0's rows, in what callbacks see and in what validate returns."""
    first, second = run_distributed(logs_on_one_rank, str(tmp_path))
    assert first == second
    metrics, validated = first
    steps = {name: (3.0, torch.float32) for name in ("most", "most_step", "most_epoch")}
    assert metrics == {**steps, "there": (5.0, torch.float64)}
    assert validated == [{"there": 5.0}]
    with open(tmp_path / "version_0" / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["most_step"] for row in rows if row["most_step"]] == ["1.0", "3.0"] * 2
    assert [row["there"] for row in rows if row["there"]] == ["5.0"] * 3


class Sums(Tiny):
    """A step's value that is the sum over the ranks; and one of the epoch's end, which decides there."""

    def __init__(self) -> None:
        super().__init__()
        self.agreed: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        self.log("sum", batch_idx + 1.0, reduce_fx="sum", sync_dist=True)
        return self.loss(batch)

    def on_train_epoch_end(self) -> None:
        self.log("end", 1.0 + self.global_rank, sync_dist=True)
        self.agreed.append(float(self.trainer.metrics.agreed("end")))


def sums_saved_at_once(folder: str) -> list[Any]:
    found = []
    for path in (None, f"{folder}/min/step=4.ckpt"):
        options = {"every_n_train_steps": 2, "monitor": "sum", "save_top_k": -1}
        saves = [ModelCheckpoint(f"{folder}/{mode}", "{step}", mode=mode, **options) for mode in ("min", "max")]
        module = Sums()
        run = trainer(callbacks=saves, enable_checkpointing=True, limit_val_batches=0, log_every_n_steps=2, **STRATEGY)
        run.fit(module, numbers(16, 2), ckpt_path=path)
        found.append([*(float(one.best_model_score) for one in saves), module.agreed])
    return found


def test_a_resumed_run_does_not_reduce_a_steps_value_twice(tmp_path: Path) -> None:
    """And what decides in an epoch's end hooks is what all ranks have logged there."""
    for whole, again in run_distributed(sums_saved_at_once, str(tmp_path)):
        assert whole == again == [4.0, 8.0, [1.5]]


class PastLite(Tiny):
    """Its backward does not go through Lite's."""

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        loss.backward()


def ragged(batch_size: int) -> list[float]:
    module = PastLite()
    trainer(limit_val_batches=0, **STRATEGY).fit(module, numbers(11, batch_size))
    return weights(module)


def test_a_ragged_batch_is_weighed_past_lites_backward_too() -> None:
    """As on one process with the doubled batch."""
    one = ragged(4)
    for rank in run_distributed(ragged, 2):
        assert rank == pytest.approx(one, rel=0, abs=1e-13)


class ByHand(LightningModule):
    """Runs backward in its training_step."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.net = nn.Linear(4, 1).double()

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        self.optimizers().zero_grad()
        self.manual_backward(self.net(batch).mean())
        self.optimizers().step()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def by_hand_under_fsdp() -> str:
    try:
        trainer(limit_val_batches=0, strategy="fsdp").fit(ByHand(), numbers(8, 2))
    except UsageError as error:
        return str(error)
    return ""


def test_a_backward_by_hand_under_fsdp_is_told_what_to_do() -> None:
    """FSDP reduces gradients when a method has returned, and training_step is one."""
    for told in run_distributed(by_hand_under_fsdp):
        assert "within a method of" in told
        assert "a step function for each optimizer" in told


class Stream(IterableDataset[Tensor]):
    """Eleven rows in their order; it does not split itself."""

    def __iter__(self) -> Any:
        return iter(Numbers(11).rows)


class Streaming(Everything):
    """Reads the stream in every stage; `way` says whether it is split in the hooks."""

    def __init__(self, way: str, batch_size: int) -> None:
        super().__init__()
        self.way, self.batch_size = way, batch_size

    def loader(self) -> Any:
        loader = DataLoader(Stream(), batch_size=self.batch_size)
        return self.trainer.lite.setup_dataloaders(loader, shard="stride") if self.way == "hook" else loader

    train_dataloader = val_dataloader = predict_dataloader = loader


def streamed(way: str, batch_size: int) -> tuple[Any, ...]:
    module, run = Streaming(way, batch_size), trainer(**STRATEGY)
    loaders: list[Any] = [None] * 3
    if way == "pass":
        plain = [DataLoader(Stream(), batch_size=batch_size) for _ in loaders]
        loaders = list(run.lite.setup_dataloaders(*plain, shard="stride"))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        run.fit(module, loaders[0], loaders[1])
        fitted = {name: float(value) for name, value in run.callback_metrics.items() if name != "rank0"}
        predictions = run.predict(module, loaders[2], gather=True)
    same = [str(one.message) for one in told if "same first batch" in str(one.message)]
    return fitted, [p.tolist() for p in predictions], weights(module), same


@pytest.mark.parametrize("way", ["hook", "pass"])
def test_a_stream_counts_each_sample_once_where_one_says_so(way: str) -> None:
    """In training, validation and prediction, as on one process with the doubled batch."""
    whole = streamed("", 4)
    assert whole[0]["rows"] == 11.0 and whole[3] == []
    for fitted, predictions, found, told in run_distributed(streamed, way, 2):
        assert fitted == pytest.approx(whole[0], rel=1e-12) and told == []
        assert [p == pytest.approx(q, rel=1e-12) for p, q in zip(predictions, whole[1], strict=True)] == [True] * 3
        assert found == pytest.approx(whole[2], rel=1e-12)


def test_a_stream_that_every_rank_reads_whole_is_told_of_with_the_trainers_way() -> None:
    """It counts once per rank, as in Lightning."""
    (fitted, _, _, first), (_, _, _, second) = run_distributed(streamed, "", 2)
    assert fitted["rows"] == 22.0 and first == []
    assert len(second) == 3  # training, validation, prediction
    assert all("return self.trainer.lite.setup_dataloaders(loader, shard='stride') from" in text for text in second)


class Asks(Callback):
    """Rank 1 gets SIGTERM in that hook, the so-manieth time."""

    def __init__(self, hook: str, at: int = 1) -> None:
        self.told: list[str] = []
        self.left = at
        setattr(self, hook, self.ask)

    def ask(self, trainer: Any, *args: Any) -> None:
        self.left -= not trainer.sanity_checking
        if self.left == 0 and trainer.global_rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self.told.append(stage)


class Slow(Tiny):
    """Evaluates slowly, and rank 1 more often than rank 0 where it is given a list."""

    def validation_step(self, batch: Tensor, batch_idx: int) -> Any:
        time.sleep(0.1)
        return super().validation_step(batch, batch_idx)

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        time.sleep(0.1)
        return super().predict_step(batch, batch_idx)


def signalled(folder: str) -> list[Any]:
    uneven = [batch for batch in numbers(40, 2)][: 10 + 10 * int(os.environ["RANK"])]
    found: list[Any] = []

    def end(hook: str, at: int, call: str, *loaders: Any, **options: Any) -> None:
        asks = Asks(hook, at)
        root = f"{folder}/{len(found)}"
        run = trainer(callbacks=asks, default_root_dir=root, enable_checkpointing=True, **options, **STRATEGY)
        started = time.monotonic()
        try:
            getattr(run, call)(Slow(), *loaders)
        except SystemExit as ended:
            saved = os.path.exists(f"{root}/checkpoints/interrupted.ckpt")
            found.append((ended.code, asks.told, saved, run.global_step, time.monotonic() - started < 20))

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is no DataLoader|.*split")
        end("on_predict_batch_end", 2, "predict", numbers(400, 1))
        end("setup", 1, "validate", numbers(400, 1))
        # No batch follows; many fast steps, then slow validation; and signals to a rank that the other waits for.
        end("on_train_epoch_end", 1, "fit", numbers(8, 2), numbers(8, 2))
        end("on_validation_batch_start", 1, "fit", numbers(400, 1), numbers(400, 1))
        end("on_validation_batch_end", 14, "fit", numbers(8, 2), uneven)
        end("on_validation_batch_end", 14, "validate", uneven)
        end("on_predict_batch_end", 14, "predict", uneven)
    return found


def test_a_signal_to_one_rank_ends_every_kind_of_run_on_all(tmp_path: Path) -> None:
    """Within seconds, where no batch follows and where ranks evaluate different numbers of batches, too."""
    zero, one = run_distributed(signalled, str(tmp_path))
    assert zero == one
    assert zero == [
        (143, ["predict"], False, 0, True),
        (143, ["validate"], False, 0, True),
        (143, ["fit"], True, 2, True),
        (143, ["fit"], True, 200, True),
        (143, ["fit"], True, 2, True),
        (143, ["validate"], False, 0, True),
        (143, ["predict"], False, 0, True),
    ]


class Alone(Callback):
    """Does what needs all ranks on one of them: in which hook what is done, on which rank."""

    def __init__(self, hook: str, rank: int, do: Callable[[Any], Any]) -> None:
        self.rank, self.do = rank, do
        setattr(self, hook, self.act)

    def act(self, trainer: Any, *args: Any) -> Any:
        return self.do(trainer) if trainer.global_rank == self.rank and trainer.global_step == 2 else None


def skip(trainer: Any) -> int:
    return -1


def save(trainer: Any) -> None:
    trainer.save_checkpoint(os.path.join(tempfile.gettempdir(), "never-written.ckpt"))


def alone(hook: str, rank: int, do: Callable[[Any], Any]) -> str:
    run = trainer(callbacks=Alone(hook, rank, do), limit_train_batches=4 if "batch" in hook else 2)
    run.fit_loop.max_epochs = 2
    try:
        run.fit(Tiny(), numbers(16, 2), numbers(4, 2))
    except (UsageError, PeerError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


@pytest.mark.parametrize(
    ("hook", "rank", "do"),
    [
        ("on_train_batch_end", 0, save),
        ("on_train_epoch_end", 0, save),
        ("on_validation_end", 1, save),
        ("on_train_batch_start", 1, skip),
    ],
)
def test_what_one_rank_does_alone_is_told(hook: str, rank: int, do: Callable[[Any], Any]) -> None:
    """A save, and a skipped rest of an epoch: an error in seconds, where ranks would wait for each other for ever."""
    # Processes of their own: what ends the other rank's wait is that the one with the error ends.
    told = [done.stdout for done in run_ranks(__file__, hook, str(rank), do.__name__, timeout=60)]
    what = "trainer.save_checkpoint() was called" if do is save else "on_train_batch_start returned -1"
    assert told[rank].startswith(f"UsageError: {what} on rank {rank}, but not on rank {1 - rank}: "), told
    assert told[1 - rank].startswith("PeerError: "), told


class Late(Callback):
    """Rank 1 comes to each save later than rank 0 asks for it."""

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        time.sleep(1.5 * trainer.global_rank)
        trainer.save_checkpoint(self.path)

    def on_train_epoch_end(self, trainer: Any, *args: Any) -> None:
        self.on_train_batch_end(trainer)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> int | None:
        time.sleep(1.5 * trainer.global_rank * (batch_idx == 1))
        return -1 if batch_idx == 1 else None


def late(folder: str) -> int:
    callback = Late()
    callback.path = f"{folder}/x.ckpt"
    run = trainer(callbacks=callback, max_epochs=2)
    run.fit(Tiny(), numbers(16, 2), numbers(4, 2))
    return run.global_step


def test_who_is_only_late_is_waited_for(tmp_path: Path) -> None:
    """In the step before, or in a hook; nobody is taken for one that has gone on."""
    assert run_distributed(late, str(tmp_path)) == [2, 2]


if __name__ == "__main__":
    print(alone(sys.argv[1], int(sys.argv[2]), {"save": save, "skip": skip}[sys.argv[3]]))
