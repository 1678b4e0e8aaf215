"""Which part of a global batch a rank takes, and what that part counts."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Shard:
    """Which part of every global batch this rank takes.

    Args:
        rank: The part's number, from 0.
        world_size: Number of parts.
    """

    rank: int
    world_size: int


class BatchWeight:
    """What the current batch of this rank counts, shared by loaders, which write it, and `Lite`, which reads it.

    Attributes:
        value: What the mean loss is multiplied by: 1, or n * world_size / m where this rank has n of a ragged batch's m
            samples.
        num_real: Real samples in this rank's batch where it is ragged, else None.
        owed: The current batch is ragged, for training, and no backward has weighed its loss yet.
        filler_pending: A batch without a real sample was given out for evaluation and not yet gathered for metrics.
        uses: Backwards and gatherings so far, by which loaders notice a loop that runs ahead of them.
        after_end: A loader with a ragged batch, whose loop runs ahead, has come to its end, and no batch was given out
            since.
        given: The weight that the user gave the current batch's last loss, or None.
        giver: The pass that the current batch is of.
        once: The ragged batch's loop was left before its loss was weighed: the weight holds for one backward.
        trains: An optimizer is set up.
        ask_size: Returns how many samples the newest pass gave out last, or None; None where a loader can't tell.
    """

    __slots__ = (
        "after_end",
        "ask_size",
        "filler_pending",
        "given",
        "giver",
        "num_real",
        "once",
        "owed",
        "trains",
        "uses",
        "value",
    )

    def __init__(self) -> None:
        self.ask_size: Callable[[], int | None] | None = None
        self.filler_pending = self.owed = self.trains = False
        self.uses = 0
        self.giver: Any = None
        self.clear()

    def clear(self) -> None:
        """The current batch is full; a ragged one before it should have been weighed."""
        if self.owed and self.trains and torch.is_grad_enabled():
            warnings.warn(
                "no lite.backward came between the last, ragged batch of a loader and the next one, so if it was "
                "trained on, it was without its weight. Call lite.backward instead of loss.backward(); where one step "
                "draws from two loaders, use drop_last=True or lite.accumulate's weight; and where nothing is trained "
                "(evaluation, statistics of the data), go through the loader under torch.no_grad().",
                stacklevel=4,
            )
        self.owed = self.after_end = self.once = False
        self.given: float | None = None
        self.value: float = 1.0
        self.num_real: int | None = None

    def set(self, share: Share) -> None:
        """The current batch is ragged."""
        self.value, self.num_real = share.weight, share.num_real
        self.owed = share.weight != 1.0 and torch.is_grad_enabled()
        if share.num_real == 0 and not torch.is_grad_enabled():
            self.filler_pending = True

    def end(self, astray: bool) -> None:
        """A loader has come to its end; `astray`: it had a ragged batch, and its loop runs ahead."""
        self.clear()
        self.after_end = astray and torch.is_grad_enabled()
        if self.after_end:
            self.value = math.nan  # so that `use` is asked; it tells the user

    def leave(self) -> None:
        """The loop over a loader was left at its current batch."""
        if self.owed:
            self.once = True
        else:
            self.clear()

    def settle(self) -> None:
        """The loss of the current batch has been weighed by other means than `use`."""
        self.owed = False

    def use(self) -> float:
        """What a loss is multiplied by whose backward comes now; asked where `value` is not 1."""
        self.owed = False
        if self.after_end:
            self.clear()
            warnings.warn(
                "a lite.backward came after its loader had ended with a ragged batch. Where the loop looks one batch "
                "ahead, the ragged batch's weight goes to the wrong one: use drop_last=True, lite.accumulate's weight, "
                "or len(loader) to know the last batch.",
                stacklevel=4,
            )
            return 1.0
        value = self.value
        if self.once:
            self.clear()
        return value

    @contextmanager
    def instead(self, weight: float) -> Iterator[float]:
        """The block's backward weighs its loss itself, by what comes back: 0 where no sample of the batch is real."""
        before, self.value = self.value, 1.0
        self.settle()
        self.given = 0.0 if self.num_real == 0 else weight
        try:
            yield self.given
        finally:
            self.value = before

    def size(self) -> int | None:
        """Samples in this rank's current batch, a repeated one included; None where that is not known."""
        if self.num_real is not None:
            return max(self.num_real, 1)
        return self.ask_size() if self.ask_size is not None else None

    @property
    def counted(self) -> float:
        """What the last backward of the current batch has multiplied its loss by, or will."""
        return self.value if self.given is None else self.given

    def outer(self) -> tuple[float, int | None] | None:
        """The ragged batch whose loss is still to be weighed, as another loop begins."""
        return (self.value, self.num_real) if self.owed and not self.once else None

    def back_to(self, outer: tuple[float, int | None]) -> None:
        """The inner loop has ended: the outer one's batch is the current one again."""
        self.clear()
        self.value, self.num_real = outer
        self.owed = True


@dataclass(frozen=True)
class Share:
    """This rank's part of a ragged global batch; `num_real` is None where the dataset makes the batches."""

    num_real: int | None
    weight: float


def slice_evenly(items: Any, shard: Shard) -> tuple[Any, Share]:
    """This rank's slice of a ragged batch; sizes differ by at most one, and a rank without a sample gets the first.

    Example:
        >>> [slice_evenly([7, 8, 9], Shard(rank, 2))[0] for rank in (0, 1)]
        [[7, 8], [9]]
    """
    total, world = len(items), shard.world_size
    each, rest = divmod(total, world)
    count = each + (shard.rank < rest)
    start = shard.rank * each + min(shard.rank, rest)
    mine = items[start : start + count] or items[:1]
    return mine, Share(count, count * world / total)
