"""`Timer`: training ends after so much time, which counts across interruptions."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from lite.errors import choose
from lite.trainer.arguments import seconds
from lite.trainer.callbacks.base import Callback


class Timer(Callback):
    """Stops training by rank 0's clock, and measures training, validation and test.

    On several processes the ranks hear of it when they look together, every `log_every_n_steps` steps.

    Args:
        duration: "DD:HH:MM:SS", a timedelta or a dict of its arguments; None only measures.
        interval: "step" looks after each batch, "epoch" after each epoch.
        verbose: Whether to tell when the time is over.
    """

    def __init__(
        self,
        duration: str | timedelta | Mapping[str, int] | None = None,
        interval: str = "step",
        verbose: bool = True,
    ) -> None:
        self._duration_s = None if duration is None else seconds("duration", duration)
        self.interval = choose("Timer's interval", interval, ["step", "epoch"])
        self._verbose = verbose
        self._before: dict[str, float] = {"train": 0.0}
        self._started: dict[str, float] = {}
        self._ended: dict[str, float] = {}
        if self.interval == "epoch" or self._duration_s is None:
            self.on_train_batch_end = None  # type: ignore[assignment, method-assign]  # costs nothing per step

    def time_elapsed(self, stage: str = "train") -> float:
        """Seconds in "train", "validate" or "test"."""
        started = self._started.get(stage)
        if started is None:
            return self._before.get(stage, 0.0)
        return self._before.get(stage, 0.0) + self._ended.get(stage, time.monotonic()) - started

    def time_remaining(self, stage: str = "train") -> float | None:
        """Seconds that are left, or None without a limit."""
        return None if self._duration_s is None else self._duration_s - self.time_elapsed(stage)

    def _start(self, stage: str) -> None:
        self._started[stage] = time.monotonic()
        self._ended.pop(stage, None)

    def _end(self, stage: str) -> None:
        self._ended[stage] = time.monotonic()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._start("train")
        self._check(trainer)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._end("train")

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        self._start("validate")

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self._end("validate")

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:
        self._start("test")

    def on_test_end(self, trainer: Any, pl_module: Any) -> None:
        self._end("test")

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._check(trainer)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self._check(trainer)

    def _check(self, trainer: Any) -> None:
        if self._duration_s is None or trainer.should_stop or not trainer.is_global_zero:
            return
        if self.time_elapsed() >= self._duration_s:
            trainer.should_stop = True  # the other ranks hear of it
            if self._verbose:
                print(f"Timer: {self._duration_s:g} s are over; training stops.", file=sys.stderr)

    def state_dict(self) -> dict[str, Any]:
        return {"time_elapsed": {stage: self.time_elapsed(stage) for stage in ("train", "validate", "test")}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        elapsed = {str(getattr(stage, "value", stage)): value for stage, value in state_dict["time_elapsed"].items()}
        self._before["train"] = elapsed.get("train", 0.0)
