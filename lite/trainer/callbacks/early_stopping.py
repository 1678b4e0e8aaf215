"""`EarlyStopping`: training ends when a metric does not get better any more."""

from __future__ import annotations

import math
import sys
import warnings
from typing import Any, ClassVar

from lite import collectives
from lite.errors import ConfigError, choose
from lite.trainer.callbacks.base import Callback
from lite.trainer.logging.monitored import looks_at_epoch_ends, monitored, nobody_logged


class EarlyStopping(Callback):
    """Stops on all ranks together, when one of them would.

    Args:
        monitor: The metric.
        min_delta: By how much it must be better than the best to count.
        patience: After how many checks without a better value training ends.
        verbose: Whether to tell of every better value.
        mode: "min" or "max": what better means.
        strict: Whether a missing metric is an error, or passed over.
        check_finite: Stop at an inf or NaN.
        stopping_threshold: Stop as soon as the metric is that good.
        divergence_threshold: Stop as soon as it is that bad.
        check_on_train_epoch_end: Check at the end of training epochs, or after validation; None: at the end of epochs
            where one validation belongs to each, or there is none, else after validation.
        log_rank_zero_only: Whether rank 0 alone tells why it stops.

    Attributes:
        stopped_epoch: The epoch in which it stopped, or 0.
        best_score: The best value so far.
        wait_count: Checks since then.
        stopping_reason: Why it stopped, or None.
    """

    reads_metrics: ClassVar[bool] = True

    def __init__(
        self,
        monitor: str,
        min_delta: float = 0.0,
        patience: int = 3,
        verbose: bool = False,
        mode: str = "min",
        strict: bool = True,
        check_finite: bool = True,
        stopping_threshold: float | None = None,
        divergence_threshold: float | None = None,
        check_on_train_epoch_end: bool | None = None,
        log_rank_zero_only: bool = False,
    ) -> None:
        self.monitor, self.patience, self.verbose = monitor, patience, verbose
        self.mode = choose("EarlyStopping's mode", mode, ["min", "max"])
        self.min_delta = abs(min_delta)
        self.strict, self.check_finite = strict, check_finite
        self.stopping_threshold, self.divergence_threshold = stopping_threshold, divergence_threshold
        self.log_rank_zero_only = log_rank_zero_only
        self.wait_count = self.stopped_epoch = 0
        self.best_score = math.inf if mode == "min" else -math.inf
        self.stopping_reason: str | None = None
        self._on_train_epoch_end = check_on_train_epoch_end

    @property
    def state_key(self) -> str:
        return f"EarlyStopping{{'monitor': {self.monitor!r}, 'mode': {self.mode!r}}}"

    def state_dict(self) -> dict[str, Any]:
        return {
            "wait_count": self.wait_count,
            "stopped_epoch": self.stopped_epoch,
            "best_score": self.best_score,
            "patience": self.patience,
        }

    @property
    def stopping_reason_message(self) -> str | None:
        """`stopping_reason`, by Lightning's name."""
        return self.stopping_reason

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.wait_count, self.stopped_epoch = state_dict["wait_count"], state_dict["stopped_epoch"]
        self.best_score, self.patience = float(state_dict["best_score"]), state_dict["patience"]

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if self.stopped_epoch and self.wait_count >= self.patience and not trainer.fit_loop.is_unsettled:
            # Saved when that had been decided; with more patience the run goes on.
            trainer.fit_loop.ask_to_stop(alone=True)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if self._goes_by_epochs(trainer) and not trainer.fit_loop.is_cut_off(trainer):
            self._check(trainer)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.fitting and not trainer.sanity_checking and not self._goes_by_epochs(trainer):
            self._check(trainer)

    def _goes_by_epochs(self, trainer: Any) -> bool:
        return looks_at_epoch_ends(trainer, self._on_train_epoch_end)

    def _check(self, trainer: Any) -> None:
        if trainer.fast_dev_run:
            return
        value = monitored(trainer, self.monitor, own=True)
        if value is None:  # on all ranks
            text = nobody_logged(trainer, f"EarlyStopping(monitor={self.monitor!r})")
            if self.strict:
                raise ConfigError(f"{text} Log it, monitor another, or pass strict=False.")
            warnings.warn(text, stacklevel=4)
            return
        stop, reason = self.evaluate(float(value))
        if collectives.any_rank(stop):
            self.stopping_reason = reason if stop else "another rank has stopped"
            self.stopped_epoch = trainer.current_epoch
            trainer.fit_loop.ask_to_stop(alone=True)  # everybody knows
        if reason and (stop or self.verbose) and (trainer.is_global_zero or not self.log_rank_zero_only):
            print(f"EarlyStopping: {reason}", file=sys.stderr)

    def evaluate(self, value: float) -> tuple[bool, str | None]:
        """Count a check with this value: whether it stops, and why, or what is better.

        Example:
            >>> stopping = EarlyStopping("loss", patience=1)
            >>> [stopping.evaluate(value)[0] for value in (3.0, 2.0, 2.0)]
            [False, False, True]
        """
        name, low = self.monitor, self.mode == "min"
        if self.check_finite and not math.isfinite(value):
            return True, f"{name} = {value} is not finite (best: {self.best_score})"
        if self.stopping_threshold is not None and self._better(value, self.stopping_threshold):
            sign = "<" if low else ">"
            return True, f"{name} = {value} is good enough ({sign} {self.stopping_threshold})"
        if self.divergence_threshold is not None and self._better(-value, -self.divergence_threshold):
            sign = ">" if low else "<"
            return True, f"{name} = {value} has diverged ({sign} {self.divergence_threshold})"
        if self._better(value - self.min_delta if not low else value + self.min_delta, self.best_score):
            better, self.best_score, self.wait_count = self.best_score, value, 0
            return False, f"{name} is better: {value}, after {better}"
        self.wait_count += 1
        if self.wait_count >= self.patience:
            checks = f"{self.wait_count} check{'s' * (self.wait_count > 1)}"
            return True, f"{name} was not better than {self.best_score} in the last {checks}"
        return False, None

    def _better(self, value: float, than: float) -> bool:
        return value < than if self.mode == "min" else value > than
