"""Behaviours 28 to 34 and 52: which checkpoints there are, what they hold, and what is made of them."""

from __future__ import annotations

import csv
import os
from argparse import Namespace
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from lite.errors import CheckpointError, ConfigError
from lite.loggers import CSVLogger
from lite.trainer import Callback, LightningDataModule, LightningModule
from lite.trainer.callbacks import ModelCheckpoint
from lite.trainer.hparams import storable
from tests.trainer.modules import Tiny, TinyData, numbers, trainer, weights

SAVES = {"enable_checkpointing": True}


class Scores(Tiny):
    """Logs the given scores, one per epoch."""

    def __init__(self, scores: list[float]) -> None:
        super().__init__()
        self.scores = scores

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("score/x", self.scores[min(self.current_epoch, len(self.scores) - 1)])


def names(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*.ckpt"))


def fitted(callback: Any, scores: list[float], **options: Any) -> Any:
    run = trainer(max_epochs=len(scores), callbacks=callback, **{**SAVES, **options})
    run.fit(Scores(scores), numbers(), numbers(4))
    return run


def test_behaviour_28_the_best_k_are_kept_and_nan_loses(tmp_path: Path) -> None:
    """Of equals the first stays; epochs count from 0 and steps are global."""
    nan = float("nan")
    saves = ModelCheckpoint(tmp_path, "{epoch}-{score/x:.2f}", "score/x", save_top_k=2)
    fitted(saves, [3.0, nan, 1.0, 2.0, 1.0])
    assert names(tmp_path) == ["epoch=2-score_x=1.00.ckpt", "epoch=4-score_x=1.00.ckpt"]
    assert os.path.basename(saves.best_model_path) == "epoch=2-score_x=1.00.ckpt"
    assert float(saves.best_model_score) == 1.0
    assert len(saves.best_k_models) == 2
    saves.to_yaml(tmp_path / "best.yaml")
    assert "epoch=2" in (tmp_path / "best.yaml").read_text()
    every = ModelCheckpoint(tmp_path / "every", "{epoch}", "score/x", save_top_k=-1)
    fitted(every, [1.0, 3.0, 2.0])
    assert (os.path.basename(every.kth_best_model_path), float(every.kth_value)) == ("epoch=1.ckpt", 3.0)
    equal = ModelCheckpoint(tmp_path / "equal", "{epoch}", "score/x", save_top_k=2)
    fitted(equal, [3.0, 3.0, 2.0])
    assert names(tmp_path / "equal") == ["epoch=0.ckpt", "epoch=2.ckpt"]
    best = ModelCheckpoint(tmp_path / "max", "{step}", "score/x", mode="max", auto_insert_metric_name=False)
    fitted(best, [3.0, nan, 5.0, 2.0])
    assert names(tmp_path / "max") == ["9.ckpt"]


def test_behaviour_28_without_a_monitor_the_newest_or_all_are_kept(tmp_path: Path) -> None:
    """save_top_k 1, -1, 0; save_last as a file and as a link; every_n_epochs; every_n_train_steps."""
    fitted(ModelCheckpoint(tmp_path / "one"), [0, 0])
    assert names(tmp_path / "one") == ["epoch=1-step=6.ckpt"]
    fitted(ModelCheckpoint(tmp_path / "all", save_top_k=-1, every_n_epochs=2), [0, 0, 0, 0])
    assert names(tmp_path / "all") == ["epoch=1-step=6.ckpt", "epoch=3-step=12.ckpt"]
    fitted(ModelCheckpoint(tmp_path / "none", save_top_k=0, save_last=True), [0])
    assert names(tmp_path / "none") == ["last.ckpt"]
    fitted(ModelCheckpoint(tmp_path / "link", save_last="link"), [0])
    assert os.readlink(tmp_path / "link" / "last.ckpt") == "epoch=0-step=3.ckpt"
    fitted(ModelCheckpoint(tmp_path / "steps", save_top_k=-1, every_n_train_steps=2), [0, 0])
    assert names(tmp_path / "steps") == ["epoch=0-step=2.ckpt", "epoch=1-step=4.ckpt", "epoch=1-step=6.ckpt"]
    fitted(ModelCheckpoint(tmp_path / "time", save_top_k=-1, train_time_interval=timedelta(seconds=0)), [0])
    assert len(names(tmp_path / "time")) == 3


def test_behaviour_28_a_taken_name_gets_a_number(tmp_path: Path) -> None:
    """-v1 for what is there from before, also of "last"; or it is overwritten."""
    for _ in range(2):
        fitted(ModelCheckpoint(tmp_path, save_last=True), [0])
    assert names(tmp_path) == ["epoch=0-step=3-v1.ckpt", "epoch=0-step=3.ckpt", "last-v1.ckpt", "last.ckpt"]
    fitted(ModelCheckpoint(tmp_path, enable_version_counter=False), [0])
    assert len(names(tmp_path)) == 4


def test_behaviour_28_settings_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    """And two that would be stored under one name, and a metric that nobody logs."""
    with pytest.raises(ConfigError, match="give one of them"):
        ModelCheckpoint(every_n_train_steps=2, every_n_epochs=1)
    with pytest.raises(ConfigError, match="needs a monitor"):
        ModelCheckpoint(save_top_k=3)
    with pytest.raises(ConfigError, match="same state_key"):
        trainer(callbacks=[ModelCheckpoint(), ModelCheckpoint()], **SAVES)
    with pytest.raises(ConfigError, match=r"monitor='nothing'.*'score/x'"):
        fitted(ModelCheckpoint(tmp_path, monitor="nothing"), [0])
    with pytest.raises(ConfigError, match="contradicts the ModelCheckpoint"):
        trainer(callbacks=ModelCheckpoint())


def test_behaviour_28_nothing_is_saved_in_a_sanity_check_or_a_fast_dev_run(tmp_path: Path) -> None:
    """Neither by a callback that is passed."""
    run = trainer(callbacks=ModelCheckpoint(tmp_path), fast_dev_run=True, enable_checkpointing=None)
    run.fit(Tiny(), datamodule=TinyData())
    run = trainer(callbacks=ModelCheckpoint(tmp_path), num_sanity_val_steps=1, max_epochs=0, **SAVES)
    run.fit(Tiny(), datamodule=TinyData())
    assert names(tmp_path) == []


def test_behaviour_43_a_checkpoint_at_a_validation_has_the_fresh_metric(tmp_path: Path) -> None:
    """Both are due after the same batch: validation comes first, and one file is written."""
    saves = ModelCheckpoint(tmp_path, "{step}-{val:.6f}", monitor="val", save_top_k=-1, every_n_train_steps=2)
    seen: list[float] = []

    class Looks(Callback):
        def on_validation_end(self, trainer: Any, *args: Any) -> None:
            seen.append(float(trainer.callback_metrics["val"]))

    run = trainer(callbacks=[saves, Looks()], val_check_interval=2, **SAVES)
    run.fit(Tiny(), numbers(16), numbers())
    assert names(tmp_path) == [f"step=2-val={seen[0]:.6f}.ckpt", f"step=4-val={seen[1]:.6f}.ckpt"]


def test_behaviour_29_where_checkpoints_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the logs, in default_root_dir, or where dirpath says."""
    run = trainer(logger=CSVLogger(tmp_path / "logs", "name"), default_root_dir=tmp_path, **SAVES)
    run.fit(Tiny(), datamodule=TinyData())
    assert names(tmp_path / "logs") == ["name/version_0/checkpoints/epoch=0-step=3.ckpt"]
    run = trainer(default_root_dir=tmp_path / "root", **SAVES)
    run.fit(Tiny(), datamodule=TinyData())
    assert names(tmp_path / "root") == ["checkpoints/epoch=0-step=3.ckpt"]


def test_behaviour_30_what_a_file_holds(tmp_path: Path) -> None:
    """Lightning's keys; weights_only leaves training state out; torch alone reads it without running code."""
    run = trainer(callbacks=ModelCheckpoint(tmp_path), **SAVES)
    run.fit(Tiny(lr=0.2), datamodule=TinyData())
    content = torch.load(run.checkpoint_callback.best_model_path, weights_only=True)
    wanted = {"epoch", "global_step", "state_dict", "optimizer_states", "lr_schedulers", "loops", "callbacks"}
    assert wanted | {"hyper_parameters", "hparams_name", "lite_version"} <= set(content)
    assert (content["epoch"], content["global_step"]) == (0, 3)
    assert content["hyper_parameters"] == {"lr": 0.2, "dropout": 0.0}
    assert set(content["state_dict"]) == set(Tiny().state_dict())
    run.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    assert not {"optimizer_states", "callbacks", "lr_schedulers"} & set(torch.load(tmp_path / "weights.ckpt"))
    with pytest.raises(CheckpointError, match="saved with weights_only"):
        trainer(max_epochs=2).fit(Tiny(), datamodule=TinyData(), ckpt_path=tmp_path / "weights.ckpt")


def test_behaviour_31_ckpt_path_knows_best_last_and_auto(tmp_path: Path) -> None:
    """And what there is to say when there is none."""
    saves = ModelCheckpoint(tmp_path, "{epoch}", "score/x", save_last=True, mode="max")
    run = fitted(saves, [3.0, 1.0])
    assert run.validate(dataloaders=numbers(4), verbose=False) != []
    assert run.ckpt_path == saves.best_model_path
    assert weights(run.module) == weights(Tiny.load_from_checkpoint(saves.best_model_path))

    def again(path: str, where: Path = tmp_path) -> Any:
        one = trainer(max_epochs=3, callbacks=ModelCheckpoint(where, "{epoch}", "score/x", mode="max"), **SAVES)
        one.fit(Scores([0, 0, 0]), numbers(), numbers(4), ckpt_path=path)
        return one

    assert again("last").ckpt_path == str(tmp_path / "last.ckpt")
    assert os.path.dirname(again("auto").ckpt_path) == str(tmp_path)
    with pytest.warns(UserWarning, match="no last checkpoint yet"):
        assert again("last", tmp_path / "empty").ckpt_path is None
    with pytest.raises(ConfigError, match="saved no checkpoint"):
        trainer().test(Tiny(), datamodule=TinyData(), ckpt_path="best")


def test_behaviour_31_auto_passes_over_a_damaged_file(tmp_path: Path) -> None:
    """The newest whole one counts."""
    fitted(ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1), [0, 0])
    newest = tmp_path / "epoch=1.ckpt"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 255
    newest.write_bytes(content)
    run = trainer(max_epochs=3, callbacks=ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1), **SAVES)
    with pytest.warns(UserWarning, match="damaged and was passed over"):
        run.fit(Scores([0, 0, 0]), numbers(), numbers(4), ckpt_path="auto")
    assert run.ckpt_path == str(tmp_path / "epoch=0.ckpt")


def test_behaviour_32_hooks_may_change_what_is_saved_and_loaded(tmp_path: Path) -> None:
    """Of module, callbacks and datamodule."""
    found: list[Any] = []

    class Adds(Tiny):
        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["mine"] = [1, 2]

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            found.append(checkpoint["mine"])

    class Counts(Callback):
        count = 0

        def state_dict(self) -> dict[str, Any]:
            return {"count": 7}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            found.append(state["count"])

        def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
            checkpoint["theirs"] = 3

        def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
            found.append(checkpoint["theirs"])

    class Data(TinyData):
        def state_dict(self) -> dict[str, Any]:
            return {"seen": 5}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            found.append(state["seen"])

    run = trainer(callbacks=Counts())
    run.fit(Adds(), datamodule=Data())
    run.save_checkpoint(tmp_path / "x.ckpt")
    trainer(max_epochs=2, callbacks=Counts()).fit(Adds(), datamodule=Data(), ckpt_path=tmp_path / "x.ckpt")
    assert found == [5, [1, 2], 3, 7]
    made = Adds.load_from_checkpoint(tmp_path / "x.ckpt", lr=0.7)
    assert made.hparams == {"lr": 0.7, "dropout": 0.0}


def test_behaviour_34_hyperparameters_of_every_kind(tmp_path: Path) -> None:
    """All arguments, names, ignore, inheritance, Namespace, dataclass; by attribute and item; a copy at first."""

    class Base(LightningModule):
        def __init__(self, width: int, **kwargs: Any) -> None:
            super().__init__()
            self.save_hyperparameters(ignore="secret")

    class Child(Base):
        def __init__(self, depth: int = 2, *, secret: str = "x", **kwargs: Any) -> None:
            super().__init__(width=depth * 2, **kwargs)

    child = Child(3, more=1)
    assert child.hparams == {"width": 6, "depth": 3, "more": 1}
    assert (child.hparams.width, child.hparams["depth"]) == (6, 3)
    child.hparams.width = 9
    assert child.hparams_initial.width == 6
    assert repr(child.hparams_initial).splitlines()[0].split() == ["width", "6"]

    class Open(LightningModule):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.save_hyperparameters()

    class Hides(Open):
        def __init__(self, width: int, token: str) -> None:
            super().__init__(width)
            self.save_hyperparameters(ignore=["token"])

    assert Hides(3, "secret").hparams == {"width": 3}  # the base class's call has taken all

    class Named(LightningModule):
        def __init__(self, a: int, b: int) -> None:
            super().__init__()
            self.save_hyperparameters("b")

    assert Named(1, 2).hparams == {"b": 2}

    class Held(LightningModule):
        def __init__(self, config: Any) -> None:
            super().__init__()
            self.save_hyperparameters(config)

    @dataclass
    class Config:
        a: int = 1

    for config in (Namespace(a=1), Config(), {"a": 1}):
        assert Held(config).hparams == {"a": 1}

    class Whole(LightningModule):
        def __init__(self, layer: nn.Module, function: Any = None) -> None:
            super().__init__()
            self.save_hyperparameters()

    with pytest.warns(UserWarning, match=r"keeps 'layer', which is a module"):
        whole = Whole(nn.Linear(1, 1), function=lambda: 1)
    with (
        pytest.warns(UserWarning, match=r"'layer' is not in the checkpoint"),
        pytest.warns(UserWarning, match="'function'"),
    ):
        assert storable(whole.hparams, "Whole") == {}

    class Data(LightningDataModule):
        def __init__(self, size: int = 4) -> None:
            super().__init__()
            self.save_hyperparameters()

        def train_dataloader(self) -> Any:
            return numbers(self.hparams.size)

    run = trainer(limit_val_batches=0)
    run.fit(Tiny(), datamodule=Data(8))
    run.save_checkpoint(tmp_path / "x.ckpt")
    assert Data.load_from_checkpoint(tmp_path / "x.ckpt").hparams == {"size": 8}


def test_behaviour_52_parts_are_restored_by_choice(tmp_path: Path) -> None:
    """By the checkpoint's own keys or shorter names; a wrong one lists them."""
    run = trainer()
    run.fit(Tiny(), datamodule=TinyData())
    run.save_checkpoint(tmp_path / "x.ckpt")
    module = Tiny(lr=0.0)
    one = trainer(max_epochs=2)
    one.fit(module, datamodule=TinyData(), ckpt_path=tmp_path / "x.ckpt", restore=("model",))
    assert weights(module) == weights(run.module)
    assert one.global_step == 6  # from the beginning
    other = trainer(max_epochs=2)
    other.fit(Tiny(lr=0.0), datamodule=TinyData(), ckpt_path=tmp_path / "x.ckpt", restore_except=("optimizer_states",))
    assert other.global_step == 6
    assert weights(other.module) == weights(run.module)  # this run's learning rate, 0, was kept
    with pytest.raises(ConfigError, match=r"restore='weights' is not known; choose one of 'model'.*'state_dict'"):
        one.fit(module, datamodule=TinyData(), ckpt_path=tmp_path / "x.ckpt", restore=("weights",))


def test_load_from_checkpoint_says_what_is_missing(tmp_path: Path) -> None:
    """An argument that the file doesn't have, keys that don't fit, and what runs code."""
    torch.save({"state_dict": Tiny().state_dict()}, tmp_path / "x.ckpt")

    class Needs(Tiny):
        def __init__(self, needed: int) -> None:
            super().__init__()

    with pytest.raises(TypeError, match=r"leaves this one as it is; .* new = Tiny\.load_from_checkpoint"):
        Tiny().load_from_checkpoint(tmp_path / "x.ckpt")
    with pytest.raises(TypeError, match=r"new = LightningDataModule\.load_from_checkpoint"):
        LightningDataModule().load_from_checkpoint(tmp_path / "x.ckpt")
    with pytest.raises(TypeError, match=r"Needs needs needed.*needed="):
        Needs.load_from_checkpoint(tmp_path / "x.ckpt")

    class Larger(Tiny):
        def __init__(self) -> None:
            super().__init__()
            self.more = nn.Linear(1, 1)

    with pytest.raises(CheckpointError, match=r"the checkpoint's 'state_dict' does not fit Larger.*more"):
        Larger.load_from_checkpoint(tmp_path / "x.ckpt")
    with pytest.warns(UserWarning, match="missing"):
        Larger.load_from_checkpoint(tmp_path / "x.ckpt", strict=False)
    (tmp_path / "hparams.csv").write_text("key,value\nlr,0.5\n")
    assert Tiny.load_from_checkpoint(tmp_path / "x.ckpt", hparams_file=tmp_path / "hparams.csv").hparams.lr == 0.5
    (tmp_path / "hparams.json").write_text('{"lr": 0.7}')
    assert Tiny.load_from_checkpoint(tmp_path / "x.ckpt", hparams_file=tmp_path / "hparams.json").hparams.lr == 0.7
    (tmp_path / "hparams.txt").write_text("lr: 0.7")
    with pytest.raises(ConfigError, match=r"hparams.txt' is no .json and no .yaml, and not a table"):
        Tiny.load_from_checkpoint(tmp_path / "x.ckpt", hparams_file=tmp_path / "hparams.txt")


class Remembers(Callback):
    """Has a state."""

    def __init__(self, value: int = 0) -> None:
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.value = state_dict["value"]


def test_evaluation_gives_callbacks_their_states_and_lets_those_that_save_be(tmp_path: Path) -> None:
    """An average of weights is needed in a test too; the best checkpoint stays the one that this Trainer has saved."""
    options = {"enable_checkpointing": True, "max_epochs": 2}
    run = trainer(callbacks=[Remembers(3), ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)], **options)
    run.fit(Tiny(), numbers(), numbers())
    again, saves = Remembers(), ModelCheckpoint(tmp_path)
    saves.best_model_path = "mine.ckpt"
    trainer(callbacks=[again, saves], **options).test(Tiny(), numbers(), tmp_path / "epoch=0.ckpt", verbose=False)
    assert (again.value, saves.best_model_path) == (3, "mine.ckpt")


def test_data_may_have_grown_when_the_next_epoch_begins(tmp_path: Path) -> None:
    """Between two epochs there is no position that would mean nothing; within one there is."""
    run = trainer(callbacks=ModelCheckpoint(tmp_path, "end"), enable_checkpointing=True)
    for event in run.steps(Tiny(), numbers(8), numbers(4)):
        if event.kind == "batch" and event.global_step == 1:
            run.save_checkpoint(tmp_path / "within.ckpt")
    again = trainer(max_epochs=2, callbacks=ModelCheckpoint(tmp_path, "end"), enable_checkpointing=True)
    with pytest.warns(UserWarning, match="next epoch begins with the training data as they are now"):
        again.fit(Tiny(), numbers(20), numbers(4), ckpt_path=tmp_path / "end.ckpt")
    assert again.global_step == 2 + 5
    with pytest.raises(CheckpointError, match="8 samples, but this one has 20"):
        again.fit(Tiny(), numbers(20), numbers(4), ckpt_path=tmp_path / "within.ckpt")


class UntilNow(IterableDataset[Tensor]):
    """Five batches that nobody has counted."""

    def __iter__(self) -> Any:
        return iter(numbers(10, 2))


def test_a_step_at_an_unannounced_end_is_saved_and_logged(tmp_path: Path) -> None:
    """The last window of an epoch of unknown length steps when the data have ended."""
    saves = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=3, save_top_k=-1)
    options = {"accumulate_grad_batches": 2, "limit_val_batches": 0, "log_every_n_steps": 1, "max_epochs": 2}
    run = trainer(callbacks=saves, enable_checkpointing=True, logger=CSVLogger(tmp_path), **options)
    run.fit(Tiny(), UntilNow())
    assert {path.name for path in tmp_path.glob("*.ckpt")} == {"step=3.ckpt", "step=6.ckpt"}
    run.logger.flush()
    rows = list(csv.DictReader(run.logger.path.read_text().splitlines()))
    assert [row["step"] for row in rows if row["loss"]] == ["0", "1", "2", "3", "4", "5"]


def test_a_second_fit_may_save_before_its_first_validation(tmp_path: Path) -> None:
    """What the first fit logged is gone, and the metric still comes."""
    saves = ModelCheckpoint(tmp_path, monitor="val", every_n_train_steps=2)
    run = trainer(callbacks=saves, enable_checkpointing=True)
    for epochs in (1, 2):
        run.fit_loop.max_epochs = epochs
        run.fit(Tiny(), numbers(16), numbers())
    assert saves.best_model_path


def test_a_name_with_a_metric_that_nobody_logs_is_told_once(tmp_path: Path) -> None:
    """It counts 0 there."""
    saves = ModelCheckpoint(tmp_path, "{step}-{val_acc:.1f}", save_top_k=-1)
    with pytest.warns(UserWarning, match="nobody has logged val_acc, which counts 0 in names") as told:
        trainer(callbacks=saves, max_epochs=2, limit_val_batches=0, enable_checkpointing=True).fit(Tiny(), numbers())
    assert len([one for one in told if "val_acc" in str(one.message)]) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step=3-val_acc=0.0.ckpt", "step=6-val_acc=0.0.ckpt"]
