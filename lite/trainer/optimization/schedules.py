"""Stepping learning-rate schedulers when they are due."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

from lite.errors import ConfigError
from lite.trainer.hooks import indexed, overrides
from lite.trainer.logging.monitored import may_still_come, monitored, nobody_logged
from lite.trainer.module import LightningModule
from lite.trainer.optimization.optimizers import SchedulerConfig


def step_schedulers(trainer: Any, configs: Sequence[SchedulerConfig], number: int) -> None:
    """Step those whose frequency divides `number`, the count of optimizer steps or epochs.

    Raises:
        ConfigError: A metric that one monitors was not logged.
    """
    stepping(trainer, configs)(number)


def stepping(trainer: Any, configs: Sequence[SchedulerConfig]) -> Callable[[int], None]:
    """`step_schedulers` as a function of the number alone, with what is the same at each step looked at once."""
    ways = [(config, _own_way(trainer, config)) for config in configs]

    def step(number: int) -> None:
        for config, own in ways:
            if number % config.frequency:
                continue
            metric = None
            if config.reduce_on_plateau:
                metric = monitored_metric(trainer, config)
                if metric is None:
                    continue
            if own is not None:
                own(config.scheduler, metric)
            elif metric is None:
                config.scheduler.step()
            else:
                config.scheduler.step(metric)

    return step


def _own_way(trainer: Any, config: SchedulerConfig) -> Callable[..., Any] | None:
    """The module's `lr_scheduler_step`, where it has its own."""
    if not overrides(trainer.module, "lr_scheduler_step", LightningModule):
        return None
    return indexed(trainer.module.lr_scheduler_step, _index(trainer, config))


def _index(trainer: Any, config: SchedulerConfig) -> int:
    """The position of the scheduler's optimizer."""
    return next((i for i, optimizer in enumerate(trainer.optimizers) if optimizer is config.optimizer), 0)


def monitored_metric(trainer: Any, config: SchedulerConfig) -> Any:
    """The metric that a scheduler follows, the same on all ranks; None, with a warning, where it may be missing and is.

    Collective: call on all ranks.

    Raises:
        ConfigError: It is missing.
    """
    metric = monitored(trainer, str(config.monitor))
    if metric is None:
        text = nobody_logged(trainer, f"the scheduler {type(config.scheduler).__name__} monitors {config.monitor!r}")
        if config.strict and may_still_come(trainer):
            raise ConfigError(
                f"{text} The fit's first validation is still to come (check_val_every_n_epoch="
                f"{trainer.check_val_every_n_epoch}); let the scheduler step after validations, by 'frequency': "
                f"{trainer.check_val_every_n_epoch}, or set 'strict': False."
            )
        if config.strict:
            raise ConfigError(f"{text} Log it, monitor another, or set 'strict': False.")
        warnings.warn(f"{text} It does not step.", stacklevel=5)
    return metric
