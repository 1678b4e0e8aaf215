"""Loggers in Lightning's form: what they write, when the Trainer calls them, and on which rank."""

from __future__ import annotations

import argparse
import csv
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lite.loggers
from lite.errors import ConfigError
from lite.trainer import Trainer
from lite.trainer.callbacks import LearningRateMonitor, ModelCheckpoint
from lite.trainer.checkpoints.loading import read_hparams
from lite.trainer.loggers import CSVLogger, DummyLogger, Logger, TensorBoardLogger, rank_zero_experiment
from lite.trainer.utilities import rank_zero_info, rank_zero_only, rank_zero_warn
from tests.support.processes import run_distributed
from tests.trainer.modules import Tiny, TinyData, numbers, trainer


def rows(folder: str | Path) -> list[dict[str, str]]:
    return list(csv.DictReader(Path(folder, "metrics.csv").read_text().splitlines()))


def files(folder: Path) -> list[str]:
    """Paths of the files, an event file's name cut short."""
    found = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    return sorted(str(p.parent / "events") if "tfevents" in p.name else str(p) for p in found)


def events(folder: str | Path) -> Any:
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    return accumulators.EventAccumulator(str(folder)).Reload()


class Own(Logger):
    """A user's, which writes down what it is asked to do."""

    def __init__(self, folder: str | None = None, name: str | None = "mine", version: Any = 4) -> None:
        super().__init__()
        self.calls: list[Any] = []
        self._place = (folder, name, version)

    @property
    def save_dir(self) -> Any:
        return self._place[0]

    @property
    def name(self) -> Any:
        return self._place[1]

    @property
    def version(self) -> Any:
        return self._place[2]

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        return self.calls

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        self.calls.append(("hyperparams", dict(params)))

    @rank_zero_only
    def log_graph(self, model: Any, input_array: Any = None) -> None:
        self.calls.append(("graph", type(model).__name__))
        torch.rand(1)

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        assert not any(isinstance(value, Tensor) for value in metrics.values())
        self.calls.append(("metrics", step))

    @rank_zero_only
    def save(self) -> None:
        self.calls.append("save")

    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        self.calls.append(("saved", os.path.basename(checkpoint_callback.best_model_path)))

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self.calls.append(status)


class OldForm(lite.loggers.Logger):
    """As `Own`, of Lite's own base class, and with what it must have."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.calls.append("metrics")

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        self.calls.append("hyperparams")

    def finalize(self, status: str) -> None:
        self.calls.append(status)


def test_a_logger_of_ones_own_is_told_everything_in_order(tmp_path: Path) -> None:
    """Hyperparameters and graph once, every save of a checkpoint, each run's end; random numbers stay as they were."""
    plain, own, old = Tiny(), Own(str(tmp_path)), OldForm()
    options = {"enable_checkpointing": True, "callbacks": ModelCheckpoint(save_last=True), "log_every_n_steps": 3}
    run = trainer(logger=[own, old], default_root_dir=tmp_path, limit_val_batches=0, **options)
    torch.manual_seed(1)
    run.fit(plain, datamodule=TinyData())
    after = torch.rand(1)
    name = "epoch=0-step=3.ckpt"
    told = [("graph", "Tiny"), ("hyperparams", {"lr": 0.05, "dropout": 0.0}), "save", ("metrics", 2)]
    assert own.calls == [*told, "save", ("saved", name), "save", ("saved", name), "success"]
    assert old.calls == ["hyperparams", "metrics", "success"]
    run.test(plain, datamodule=TinyData(), verbose=False)
    assert own.calls[9:] == [("metrics", 3), "success"]
    plain = Tiny()
    torch.manual_seed(1)
    trainer(limit_val_batches=0).fit(plain, datamodule=TinyData())
    assert torch.equal(after, torch.rand(1))


class Fails(Tiny):
    def __init__(self, error: type[BaseException]) -> None:
        super().__init__()
        self.error = error

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        raise self.error


class Signalled(Tiny):
    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return super().training_step(batch, batch_idx)


def test_loggers_are_told_how_a_run_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In Lightning's words; a plan is no run; a run that was left is "interrupted"."""
    monkeypatch.chdir(tmp_path)
    for error, raised in ((ValueError, ValueError), (KeyboardInterrupt, SystemExit)):
        own = Own()
        with pytest.raises(raised):
            trainer(logger=own).fit(Fails(error), datamodule=TinyData())
        assert own.calls[-1] == "failed"
    own = Own()
    with pytest.raises(SystemExit):
        trainer(logger=own).fit(Signalled(), datamodule=TinyData())
    assert own.calls[-1] == "finished"
    own = Own()
    run = trainer(logger=own)
    run.plan(Tiny(), datamodule=TinyData())
    assert own.calls == []
    steps = run.steps(Tiny(), datamodule=TinyData())
    next(steps)
    steps.close()
    assert own.calls[-1] == "interrupted"


@pytest.mark.parametrize(
    ("logger", "folder"),
    [
        (lambda root: Own(f"{root}/logs", version=4), "logs/mine/version_4/checkpoints"),
        (lambda root: Own(f"{root}/logs", version="four"), "logs/mine/four/checkpoints"),
        (lambda root: Own(None), "mine/version_4/checkpoints"),
        (lambda root: OldForm(), "checkpoints"),
        (lambda root: CSVLogger(root, "a", "b"), "a/b/checkpoints"),
        (lambda root: CSVLogger(root, None), "version_0/checkpoints"),
        (lambda root: TensorBoardLogger(root, sub_dir="train"), "lite_logs/version_0/checkpoints"),
        (lambda root: lite.loggers.TensorBoardLogger(root / "tb"), "tb/checkpoints"),
    ],
)
def test_behaviour_29_checkpoints_lie_in_the_first_loggers_folder(tmp_path: Path, logger: Any, folder: str) -> None:
    """save_dir/name/version_N, as far as it has them."""
    pytest.importorskip("tensorboard")
    options = {"enable_checkpointing": True, "default_root_dir": tmp_path, "limit_val_batches": 0}
    run = trainer(logger=logger(tmp_path), **options)
    run.fit(Tiny(), datamodule=TinyData())
    assert run.checkpoint_callback.best_model_path == str(tmp_path / folder / "epoch=0-step=3.ckpt")
    assert os.path.exists(run.checkpoint_callback.best_model_path)


class Asks(Tiny):
    """Uses its logger by hand, on every rank."""

    def on_fit_start(self) -> None:
        self.logger.log_hyperparams(argparse.Namespace(depth=3))

    def on_train_epoch_end(self) -> None:
        self.logger.log_metrics({"by_hand": 7.0}, step=5)
        self.logger.experiment.log_metrics({"raw": 8.0}, 6)
        self.logger.experiment.save()


def test_csv_logger_writes_what_lightnings_does(tmp_path: Path) -> None:
    """Under the names that it has; `hparams.yaml` is read back by `load_from_checkpoint`'s reader."""
    logger = CSVLogger(save_dir=tmp_path, name="run", prefix="p", flush_logs_every_n_steps=2)
    assert isinstance(logger, lite.loggers.CSVLogger) and isinstance(logger, Logger)
    run = trainer(logger=logger, log_every_n_steps=3)
    run.fit(Asks(), datamodule=TinyData())
    assert (logger.save_dir, logger.name, logger.version) == (str(tmp_path), "run", 0)
    assert (logger.root_dir, logger.log_dir) == (f"{tmp_path}/run", f"{tmp_path}/run/version_0")
    written = rows(logger.log_dir)
    assert [row["step"] for row in written if row["p-loss"]] == ["2"]
    assert [(row["step"], row["p-by_hand"]) for row in written if row["p-by_hand"]] == [("5", "7.0")]
    assert [(row["step"], row["raw"]) for row in written if row["raw"]] == [("6", "8.0")]
    assert logger.experiment.metrics_file_path == f"{logger.experiment.log_dir}/metrics.csv"
    assert logger.hparams == {"depth": 3, "lr": 0.05, "dropout": 0.0}
    assert CSVLogger(tmp_path, "run").version == 1
    with pytest.raises(ConfigError, match="save_dir='/proc': the folder '/proc/lite_logs' can't be made"):
        trainer(logger=CSVLogger("/proc"))
    with pytest.raises(ConfigError, match="flush_logs_every_n_steps=0"):
        CSVLogger(tmp_path, flush_logs_every_n_steps=0)
    with pytest.raises(ConfigError, match=r"version=1\.5"):
        CSVLogger(tmp_path, version=1.5)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="params=3; pass a dict"):
        logger.log_hyperparams(3)


def test_hparams_yaml_is_read_back(tmp_path: Path) -> None:
    """Numbers, words that YAML takes for others, nestings; objects as their text."""
    pytest.importorskip("yaml")
    params = {
        "lr": 1e-5,
        "big": 1e20,
        "inf": float("-inf"),
        "n": 3,
        "flag": False,
        "off": "on",
        "a b": 'quote " and\nline ö',
        "net": {"sizes": [1, 2.5], "none": None},
        "empty": {},
    }
    logger = CSVLogger(tmp_path)
    logger.log_hyperparams({**params, "where": Path("x"), "tensor": torch.tensor(2.0)})
    found = read_hparams(os.path.join(logger.log_dir, "hparams.yaml"))
    assert found == {**params, "where": "x", "tensor": 2.0}


class Draws(Tiny):
    def __init__(self) -> None:
        super().__init__()
        self.example_input_array = torch.zeros(1, 4, dtype=torch.float64)

    def on_train_epoch_end(self) -> None:
        self.logger.experiment.add_scalar("by_hand", 7.0, 5)
        self.logger.log_metrics({"pair": {"a": 1.0, "b": 2.0}}, 5)


def test_tensorboard_logger_writes_what_lightnings_does(tmp_path: Path) -> None:
    """Scalars with the prefix, hyperparameters with their metric, and the graph, in the run's folder."""
    pytest.importorskip("tensorboard")
    logger = TensorBoardLogger(tmp_path, "run", log_graph=True, prefix="p", sub_dir="sub", max_queue=5)
    assert isinstance(logger, lite.loggers.TensorBoardLogger) and isinstance(logger, Logger)
    module = Draws()
    trainer(logger=logger, log_every_n_steps=3).fit(module, datamodule=TinyData())
    assert (logger.save_dir, logger.name, logger.version) == (str(tmp_path), "run", 0)
    assert (logger.root_dir, logger.log_dir) == (f"{tmp_path}/run", f"{tmp_path}/run/version_0/sub")
    assert module.training
    found = events(logger.log_dir)
    assert [(e.step, e.value) for e in found.Scalars("by_hand")] == [(5, 7.0)]
    assert [e.step for e in found.Scalars("p-loss")] == [2]
    assert [e.value for e in found.Scalars("p-hp_metric")] == [-1.0]
    assert "net" in str(found.Graph())
    assert f"{logger.sub_dir}/p-pair_a/events" in files(tmp_path / "run" / "version_0")
    logger.log_hyperparams(argparse.Namespace(lr=0.1, net={"width": 3}), metrics={"accuracy": torch.tensor(0.5)})
    logger.log_hyperparams({"lr": 0.2}, metrics=0.25)
    logger.save()
    found = events(logger.log_dir)
    assert [e.value for e in found.Scalars("p-accuracy")] == [0.5]
    assert [e.value for e in found.Scalars("p-hp_metric")] == [-1.0, 0.25]
    assert "_hparams_/session_start_info" in found.summary_metadata
    assert not events(tmp_path).Tags()["scalars"]


def test_tensorboard_logger_says_why_it_draws_no_graph(tmp_path: Path) -> None:
    """Without an input; without `log_graph` it says nothing. No metric, no hyperparameters for TensorBoard."""
    pytest.importorskip("tensorboard")
    with pytest.warns(UserWarning, match="draws no graph: Tiny.example_input_array is not set"):
        TensorBoardLogger(tmp_path, log_graph=True).log_graph(Tiny())
    logger = TensorBoardLogger(tmp_path, default_hp_metric=False)
    logger.log_graph(Tiny())
    logger.log_hyperparams({"lr": 0.1})
    assert files(tmp_path) == ["lite_logs/version_0/hparams.yaml"]


def test_the_default_logger_has_what_scripts_use(tmp_path: Path) -> None:
    """TensorBoard's writer, name, version and folder; the version is the next that is free."""
    pytest.importorskip("tensorboard")
    for number in range(2):
        run = trainer(logger=True, default_root_dir=tmp_path)
        run.fit(Draws(), datamodule=TinyData())
        assert (run.logger.name, run.logger.version) == ("lite_logs", number)
        assert run.log_dir == f"{tmp_path}/lite_logs/version_{number}"
        assert [e.value for e in events(run.log_dir).Scalars("by_hand")] == [7.0]


def test_the_default_logger_without_tensorboard_is_csv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same folders."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    run = trainer(default_root_dir=tmp_path, **{"logger": None})
    monkeypatch.undo()
    run.fit(Asks(), datamodule=TinyData())
    assert files(tmp_path / "lite_logs") == ["version_0/hparams.yaml", "version_0/metrics.csv"]


def test_lites_own_loggers_have_experiment_and_log_hyperparams(tmp_path: Path) -> None:
    """So that a module may use them as it uses Lightning's."""
    logger = lite.loggers.CSVLogger(tmp_path, "run")
    trainer(logger=logger, log_every_n_steps=3).fit(Asks(), datamodule=TinyData())
    assert (logger.save_dir, logger.name, logger.version) == (str(tmp_path), "run", "version_0")
    written = rows(logger.log_dir)
    assert [row["raw"] for row in written if row["raw"]] == ["8.0"]
    assert [row["by_hand"] for row in written if row["by_hand"]] == ["7.0"]
    pytest.importorskip("tensorboard")
    board = lite.loggers.TensorBoardLogger(tmp_path / "tb")
    trainer(logger=board).fit(Draws(), datamodule=TinyData())
    board.log_hyperparams({"lr": 0.1}, metrics={"score": 2.0})
    assert [e.value for e in events(tmp_path / "tb").Scalars("by_hand")] == [7.0]


class AsksMuch(Tiny):
    def on_train_epoch_end(self) -> None:
        assert isinstance(self.logger, DummyLogger)
        self.logger.experiment.add_scalar("x", 1.0, 1)
        self.logger.experiment[0].log({"x": 1.0})
        self.logger[0].watch(self)
        self.logger.log_metrics({"x": 1.0}, step=1)
        self.logger.log_hyperparams({"x": 1.0}, metrics={"y": 2.0})
        self.logger.log_image(key="x", images=[])
        assert (self.logger.name, self.logger.version, self.logger.save_dir) == ("", "", None)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_fast_dev_run_has_loggers_that_write_nothing(tmp_path: Path, number: int) -> None:
    """As many as were asked for; a Lite's own stay silent; logger=False still is None."""
    given: Any = [CSVLogger(tmp_path) for _ in range(number)] or True
    run = trainer(logger=given, fast_dev_run=True, default_root_dir=tmp_path, callbacks=LearningRateMonitor())
    run.fit(AsksMuch(), datamodule=TinyData())
    assert (len(run.loggers), run.log_dir) == (number or 1, str(tmp_path))
    lite_object = lite.Lite(accelerator="cpu", loggers=CSVLogger(tmp_path))
    Trainer(lite=lite_object, fast_dev_run=True, enable_progress_bar=False, enable_model_summary=False).fit(
        AsksMuch(), datamodule=TinyData()
    )
    assert trainer(logger=False, fast_dev_run=True).logger is None
    assert not list(tmp_path.iterdir())


def test_rank_zero_only_knows_the_rank_before_processes_meet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By the launcher's variables; a logger that is used before the Trainer is made writes nothing there."""

    def double(value: int) -> int:
        return 2 * value

    assert (rank_zero_only.rank, rank_zero_only(double)(3)) == (0, 6)
    with pytest.warns(UserWarning, match="told"):
        rank_zero_warn("told")
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "1")
    assert rank_zero_only.rank == 1
    assert (rank_zero_only(double)(3), rank_zero_only(double, default=9)(3)) == (None, 9)
    rank_zero_warn("told to nobody")
    rank_zero_info("told to nobody")
    logger = CSVLogger(tmp_path)
    logger.log_hyperparams({"lr": 0.1})
    logger.log_metrics({"a": 1.0})
    logger.experiment.log_hparams({"lr": 0.1})
    logger.experiment["a"] = 1
    logger.save()
    assert not list(tmp_path.iterdir())


class AsksAll(Draws):
    """Uses loggers of both kinds on both ranks."""

    def on_fit_start(self) -> None:
        for logger in self.loggers:
            logger.log_hyperparams({"depth": 3})

    def on_train_epoch_end(self) -> None:
        sheet, board, own = self.loggers
        sheet.experiment.log_metrics({"raw": float(self.global_rank)}, 6)
        sheet.log_metrics({"by_hand": float(self.global_rank)}, 7)
        sheet.save()
        board.experiment.add_scalar("by_hand", float(self.global_rank), 5)
        own.experiment.append("by hand")


def two_ranks(root: str) -> list[Any]:
    sheet = CSVLogger(f"{root}/sheet")
    if rank_zero_only.rank == 1:  # it looks when rank 0 has begun to write
        Path(root, "sheet", "lite_logs", "version_0").mkdir(parents=True)
        assert sheet.version == 1
        Path(root, "sheet", "lite_logs", "version_0").rmdir()
    board, own = TensorBoardLogger(f"{root}/board", log_graph=True), Own(root)
    loggers = [sheet, board, own]
    options = {"enable_checkpointing": True, "default_root_dir": root, "strategy": "ddp", "limit_val_batches": 0}
    run = trainer(logger=loggers, log_every_n_steps=1, **options)
    run.fit(AsksAll(), numbers(12, 2))
    return [sheet.version, run.log_dir, run.checkpoint_callback.dirpath, own.calls]


def test_rank_zero_alone_writes(tmp_path: Path) -> None:
    """Whatever is called on the others; they know rank 0's folders; a logger of one's own is called on rank 0 alone."""
    pytest.importorskip("tensorboard")
    first, second = run_distributed(two_ranks, str(tmp_path))
    run = f"{tmp_path}/sheet/lite_logs/version_0"
    assert first[:3] == second[:3] == [0, run, f"{run}/checkpoints"]
    assert second[3] == []
    told = [call for call in first[3] if call[0] != "metrics"]
    assert told == [
        ("graph", "AsksAll"),
        ("hyperparams", {"depth": 3}),
        ("hyperparams", {"lr": 0.05, "dropout": 0.0}),
        "save",
        "by hand",
        "save",
        ("saved", "epoch=0-step=3.ckpt"),
        "success",
    ]
    assert files(tmp_path) == [
        "board/lite_logs/version_0/events",
        "board/lite_logs/version_0/hparams.yaml",
        "sheet/lite_logs/version_0/checkpoints/epoch=0-step=3.ckpt",
        "sheet/lite_logs/version_0/hparams.yaml",
        "sheet/lite_logs/version_0/metrics.csv",
    ]
    assert [row["raw"] for row in rows(run) if row["raw"]] == ["0.0"]
    assert [row["by_hand"] for row in rows(run) if row["by_hand"]] == ["0.0"]
    assert [e.value for e in events(f"{tmp_path}/board/lite_logs/version_0").Scalars("by_hand")] == [0.0]


@pytest.mark.parametrize("within", [False, True], ids=["before", "within"])
@pytest.mark.parametrize("how", ["logger", "loggers", "append", "slice"])
def test_a_logger_may_be_given_after_the_trainer_was_made(tmp_path: Path, how: str, within: bool) -> None:
    """Before a run or within one, which had none: it has each row from then on, and what it buffers is written."""
    given = CSVLogger(tmp_path)

    def give(run: Trainer) -> None:
        if how == "append":
            run.loggers.append(given)
        elif how == "slice":
            run.loggers[:] = [given]
        else:
            setattr(run, how, given if how == "logger" else [given])

    class Gives(Tiny):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            if within and batch_idx == 3:
                give(self.trainer)
            return super().training_step(batch, batch_idx)

    run = trainer(log_every_n_steps=2, limit_val_batches=0)
    if not within:
        give(run)
    run.fit(Gives(), numbers(40))
    assert (run.logger, run.loggers, run.lite.loggers) == (given, [given], (given,))
    expected = [3, 5, 7, 9] if within else [1, 3, 5, 7, 9]
    assert [int(row["step"]) for row in rows(given.log_dir)] == expected
    assert Path(given.log_dir, "hparams.yaml").exists() is not within  # they come as a run begins


def test_loggers_may_be_exchanged_and_taken_away(tmp_path: Path) -> None:
    """Each has the rows of its time, and what is no logger is refused at once."""
    first, second = CSVLogger(tmp_path, name="first"), CSVLogger(tmp_path, name="second")
    run = trainer(max_epochs=4, log_every_n_steps=1, logger=first, limit_val_batches=0)
    for event in run.steps(Tiny(), numbers(), events=("epoch",)):
        if event.epoch < 2:
            run.logger = (second, None)[event.epoch]
        elif event.epoch == 2:
            assert (run.logger, run.loggers) == (None, [])
            run.loggers.append(first)
    assert [int(row["epoch"]) for row in rows(first.log_dir)] == [0] * 3 + [3] * 3
    assert [int(row["epoch"]) for row in rows(second.log_dir)] == [1] * 3
    for give in (lambda: run.loggers.append(3), lambda: setattr(run, "logger", "csv")):  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match=r"is no Logger; pass"):
            give()
    assert run.loggers == [first]
    run.loggers[:0] = [second]
    run.loggers.reverse()
    assert run.lite.loggers == (first, second) == tuple(run.loggers)
    del run.loggers[1]
    run.loggers += [second]
    assert run.loggers.pop(0) is first and run.lite.loggers == (second,)
    run.loggers.remove(second)
    assert run.lite.loggers == ()
    with pytest.raises(ConfigError, match=r"barebones=True, logger="):
        Trainer(accelerator="cpu", barebones=True).logger = first
