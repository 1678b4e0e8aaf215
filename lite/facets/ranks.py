"""What ranks say to each other, from the user's loop."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import Tensor

from lite import collectives
from lite.facets.base import Facet
from lite.first_rank import FirstRank
from lite.nesting import flatten

T = TypeVar("T")


class BetweenRanks(Facet):
    """The side of `Lite` that communicates."""

    _first_rank: FirstRank | None

    def print(self, *args: Any, **kwargs: Any) -> None:
        """`print` on rank 0 alone."""
        if self.is_global_zero:
            print(*args, **kwargs)

    def barrier(self) -> None:
        """Wait until all ranks are here. Collective: call on all ranks."""
        self._require_connected("barrier")
        collectives.barrier()

    def broadcast(self, obj: T, src: int = 0) -> T:
        """Rank `src`'s object on every rank. Collective: call on all ranks. See `lite.collectives.broadcast`."""
        self._require_connected("broadcast")
        return collectives.broadcast(obj, src, device=self._device)  # type: ignore[no-any-return]

    def sync_buffers(self) -> None:
        """Give every rank rank 0's buffers now, as each training forward does. Collective: call on all ranks.

        After a training step a BatchNorm's statistics hold the rank's own last batch; call this before an evaluation of
        which each rank does a part, and all evaluate the model that a checkpoint would hold. The Trainer does.
        It does nothing where the strategy takes no buffers from rank 0 (one process, LocalSGD, pipelines).
        """
        self._require_connected("sync_buffers")
        for engine in self._modules.values():
            if engine is not None and engine.syncs_buffers:
                engine.sync_buffers()

    def all_gather(self, data: Any, *, cat: bool = False, sync_grads: bool = False) -> Any:
        """Every rank's tensors, as `lite.collectives.all_gather` gives them. Collective: call on all ranks."""
        self._require_connected("all_gather")
        return collectives.all_gather(self._for_group(data), cat=cat, sync_grads=sync_grads)

    def all_reduce(self, data: Any, op: str = "mean") -> Any:
        """The reduction of tensors and numbers by `lite.collectives.all_reduce`. Collective: call on all ranks.

        Ranks that share one part of the data (tensor parallelism) count once.
        """
        self._require_connected("all_reduce")
        self._check_filler()
        return collectives.all_reduce(self._for_group(data), op, group=self.strategy.data_group())

    def gather_for_metrics(self, data: Any) -> Any:
        """Predictions and targets of the current batch from all ranks, every sample once, in the stream's order.

        Collective: call on all ranks, for each batch of a set-up loader.

        Args:
            data: Tensors of shape (n, ...), lists of n objects (strings, dicts of boxes, ...), or a nested dict or
                tuple of them, for the rank's n samples. Several tensors, such as predictions and targets, go into a
                tuple or a dict, since a list is one object per sample.

        Returns:
            The same nesting with all ranks' samples along the first dimension, or in one list.

        Raises:
            UsageError: (on all ranks) it comes after the loop, and a batch in it held a sample twice; or the current
                batch is ragged, and `data` has not one row for each of its samples; or a list has not one object for
                each sample of the current batch.
        """
        self._require_connected("gather_for_metrics")
        weight, refusal = self._weight, None
        if weight.filler_pending and weight.num_real is None:
            refusal = (
                "lite.gather_for_metrics was called after the loop, but a rank's last batch repeats one sample, to "
                "stay in step with the others, and can't be told from the real ones any more; gather each batch "
                "inside the loop."
            )
        else:
            refusal = _no_samples(data, weight.size())
            if refusal is None and weight.num_real is not None:
                refusal = _misfit(data, max(weight.num_real, 1))
        weight.filler_pending = weight.owed = False
        weight.uses += 1
        cuda = self._device if self._device.type == "cuda" else None
        tensors = self._for_group(data)
        group = self.strategy.data_group()
        return collectives.gather_for_metrics(tensors, weight.num_real, device=cuda, group=group, refusal=refusal)

    def real_samples(self) -> int | None:
        """How many samples of this rank's current batch count, for metrics of your own.

        Returns:
            None where all do; 0 where the batch repeats another rank's sample, to keep this rank in step.
        """
        self._weight.filler_pending = False
        return self._weight.num_real

    @contextmanager
    def rank_zero_first(self, local: bool = False) -> Iterator[None]:
        """Rank 0 runs the block first, the others after it, or not at all when it failed.

        Collective: enter on all ranks. Inside, ranks are alone: other collectives are refused there, but a block within
        a block is this rank's turn already.

        Args:
            local: The first rank of each machine goes first, instead of rank 0 of the job.
        """
        self._require_connected("rank_zero_first")
        if self._first_rank is None or self.world_size == 1:
            yield
            return
        first = self.local_rank == 0 if local else self.global_rank == 0
        scope = f"node{self.node_rank}" if local else "job"
        with self._first_rank.run(first, scope, f"rank 0{' of this machine' if local else ''}"):
            yield

    def _check_filler(self) -> None:
        if self._weight.filler_pending:
            self._weight.filler_pending = False
            warnings.warn(
                "this rank's last evaluation batch repeats one sample, to stay in step with the other ranks; a sum "
                "or mean over it counts that sample twice. Use lite.gather_for_metrics(predictions), which leaves it "
                "out.",
                stacklevel=3,
            )


def _misfit(data: Any, size: int) -> str | None:
    """What is wrong with data that should have `size` rows, of which some may be no samples of their own."""
    for leaf in flatten(data, split_lists=False)[0]:
        is_rows = isinstance(leaf, list) or (isinstance(leaf, Tensor) and leaf.ndim > 0)
        if is_rows and len(leaf) != size:
            return (
                f"lite.gather_for_metrics got {len(leaf)} rows, but this rank's current batch, which is ragged, has "
                f"{size} samples. Pass one row for each sample (a tensor of shape (n, ...), no flattened one), and "
                "gather each batch before the loop takes the next one from the loader."
            )
    return None


def _no_samples(data: Any, size: int | None) -> str | None:
    """What is wrong with a list that has not one object for each of the current batch's samples."""
    for leaf in flatten(data, split_lists=False)[0]:
        if isinstance(leaf, list) and size is not None and len(leaf) != size:
            kinds = ", ".join(dict.fromkeys(type(part).__name__ for part in leaf[:8]))
            return (
                f"lite.gather_for_metrics got a list of {len(leaf)} ({kinds}), but this rank's current batch has "
                f"{size} samples, and a list is one object per sample. Put whole batches of tensors or strings into a "
                "tuple or a dict, as lite.gather_for_metrics((predictions, targets)); torch's collate function makes "
                "lists of the tuples that a dataset returns: tuple(targets)."
            )
    return None
