"""One global stream of batches, of which each rank takes its slices.

The stream is what one process with the global batch (batch size x world size) would draw from the user's own sampler.
This module knows indices and random states, not datasets or loaders.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import BatchSampler, RandomSampler, SequentialSampler, SubsetRandomSampler, WeightedRandomSampler

# These draw from a global generator at their first item only.
_EAGER = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)


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
        filler_pending: A batch without a real sample was given out for evaluation and not yet gathered for metrics.
    """

    __slots__ = ("filler_pending", "num_real", "value")

    def __init__(self) -> None:
        self.clear()
        self.filler_pending = False

    def clear(self) -> None:
        """The current batch is full."""
        self.value: float = 1.0
        self.num_real: int | None = None

    def set(self, share: Share) -> None:
        """The current batch is ragged."""
        self.value, self.num_real = share.weight, share.num_real
        if share.num_real == 0 and not torch.is_grad_enabled():
            self.filler_pending = True


@dataclass(frozen=True)
class Share:
    """This rank's part of a ragged global batch."""

    num_real: int
    weight: float


def slice_evenly(items: list[Any], shard: Shard) -> tuple[list[Any], Share]:
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


class ShardedSampler:
    """Stands in the place of a loader's batch sampler (or of its sampler, without automatic batching) on each rank.

    Args:
        source: The user's sampler, or batch sampler where it is a custom one.
        shard: This rank's part.
        batch_size: Samples per rank; None where `source` yields ready batches.
        single: `source` yields one index per batch (a loader with batch_size=None).
        drop_last: Leave out a last global batch that doesn't fill up.
        generators: The torch generators that the loader and its samplers were given.
        sync: Returns rank 0's object on every rank; called at the first batch of an epoch when the order may be random.

    Attributes:
        ragged: For the newest iteration, this rank's share of each batch that is not full, by the batch's number.
    """

    def __init__(
        self,
        source: Iterable[Any],
        shard: Shard,
        *,
        batch_size: int | None,
        single: bool,
        drop_last: bool,
        generators: list[torch.Generator],
        sync: Callable[[Any], Any],
    ) -> None:
        self.sampler = source
        self.batch_size = batch_size
        self.drop_last = drop_last
        self.ragged: dict[int, Share] = {}
        self._shard = shard
        self._single = single
        self._generators = generators
        self._sync = sync

    def __len__(self) -> int:
        count = len(self.sampler)  # type: ignore[arg-type]  # without a length: TypeError, as it is raw
        group = self._shard.world_size * (self.batch_size or 1)
        return count // group if self.drop_last else -(-count // group)

    def __iter__(self) -> Iterator[Any]:
        self.ragged = {}
        return self._slices(self.ragged)

    def _slices(self, ragged: dict[int, Share]) -> Iterator[Any]:
        world = self._shard.world_size
        size = world * (self.batch_size or 1)
        for number, group in enumerate(self._groups(size)):
            if len(group) < size and self.drop_last:
                return
            mine, share = self._take(group, full=len(group) == size)
            if share is not None and share.weight != 1.0:
                ragged[number] = share
            yield mine

    def _take(self, group: list[Any], full: bool) -> tuple[Any, Share | None]:
        rank, world = self._shard.rank, self._shard.world_size
        if self.batch_size is not None:
            if full:
                return group[rank * self.batch_size : (rank + 1) * self.batch_size], None
            return slice_evenly(group, self._shard)
        if self._single:
            if full:
                return group[rank], None
            return (group[rank], Share(1, world / len(group))) if rank < len(group) else (group[0], Share(0, 0.0))
        if full:
            total = sum(len(batch) for batch in group)
            return group[rank], Share(len(group[rank]), len(group[rank]) * world / total)
        return slice_evenly([index for batch in group for index in batch], self._shard)

    def _groups(self, size: int) -> Iterator[list[Any]]:
        """The global batches, drawn under rank 0's random state on every rank."""
        if is_sequential(self.sampler):
            items = iter(self.sampler)
            while group := list(islice(items, size)):
                yield group
            return
        mine = RandomState.capture(self._generators)
        shared: RandomState = self._sync(mine)
        shared.restore_generators(self._generators)
        alike = shared == mine
        if not alike:
            shared.restore()
        items = iter(self.sampler)
        group = list(islice(items, size))
        after = None if type(self.sampler) in _EAGER else RandomState.capture([])
        if not alike:
            mine.restore()
        while group:
            yield group
            if after is None:
                group = list(islice(items, size))
                continue
            # An unknown sampler may draw at any time: from here on it does so from a state that all ranks share.
            before = RandomState.capture([])
            after.restore()
            group = list(islice(items, size))
            after = RandomState.capture([])
            before.restore()


def is_sequential(sampler: Any) -> bool:
    """Whether the order is fixed, so that ranks need not agree on a random state."""
    if type(sampler) is BatchSampler:
        return is_sequential(sampler.sampler)
    return type(sampler) is SequentialSampler


@dataclass(eq=False)
class RandomState:
    """The states of the random generators that a sampler may draw from."""

    torch_state: torch.Tensor
    python_state: Any
    numpy_state: Any
    generator_states: list[torch.Tensor]

    @classmethod
    def capture(cls, generators: list[torch.Generator]) -> RandomState:
        return cls(torch.get_rng_state(), random.getstate(), np.random.get_state(), [g.get_state() for g in generators])

    def restore(self) -> None:
        """Put the global generators back."""
        torch.set_rng_state(self.torch_state)
        random.setstate(self.python_state)
        np.random.set_state(self.numpy_state)

    def restore_generators(self, generators: list[torch.Generator]) -> None:
        """Put the generators that belong to the loader back."""
        for generator, state in zip(generators, self.generator_states, strict=True):
            generator.set_state(state)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RandomState):
            return NotImplemented
        return (
            torch.equal(self.torch_state, other.torch_state)
            and self.python_state == other.python_state
            and self.numpy_state[2] == other.numpy_state[2]
            and np.array_equal(self.numpy_state[1], other.numpy_state[1])
        )
