"""`GradientAccumulationScheduler`: another number of batches per optimizer step from certain epochs on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lite.errors import ConfigError, shown
from lite.trainer.callbacks.base import Callback


class GradientAccumulationScheduler(Callback):
    """Sets `trainer.accumulate_grad_batches` as an epoch begins.

    Args:
        scheduling: {epoch: batches per step}, epochs from 0; before the first one it is 1.
        argument: How the user gave it, for errors.
    """

    def __init__(
        self, scheduling: Mapping[int, int], *, argument: str = "GradientAccumulationScheduler: scheduling="
    ) -> None:
        if not isinstance(scheduling, Mapping) or not scheduling:
            raise ConfigError(f"{argument}{shown(scheduling)}: give at least one epoch, {{0: 4}} say.")
        for epoch, factor in scheduling.items():
            for what, value, least in (("epoch", epoch, 0), ("number of batches", factor, 1)):
                if isinstance(value, bool) or not isinstance(value, int) or value < least:
                    raise ConfigError(
                        f"{argument}{dict(scheduling)!r}: the {what} {value!r} must be a whole number of at least "
                        f"{least}."
                    )
        self.scheduling = dict(sorted(scheduling.items()))

    def factor(self, epoch: int) -> int:
        """Batches per step in that epoch."""
        return next((n for start, n in reversed(self.scheduling.items()) if epoch >= start), 1)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        if not pl_module.automatic_optimization:
            raise ConfigError("GradientAccumulationScheduler needs automatic optimisation; step when you want instead.")
        trainer.set_accumulation(self.factor(trainer.current_epoch))

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        trainer.set_accumulation(self.factor(trainer.current_epoch))

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        trainer.set_accumulation(self.factor(trainer.current_epoch))
