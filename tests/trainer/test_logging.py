"""Behaviours 1 to 8 and 50: what `self.log` keeps, under which names, and who gets it."""

from __future__ import annotations

import csv
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lite.errors import ConfigError, UsageError
from lite.loggers import CSVLogger
from lite.trainer import Callback, LightningModule
from lite.trainer.callbacks import ModelCheckpoint
from tests.trainer.modules import Numbers, Tiny, TinyData, numbers, trainer


class Logs(Tiny):
    """Calls `log` as the test says, in one place."""

    def __init__(self, where: str, name: str = "x", value: Any = 1.0, **options: Any) -> None:
        super().__init__()
        self.where, self.name, self.value, self.options = where, name, value, options

    def _log(self, where: str, batch_idx: int = 0) -> None:
        if where == self.where:
            self.log(self.name, self.value(batch_idx) if callable(self.value) else self.value, **self.options)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self._log("training_step", batch_idx)
        return self.loss(batch)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self._log("validation_step", batch_idx)

    def on_train_epoch_end(self) -> None:
        self._log("on_train_epoch_end")

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._log("on_train_batch_end", batch_idx)

    def on_fit_start(self) -> None:
        self._log("on_fit_start")

    def on_predict_epoch_end(self) -> None:
        self._log("on_predict_epoch_end")

    def setup(self, stage: str) -> None:
        self._log("setup")


def read_rows(logger: CSVLogger) -> list[dict[str, str]]:
    logger.flush()
    return list(csv.DictReader(logger.path.read_text().splitlines()))


def fitted(module: Tiny, count: int = 12, **options: Any) -> Any:
    run = trainer(**options)
    run.fit(module, numbers(count), numbers(count))
    return run


@pytest.mark.parametrize(
    ("where", "expected"), [("training_step", 2.0), ("on_train_batch_end", 2.0), ("validation_step", 1.0)]
)
def test_behaviour_1_steps_keep_the_last_value_and_evaluation_the_mean(where: str, expected: float) -> None:
    """The defaults of on_step and on_epoch, by hook."""
    assert float(fitted(Logs(where, value=float)).callback_metrics["x"]) == expected


@pytest.mark.parametrize("where", ["on_fit_start", "setup"])
def test_behaviour_1_logging_where_nothing_is_kept_is_an_error(where: str) -> None:
    """In setup-time hooks, and in prediction."""
    with pytest.raises(UsageError, match=f"log\\('x'\\) was called in {where}"):
        fitted(Logs(where))
    with pytest.raises(UsageError, match="on_predict_epoch_end"):
        trainer().predict(Logs("on_predict_epoch_end"), numbers())
    with pytest.raises(ConfigError, match="on_step=True"):
        fitted(Logs("on_train_epoch_end", on_step=True))
    with pytest.raises(ConfigError, match="keeps nothing"):
        fitted(Logs("training_step", on_step=False, on_epoch=False))


def test_behaviour_2_both_kinds_fork_the_name(tmp_path: Path) -> None:
    """x_step and x_epoch for loggers; x is the newest of both."""
    seen: list[dict[str, float]] = []

    class Looks(Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            seen.append({k: float(v) for k, v in trainer.callback_metrics.items()})

    logger = CSVLogger(tmp_path)
    run = trainer(logger=logger, callbacks=[Looks()], log_every_n_steps=1, limit_val_batches=0)
    run.fit(Logs("training_step", value=float, on_epoch=True), numbers())
    assert seen[-1] == {"x": 2.0, "x_step": 2.0}
    assert {k: float(v) for k, v in run.callback_metrics.items()} == {"x": 1.0, "x_step": 2.0, "x_epoch": 1.0}
    rows = read_rows(logger)
    assert [row["x_step"] for row in rows if row["x_step"]] == ["0.0", "1.0", "2.0"]
    assert [row["x_epoch"] for row in rows if row["x_epoch"]] == ["1.0"]
    assert set(rows[0]) >= {"step", "epoch", "batches", "updates", "samples", "seconds"}
    assert [(row["batches"], row["samples"]) for row in rows[:3]] == [("1", "4"), ("2", "8"), ("3", "12")]


@pytest.mark.parametrize(
    ("reduce_fx", "expected"),
    [("mean", (0 * 4 + 1 * 4 + 2 * 2) / 10), ("sum", 3), ("min", 0), ("max", 2), (torch.median, 1), (max, 2)],
)
def test_behaviour_3_epoch_values_are_weighed_by_batch_size(reduce_fx: Any, expected: float) -> None:
    """Ten rows in batches of 4, 4, 2: the mean is that of all rows."""
    module = Logs(
        "training_step", value=lambda i: torch.tensor(float(i), dtype=torch.float64), on_step=False, on_epoch=True
    )
    module.options["reduce_fx"] = reduce_fx
    assert float(fitted(module, 10).callback_metrics["x"]) == pytest.approx(expected, rel=1e-12)


def test_behaviour_3_a_function_may_be_written_within_the_call() -> None:
    """A lambda or a partial that each call makes anew is the same; another function is not."""

    class Inline(Tiny):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("x", float(batch_idx), reduce_fx=lambda values: values.sum() * 10)
            self.log("median", float(batch_idx), reduce_fx=partial(torch.quantile, q=0.5))

    assert trainer().validate(Inline(), numbers(), verbose=False) == [{"x": 30.0, "median": 1.0}]

    class Differs(Tiny):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("x", 1.0, reduce_fx=torch.median if batch_idx else (lambda values: values.sum()))

    with pytest.raises(ConfigError, match="came with other settings: reduce_fx="):
        trainer().validate(Differs(), numbers(), verbose=False)


def test_behaviour_3_a_given_batch_size_counts_and_an_ambiguous_one_is_told() -> None:
    """batch_size= outranks what is found in the batch."""
    module = Logs("validation_step", value=float, batch_size=1)
    assert float(fitted(module, 10).callback_metrics["x"]) == 1.0

    class Two(Tiny):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("x", 1.0)

    data = [{"a": torch.zeros(2, 4), "b": torch.zeros(3)}]
    with pytest.warns(UserWarning, match=r"different first dimensions \(\[2, 3\]\)"):
        trainer().validate(Two(), [data], verbose=False)


def test_behaviour_5_loaders_are_part_of_the_names_and_clashes_are_named() -> None:
    """dataloader_idx_N, add_dataloader_idx=False, one key in two places or with other settings."""

    class Several(Tiny):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            self.log("x", float(dataloader_idx))
            self.log(f"own{dataloader_idx}", 5.0, add_dataloader_idx=False)

        def on_validation_epoch_end(self) -> None:
            self.log("all", 7.0)

    found = trainer().validate(Several(), [numbers(), numbers()], verbose=False)
    assert found == [
        {"x/dataloader_idx_0": 0.0, "own0": 5.0, "all": 7.0},
        {"x/dataloader_idx_1": 1.0, "own1": 5.0, "all": 7.0},
    ]

    class Clash(Tiny):
        def on_train_batch_end(self, *args: Any) -> None:
            self.log("loss", 1.0)

    with pytest.raises(ConfigError, match=r"'loss'.*training_step and in on_train_batch_end"):
        fitted(Clash())

    class Changes(Tiny):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            self.log("x", 1.0, prog_bar=batch_idx > 0)
            return self.loss(batch)

    with pytest.raises(ConfigError, match="prog_bar=True instead of False"):
        fitted(Changes())


def test_behaviour_46_names_of_loaders_prefix_the_metrics() -> None:
    """A dict of evaluation loaders."""

    class Several(Tiny):
        def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            self.log("x", float(dataloader_idx))

    found = trainer().test(Several(), {"clean": numbers(), "noisy": numbers()}, verbose=False)
    assert found == [{"clean/x": 0.0}, {"noisy/x": 1.0}]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("x", "text", r"log\('x'\) got a str"),
        ("x", torch.zeros(2), r"log\('x'\) got a tensor of shape \(2,\)"),
        ("x", {"a": 1}, r"log\('x'\) got a dict"),
        ("x/dataloader_idx_1", 1.0, "dataloader_idx_"),
        ("x", object(), r"log\('x'\) got a object"),
    ],
)
def test_behaviour_7_only_numbers_are_logged(name: str, value: Any, message: str) -> None:
    """Anything else is an error that names the key."""
    with pytest.raises(ConfigError, match=message):
        fitted(Logs("training_step", name, value))


def test_behaviour_7_one_element_tensors_flags_and_log_dict(tmp_path: Path) -> None:
    """logger=False keeps a key from loggers; prog_bar=True shows it; later changes of a tensor don't count."""

    class Some(Tiny):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            running = torch.zeros(1)
            self.log_dict({"a": running, "b": 2}, prog_bar=True)
            self.log("hidden", 1.0, logger=False)
            running += 5
            return self.loss(batch)

    logger = CSVLogger(tmp_path)
    run = trainer(logger=logger, log_every_n_steps=1, limit_val_batches=0)
    run.fit(Some(), numbers())
    assert run.progress_bar_metrics == {"a": 0.0, "b": 2.0}
    assert {k: float(v) for k, v in run.callback_metrics.items()} == {"a": 0.0, "b": 2.0, "hidden": 1.0}
    assert set(run.logged_metrics) == {"a", "b"}


class Steps(Tiny):
    """Values of single batches, in training and validation, for everybody."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.log("t", float(batch_idx), prog_bar=True)
        self.log("both", float(batch_idx), on_epoch=True, prog_bar=True)
        return self.loss(batch)

    def validation_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("v", float(batch_idx), on_step=True, on_epoch=True, prog_bar=True)


def test_behaviour_7_the_newest_step_values_stay_where_they_are_shown(tmp_path: Path) -> None:
    """Also those that loggers were not given, between two rows and after the fit."""
    run = trainer(logger=CSVLogger(tmp_path), log_every_n_steps=2, limit_val_batches=0)
    for event in run.steps(Steps(), numbers(), events=("batch",)):
        assert run.logged_metrics == {"t": event.batch_idx, "both_step": event.batch_idx}
    expected = {"t": 2.0, "both_step": 2.0, "both_epoch": 1.0}
    assert run.logged_metrics == run.progress_bar_metrics == expected
    run = trainer(logger=CSVLogger(tmp_path), log_every_n_steps=2)
    run.fit(Steps(), numbers(), numbers())
    assert run.logged_metrics == run.progress_bar_metrics == {**expected, "v_step": 2.0, "v_epoch": 1.0}


def test_steps_of_evaluation_lie_at_their_own_count(tmp_path: Path) -> None:
    """Of each loader, over all epochs, also in a resumed run; epochs lie at the training step."""

    def steps(logger: CSVLogger, name: str) -> list[int]:
        return [int(row["step"]) for row in read_rows(logger) if row.get(name)]

    loggers = [CSVLogger(tmp_path / name) for name in "ab"]
    loaders = [numbers(8), numbers(4)]
    run = trainer(max_epochs=2, logger=loggers[0])
    for event in run.steps(Steps(), numbers(), loaders, events=("epoch",)):
        if event.epoch == 0:
            run.save_checkpoint(tmp_path / "x.ckpt")
    assert steps(loggers[0], "v_step/dataloader_idx_0") == [0, 1, 2, 3]
    assert steps(loggers[0], "v_step/dataloader_idx_1") == [0, 1]
    assert steps(loggers[0], "v_epoch/dataloader_idx_0") == [2, 5]
    run = trainer(max_epochs=2, logger=loggers[1])
    run.fit(Steps(), numbers(), loaders, ckpt_path=tmp_path / "x.ckpt")
    assert steps(loggers[1], "v_step/dataloader_idx_0") == [2, 3]


def test_behaviour_8_evaluation_returns_a_dict_per_loader_and_prints_a_table(capsys: Any) -> None:
    """validate and test."""
    module, run = Tiny(), trainer()
    (validated,) = run.validate(module, numbers(10))
    assert validated == {"val": pytest.approx(float(module.loss(Numbers(10).rows).detach()), rel=1e-12)}
    assert "validate metric" in capsys.readouterr().out
    assert run.test(module, numbers(10), verbose=False) == [{"test": validated["val"]}]
    assert capsys.readouterr().out == ""


def test_behaviour_37_outside_of_a_trainer_log_is_ignored_and_trainer_is_an_error() -> None:
    """The module still computes."""
    module = Tiny()
    with pytest.warns(UserWarning, match="outside of a Trainer"):
        module.log("x", 1)
    with pytest.raises(UsageError, match=r"Tiny\.trainer needs a Trainer"):
        _ = module.trainer
    assert module(torch.zeros(1, 4, dtype=torch.float64)).shape == (1, 1)
    assert (module.current_epoch, module.global_step, module.logger) == (0, 0, None)


def test_behaviour_50_a_further_log_call_is_cheap() -> None:
    """Some microseconds; 40 leave room for a machine that is busy with other things (5 on a free one)."""
    spent: list[float] = []

    class Times(Tiny):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            loss = self.loss(batch)
            self.log("x", loss)
            start = time.perf_counter()
            for _ in range(100):
                self.log("x", loss)
            spent.append((time.perf_counter() - start) / 100)
            return loss

    fitted(Times(), 120)
    assert min(spent) < 40e-6


def test_old_epoch_end_hooks_run_with_a_word_on_their_present_form() -> None:
    """Modules written for 1.8."""
    seen: dict[str, Any] = {}

    class Old(Tiny):
        def training_epoch_end(self, outputs: Any) -> None:
            seen["train"] = [float(one["loss"]) for one in outputs]
            self.log("old", 4.0)

        def validation_step(self, batch: Tensor, batch_idx: int) -> Any:
            return batch.shape[0]

        def validation_step_end(self, output: int) -> int:
            return output * 10

        def validation_epoch_end(self, outputs: Any) -> None:
            seen["val"] = outputs

    with pytest.warns(DeprecationWarning, match=r"(training|validation)_(epoch|step)_end is deprecated"):
        run = fitted(Old(), 10)
    assert len(seen["train"]) == 3
    assert seen["val"] == [40, 40, 20]
    assert float(run.callback_metrics["old"]) == 4.0
    assert issubclass(Old, LightningModule)


def test_values_of_a_sanity_check_are_forgotten(tmp_path: Path) -> None:
    """No logger, callback or bar sees them."""

    class Looks(Callback):
        found: Any = None

        def on_sanity_check_end(self, trainer: Any, *args: Any) -> None:
            self.found = dict(trainer.callback_metrics)

        def on_train_start(self, trainer: Any, *args: Any) -> None:
            assert trainer.callback_metrics == {}
            assert trainer.logged_metrics == {}

    looks, logger = Looks(), CSVLogger(tmp_path)
    trainer(num_sanity_val_steps=2, callbacks=[looks], logger=logger).fit(Tiny(), datamodule=TinyData())
    assert "val" in looks.found
    assert len(read_rows(logger)) == 1


def test_behaviour_42_one_cursor_and_every_row_has_the_clocks(tmp_path: Path) -> None:
    """Batches, optimizer updates, samples, seconds: of a run that accumulates, in training's and validation's rows."""
    logger = CSVLogger(tmp_path)
    run = trainer(max_epochs=2, logger=logger, log_every_n_steps=1, accumulate_grad_batches=2)
    cursor = []
    for event in run.steps(Tiny(), numbers(10), numbers(4), events=("batch",)):
        progress = run.fit_loop.progress
        cursor.append((event.epoch, event.batch_idx, progress.epoch, progress.batch, progress.batches))
    assert cursor == [(e, b, e, b + 1, 3 * e + b + 1) for e in range(2) for b in range(3)]
    logger.flush()
    rows = list(csv.DictReader(logger.path.read_text().splitlines()))
    found = [(row["epoch"], row["batches"], row["updates"], row["samples"]) for row in rows if row["loss"]]
    assert found == [("0", "2", "1", "8"), ("0", "3", "2", "10"), ("1", "5", "3", "18"), ("1", "6", "4", "20")]
    assert [row["batches"] for row in rows if row["val"]] == ["3", "6"]
    seconds = [float(row["seconds"]) for row in rows]
    assert seconds == sorted(seconds) and seconds[0] > 0


class Watcher(Callback):
    """Reads the metrics in a callback's hooks at the end of epochs."""

    def __init__(self, path: Path | None = None) -> None:
        self.seen: list[dict[str, float]] = []
        self.path = path

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            self.seen.append({"val": float(trainer.callback_metrics["val"])})

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.seen.append({name: float(value) for name, value in trainer.callback_metrics.items()})
        if self.path is not None and trainer.current_epoch == 0:
            trainer.save_checkpoint(self.path)


class Watched(Tiny):
    """Its epoch means are 0.5 and 0.25 more in each epoch."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.log("both", float(batch_idx + self.current_epoch), on_step=True, on_epoch=True)
        self.log("mean", float(batch_idx + self.current_epoch), on_step=False, on_epoch=True)
        return self.loss(batch)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val", float(batch_idx + self.current_epoch))

    def on_train_epoch_end(self) -> None:
        self.log("after", self.current_epoch)


def test_callbacks_see_an_epochs_values_as_it_ends(tmp_path: Path) -> None:
    """As do those that a save within the hook is gone on with from; and what an epoch's end logs comes on top."""
    watcher = Watcher(tmp_path / "within.ckpt")
    run = trainer(callbacks=watcher, max_epochs=2)
    run.fit(Watched(), numbers(8), numbers(8))
    first = {"val": 0.5, "both": 0.5, "both_epoch": 0.5, "both_step": 1.0, "mean": 0.5}
    second = {"val": 1.5, "both": 1.5, "both_epoch": 1.5, "both_step": 2.0, "mean": 1.5, "after": 0.0}
    assert watcher.seen == [{"val": 0.5}, first, {"val": 1.5}, second]
    assert {name: float(value) for name, value in run.callback_metrics.items()} == {**second, "after": 1.0}
    resumed = Watcher()
    again = trainer(callbacks=resumed, max_epochs=2)
    again.fit(Watched(), numbers(8), numbers(8), ckpt_path=tmp_path / "within.ckpt")
    assert resumed.seen == [{"val": 1.5}, second]  # the first epoch's hook had begun when it saved
    assert again.callback_metrics == run.callback_metrics


class AtEnds(LightningModule):
    """Logs in its end hooks, and keeps what it then sees."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Linear(4, 1).double()
        self.seen: list[Any] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.net(batch).mean()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None: ...

    def _log(self, name: str) -> None:
        self.log(name, self.current_epoch)
        self.log(name, self.current_epoch + 2.0)
        self.seen.append((name, self.trainer.callback_metrics[name].item(), self.trainer.logged_metrics[name].item()))

    def on_validation_epoch_end(self) -> None:
        self._log("score")

    def on_train_epoch_end(self) -> None:
        self._log("gap")

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_what_is_logged_as_an_epoch_ends_is_seen_there() -> None:
    """This epoch's mean, not the one before's."""
    module = AtEnds()
    run = trainer(max_epochs=2)
    run.fit(module, numbers(), numbers())
    assert module.seen == [("score", 1.0, 1.0), ("gap", 1.0, 1.0), ("score", 2.0, 2.0), ("gap", 2.0, 2.0)]
    assert {name: float(value) for name, value in run.callback_metrics.items()} == {"score": 2.0, "gap": 2.0}


def test_what_a_callback_writes_into_the_metrics_counts(tmp_path: Path) -> None:
    """ModelCheckpoint can follow it, beside what was logged."""

    class Writes(Callback):
        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            trainer.callback_metrics["mine"] = 2.5 - trainer.current_epoch

    saves = ModelCheckpoint(tmp_path, "{mine:.1f}", monitor="mine", mode="max")
    run = trainer(callbacks=[Writes(), saves], max_epochs=2, enable_checkpointing=True)
    run.fit(Watched(), numbers(8), numbers(8))
    assert saves.best_model_path.endswith("mine=2.5.ckpt")


def test_a_run_shows_only_its_own_metrics() -> None:
    """What a fit logged is no longer there after a validation."""
    run = trainer(max_epochs=1)
    run.fit(Watched(), numbers(8), numbers(8))
    run.validate(Watched(), numbers(4), verbose=False)
    assert {name: float(value) for name, value in run.callback_metrics.items()} == {"val": 1.0}
