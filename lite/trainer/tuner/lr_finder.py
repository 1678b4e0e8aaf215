"""A learning rate, by a short training in which it rises while the loss is watched.

Source: L. N. Smith, Cyclical Learning Rates for Training Neural Networks, https://arxiv.org/abs/1506.01186
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np

from lite.trainer.callbacks.base import Callback

_SMOOTHING = 0.98


class LRFinder:
    """What a search for a learning rate has found.

    Attributes:
        results: {"lr": the rates, "loss": the smoothed loss after each}.
    """

    def __init__(self, lr: list[float], loss: list[float]) -> None:
        self.results = {"lr": lr, "loss": loss}

    def suggestion(self, skip_begin: int = 10, skip_end: int = 1) -> float | None:
        """The rate at which the loss fell most steeply; None, with a warning, where there are too few values.

        Example:
            >>> LRFinder([1e-3, 1e-2, 1e-1, 1.0], [3.0, 2.9, 1.0, 9.0]).suggestion(skip_begin=0)
            0.1
        """
        end = len(self.results["loss"]) - skip_end
        losses = np.array(self.results["loss"][skip_begin:end])
        finite = np.isfinite(losses)
        rates = np.array(self.results["lr"][skip_begin:end])[finite]
        if len(rates) < 2:
            warnings.warn(
                "there are too few losses to suggest a learning rate by; use more training steps.", stacklevel=2
            )
            return None
        return float(rates[np.gradient(losses[finite]).argmin()])


class Ramp(Callback):
    """Raises the learning rate from batch to batch, and stops where the loss grows out of hand.

    Args:
        min_lr: The first rate.
        max_lr: The last one.
        num_training: Batches.
        mode: "exponential" or "linear".
        early_stop_threshold: How many times the best loss is too much; None never stops.
    """

    def __init__(
        self, min_lr: float, max_lr: float, num_training: int, mode: str, early_stop_threshold: float | None
    ) -> None:
        self.lr: list[float] = []
        self.loss: list[float] = []
        self._range, self._num, self._mode = (min_lr, max_lr), num_training, mode
        self._threshold = early_stop_threshold
        self._mean, self._best = 0.0, math.inf

    def rate(self, number: int) -> float:
        """The rate of that batch."""
        low, high = self._range
        share = number / max(self._num - 1, 1)
        return low + share * (high - low) if self._mode == "linear" else low * (high / low) ** share

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        rate = self.rate(len(self.lr))
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
        self.lr.append(rate)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        loss = float(trainer.lite.all_reduce(outputs["loss"])) if outputs else math.nan
        self._mean = _SMOOTHING * self._mean + (1 - _SMOOTHING) * loss
        smoothed = self._mean / (1 - _SMOOTHING ** len(self.lr))
        self.loss.append(smoothed)
        if self._threshold is not None and len(self.lr) > 1 and not smoothed <= self._threshold * self._best:
            trainer.fit_loop.ask_to_stop(alone=True)  # the loss is all ranks'
        self._best = min(self._best, smoothed)
