"""Prediction: as evaluation, without metrics; what each batch gives is kept, or handed to writers."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.utils.data import DataLoader, SequentialSampler

from lite.data.shares import Shard, slice_evenly
from lite.data.transfer import move_to_device
from lite.trainer.data.stage import StageData
from lite.trainer.loops.evaluate import EvaluationLoop, evaluating

_CPU = torch.device("cpu")


class PredictLoop(EvaluationLoop):
    """Predicts on the loaders of one stage.

    Attributes:
        keep: Whether outputs are kept; they are while a callback wants them.
        gather: Whether every rank gets all ranks' outputs, in the dataset's order.
        predictions: For each loader what its batches gave on this rank, in order.
        batch_indices: For each loader the dataset indices of its batches; [] where they are unknown.
    """

    def __init__(self) -> None:
        super().__init__("predict")
        self.predictions: list[list[Any]] = []
        self.batch_indices: list[list[list[int]]] = []
        self.keep = self._keeps = True
        self.gather = False

    def run(
        self,
        trainer: Any,
        data: StageData,
        *,
        no_grad: Callable[[], AbstractContextManager[Any]],
        go_on: Callable[[], None] | None = None,
        look: Callable[..., bool] | None = None,
    ) -> list[Any]:
        """Predict all batches that count; returns `predictions`, or [] where they are not kept."""
        self._keeps = self.keep or any(getattr(c, "wants_predictions", False) for c in trainer.callbacks)
        self.predictions = [[] for _ in data.loaders]
        self.batch_indices = [[] for _ in data.loaders]
        if data.num_batches == 0:
            return []
        self.loader = self.batch = 0
        self.begun = {}
        self._data = data
        with evaluating(trainer, "predict"), no_grad():
            self._call(trainer, "on_predict_start")
            self._call(trainer, "on_predict_epoch_start")
            for index in range(len(data.loaders)):
                self.loader, self.batch = index, 0
                self._run_loader(trainer, index, data, None, look)
            trainer.metrics.end_batches()
            self._call(trainer, "on_predict_epoch_end")
            self._call(trainer, "on_predict_end")
        self._data = None
        return self.predictions if self._keeps else []

    def take(self, outputs: Any, index: int, trainer: Any) -> None:
        if self.gather and trainer.world_size > 1:
            outputs = trainer.lite.gather_for_metrics(outputs)
        elif trainer.metrics.filler:
            return
        if self._keeps:
            self.predictions[index].append(move_to_device(outputs, _CPU))

    def indices(self, trainer: Any, index: int, number: int) -> list[int]:
        """The dataset's indices in this rank's batch of that number; [] where they are not those of the order."""
        assert self._data is not None
        return dataset_indices(self._data.loaders[index], number, trainer.world_size, trainer.global_rank)


def dataset_indices(loader: Any, number: int, world_size: int, rank: int) -> list[int]:
    """The indices in a rank's batch of a loader that goes through its dataset in order.

    Example:
        >>> dataset_indices(DataLoader(range(10), batch_size=2), 1, 2, 1)
        [6, 7]
    """
    if not isinstance(loader, DataLoader) or loader.batch_size is None:
        return []
    sampler = loader.sampler
    if not isinstance(getattr(sampler, "sampler", sampler), SequentialSampler):
        return []
    total = len(loader.dataset)  # type: ignore[arg-type]
    begin = number * loader.batch_size * world_size
    group = range(begin, min(begin + loader.batch_size * world_size, total))
    if not group:
        return []
    mine, share = slice_evenly(group, Shard(rank, world_size))
    return list(mine) if share.num_real else []
