"""One global stream of batches, of which each rank takes its slices, from its beginning or from where it was left.

The stream is what one process with the global batch (batch size x world size) would draw from the user's own sampler.
This module knows indices and random states, not datasets or loaders.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

from torch.utils.data import BatchSampler, RandomSampler, SequentialSampler, SubsetRandomSampler, WeightedRandomSampler
from torch.utils.data.distributed import DistributedSampler

from lite.data.checksum import checksum
from lite.data.draws import Draws, move_on
from lite.data.position import Pass, items_crc
from lite.data.seeded import Seeded
from lite.data.shares import Shard, Share, slice_evenly
from lite.errors import UsageError
from lite.seed import Generator, RandomState, drawing_under, mix

# These draw from a global generator at their first item only, and from torch's alone.
_EAGER = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler, DistributedSampler)
# An iterator over something that is there already can't draw.
_READY: tuple[type, ...] = (type(iter([])), type(iter(())), type(iter(range(0))))


class ShardedSampler:
    """Stands in the place of a loader's batch sampler (or of its sampler, without automatic batching) on each rank.

    Args:
        source: The user's sampler, or batch sampler where it is a custom one.
        shard: This rank's part.
        batch_size: Samples per rank; None where `source` yields ready batches.
        single: `source` yields one index per batch (a loader with batch_size=None).
        drop_last: Leave out a last global batch that doesn't fill up.
        generators: The generators that the loader and its samplers were given.
        sync: Returns rank 0's object on every rank. Collective: called as an epoch starts when the order may be random.
        seed_rank: Whose batches these are, where workers are seeded for each; None without workers.

    Attributes:
        upcoming: The pass that an iteration makes now; a fresh one where there is none. A DataLoader with workers
            calls `__iter__` twice for one pass (torch 2.13).
    """

    def __init__(
        self,
        source: Iterable[Any],
        shard: Shard,
        *,
        batch_size: int | None,
        single: bool,
        drop_last: bool,
        generators: Sequence[Generator],
        sync: Callable[[Any], Any],
        seed_rank: int | None = None,
    ) -> None:
        self.sampler = source
        self.batch_size = batch_size
        self.drop_last = drop_last
        self.group_size = shard.world_size * (batch_size or 1)
        self.upcoming: Pass | None = None
        self.shard = shard
        self._single = single
        self._generators = generators
        self._sync = sync
        self._seed_rank = seed_rank
        self._draws: Draws | None = None  # of the newest pass
        self._apart: dict[str, int] | None = None
        # torch's BatchSampler starts the sampler within it at the first batch; any other source is started by iter().
        self._starts_late = batch_size is not None

    def __getattr__(self, name: str) -> Any:
        if "sampler" not in self.__dict__:  # a copy that is being made
            raise AttributeError(name)
        return getattr(self.sampler, name)  # what else the user's own has: set_epoch, say

    def __len__(self) -> int:
        count = len(self.sampler)  # type: ignore[arg-type]  # without a length: TypeError, as it is raw
        return count // self.group_size if self.drop_last else -(-count // self.group_size)

    def __iter__(self) -> Iterator[Any]:
        current = self.upcoming or Pass()
        current.taken = True
        items = None if self._starts_late else self._open(current)
        whole = self.shard.world_size == 1 and self.batch_size is not None and self._seed_rank is None
        return self._groups(current, items) if whole and not self.drop_last else self._slices(current, items)

    def _slices(self, current: Pass, items: Iterator[Any] | None) -> Iterator[Any]:
        size = self.group_size
        for number, group in enumerate(self._groups(current, items)):
            full = len(group) == size
            if not full and self.drop_last:
                break
            mine, share = self._take(group, full)
            if share is not None and share.weight != 1.0:
                current.ragged[number] = share
            if self._seed_rank is None:
                yield mine
            else:
                yield Seeded(mine, current.seed, current.first + number, self._seed_rank)

    def size_of_batch(self, current: Pass) -> int | None:
        """Samples in the batch of a pass that its loop was given last; None where only the sampler itself knows."""
        if self.batch_size is None or current.finished or not current.consumed:
            return None
        try:
            total = len(self.sampler)  # type: ignore[arg-type]
        except TypeError:
            return None
        left = total - current.skip - (current.consumed - 1) * self.group_size
        return len(slice_evenly(range(max(0, min(left, self.group_size))), self.shard)[0])

    def _take(self, group: list[Any], full: bool) -> tuple[Any, Share | None]:
        rank, world = self.shard.rank, self.shard.world_size
        if self.batch_size is not None:
            if full:
                return (group if world == 1 else group[rank * self.batch_size : (rank + 1) * self.batch_size]), None
            return slice_evenly(group, self.shard)
        if self._single:
            if full:
                return group[rank], None
            return (group[rank], Share(None, world / len(group))) if rank < len(group) else (group[0], Share(0, 0.0))
        if full:
            total = sum(len(batch) for batch in group)
            return group[rank], Share(len(group[rank]), len(group[rank]) * world / total) if world > 1 else None
        return slice_evenly([index for batch in group for index in batch], self.shard)

    def _open(self, current: Pass) -> Iterator[Any]:
        """The source's iterator; what its `__iter__` draws at once is drawn under rank 0's random state."""
        if is_sequential(self.sampler):
            return iter(self.sampler)
        if not current.resumed:
            current.start.opened = self._capture()
        with drawing_under(self._agree(current, "opened")):
            return iter(self.sampler)

    def _groups(self, current: Pass, items: Iterator[Any] | None) -> Iterator[list[Any]]:
        """The global batches that are still to come, drawn under rank 0's random state on every rank."""
        size = self.group_size
        if is_sequential(self.sampler):
            if self._seed_rank is not None and not current.resumed:
                current.seed = mix(self._sync(current.start.before).digest(), current.epoch)
            items = iter(self.sampler) if items is None else items
            _skip(items, current.skip)
            while group := list(islice(items, size)):
                yield group
            return
        if not current.resumed:
            self._move_on()
            current.start.drawn = self._capture()
        with drawing_under(self._agree(current, "drawn")):
            items = iter(self.sampler) if items is None else items
            if type(self.sampler) in _EAGER:
                _skip(items, current.skip)
            else:
                self._check_skipped(items, current)
            group = list(islice(items, size))
            state = RandomState.capture()
        if type(self.sampler) in _EAGER:
            while group:
                yield group
                group = list(islice(items, size))
            return
        _check_same_order(group, self._sync)
        if type(items) in _READY:
            while group:
                current.note(group)
                yield group
                group = list(islice(items, size))
            return
        assert current.start.drawn is not None
        # An unknown sampler may draw at any time: it does so from a state that all ranks share.
        self._draws, self._apart = Draws(current.start.drawn, state), None
        while group:
            current.note(group)
            yield group
            with self._draws.drawing():
                group = list(islice(items, size))
        self._apart = self._draws.apart() if current.apart is None else current.apart

    def apart(self) -> dict[str, int] | None:
        """Which generators the newest pass has drawn apart from, once it has drawn all; see `Draws.apart`."""
        return self._apart

    def begin_apart(self, apart: dict[str, int] | None) -> None:
        """What a stored state says of the pass before the next one."""
        self._draws, self._apart = None, apart

    def _move_on(self) -> None:
        """Begin a pass where no number of the one before is drawn again."""
        apart = self._apart
        if apart is None and self._draws is not None:  # it was broken off
            apart = self._draws.apart()
        self._draws, self._apart = None, None
        if apart:
            move_on(apart)

    def _capture(self) -> RandomState:
        return RandomState.capture(self._generators, torch_only=type(self.sampler) in _EAGER)

    def _agree(self, current: Pass, moment: str) -> RandomState | None:
        """Go on from rank 0's random state, or from that of an interrupted pass.

        Returns:
            The state under which the global generators are drawn from; None where they stand there already. Collective.
        """
        mine: RandomState = getattr(current.start, moment)
        if current.resumed:
            mine.restore_generators(self._generators)
            return mine
        shared: RandomState = self._sync(mine)
        setattr(current.start, moment, shared)
        shared.restore_generators(self._generators)
        if moment == "drawn" and self._seed_rank is not None:
            current.seed = mix(shared.digest(), current.epoch)
        return None if shared is mine or shared.same_globals(mine) else shared

    def _check_skipped(self, items: Iterator[Any], current: Pass) -> None:
        """Skip in a sampler of the user's, and make sure that it yields what it yielded before the interruption."""
        if items_crc(islice(items, current.skip)) != current.crc:
            raise UsageError(
                f"{type(self.sampler).__name__} gives other samples than before the interruption, so that some would "
                "be repeated and others missed; let it draw from a generator that is an attribute of it, from torch's, "
                "Python's or numpy's global one, or by its set_epoch, or give it state_dict and load_state_dict."
            )


def _skip(items: Iterator[Any], count: int) -> None:
    next(islice(items, count, count), None)


def _check_same_order(group: list[Any], sync: Callable[[Any], Any]) -> None:
    """Refuse a sampler with a hidden generator that ranks have seeded differently. Collective."""
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
