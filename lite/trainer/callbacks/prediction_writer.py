"""`BasePredictionWriter`: hands what was predicted to a method of yours, per batch or at the end."""

from __future__ import annotations

from typing import Any

from lite.errors import choose
from lite.trainer.callbacks.base import Callback


class BasePredictionWriter(Callback):
    """Override `write_on_batch_end`, `write_on_epoch_end`, or both.

    Args:
        write_interval: "batch", "epoch" or "batch_and_epoch".
    """

    def __init__(self, write_interval: str = "batch") -> None:
        self.interval = choose("write_interval", write_interval, ["batch", "epoch", "batch_and_epoch"])

    @property
    def wants_predictions(self) -> bool:
        """Whether predictions are kept for the end."""
        return self.interval != "batch"

    def write_on_batch_end(
        self,
        trainer: Any,
        pl_module: Any,
        prediction: Any,
        batch_indices: list[int],
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Write one batch's prediction; `batch_indices` are the dataset's, or [] where the order is unknown."""

    def write_on_epoch_end(
        self, trainer: Any, pl_module: Any, predictions: list[Any], batch_indices: list[Any]
    ) -> None:
        """Write all of this rank's predictions.

        Args:
            trainer: The Trainer.
            pl_module: The module.
            predictions: As `trainer.predict` returns them: by batch, with several loaders a list of such lists.
            batch_indices: The dataset's indices, nested by loader, batch and sample.
        """

    def on_predict_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if trainer.metrics.filler:  # this rank's batch repeats another's sample
            return
        indices = trainer.predict_loop.indices(trainer, dataloader_idx, batch_idx)
        trainer.predict_loop.batch_indices[dataloader_idx].append(indices)
        if self.interval != "epoch":
            self.write_on_batch_end(trainer, pl_module, outputs, indices, batch, batch_idx, dataloader_idx)

    def on_predict_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if self.interval != "batch":
            loop = trainer.predict_loop
            found = loop.predictions
            self.write_on_epoch_end(trainer, pl_module, found[0] if len(found) == 1 else found, loop.batch_indices)
