"""What `Trainer.steps` gives to whoever drives a run by hand."""

from __future__ import annotations

from typing import Any


class Event:
    """Something has happened, and the run stands still until the next one is asked for.

    Attributes:
        kind: "batch" (a training batch is done, with all that was due after it) or "epoch" (an epoch is).
        trainer: The Trainer, to look at or to save with.
    """

    __slots__ = ("kind", "trainer")

    def __init__(self, kind: str, trainer: Any) -> None:
        self.kind = kind
        self.trainer = trainer

    @property
    def epoch(self) -> int:
        """The epoch that is under way, or has just ended."""
        epoch: int = self.trainer.fit_loop.progress.epoch
        return epoch - (self.kind == "epoch")

    @property
    def batch_idx(self) -> int:
        """The number in its epoch of the batch that is done."""
        batch: int = self.trainer.fit_loop.progress.batch
        return batch - 1

    @property
    def global_step(self) -> int:
        """Optimizer steps so far."""
        steps: int = self.trainer.global_step
        return steps

    @property
    def outputs(self) -> Any:
        """What `training_step` returned for the batch."""
        return self.trainer.fit_loop.epoch_loop.output

    @property
    def metrics(self) -> dict[str, Any]:
        """`trainer.callback_metrics`."""
        found: dict[str, Any] = self.trainer.callback_metrics
        return found

    def __repr__(self) -> str:
        return f"Event({self.kind!r}, epoch={self.epoch}, batch_idx={self.batch_idx}, global_step={self.global_step})"
