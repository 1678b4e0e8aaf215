"""Behaviours 36 to 40 and the Trainer's arguments: what is refused, what a Trainer object is good for afterwards."""

from __future__ import annotations

import contextlib
import copy
import csv
import importlib.util
import re
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lite import Lite
from lite.errors import CheckpointError, ConfigError, UsageError
from lite.loggers import CSVLogger
from lite.trainer import Callback, LightningModule, Trainer
from lite.trainer.callbacks import (
    GradientAccumulationScheduler,
    LambdaCallback,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelSummary,
    ProgressBar,
    Timer,
    TQDMProgressBar,
)
from lite.trainer.profilers import PyTorchProfiler
from tests.trainer.modules import QUIET, Recorder, Tiny, TinyData, numbers, trainer, weights


def test_behaviour_36_what_is_no_module_or_lacks_a_method_is_named() -> None:
    """TypeError for another object; ConfigErrors that name the method."""
    with pytest.raises(TypeError, match=r"fit\(\) got a Linear as the model, not a LightningModule"):
        trainer().fit(nn.Linear(1, 1), numbers())
    with pytest.raises(TypeError, match=r"pass an instance, Tiny\(\.\.\.\)"):
        trainer().fit(Tiny, numbers())

    class Bare(LightningModule):
        pass

    with pytest.raises(ConfigError, match="Bare has no training_step"):
        trainer().fit(Bare(), numbers())
    Bare.training_step = Tiny.training_step  # type: ignore[method-assign]
    with pytest.raises(ConfigError, match="Bare has no configure_optimizers"):
        trainer().fit(Bare(), numbers())
    with pytest.raises(ConfigError, match=r"pass train_dataloaders.*Tiny\.train_dataloader"):
        trainer().fit(Tiny())
    with pytest.raises(ConfigError, match="Bare has no validation_step"):
        trainer().validate(Bare(), numbers())
    with pytest.raises(ConfigError, match=r"define Tiny\.test_dataloader"):
        trainer().test(Tiny())
    with pytest.warns(UserWarning, match="no validation_step"):
        trainer().fit(
            type("NoVal", (Tiny,), {"validation_step": LightningModule.validation_step})(), numbers(), numbers()
        )


class SeveralVals(Tiny):
    """Validates on several loaders."""

    def validation_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val", self.loss(batch))


class Nested(Callback):
    """Evaluates in the middle of a fit, by that Trainer and by another; and a copy, which may be."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.found: Any = None

    def on_train_epoch_end(self, pl_trainer: Any, pl_module: Any) -> None:
        for run in (pl_trainer, trainer()):
            with pytest.raises(UsageError) as caught:
                run.test(pl_module, numbers(), verbose=False)
            self.told.append(str(caught.value))
        self.found = trainer().test(copy.deepcopy(pl_module), numbers(), verbose=False)


def test_a_run_within_a_run_is_refused_and_leaves_the_outer_one_alone() -> None:
    """By name; what a fit gives is what it gives without."""
    plain, nested, module = Tiny(), Nested(), Tiny()
    trainer(max_epochs=2).fit(plain, datamodule=TinyData())
    trainer(max_epochs=2, callbacks=nested).fit(module, datamodule=TinyData())
    assert weights(module) == weights(plain)
    first, second = nested.told[:2]
    assert "trainer.test() was called while this Trainer is in the middle of fit" in first
    assert "while the module's Trainer is in the middle of fit" in second
    assert "copy.deepcopy(module)" in second
    assert nested.found == trainer().test(module, numbers(), verbose=False)


def test_behaviour_38_a_trainer_is_used_again() -> None:
    """fit, test, fit with more epochs; a fit with nothing left says so; the module is the user's own afterwards."""
    module, run = Tiny(), trainer(max_epochs=1)
    run.fit(module, datamodule=TinyData())
    assert type(module) is Tiny
    run.test(module, datamodule=TinyData(), verbose=False)
    with pytest.warns(UserWarning, match="nothing is left to train: 1 epochs and 3 steps"):
        run.fit(module, datamodule=TinyData())
    run.fit_loop.max_epochs = 2
    run.fit(module, datamodule=TinyData())
    assert (run.current_epoch, run.global_step) == (2, 6)
    whole = Tiny()
    trainer(max_epochs=2).fit(whole, datamodule=TinyData())
    assert weights(module) == weights(whole)


def test_behaviour_40_the_progress_bar_shows_the_run(capsys: Any) -> None:
    """Epoch, batches and metrics; refresh_rate 0 switches off; a second bar is refused."""
    options = {"enable_progress_bar": None, "callbacks": TQDMProgressBar()}

    class Bars(Tiny):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = self.loss(batch)
            self.log("seen", 0.25, prog_bar=True)
            return loss

    trainer(max_epochs=2, limit_train_batches=2, **options).fit(Bars(), datamodule=TinyData())
    shown = capsys.readouterr().out
    assert "Epoch 1" in shown and "2/2" in shown and "seen=0.25" in shown and "Validation" in shown
    options["callbacks"] = TQDMProgressBar(refresh_rate=0)
    trainer(**options).fit(Bars(), datamodule=TinyData())
    assert capsys.readouterr().out == ""
    with pytest.raises(ConfigError, match="two progress bars"):
        trainer(**{**options, "callbacks": [TQDMProgressBar(), TQDMProgressBar()]})


class Percent(ProgressBar):
    """Keeps what it would show, in the form that people know from Lightning: `enable` is a value of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.enable = True
        self.shown: list[str] = []

    def disable(self) -> None:
        self.enable = False

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self.shown.append(f"{100 * batch_idx / self.total_train_batches:.0f}")

    def on_validation_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, *number: int) -> None:
        self.shown.append(f"{number[0] + 1}/{self.total_val_batches_current_dataloader} of {self.total_val_batches}")


class Coloured(TQDMProgressBar):
    """Changes its bars as they are made."""

    def init_validation_tqdm(self) -> Any:
        bar = super().init_validation_tqdm()
        bar.set_description("running validation")
        return bar


def test_progress_bars_of_ones_own(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the attributes and methods that Lightning's have; with tqdm and in plain lines."""
    bar = Percent()
    with pytest.raises(UsageError, match=r"Percent\.trainer is known from setup on"):
        _ = bar.total_train_batches
    loaders = [numbers(8), numbers()]
    options = {"enable_progress_bar": True, "num_sanity_val_steps": 1}
    trainer(callbacks=bar, **options).fit(SeveralVals(), numbers(), loaders)
    assert bar.shown == ["1/1 of 2"] * 2 + ["0", "33", "67"] + [f"{n}/2 of 5" for n in (1, 2)] + [
        f"{n}/3 of 5" for n in (1, 2, 3)
    ]
    for name in ("tqdm", "plain"):
        if name == "plain":
            monkeypatch.setattr("lite.trainer.callbacks.bars.importlib.util.find_spec", lambda name: None)
        elif importlib.util.find_spec("tqdm") is None:
            continue
        run = trainer(callbacks=Coloured(), **options)
        for event in run.steps(SeveralVals(), numbers(), loaders):
            if event.kind == "batch" and event.batch_idx == 0:
                assert run.progress_bar_callback.train_progress_bar.total == 3
        shown = capsys.readouterr()
        text = shown.out + shown.err
        assert all(part in text for part in ("running validation: ", "Epoch 0: ", "Sanity check: ")), text


def test_arguments_have_names_and_defaults_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """argument > environment > default; both prefixes; an empty variable counts as unset."""
    with pytest.raises(ConfigError, match=r"write Trainer\(accelerator='cpu'"):
        Trainer("cpu")
    with pytest.raises(ConfigError, match="Did you mean 'max_epochs'"):
        trainer(max_epoch=1)
    monkeypatch.setenv("PL_TRAINER_MAX_EPOCHS", "7")
    monkeypatch.setenv("LITE_TRAINER_LIMIT_VAL_BATCHES", "0.5")
    monkeypatch.setenv("PL_TRAINER_MAX_TIME", "00:01:00:00")
    monkeypatch.setenv("PL_TRAINER_MIN_EPOCHS", "")
    run = Trainer(accelerator="cpu", **QUIET)
    assert (run.max_epochs, run.min_epochs, run.limit_val_batches) == (7, 0, 0.5)
    assert any(isinstance(c, Timer) for c in run.callbacks)
    assert trainer(max_epochs=2).max_epochs == 2


def test_variables_of_the_environment_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that Lite has too are the Trainer's, without a word; a misspelt one is told; old names are translated."""
    for name, value in {"PRECISION": "64", "ACCELERATOR": "cpu", "DEVICES": "1", "NUM_NODES": "1"}.items():
        monkeypatch.setenv(f"LITE_TRAINER_{name}", value)
    run = Trainer(max_epochs=1, **QUIET)
    assert (run.precision, run.num_nodes) == ("64-true", 1)
    monkeypatch.setenv("PL_TRAINER_REPLACE_SAMPLER_DDP", "False")
    with pytest.warns(DeprecationWarning, match="use_distributed_sampler=False"):
        assert trainer().use_distributed_sampler is False
    monkeypatch.delenv("PL_TRAINER_REPLACE_SAMPLER_DDP")
    monkeypatch.setenv("LITE_TRAINER_MAX_EPOCH", "3")
    with pytest.warns(UserWarning, match="changes nothing; did you mean LITE_TRAINER_MAX_EPOCHS"):
        trainer()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_epochs": -2}, "max_epochs=-2"),
        ({"limit_train_batches": 1.5}, "share above 1.0"),
        ({"limit_val_batches": -1}, "limit_val_batches=-1"),
        ({"accumulate_grad_batches": 0}, "accumulate_grad_batches=0"),
        ({"gradient_clip_val": "x"}, "gradient_clip_val='x'"),
        ({"gradient_clip_val": -1}, "gradient_clip_val=-1"),
        ({"gradient_clip_val": float("nan")}, "gradient_clip_val=nan"),
        ({"deterministic": "x"}, "deterministic='x' is not known; choose one of .*'warn'"),
        ({"sync_batchnorm": "x"}, "sync_batchnorm='x'"),
        ({"enable_progress_bar": "no"}, "enable_progress_bar='no'"),
        ({"barebones": "x"}, "barebones='x'"),
        ({"val_check_interval": 0}, "val_check_interval=0 must be"),
        ({"val_check_interval": 0.0}, "limit_val_batches=0 switches validation off"),
        ({"lite": Lite(accelerator="cpu"), "precision": "64"}, r"lite=..., precision='64'.*Lite\(precision=...\)"),
        ({"lite": 5}, "lite=5 must be a Lite object"),
        ({"fast_dev_run": "foo"}, "fast_dev_run='foo'"),
        ({"fast_dev_run": 2.5}, "fast_dev_run=2.5"),
        ({"limit_val_batches": float("nan")}, "limit_val_batches=nan"),
        ({"max_time": timedelta(seconds=-60)}, "max_time=-1 day, 23:59:00"),
        ({"max_time": "soon"}, "max_time='soon'"),
        ({"accumulate_grad_batches": {"a": 1}}, "accumulate_grad_batches={'a': 1}: the epoch 'a'"),
        ({"max_epoch": 3}, "Trainer has no argument 'max_epoch'. Did you mean 'max_epochs'"),
        ({"default_root_dir": 5}, "default_root_dir=5 must be a path"),
        ({"use_distributed_sampler": "x"}, "use_distributed_sampler='x'"),
        ({"auto_scale_batch_size": "powr"}, "Did you mean 'power'"),
        ({"gradient_clip_algorithm": "nrom"}, "Did you mean 'norm'"),
        ({"barebones": True, "logger": True}, "barebones=True, logger=True"),
        ({"tpu_cores": 8}, "tpu_cores=8"),
        ({"resume_from_checkpoint": "x"}, "ckpt_path='x'"),
        ({"profiler": "fast"}, "profiler='fast'"),
        ({"accumulation": "sum"}, "accumulation='sum'"),
        ({"check_val_every_n_epoch": 0}, "check_val_every_n_epoch=0"),
        ({"track_grad_norm": "x"}, "track_grad_norm='x' must be a number"),
        ({"multiple_trainloader_mode": "foo"}, "multiple_trainloader_mode='foo'"),
        ({"callbacks": [Timer]}, r"pass an instance, Timer\(\.\.\.\)"),
        ({"callbacks": [1]}, "callbacks has 1, which is no callback"),
        (
            {"callbacks": GradientAccumulationScheduler({0: 2}), "accumulate_grad_batches": 2},
            "accumulate_grad_batches=2 contradicts",
        ),
    ],
)
def test_wrong_arguments_are_refused_by_name_and_value(options: dict[str, Any], message: str) -> None:
    """Before anything runs."""
    with pytest.raises(ConfigError, match=message):
        trainer(**options)


def test_arguments_of_1_8_have_their_present_form() -> None:
    """Translated with a deprecation."""
    with pytest.warns(DeprecationWarning, match=r"use_distributed_sampler=False"):
        assert trainer(replace_sampler_ddp=False).use_distributed_sampler is False
    run = trainer(accumulate_grad_batches={0: 1, 1: 3})
    assert any(isinstance(c, GradientAccumulationScheduler) for c in run.callbacks)
    run = trainer(max_epochs=None)  # says nothing, as it may be made for an evaluation alone
    assert run.max_epochs == 1000
    with pytest.warns(UserWarning, match="1000 epochs"):
        run.plan(Tiny(), numbers(4), numbers(4), limit=1)
    assert trainer(max_epochs=None, max_steps=5).max_epochs == -1
    assert trainer(max_epochs=None, max_time=timedelta(hours=1)).max_epochs == -1


_NONE_IN_SOME_VERSION = ("accelerator", "strategy", "devices", "precision", "accumulate_grad_batches", "gpus")


@pytest.mark.parametrize("options", [{name: None} for name in _NONE_IN_SOME_VERSION])
def test_defaults_of_older_versions_may_be_written_out(options: dict[str, Any]) -> None:
    """None stood for the default."""
    run = Trainer(**{**QUIET, "max_epochs": 1, **options})
    assert (run.precision, run.accumulate_grad_batches) == ("32-true", 1)


def test_gpus_and_amp_backend_of_older_versions() -> None:
    """gpus=0 was the CPU; torch's own mixed precision was one of two."""
    plain = {**QUIET, "max_epochs": 1}
    for options in ({"gpus": 0}, {"gpus": 0, "accelerator": "cpu"}, {"accelerator": "cpu", "num_processes": 1}):
        with pytest.warns(DeprecationWarning, match=r"accelerator='cpu'"):
            assert Trainer(**plain, **options).lite.device.type == "cpu"
    with pytest.warns(DeprecationWarning, match=r"amp_backend='native'"):
        assert trainer(amp_backend="native", precision="bf16").precision == "bf16-mixed"
    with pytest.raises(ConfigError, match="amp_backend='apex'"):
        trainer(amp_backend="apex")
    with pytest.raises(ConfigError, match="contradict"):
        trainer(gpus=2)


def test_weights_only_false_lets_a_checkpoint_bring_code(tmp_path: Path) -> None:
    """Where files are read: fit, validate, test and predict."""
    path, module = str(tmp_path / "x.ckpt"), Tiny()
    run = trainer()
    run.fit(module, datamodule=TinyData(), weights_only=True)
    run.save_checkpoint(path, storage_options=None)
    torch.save({**torch.load(path, weights_only=True), "class": Recorder()}, path)
    with pytest.raises(CheckpointError):
        run.validate(module, datamodule=TinyData(), ckpt_path=path)
    for call in (run.validate, run.test, run.predict):
        assert call(module, datamodule=TinyData(), ckpt_path=path, weights_only=False)
    again = trainer(max_epochs=2)
    again.fit(module, datamodule=TinyData(), ckpt_path=path, weights_only=False)
    assert again.global_step == 6
    with pytest.raises(ConfigError, match="storage_options"):
        run.save_checkpoint(path, storage_options={"key": 1})


def test_accumulation_changes_with_the_epoch() -> None:
    """GradientAccumulationScheduler."""
    run = trainer(max_epochs=3, accumulate_grad_batches={1: 3}, limit_val_batches=0)
    run.fit(Tiny(), numbers())
    assert run.global_step == 3 + 1 + 1


def test_a_ready_lite_is_used(tmp_path: Path) -> None:
    """With its precision and its loggers."""
    lite = Lite(accelerator="cpu", precision="64-true", loggers=CSVLogger(tmp_path))
    run = trainer(lite=lite, logger=None)
    assert (run.precision, run.logger) == ("64-true", lite.logger)
    run.fit(Tiny(), datamodule=TinyData())
    with pytest.raises(ConfigError, match="pass them to Lite"):
        trainer(lite=lite, logger=CSVLogger(tmp_path))


def test_precision_goes_around_the_steps() -> None:
    """bf16-mixed computes in bfloat16 and keeps float32 weights; the module is unwrapped after."""
    seen: list[Any] = []

    class Looks(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 1)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            out = self.layer(batch.float())
            seen.append(out.dtype)
            return out.float().pow(2).mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module = Looks()
    trainer(precision="bf16-mixed").fit(module, numbers())
    assert set(seen) == {torch.bfloat16}
    assert module.layer.weight.dtype is torch.float32
    assert type(module) is Looks


def test_callbacks_keep_their_order_and_a_modules_own_replace_them() -> None:
    """Tuning ones first, saving ones last; configure_callbacks replaces those of its type."""

    class Tunes(Callback):
        tunes = True

    class Own(Tiny):
        def configure_callbacks(self) -> Any:
            return [Timer(), ModelSummary(max_depth=2)]

    order: list[str] = []
    run = trainer(callbacks=[Timer(interval="epoch"), Tunes()], enable_checkpointing=True, fast_dev_run=True)
    run = trainer(callbacks=[Timer(interval="epoch"), Tunes()])
    assert [type(c).__name__ for c in run.callbacks] == ["Tunes", "Timer"]
    run.fit(Own(), datamodule=TinyData())
    assert [type(c).__name__ for c in run.callbacks] == ["Tunes", "Timer", "ModelSummary"]
    assert run.callbacks[1].interval == "step"
    run = trainer(callbacks=LambdaCallback(on_train_end=lambda trainer, module: order.append("end")))
    run.fit(Tiny(), datamodule=TinyData())
    assert order == ["end"]
    with pytest.raises(ConfigError, match="Did you mean 'on_train_end'"):
        LambdaCallback(on_train_ending=print)


class TwoPaces(Tiny):
    """One optimizer with two schedulers."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        one, two = (torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5) for _ in range(2))
        return [optimizer], [one, {"scheduler": two, "name": "decay"}]


def test_learning_rates_are_monitored(tmp_path: Path) -> None:
    """Names by optimizer and group; it needs a logger."""

    class Groups(Tiny):
        def configure_optimizers(self) -> Any:
            groups = [{"params": self.net[0].parameters()}, {"params": self.net[3].parameters(), "lr": 0.5}]
            optimizer = torch.optim.Adam(groups, lr=0.1)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]

    monitor = LearningRateMonitor(log_momentum=True)
    trainer(max_epochs=2, callbacks=monitor, logger=CSVLogger(tmp_path)).fit(Groups(), datamodule=TinyData())
    assert monitor.lrs["lr-Adam/pg1"] == [0.1, 0.05]
    assert monitor.lrs["lr-Adam/pg2-momentum"] == [0.9, 0.9]
    saves = ModelCheckpoint(tmp_path, "{lr-Adam/pg2:.2f}")  # the rates are among the metrics
    trainer(callbacks=[LearningRateMonitor(), saves], logger=CSVLogger(tmp_path), enable_checkpointing=True).fit(
        Groups(), datamodule=TinyData()
    )
    assert saves.best_model_path.endswith("lr-Adam_pg2=0.50.ckpt")
    by_step = trainer(
        max_epochs=2,
        accumulate_grad_batches=2,
        callbacks=LearningRateMonitor("step"),
        logger=CSVLogger(tmp_path, "steps"),
        log_every_n_steps=2,
    )
    by_step.fit(Groups(), numbers(12, 2), numbers(4))
    with open(by_step.logger.path, newline="") as file:
        rows = list(csv.DictReader(file))
    # Each beside the row of the losses, with the rate of that very step.
    assert [row["step"] for row in rows if row["loss"]] == ["1", "3", "5"]
    assert [(row["step"], row["lr-Adam/pg1"]) for row in rows if row["lr-Adam/pg1"]] == [
        ("1", "0.1"),
        ("3", "0.05"),
        ("5", "0.05"),
    ]
    twice = LearningRateMonitor()
    trainer(callbacks=twice, logger=CSVLogger(tmp_path, "twice"), limit_val_batches=0).fit(TwoPaces(), numbers())
    assert twice.lrs == {"lr-SGD": [0.1], "decay": [0.1]}
    # Saved within a window whose step's row has been written; the run that goes on writes it no more.
    options = {"accumulate_grad_batches": 2, "log_every_n_steps": 1, "limit_val_batches": 0}
    for event in trainer(callbacks=LearningRateMonitor("step"), logger=CSVLogger(tmp_path, "w"), **options).steps(
        Groups(), numbers(12, 2)
    ):
        if event.batch_idx == 2:
            event.trainer.save_checkpoint(tmp_path / "within.ckpt")
    again = LearningRateMonitor("step")
    trainer(callbacks=[again], logger=CSVLogger(tmp_path, "v"), **options).fit(
        Groups(), numbers(12, 2), ckpt_path=tmp_path / "within.ckpt"
    )
    assert len(again.lrs["lr-Adam/pg1"]) == 1
    with pytest.raises(ConfigError, match="needs a logger"):
        trainer(callbacks=LearningRateMonitor()).fit(Tiny(), datamodule=TinyData())


def test_learning_rate_monitors_are_told_apart_and_leave_no_traces(tmp_path: Path) -> None:
    """Several in one run, by their settings; a run that goes on without them isn't warned; another fit begins anew."""
    options = {"log_every_n_steps": 1, "limit_val_batches": 0, "max_steps": 1}
    monitors = [LearningRateMonitor("epoch"), LearningRateMonitor("step", log_momentum=True)]
    run = trainer(callbacks=monitors, logger=CSVLogger(tmp_path), **options)
    run.fit(Tiny(), numbers())
    run.save_checkpoint(tmp_path / "x.ckpt")
    assert [list(monitor.lrs) for monitor in monitors] == [["lr-SGD"], ["lr-SGD", "lr-SGD-momentum"]]
    trainer(**{**options, "max_steps": 2}).fit(Tiny(), numbers(), ckpt_path=tmp_path / "x.ckpt")
    trainer(callbacks=monitors, logger=CSVLogger(tmp_path), **options).fit(Tiny(), numbers())
    assert [monitor.lrs["lr-SGD"] for monitor in monitors] == [[0.05], [0.05]]


def test_settings_can_be_read(tmp_path: Path) -> None:
    """Under the names that Lightning has."""
    run = trainer(val_check_interval=0.5, logger=CSVLogger(tmp_path))
    assert (run.val_check_interval, run.check_val_every_n_epoch) == (0.5, 1)
    assert (run.scaler, run.distributed_sampler_kwargs) == (None, None)
    assert trainer(val_check_interval="00:00:01:00").val_check_interval == 60
    run.logger.log_metrics({"a": 1})
    run.logger.save()
    assert run.logger.path.read_text() == "step,a\n,1\n"


def test_hyperparameters_are_logged_once(tmp_path: Path) -> None:
    """Of module and datamodule, as a run begins."""
    run = trainer(logger=CSVLogger(tmp_path))
    run.fit(Tiny(lr=0.25), datamodule=TinyData())
    assert '"lr": 0.25' in (tmp_path / "version_0" / "hyperparameters.json").read_text()


class Hooked(Tiny):
    def on_train_epoch_end(self) -> None:
        pass


class OwnProfiler:
    """Another package's."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def profile(self, name: str) -> Any:
        self.names.append(name)
        return contextlib.nullcontext()


def test_profilers_see_hooks_and_steps(tmp_path: Path, capsys: Any) -> None:
    """By name, by class, or another package's; each tells of a hook and of the steps, and training is the same."""
    module = Hooked()
    trainer(max_epochs=2).fit(module, datamodule=TinyData())
    expected = weights(module)
    own = OwnProfiler()
    for profiler in ("simple", "advanced", PyTorchProfiler(tmp_path / "traces"), own):
        module = Hooked()
        trainer(profiler=profiler, max_epochs=2).fit(module, datamodule=TinyData())
        assert weights(module) == expected
        out = capsys.readouterr().out
        told = "\n".join(own.names) if profiler is own else out
        for name in ("on_train_epoch_end", "training_step", "validation_step"):
            assert f"[Hooked].{name}" in told or (isinstance(profiler, PyTorchProfiler) and name != "training_step")
        assert profiler != "simple" or re.search(r"\[Hooked\]\.training_step +6 ", told)
    trace = (tmp_path / "traces" / "trace-0.json").read_text()
    assert "[Hooked].training_step" in trace and "aten::linear" in trace
    with pytest.raises(ConfigError, match="'simple', 'advanced', 'pytorch'"):
        trainer(profiler="smple")


def test_barebones_logs_nothing() -> None:
    """log is ignored with a warning."""
    with pytest.warns(UserWarning, match="barebones"):
        run = Trainer(accelerator="cpu", max_epochs=1, barebones=True)
        run.fit(Tiny(), numbers(), numbers())
    assert run.callback_metrics == {}


def test_callbacks_may_be_added_and_taken_out_between_two_runs() -> None:
    """`trainer.callbacks` is the list that counts; a module's own are with it for its runs alone."""

    class Own(Tiny):
        def configure_callbacks(self) -> Any:
            return [ModelSummary(max_depth=2)]

    first, second = Recorder(), Recorder()
    run = trainer(callbacks=[first])
    run.fit(Own(), datamodule=TinyData())
    run.callbacks.append(second)
    run.callbacks.remove(first)
    run.fit_loop.max_epochs = 2
    run.fit(Tiny(), datamodule=TinyData())
    assert (len(first.seen), len(second.seen)) == (1, 1)
    assert run.callbacks == [second]


class Layered(Tiny):
    """Makes its layers in configure_model."""

    def configure_model(self) -> None:
        if not hasattr(self, "more"):
            self.more = nn.Linear(1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.more(self.net(x))


def test_configure_model_makes_layers_in_the_precisions_dtype() -> None:
    """Where they will run; they are made once."""
    module = Layered()
    run = trainer(precision="64-true", limit_val_batches=0)
    run.fit(module, numbers())
    assert module.more.weight.dtype is torch.float64
    assert module.more.weight.grad is not None


def test_tuning_is_left_out_of_a_quick_run() -> None:
    """Whose batches would not tell."""
    with pytest.warns(UserWarning, match="fast_dev_run"):
        assert trainer(auto_lr_find=True, fast_dev_run=True).tune(Tiny(), numbers()) == {}
