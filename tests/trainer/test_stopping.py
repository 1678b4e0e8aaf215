"""Behaviours 23 to 27, 39 and 48: what ends a run, and how."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lite.errors import ConfigError
from lite.trainer import Callback
from lite.trainer.callbacks import EarlyStopping, ModelCheckpoint, Timer
from lite.trainer.loops import FitLoop
from tests.support.processes import ROOT
from tests.trainer.modules import Numbers, Tiny, TinyData, numbers, trainer, weights


class Counts(Tiny):
    """Notes every training batch and validation."""

    def __init__(self, stop_at: int = -1, raises: Any = None) -> None:
        super().__init__()
        self.calls: list[str] = []
        self.stop_at, self.raises = stop_at, raises

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        self.calls.append("t")
        if self.calls.count("t") == self.stop_at:
            if self.raises is not None:
                raise self.raises
            self.trainer.should_stop = True
        return super().training_step(batch, batch_idx)

    def on_validation_end(self) -> None:
        self.calls.append("v")

    def on_train_epoch_end(self) -> None:
        self.calls.append("e")

    def teardown(self, stage: str) -> None:
        self.calls.append("end")


def calls(module: Counts, **options: Any) -> str:
    trainer(**options).fit(module, numbers(), numbers())
    return " ".join(module.calls)


def test_behaviour_24_max_steps_stops_in_mid_epoch_after_what_is_due() -> None:
    """Validation that is due at the last step still runs; 0 trains nothing."""
    assert calls(Counts(), max_epochs=-1, max_steps=4) == "t t t v e t e end"
    assert calls(Counts(), max_epochs=-1, max_steps=3) == "t t t v e end"
    assert calls(Counts(), max_epochs=-1, max_steps=2, val_check_interval=2) == "t t v e end"
    assert calls(Counts(), max_epochs=0) == "end"
    assert calls(Counts(), max_epochs=2, max_steps=0) == "end"


def test_behaviour_24_min_steps_and_min_epochs_outrank_should_stop() -> None:
    """A wish to stop validates first, so that others see fresh metrics."""
    assert calls(Counts(stop_at=2), max_epochs=5) == "t t v e end"
    assert calls(Counts(stop_at=2), max_epochs=5, min_epochs=2) == "t t t v e t t t v e end"
    assert calls(Counts(stop_at=1), max_epochs=5, min_steps=4) == "t t t v e t v e end"


def test_validation_comes_when_it_is_due() -> None:
    """Shares, numbers of batches, across epochs, every so many epochs, by time."""

    def of(count: int, **options: Any) -> str:
        module = Counts()
        trainer(max_epochs=2, **options).fit(module, numbers(count), numbers(4))
        return " ".join(module.calls)

    assert of(16, val_check_interval=0.5) == "t t v t t v e t t v t t v e end"
    assert of(12, val_check_interval=2) == "t t v t e t t v t e end"
    assert of(12, val_check_interval=2, check_val_every_n_epoch=None) == "t t v t e t v t t v e end"
    assert of(8, check_val_every_n_epoch=2) == "t t e t t v e end"
    assert of(8, val_check_interval={"hours": 1}) == "t t e t t e end"
    assert of(4, val_check_interval={"microseconds": 1}) == "t v e t v e end"
    with pytest.raises(ConfigError, match="more than the 2 of an epoch"):
        of(8, val_check_interval=3)
    with pytest.raises(ConfigError, match="must be a number of batches, or a time"):
        of(8, val_check_interval=0.5, check_val_every_n_epoch=None)


class Scores(Tiny):
    """Logs given scores at the ends of epochs."""

    def __init__(self, scores: list[float]) -> None:
        super().__init__()
        self.scores = scores

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("score", self.scores[self.current_epoch])


@pytest.mark.parametrize(
    ("scores", "options", "epochs"),
    [
        ([3, 2, 2, 2, 1], {"patience": 2}, 4),
        ([3, 2.95, 2.9, 2.85, 2.8], {"patience": 2, "min_delta": 0.3}, 3),
        ([1, 2, 3, 3, 3], {"patience": 1, "mode": "max"}, 4),
        ([1, float("nan"), 1], {}, 2),
        ([1, float("nan"), 1], {"check_finite": False, "patience": 9}, 3),
        ([3, 2, 1], {"stopping_threshold": 2.5}, 2),
        ([3, 9, 1], {"divergence_threshold": 8.0}, 2),
    ],
)
def test_behaviour_25_early_stopping(scores: list[float], options: dict[str, Any], epochs: int) -> None:
    """patience counts checks; min_delta, mode, check_finite, both thresholds."""
    stops = EarlyStopping("score", **options)
    run = trainer(max_epochs=len(scores), callbacks=stops, num_sanity_val_steps=1)
    run.fit(Scores(scores), numbers(4), numbers(4))
    assert run.current_epoch == epochs
    assert stops.stopped_epoch == (0 if options.get("check_finite") is False else epochs - 1)
    assert ("score = " in str(stops.stopping_reason_message) or "score was" in str(stops.stopping_reason_message)) == (
        epochs < len(scores)
    )
    assert stops.state_key == f"EarlyStopping{{'monitor': 'score', 'mode': '{stops.mode}'}}"


def test_behaviour_25_a_missing_metric_is_an_error_unless_told_otherwise() -> None:
    """It lists what was logged."""
    with pytest.raises(ConfigError, match=r"monitor='nothing'.*'score'"):
        trainer(callbacks=EarlyStopping("nothing")).fit(Scores([1]), numbers(4), numbers(4))
    with pytest.warns(UserWarning, match="nobody has logged it"):
        trainer(callbacks=EarlyStopping("nothing", strict=False)).fit(Scores([1]), numbers(4), numbers(4))
    run = trainer(
        max_epochs=4, limit_val_batches=0, callbacks=EarlyStopping("loss", patience=1, stopping_threshold=1e9)
    )
    run.fit(Tiny(), numbers(4))
    assert run.current_epoch == 1  # without validation it looks at epochs' ends


def test_behaviour_26_an_exception_is_told_and_everything_is_torn_down() -> None:
    """Ctrl-C ends a script with 130; other exceptions propagate."""
    told: list[str] = []

    class Told(Callback):
        def on_exception(self, trainer: Any, module: Any, exception: BaseException) -> None:
            told.append(type(exception).__name__)

    module, run = Counts(stop_at=2, raises=ValueError("bad batch")), trainer(callbacks=Told())
    with pytest.raises(ValueError, match="bad batch"):
        run.fit(module, numbers(), numbers())
    assert module.calls[-1] == "end"
    assert run.interrupted
    module, run = Counts(stop_at=2, raises=KeyboardInterrupt()), trainer(callbacks=Told())
    with pytest.raises(SystemExit) as ended:
        run.fit(module, numbers(), numbers())
    assert ended.value.code == 130
    assert told == ["ValueError", "KeyboardInterrupt"]
    assert run.fit_loop.progress.batch == 1

    class Unprepared(Tiny):
        def prepare_data(self) -> None:
            raise OSError("no download")

        def teardown(self, stage: str) -> None:
            told.append("teardown")  # of what was never set up

    with pytest.raises(OSError, match="no download"):
        trainer(callbacks=Told()).fit(Unprepared(), numbers(), numbers())
    assert told[2:] == ["OSError"]


def test_behaviour_48_ctrl_c_ends_at_the_batch_so_that_the_run_goes_on_exactly(tmp_path: Path) -> None:
    """The state after an interrupt is that of a batch that is done."""

    class Interrupts(Tiny):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 1 and self.current_epoch == 0:
                os.kill(os.getpid(), signal.SIGINT)

    whole = Tiny()
    trainer(max_epochs=2, limit_val_batches=0).fit(whole, numbers(22, shuffle=True))
    torch.manual_seed(5)
    module, run = Interrupts(), trainer(max_epochs=2, limit_val_batches=0)
    with pytest.raises(SystemExit):
        run.fit(module, numbers(22, shuffle=True))
    assert run.fit_loop.progress.batch == 2
    run.save_checkpoint(tmp_path / "x.ckpt")
    again = Tiny()
    trainer(max_epochs=2, limit_val_batches=0).fit(again, numbers(22, shuffle=True), ckpt_path=tmp_path / "x.ckpt")
    assert weights(again) == weights(whole)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


class Breaks(Tiny):
    """Ends by an exception or Ctrl-C once, in the second batch of epoch 0; keeps what it has trained on."""

    def __init__(self, error: BaseException | None) -> None:
        super().__init__()
        self.error, self.seen = error, []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.log("ones", 1.0, on_epoch=True, reduce_fx="sum")
        if self.error is not None and batch_idx == 1:
            error, self.error = self.error, None
            raise error
        self.seen.append((self.current_epoch, batch_idx))
        return self.loss(batch)


@pytest.mark.parametrize("error", [ValueError("bad batch"), KeyboardInterrupt()], ids=["error", "ctrl-c"])
def test_behaviour_38_an_epoch_that_broke_off_begins_anew(error: BaseException) -> None:
    """By another fit of the same Trainer, which says so; nothing of the first try is in the epoch's metrics."""
    module, run = Breaks(error), trainer(max_epochs=2, limit_val_batches=0)
    with pytest.raises((ValueError, SystemExit)):
        run.fit(module, numbers())
    with pytest.warns(UserWarning, match="ended in epoch 0, after 1 of its batches: that epoch begins anew"):
        for event in run.steps(module, numbers(), events=("epoch",)):
            assert float(event.metrics["ones_epoch"]) == 3.0
    assert module.seen == [(0, 0), (0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    assert (run.current_epoch, run.global_step) == (2, 7)
    module, run = Breaks(None), trainer(max_epochs=2, max_steps=1, limit_val_batches=0)
    run.fit(module, numbers())
    assert run.current_epoch == 0  # the epoch that it is in: it is not complete
    run.fit_loop.max_steps = -1
    run.fit(module, numbers())
    assert module.seen == [(0, 0), (1, 0), (1, 1), (1, 2)]  # that epoch's end had been


def test_sigterm_saves_at_the_batch_and_ends_with_its_code(tmp_path: Path) -> None:
    """And "auto" goes on from there."""

    class Killed(Tiny):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            if self.trainer.fit_loop.progress.batches == 4:
                os.kill(os.getpid(), signal.SIGTERM)

    run = trainer(max_epochs=2, default_root_dir=tmp_path, limit_val_batches=0)
    with pytest.raises(SystemExit) as ended:
        run.fit(Killed(), numbers())
    assert ended.value.code == 143
    assert run.received_sigterm
    again = Tiny()
    one = trainer(max_epochs=2, default_root_dir=tmp_path, limit_val_batches=0)
    one.fit(again, numbers(), ckpt_path="auto")
    assert one.fit_loop.progress.batches == 6
    whole = Tiny()
    trainer(max_epochs=2, limit_val_batches=0).fit(whole, numbers())
    assert weights(again) == weights(whole)


def test_behaviour_39_slurm_gets_its_checkpoint_and_is_asked_to_requeue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """hpc_ckpt_N in default_root_dir, scontrol, and the next start goes on by itself."""
    tool = tmp_path / "bin" / "scontrol"
    tool.parent.mkdir()
    tool.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")

    class Signalled(Tiny):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 1 and self.current_epoch == 0:
                monkeypatch.setenv("SLURM_JOB_ID", "17")
                os.kill(os.getpid(), signal.SIGUSR1)

    options = {"max_epochs": 2, "default_root_dir": tmp_path, "limit_val_batches": 0}
    with pytest.raises(SystemExit):
        trainer(**options).fit(Signalled(), numbers())
    assert (tmp_path / "asked").read_text() == "requeue 17\n"
    assert (tmp_path / "hpc_ckpt_1.ckpt").exists()
    monkeypatch.delenv("SLURM_JOB_ID")
    run = trainer(**options)
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    run.fit(Tiny(), numbers())
    assert run.ckpt_path == str(tmp_path / "hpc_ckpt_1.ckpt")
    assert run.fit_loop.progress.batches == 6


def test_behaviour_27_a_timer_stops_and_counts_across_interruptions(tmp_path: Path) -> None:
    """By step and by epoch; max_time makes one; its state goes on."""
    run = trainer(max_epochs=-1, max_time={"seconds": 0}, limit_val_batches=0)
    run.fit(Tiny(), numbers())
    assert run.global_step == 0
    timer = Timer({"milliseconds": 1}, interval="epoch")
    run = trainer(max_epochs=-1, callbacks=timer, limit_val_batches=0)
    run.fit(Tiny(), numbers())
    assert run.current_epoch >= 1
    run.save_checkpoint(tmp_path / "x.ckpt")
    other = Timer("00:00:00:01")
    other.load_state_dict(timer.state_dict())
    assert other.time_elapsed() == pytest.approx(timer.time_elapsed())
    assert other.time_remaining() == pytest.approx(1 - timer.time_elapsed())
    with pytest.raises(ConfigError, match="DD:HH:MM:SS"):
        trainer(max_time="1 hour")


def test_behaviour_48_a_run_can_be_driven_by_hand(tmp_path: Path) -> None:
    """steps() gives an event after each batch and epoch; broken off, everything is torn down."""
    module, run = Counts(), trainer(max_epochs=2)
    events = [(e.kind, e.epoch, e.batch_idx, e.global_step) for e in run.steps(module, numbers(), numbers())]
    assert events == [
        *[("batch", 0, i, i + 1) for i in range(3)],
        ("epoch", 0, -1, 3),
        *[("batch", 1, i, i + 4) for i in range(3)],
        ("epoch", 1, -1, 6),
    ]
    module, run = Counts(), trainer(max_epochs=2)
    for event in run.steps(module, numbers(), numbers()):
        if event.global_step == 2:
            run.save_checkpoint(tmp_path / "two.ckpt")
            break
    del event
    import gc

    gc.collect()
    assert module.calls == ["t", "t", "end"]
    again, whole = Tiny(), Tiny()
    trainer(max_epochs=2).fit(again, datamodule=TinyData(), ckpt_path=tmp_path / "two.ckpt")
    trainer(max_epochs=2).fit(whole, datamodule=TinyData())
    assert weights(again) == weights(whole)


def test_behaviour_23_limits_are_shares_of_each_loader() -> None:
    """At least one batch, or an error that says which share would be."""

    class Both(Tiny):
        def validation_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> None:
            super().validation_step(batch, batch_idx)

    run = trainer(limit_val_batches=0.5, limit_train_batches=0.5)
    run.fit(Both(), numbers(20), [numbers(24, 2), numbers(8)])
    assert (run.num_training_batches, run.num_val_batches) == (2, [6, 1])
    assert run.callback_metrics.keys() >= {"val/dataloader_idx_0", "val/dataloader_idx_1"}
    with pytest.raises(ConfigError, match=r"limit_val_batches=0.4 of 2 batches is none; give at least 0.5"):
        trainer(limit_val_batches=0.4).fit(Both(), numbers(), [numbers(24, 2), numbers(8)])


def test_limits_and_quick_runs() -> None:
    """limit_*_batches, fast_dev_run, overfit_batches, num_sanity_val_steps."""
    assert calls(Counts(), limit_train_batches=2) == "t t v e end"
    assert calls(Counts(), limit_train_batches=0.4, limit_val_batches=0) == "t e end"
    assert calls(Counts(), num_sanity_val_steps=1, limit_train_batches=1) == "v t v e end"
    with pytest.raises(ConfigError, match=r"limit_train_batches=0.1 of 3 batches is none"):
        calls(Counts(), limit_train_batches=0.1)
    assert calls(Counts(), fast_dev_run=2, max_epochs=9) == "t t v e end"
    seen: list[Any] = []

    class Looks(Tiny):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            seen.append(batch.sum().item())
            return super().training_step(batch, batch_idx)

    with pytest.warns(UserWarning, match="shuffling is off"):
        trainer(max_epochs=2, overfit_batches=2).fit(Looks(), numbers(shuffle=True), numbers())
    assert len(seen) == 4
    assert seen[:2] == seen[2:]


class Known(Tiny):
    """Notes the first number of each batch, and whether it was told to be the last, within the step and after it."""

    def __init__(self) -> None:
        super().__init__()
        self.firsts: list[float] = []
        self.last: list[bool] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        self.firsts.append(float(batch[0, 0]))
        self.last.append(self.trainer.is_last_batch)
        return super().training_step(batch, batch_idx)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.last.append(self.trainer.is_last_batch)


def test_is_last_batch_is_true_from_the_last_batchs_begin() -> None:
    """Within its step and in the hooks after it, and not before."""
    module = Known()
    trainer(limit_val_batches=0).fit(module, numbers())
    assert module.last == [False, False, False, False, True, True]


class Stream(IterableDataset[Tensor]):
    """Rows of which nobody knows the number."""

    def __iter__(self) -> Any:
        return iter(Numbers(24).rows)


@pytest.mark.parametrize("stop", [{"max_steps": 3}, {"max_steps": 6}, {"wish": 3}])
def test_behaviour_41_a_stream_goes_on_where_it_was_stopped(stop: dict[str, int], tmp_path: Path) -> None:
    """By max_steps or a wish, in the middle of an epoch of unknown length, or with its last batch."""

    def fit(path: Path | None = None, wish: int = 0, **options: Any) -> list[float]:
        module = Known()
        run = trainer(limit_val_batches=0, max_epochs=2, **options)
        for event in run.steps(module, DataLoader(Stream(), batch_size=4), ckpt_path=path):
            if event.global_step == wish:
                run.should_stop = True
        run.save_checkpoint(tmp_path / "x.ckpt")
        return module.firsts

    whole = fit()
    first = fit(**stop)
    assert first == whole[: len(first)]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*Stream has no state_dict")
        assert first + fit(tmp_path / "x.ckpt") == whole


def test_a_fit_without_data_leaves_the_next_one_alone() -> None:
    """Its limits stay what they were."""
    run, module = trainer(limit_val_batches=0), Known()
    with pytest.warns(UserWarning, match="no training batches"):
        run.fit(module, [])
    run.fit(module, numbers())
    assert (len(module.firsts), run.max_epochs) == (3, 1)


def test_a_loop_of_ones_own_has_the_trainers_limits() -> None:
    """What it was not given itself."""

    class Own(FitLoop):
        epochs = 0

        def _begin_epoch(self, trainer: Any) -> None:
            self.epochs += 1
            super()._begin_epoch(trainer)

    run = trainer(max_epochs=5, max_steps=5, val_check_interval=2)
    run.fit_loop = own = Own()
    run.fit(Counts(), datamodule=TinyData())
    assert (own.epochs, run.global_step, run.val_check_interval, run.max_epochs) == (2, 5, 2, 5)
    run.fit_loop = Own(max_steps=1)
    assert (run.max_steps, run.max_epochs) == (1, 5)


def test_teardown_reaches_everyone_and_the_first_error_is_raised() -> None:
    """As does on_exception."""
    told: list[str] = []

    class Fails(Callback):
        def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
            told.append("callback")
            raise ValueError("first")

        def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
            told.append(f"exception {exception}")
            raise ValueError("third")

    class After(Tiny):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            raise RuntimeError("zeroth")

        def teardown(self, stage: str) -> None:
            told.append("module")
            raise ValueError("second")

    class Data(TinyData):
        def teardown(self, stage: str) -> None:
            told.append("data")

        def on_exception(self, exception: BaseException) -> None:
            told.append("data's exception")

    with pytest.raises(ValueError, match="first"):
        trainer(callbacks=Fails()).fit(After(), datamodule=Data())
    assert told == ["exception zeroth", "data's exception", "data", "callback", "module"]


def test_ctrl_c_in_the_last_hook_of_an_epoch_ends_the_run() -> None:
    """It is not lost because no batch comes after it."""

    class Presses(Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            os.kill(os.getpid(), signal.SIGINT)

    run = trainer(callbacks=Presses())
    with pytest.raises(SystemExit) as ended:
        run.fit(Counts(), datamodule=TinyData())
    assert (ended.value.code, run.interrupted) == (130, True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("hook", ["on_save_checkpoint", "on_validation_end", "on_train_epoch_end"])
def test_a_signal_between_batches_is_acted_on_after_the_next_one(tmp_path: Path, hook: str, number: int) -> None:
    """While a checkpoint is written, as a validation ends, or between two epochs; not where something is due anyway."""
    sent: list[int] = []

    def send(trainer: Any, *args: Any) -> None:
        if not sent:
            sent.append(trainer.global_step)
            os.kill(os.getpid(), number)

    saves = ModelCheckpoint(tmp_path, every_n_train_steps=3) if hook == "on_save_checkpoint" else Callback()
    told = type("Sends", (Callback,), {hook: lambda self, *args: send(*args)})()
    options: dict[str, Any] = {"enable_checkpointing": None, "default_root_dir": tmp_path, "val_check_interval": 3}
    options["limit_val_batches"] = 1.0 if hook == "on_validation_end" else 0
    run = trainer(max_epochs=2, callbacks=[saves, told], **options)
    with pytest.raises(SystemExit) as ended:
        run.fit(Tiny(), numbers(40), numbers())
    assert ended.value.code == 128 + number
    assert sent == [10 if hook == "on_train_epoch_end" else 3]
    assert run.global_step == sent[0] + 1


def sends(hook: str, told: list[str], *, at: int = 1) -> Callback:
    """Sends SIGTERM in that hook, the so-manieth time, and notes what is told of the run's end."""

    def send(self: Callback, *args: Any) -> None:
        told.append(hook)
        if told.count(hook) == at:
            os.kill(os.getpid(), signal.SIGTERM)

    def note(what: str) -> Any:
        return lambda self, *args: told.append(what)

    return type("Sends", (Callback,), {"teardown": note("end"), "on_exception": note("exception"), hook: send})()


@pytest.mark.parametrize(
    ("call", "hook", "batches"),
    [
        ("validate", "on_validation_batch_start", 1),
        ("test", "on_test_batch_start", 1),
        ("predict", "on_predict_batch_start", 1),
        ("predict", "setup", 0),
        ("predict", "on_predict_end", 6),
        ("fit", "setup", 0),
        ("fit", "on_sanity_check_start", 1),
    ],
)
def test_a_signal_outside_of_training_ends_the_run_at_the_next_batch(call: str, hook: str, batches: int) -> None:
    """As in training, with the signal's code, and teardown; there is nothing to save."""
    told: list[str] = []
    module = Tiny()
    forwards: list[int] = []
    module.net.register_forward_hook(lambda *args: forwards.append(1))
    run = trainer(callbacks=sends(hook, told), num_sanity_val_steps=2, enable_checkpointing=True)
    with pytest.raises(SystemExit) as ended:
        getattr(run, call)(module, *([numbers()] if call == "fit" else []), numbers(6, 1))
    assert (ended.value.code, told, len(forwards)) == (143, [hook, "end"], batches)
    assert run.interrupted and run.received_sigterm
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize("hook", ["on_train_epoch_end", "on_train_end", "on_fit_end"])
def test_a_signal_that_no_batch_follows_counts_too(tmp_path: Path, hook: str) -> None:
    """All is trained: it is saved, and a run that goes on from there has only the last hooks left."""
    told: list[str] = []
    options: dict[str, Any] = {"enable_checkpointing": True, "default_root_dir": tmp_path}
    with pytest.raises(SystemExit) as ended:
        trainer(callbacks=sends(hook, told), **options).fit(module := Tiny(), numbers(), numbers())
    assert (ended.value.code, told) == (143, [hook, "end"])
    again = trainer(callbacks=sends("on_train_end", told, at=9), **options)
    with pytest.warns(UserWarning, match="nothing is left to train"):
        again.fit(other := Tiny(), numbers(), numbers(), ckpt_path=str(tmp_path / "checkpoints" / "interrupted.ckpt"))
    assert weights(other) == weights(module)
    assert (again.global_step, told[2:]) == (3, ["on_train_end", "end"])


def test_a_signal_in_teardown_acts_when_the_run_is_over(tmp_path: Path) -> None:
    """It is not swallowed: what it does outside of a run, it does after it."""
    script = (
        "import os, signal\n"
        "from tests.trainer.modules import Tiny, TinyData, trainer\n"
        "from tests.trainer.test_stopping import sends\n"
        "run = trainer(callbacks=sends('teardown', []))\n"
        "run.validate(Tiny(), datamodule=TinyData(), verbose=False)\n"
        "print('went on')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, ""), done.stderr
