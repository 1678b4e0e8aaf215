"""What a fit is going to do: its steps, validations and saves without training, and settings that can never come true.

It asks the objects that the run itself asks, with the numbers that the run would have.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lite.errors import ConfigError, UsageError
from lite.trainer.callbacks.accumulation import GradientAccumulationScheduler
from lite.trainer.callbacks.model_checkpoint import ModelCheckpoint
from lite.trainer.data.counting import INFINITE
from lite.trainer.hooks import overrides
from lite.trainer.logging.monitored import may_still_come
from lite.trainer.module import LightningModule
from lite.trainer.optimization.optimizers import SchedulerConfig
from lite.trainer.optimization.schedules import monitored_metric


@dataclass(frozen=True)
class Planned:
    """Something that the run is going to do.

    Attributes:
        kind: "step" (of an optimizer), "validation", "save", "epoch" (its end) or "stop".
        epoch, batch: Where: in that epoch, after that batch of it (from 0).
        global_step: Optimizer steps by then.
        lr: The learning rates of a step, one for each parameter group.
        what: The optimizer, the callback that saves, or why it stops.
    """

    kind: str
    epoch: int
    batch: int
    global_step: int
    lr: tuple[float, ...] = ()
    what: str = ""


class _Part:
    """One optimizer's turns and window."""

    def __init__(self, optimizer: Any, every: int, accumulate: int | None, name: str) -> None:
        self.optimizer, self.every, self.accumulate, self.name = optimizer, every, accumulate, name
        self.waiting = self.steps = 0


def plan(trainer: Any, limit: int) -> list[Planned]:
    """The coming events of a fit that is set up: loaders, optimizers and schedulers are there.

    Args:
        trainer: Whose fit it is; it is left as it was, but for the learning rates of its optimizers.
        limit: Events at most.

    Raises:
        UsageError: The module steps by its own hand.
    """
    if not trainer.module.automatic_optimization:
        raise UsageError(
            f"plan: {type(trainer.module).__name__} steps in training_step by itself (automatic_optimization = False), "
            "so nobody knows when; declare its optimizers with a 'step' each."
        )
    fit, accumulate = trainer.fit_loop, trainer.accumulate_grad_batches
    twin = copy.copy(fit)
    twin.progress, twin.schedule = copy.copy(fit.progress), copy.copy(fit.schedule)
    trainer.fit_loop = twin
    found: list[Planned] = []
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step\\(\\)` before")
            for event in _events(trainer, twin):
                found.append(event)
                if len(found) >= limit:
                    break
    finally:
        trainer.fit_loop, trainer.accumulate_grad_batches = fit, accumulate
    return found


def _events(trainer: Any, fit: Any) -> Iterator[Planned]:
    progress, num_batches = fit.progress, fit.data.num_batches
    parts = [_Part(d.optimizer, d.every_n_batches, d.accumulate_grad_batches, d.step) for d in trainer.declared]
    parts = parts or [_Part(o, 1, None, type(o).__name__) for o in trainer.optimizers[:1]]
    savers = [(c, copy.copy(c.schedule)) for c in trainer.callbacks if isinstance(c, ModelCheckpoint)]
    for _, schedule in savers:
        schedule.begin()
        schedule.seen = progress.updates
    count = progress.batch

    def event(kind: str, lr: tuple[float, ...] = (), what: str = "") -> Planned:
        return Planned(kind, progress.epoch, count - 1, progress.updates, lr, what)

    def saves(*, validated: bool = False, ended: bool = False) -> Iterator[Planned]:
        for callback, schedule in savers:
            by_epochs = callback.goes_by_epochs(trainer)
            if ended:
                due = by_epochs and schedule.after_epoch(progress.updates, progress.epoch)
            else:
                due = schedule.after_batch(progress.updates, progress.epoch, validated=validated and not by_epochs)
            if due:
                schedule.done(progress.updates)
                yield event("save", what=callback.monitor or type(callback).__name__)

    while not fit.is_over(trainer) and num_batches:
        for callback in trainer.callbacks:
            if isinstance(callback, GradientAccumulationScheduler):
                callback.on_train_epoch_start(trainer, trainer.module)
        while count < num_batches:
            count += 1
            yield from _steps(trainer, parts, progress, count, num_batches, event)
            progress.batches, progress.batch = progress.batches + 1, count
            if count >= num_batches:
                _step_by_epoch(trainer, progress.epoch + 1)
            validated = fit.validation_is_due(trainer, count)
            if validated:
                yield event("validation")
                progress.validated, progress.validated_epoch = progress.batches, progress.epoch
            yield from saves(validated=validated)
            if fit.is_over(trainer):
                break
        yield from saves(ended=True)
        if count < num_batches:
            break
        yield event("epoch")
        progress.epoch, progress.batch, count = progress.epoch + 1, 0, 0
    reached = 0 <= fit.max_steps <= progress.updates
    yield event("stop", what=f"max_steps={fit.max_steps}" if reached else f"max_epochs={fit.max_epochs}")


def _steps(
    trainer: Any, parts: list[_Part], progress: Any, count: int, num_batches: float, event: Any
) -> Iterator[Planned]:
    stepped = False
    for part in parts:
        if (progress.batches + 1) % part.every:
            continue
        part.waiting += 1
        is_last = num_batches - count < part.every
        if part.waiting < (part.accumulate or trainer.accumulate_grad_batches) and not is_last:
            continue
        part.waiting, part.steps, stepped = 0, part.steps + 1, True
        progress.updates += 1
        yield event("step", tuple(float(group["lr"]) for group in part.optimizer.param_groups), part.name)
        for config in _paced(trainer, "step"):
            if config.optimizer is part.optimizer and part.steps % config.frequency == 0:
                config.scheduler.step()
    progress.stepped += stepped


def _step_by_epoch(trainer: Any, number: int) -> None:
    for config in _paced(trainer, "epoch"):
        if number % config.frequency == 0:
            config.scheduler.step()


def _paced(trainer: Any, interval: str) -> list[SchedulerConfig]:
    """Schedulers whose steps can be foreseen: not those that follow a metric, or that the module steps."""
    if overrides(trainer.module, "lr_scheduler_step", LightningModule):
        return []
    return [c for c in trainer.lr_scheduler_configs if c.interval == interval and not c.reduce_on_plateau]


def check_reachable(trainer: Any) -> None:
    """Refuse settings that can never come true in this fit, as soon as its length is known.

    Raises:
        ConfigError: A frequency is larger than all there is to count.
    """
    fit = trainer.fit_loop
    batches = fit.data.num_batches
    if trainer.fast_dev_run or fit.progress.batches or not batches or trainer.declared:
        return
    if not trainer.module.automatic_optimization or batches == INFINITE or fit.max_epochs == 0 or fit.max_steps == 0:
        return
    per_epoch = math.ceil(batches / trainer.accumulate_grad_batches)
    epochs = fit.max_epochs if fit.max_epochs >= 0 else INFINITE
    steps = epochs * per_epoch
    if fit.max_steps >= 0:
        steps = min(steps, fit.max_steps)
        epochs = min(epochs, math.ceil(fit.max_steps / per_epoch))

    def refuse(setting: str, unit: str, has: float) -> None:
        raise ConfigError(
            f"{setting} is never reached: this fit has {int(has)} {unit}; give at most that, or leave it out."
        )

    for callback in trainer.callbacks:
        if not isinstance(callback, ModelCheckpoint):
            continue
        by_steps, by_epochs = callback.every_n_train_steps, callback.every_n_epochs
        if any(isinstance(c, GradientAccumulationScheduler) for c in trainer.callbacks):
            by_steps = 0  # the steps are fewer, or more
        if by_steps > steps:
            refuse(f"ModelCheckpoint(every_n_train_steps={by_steps})", "optimizer steps", steps)
        if by_epochs > epochs:
            refuse(f"ModelCheckpoint(every_n_epochs={by_epochs})", "epochs", epochs)
    schedule = fit.schedule
    if trainer.enable_validation and schedule.interval_s is None:
        if schedule.every_n_epochs is not None and schedule.every_n_epochs > epochs:
            refuse(f"check_val_every_n_epoch={schedule.every_n_epochs}", "epochs", epochs)
        if schedule.every_n_epochs is None and schedule.interval > epochs * batches:
            refuse(f"val_check_interval={schedule.interval}", "batches", epochs * batches)
    for config in trainer.lr_scheduler_configs:
        unit, has = ("optimizer steps", steps) if config.interval == "step" else ("epochs", epochs)
        if config.frequency > has:
            refuse(f"{type(config.scheduler).__name__}'s 'frequency': {config.frequency}", unit, has)


def check_monitored(trainer: Any) -> bool:
    """Refuse monitors that nobody logs, when an epoch has ended in which everybody could; whether it had. Collective.

    Raises:
        ConfigError: A checkpoint or a scheduler waits for such a metric.
    """
    if may_still_come(trainer):
        return False
    for callback in trainer.callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.monitor is not None and callback.save_top_k:
            callback.score(trainer)
    for config in trainer.lr_scheduler_configs:
        if config.reduce_on_plateau and config.strict:
            monitored_metric(trainer, config)
    return True
