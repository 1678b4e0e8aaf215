"""One global stream of batches, of which each rank takes its slices.

The stream is what one process with the global batch (batch size x world size) would draw from the user's own sampler.
This module knows indices and random states, not datasets or loaders.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import BatchSampler, RandomSampler, SequentialSampler, SubsetRandomSampler, WeightedRandomSampler

from lite.data.checksum import checksum
from lite.errors import UsageError

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
        owed: The current batch is ragged, for training, and no backward has weighed its loss yet.
        filler_pending: A batch without a real sample was given out for evaluation and not yet gathered for metrics.
    """

    __slots__ = ("filler_pending", "num_real", "owed", "value")

    def __init__(self) -> None:
        self.filler_pending = self.owed = False
        self.clear()

    def clear(self) -> None:
        """The current batch is full; a ragged one before it should have been weighed."""
        if self.owed and torch.is_grad_enabled():
            warnings.warn(
                "the last, ragged batch of a loader was trained on without its weight, since no lite.backward came "
                "before the next batch. Call lite.backward instead of loss.backward(), and torch.no_grad() in "
                "evaluation; where one step draws from two loaders, use drop_last=True or lite.accumulate's weight.",
                stacklevel=4,
            )
        self.owed = False
        self.value: float = 1.0
        self.num_real: int | None = None

    def set(self, share: Share) -> None:
        """The current batch is ragged."""
        self.value, self.num_real = share.weight, share.num_real
        self.owed = share.weight != 1.0 and torch.is_grad_enabled()
        if share.num_real == 0 and not torch.is_grad_enabled():
            self.filler_pending = True


@dataclass(frozen=True)
class Share:
    """This rank's part of a ragged global batch; `num_real` is None where the dataset makes the batches."""

    num_real: int | None
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
        sync: Returns rank 0's object on every rank. Collective: called as an epoch starts when the order may be random.

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
        # torch's BatchSampler starts the sampler within it at the first batch; any other source is started by iter().
        self._starts_late = batch_size is not None

    def __len__(self) -> int:
        count = len(self.sampler)  # type: ignore[arg-type]  # without a length: TypeError, as it is raw
        group = self._shard.world_size * (self.batch_size or 1)
        return count // group if self.drop_last else -(-count // group)

    def __iter__(self) -> Iterator[Any]:
        self.ragged = {}
        items = None if self._starts_late else self._start()
        return self._slices(self.ragged, items)

    def _slices(self, ragged: dict[int, Share], items: Iterator[Any] | None) -> Iterator[Any]:
        world = self._shard.world_size
        size = world * (self.batch_size or 1)
        for number, group in enumerate(self._groups(size, items)):
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
            return (group[rank], Share(None, world / len(group))) if rank < len(group) else (group[0], Share(0, 0.0))
        if full:
            total = sum(len(batch) for batch in group)
            return group[rank], Share(len(group[rank]), len(group[rank]) * world / total)
        return slice_evenly([index for batch in group for index in batch], self._shard)

    def _start(self) -> Iterator[Any]:
        """The source's iterator; what its `__iter__` draws at once is drawn under rank 0's random state."""
        if is_sequential(self.sampler):
            return iter(self.sampler)
        with drawing_under(self._agree()):
            return iter(self.sampler)

    def _agree(self) -> RandomState | None:
        """Rank 0's random state, or None where this rank's own is the same. Collective."""
        mine = RandomState.capture(self._generators)
        shared: RandomState = self._sync(mine)
        shared.restore_generators(self._generators)
        return None if shared == mine else shared

    def _groups(self, size: int, items: Iterator[Any] | None) -> Iterator[list[Any]]:
        """The global batches, drawn under rank 0's random state on every rank."""
        if is_sequential(self.sampler):
            items = iter(self.sampler) if items is None else items
            while group := list(islice(items, size)):
                yield group
            return
        with drawing_under(self._agree()):
            items = iter(self.sampler) if items is None else items
            group = list(islice(items, size))
            state = RandomState.capture([])
        if type(self.sampler) in _EAGER:
            while group:
                yield group
                group = list(islice(items, size))
            return
        _check_same_order(group, self._sync)
        while group:
            yield group
            # An unknown sampler may draw at any time: from here on it does so from a state that all ranks share.
            with drawing_under(state):
                group = list(islice(items, size))
                state = RandomState.capture([])


def _check_same_order(group: list[Any], sync: Callable[[Any], Any]) -> None:
    """Refuse a sampler with a generator of its own that ranks have seeded differently. Collective."""
    mine = checksum(group)
    if sync(mine) != mine:
        raise UsageError(
            "the loader's sampler gives this rank other samples than rank 0, so that its slices would repeat some "
            "and miss others; seed the sampler's own random generator alike on all ranks, or, if it splits the data by "
            "rank itself, call setup_dataloaders(loader, use_distributed_sampler=False)."
        )


def is_sequential(sampler: Any) -> bool:
    """Whether the order is fixed, so that ranks need not agree on a random state."""
    if type(sampler) is BatchSampler:
        return is_sequential(sampler.sampler)
    return type(sampler) in (SequentialSampler, list, tuple, range)


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
            and self.numpy_state[2:] == other.numpy_state[2:]
            and np.array_equal(self.numpy_state[1], other.numpy_state[1])
        )


@contextmanager
def drawing_under(state: RandomState | None) -> Iterator[None]:
    """Within the block the global generators go on from `state`, afterwards from where they were; None leaves them."""
    if state is None:
        yield
        return
    mine = RandomState.capture([])
    state.restore()
    try:
        yield
    finally:
        mine.restore()
