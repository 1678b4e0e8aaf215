"""Behaviour 49: what a fit is going to do, and settings that can never come true."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lite.errors import ConfigError, UsageError
from lite.trainer import Callback
from lite.trainer.callbacks import GradientAccumulationScheduler, ModelCheckpoint
from tests.trainer.modules import Tiny, numbers, trainer, weights
from tests.trainer.test_several_optimizers import ByHand, Declared


class Scheduled(Tiny):
    def __init__(self, frequency: int = 1, interval: str = "step") -> None:
        super().__init__()
        self.settings = {"frequency": frequency, "interval": interval}

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5), **self.settings}]


class Diary(Callback):
    """Writes down what happens, in the plan's terms."""

    def __init__(self) -> None:
        self.entries: list[tuple[str, int, int, int]] = []
        self.rates: list[float] = []

    def note(self, kind: str, trainer: Any, ended: int = 0) -> None:
        progress = trainer.fit_loop.progress
        self.entries.append((kind, progress.epoch, progress.batch - ended, trainer.global_step))

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        progress = trainer.fit_loop.progress
        self.entries.append(("step", progress.epoch, progress.batch, trainer.global_step + 1))
        self.rates.append(optimizer.param_groups[0]["lr"])

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        self.note("validation", trainer, ended=1)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: Any) -> None:
        self.note("save", trainer, ended=1)


@pytest.mark.parametrize(
    ("module", "options", "saves"),
    [
        (Scheduled, {"max_epochs": 2, "accumulate_grad_batches": 2}, {"every_n_epochs": 1}),
        (Scheduled, {"max_epochs": -1, "max_steps": 7, "val_check_interval": 2}, {"every_n_train_steps": 3}),
        (Tiny, {"max_epochs": 3, "check_val_every_n_epoch": 2, "limit_train_batches": 3}, {"every_n_epochs": 2}),
        (Tiny, {"max_epochs": 2, "check_val_every_n_epoch": None, "val_check_interval": 4}, {}),
        (Tiny, {"max_epochs": 3, "callbacks": [GradientAccumulationScheduler({0: 1, 2: 3})]}, {}),
        (Declared, {"max_epochs": 2}, {"every_n_train_steps": 4}),
    ],
)
def test_behaviour_49_the_plan_is_what_the_run_does(
    module: Any, options: dict[str, Any], saves: dict[str, Any], tmp_path: Path
) -> None:
    """Steps with their rates, validations and saves, in order; and planning changes nothing."""
    diary, own = Diary(), options.pop("callbacks", [])
    val = numbers(4) if module is not Declared else None
    saver = ModelCheckpoint(tmp_path, save_top_k=-1, **saves)
    run = trainer(callbacks=[*own, diary, saver], enable_checkpointing=True, **options)
    model = module()
    before = weights(model)
    planned = run.plan(model, numbers(18), val)
    assert weights(model) == before
    assert run.global_step == 0 and not diary.entries and not list(tmp_path.iterdir())
    run.fit(model, numbers(18), val)
    kinds = ("step", "validation", "save")
    assert [(e.kind, e.epoch, e.batch, e.global_step) for e in planned if e.kind in kinds] == diary.entries
    assert [rate for e in planned if e.kind == "step" for rate in e.lr] == diary.rates
    assert (planned[-1].kind, planned[-1].global_step) == ("stop", run.global_step)
    assert any(e.kind == "save" for e in planned)


def test_behaviour_49_an_endless_run_is_planned_up_to_a_limit() -> None:
    """And what a hand steps can't be foreseen."""
    assert len(trainer(max_epochs=-1, limit_val_batches=0).plan(Tiny(), numbers(), limit=30)) == 30
    with pytest.raises(UsageError, match="declare its optimizers"):
        trainer().plan(ByHand(), numbers())


@pytest.mark.parametrize(
    ("options", "module", "said"),
    [
        ({"callbacks": [ModelCheckpoint(every_n_train_steps=10)]}, Tiny(), "every_n_train_steps=10.*9 optimizer steps"),
        ({"callbacks": [ModelCheckpoint(every_n_epochs=4)]}, Tiny(), "every_n_epochs=4.*3 epochs"),
        ({"max_steps": 4, "check_val_every_n_epoch": 3}, Tiny(), "check_val_every_n_epoch=3.*2 epochs"),
        ({"check_val_every_n_epoch": None, "val_check_interval": 10}, Tiny(), "val_check_interval=10.*9 batches"),
        ({}, Scheduled(frequency=10), "StepLR's 'frequency': 10.*9 optimizer steps"),
        ({}, Scheduled(frequency=4, interval="epoch"), "StepLR's 'frequency': 4.*3 epochs"),
    ],
)
def test_behaviour_49_what_can_never_come_true_is_refused(options: dict[str, Any], module: Any, said: str) -> None:
    """As soon as the run's length is known: before its first batch."""
    run = trainer(**{"max_epochs": 3, "enable_checkpointing": "callbacks" in options, **options})
    before = weights(module)
    with pytest.raises(ConfigError, match=said):
        run.fit(module, numbers(), numbers())
    assert weights(module) == before


def test_behaviour_49_a_monitor_that_nobody_logs_is_an_error_after_the_first_validation(
    tmp_path: Path,
) -> None:
    """At the epoch's end, not only when a save is due, in a later epoch."""
    saver = ModelCheckpoint(tmp_path, monitor="nothing", every_n_epochs=3)
    run = trainer(max_epochs=3, callbacks=[saver], enable_checkpointing=True)
    with pytest.raises(ConfigError, match=r"monitor='nothing'.*'val', 'loss'"):
        run.fit(Tiny(), numbers(), numbers())
    assert run.current_epoch == 0

    class Late(Tiny):
        def on_train_epoch_end(self) -> None:
            self.log("late", torch.tensor(1.0))

        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            self.log("val", 1.0)

    saver = ModelCheckpoint(tmp_path, monitor="late")
    trainer(callbacks=[saver], enable_checkpointing=True).fit(Late(), numbers(), numbers())
    assert saver.best_model_score == 1.0
