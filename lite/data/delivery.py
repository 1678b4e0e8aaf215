"""The batches of a pass on their way to the user's loop: put in place, counted, and their weights told."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator
from itertools import chain, islice
from typing import Any

import torch

from lite import collectives
from lite.data.checksum import checksum
from lite.data.iterable import check_same_stream, check_unsplit, warn_if_same
from lite.data.position import Pass
from lite.data.sampler import ShardedSampler
from lite.data.shares import BatchWeight
from lite.data.stream import StreamTracker
from lite.data.transfer import move_to_device
from lite.disguise import disguise
from lite.errors import UsageError

_REPLACED = (
    "this iterator of the loader was begun before a state was loaded into the loader, whose next pass gives out the "
    "same batches; begin it anew, by iter(loader) or another for loop, after lite.load, and within run.epochs where a "
    "batch was taken from it before."
)
Size = Callable[[], int | None]


class Delivery:
    """Hands out the batches of one loader, pass after pass.

    Args:
        sampler: What slices its sampler's stream; None for an IterableDataset.
        tracker: What knows how far an IterableDataset was read; None for others.
        strided: Whether batches come from the one stream that all ranks read, with their shares.
        weight: Told what each batch counts, as it is given out.
        device: Where batches are moved; None leaves them.
        sync: Returns rank 0's object on every rank.
        rank: This rank.
        watched: Whether ranks are meant to get different batches by the dataset's own doing.
        same: Where several ranks are meant to get the same ones: whether an object is equal on all of them. Collective.
        own_iter: Whether the loader's class iterates in a way of its own, around the batches that are read.

    Attributes:
        sliced: Whether each batch is a part of a global one, which the sampler has cut.
        own_iter: As above.
    """

    def __init__(
        self,
        *,
        sampler: ShardedSampler | None,
        tracker: StreamTracker | None,
        strided: bool,
        weight: BatchWeight,
        device: torch.device | None,
        sync: Callable[[Any], Any],
        rank: int,
        watched: bool,
        own_iter: bool,
        same: Callable[[Any], bool] | None = None,
    ) -> None:
        self._sampler = sampler
        self._tracker = tracker
        self._strided = strided
        self._weight = weight
        self._device = device
        self._sync = sync
        self._rank = rank
        self.sliced = sampler is not None and sampler.shard.world_size > 1
        self._watched = watched
        self._same = same
        self.own_iter = own_iter

    def watch(self, batches: Any, newest: Callable[[], Pass | None]) -> Any:
        """The iterator that reads the batches, where the user's class stands between it and the user's loop.

        Args:
            batches: The iterator, which may serve several passes (persistent workers).
            newest: Returns the pass that it is in.
        """
        if not self.own_iter:
            return batches
        raw_next = type(batches).__next__

        def __next__(iterator: Any) -> Any:
            batch = raw_next(iterator)
            current = newest()
            if current is not None:
                if self.sliced:
                    self._tell(current, current.read)
                current.read += 1
            return batch

        disguise(batches, {"__next__": __next__})
        return batches

    def around(self, batches: Iterator[Any], current: Pass) -> Iterator[Any]:
        """Give out batches in place, with their weights told, and count them."""
        sampler = None if self.own_iter else self._sampler  # such a class may read ahead of the loop
        size_before = self._weight.ask_size
        self._weight.ask_size = size = _size_of_newest(sampler, current) if sampler is not None else None
        if self._strided:
            batches = self._unpack(batches, current)
        elif self._tracker is not None:
            batches = self._tracker.around(batches, current)
        if self._watched and current.epoch == 0 and not current.resumed:
            batches = self._compare(batches)
        if self._same is not None:
            batches = self._compare_together(batches, self._same)
        if self._device is not None:
            batches = self._move(batches, self._device)
        give_out = self._weigh if self.sliced or self._strided else self._count
        return give_out(batches, current, size, size_before)

    def _forget(self, size: Size | None, before: Size | None) -> None:
        """The loop has ended or was left: the current batch is that of the loop around, if there is one."""
        if self._weight.ask_size is size:
            self._weight.ask_size = before

    def _started(self, batches: Iterator[Any], current: Pass) -> Iterator[Any]:
        """The same batches; a class that iterates in a generator starts its sampler only as the first is asked for."""
        if self._sampler is None:
            return batches
        self._sampler.upcoming = None if current.taken else current
        first = list(islice(batches, 1))
        self._sampler.upcoming = None
        if first and self.sliced and not current.taken:
            raise UsageError(
                "the DataLoader's class gives out batches of an iterator that it made before "
                "lite.setup_dataloaders, so they can't be split over the ranks; use a plain DataLoader "
                "(persistent_workers=True keeps its workers alive)."
            )
        return chain(first, batches)

    def _count(self, batches: Iterator[Any], current: Pass, size: Size | None, before: Size | None) -> Iterator[Any]:
        try:
            for batch in self._started(batches, current):
                if current.replaced:
                    raise UsageError(_REPLACED)
                current.consumed += 1
                yield batch
        finally:
            self._forget(size, before)
        current.finished = True

    def _weigh(self, batches: Iterator[Any], current: Pass, size: Size | None, before: Size | None) -> Iterator[Any]:
        weight, tell = self._weight, self.sliced and not self.own_iter
        outer = weight.outer()
        try:
            for number, batch in enumerate(self._started(batches, current)):
                if current.replaced:
                    raise UsageError(_REPLACED)
                if tell:
                    self._tell(current, number)
                current.consumed += 1
                yield batch
        except GeneratorExit:
            weight.leave()
            if outer is not None:
                weight.back_to(outer)
            raise
        finally:
            self._forget(size, before)
        weight.end(bool(current.ragged) and current.ahead)
        if outer is not None:
            weight.back_to(outer)
        current.finished = True

    def _tell(self, current: Pass, number: int) -> None:
        """The batch with that number is the current one."""
        weight = self._weight
        if number and weight.uses == current.uses:
            current.ahead = True
        current.uses, before = weight.uses, current.uses
        weight.clear()
        other, weight.giver = weight.giver, current
        share = current.ragged.get(number)
        if share is None:
            return
        weight.set(share)
        if other not in (None, current) and not other.finished and other.uses == weight.uses and weight.owed:
            warnings.warn(
                "one step draws from two loaders, and this one's batch is ragged: its weight goes to the loss of both. "
                "Use drop_last=True, or give lite.backward or lite.accumulate a weight.",
                stacklevel=4,
            )
        if current.ahead and before != current.began:
            warnings.warn(
                "the loop took a batch from the loader before it had used the one before it, and the last batch is "
                "ragged: its weight may go to the wrong one. Where the loop looks one batch ahead, use drop_last=True, "
                "lite.accumulate's weight, or len(loader) to know the last batch.",
                stacklevel=4,
            )

    def _unpack(self, batches: Iterator[Any], current: Pass) -> Iterator[Any]:
        weight, first = self._weight, None
        for batch, share, fingerprint, state in batches:
            if fingerprint is not None:
                first = fingerprint if first is None else first
                check_unsplit(fingerprint, first)
                check_same_stream(fingerprint, self._sync)
            if batch is None:
                continue
            weight.clear()
            if share is not None:
                current.ragged[current.consumed] = share
                weight.set(share)
            current.stream = state
            yield batch

    def _compare(self, batches: Iterator[Any]) -> Iterator[Any]:
        first = next(batches, None)
        warn_if_same(first, self._rank, self._sync)
        if first is not None:
            yield first
            yield from batches

    def _compare_together(self, batches: Iterator[Any], same: Callable[[Any], bool]) -> Iterator[Any]:
        """Refuse a first batch, or any under LITE_DEBUG, that differs between ranks that work on one model together."""
        every = collectives.are_compared()
        while True:
            upcoming = list(islice(batches, 1))
            # Numbers and words beside the samples may be a rank's own: when it read them, from which cache.
            if not same(checksum(upcoming, arrays_alone=not every)):
                raise UsageError(
                    "the ranks that share a model got different batches, so its parts would work on different samples: "
                    "the dataset draws or reads otherwise on each rank. Give the loader workers (num_workers=1), whose "
                    "random numbers are the same on these ranks, or let the dataset depend on the index alone; an "
                    "IterableDataset must give all of them the same samples."
                )
            yield from upcoming
            if not every or not upcoming:
                break
        yield from batches

    def _move(self, batches: Iterator[Any], device: torch.device) -> Iterator[Any]:
        for batch in batches:
            yield move_to_device(batch, device)


def _size_of_newest(sampler: ShardedSampler, current: Pass) -> Callable[[], int | None]:
    """What tells the size of a pass's newest batch, and keeps neither the sampler nor its dataset alive."""
    reference = weakref.ref(sampler)

    def size() -> int | None:
        sampler = reference()
        return None if sampler is None else sampler.size_of_batch(current)

    return size
