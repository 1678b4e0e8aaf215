"""Splitting an IterableDataset over ranks and workers as one stream; noticing ranks that read the same by mistake."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from lite.data.checksum import checksum
from lite.data.shares import Shard, Share, slice_evenly
from lite.errors import UsageError
from lite.seed import RandomState, drawing_under, mix, seed_here
from lite.state import is_stateful


class StridedStream(IterableDataset[Any]):
    """Yields this rank's slice of each global batch of the one stream that `dataset` is, collated, with its share.

    Every process reads the whole stream and skips what isn't its own; worker w of n makes the global batches j with
    j % n == w, so the order does not depend on the number of workers. What a dataset draws from the global generators
    must be alike everywhere too: in workers they are seeded for each global batch as it is read, and then, for each
    rank another way, as this rank's part is collated.

    Args:
        dataset: The user's dataset. It must yield the same samples in the same order in every process.
        batch_size: Samples per rank.
        drop_last: Leave out a last global batch that doesn't fill up.
        collate: The loader's collate function.
        shard: This rank's part.

    Attributes:
        resume: Global batches to leave out in the next iteration, and the dataset's state after them or None.
        seed: From which the workers' seeds are made; the same on all ranks.
        opened: The random state as the iterator of a resumed epoch was made.
    """

    def __init__(
        self, dataset: Iterable[Any], batch_size: int, drop_last: bool, collate: Callable[[Any], Any], shard: Shard
    ) -> None:
        self.dataset = dataset
        self.batch_size = batch_size
        self.drop_last = drop_last
        self.collate = collate
        self.shard = shard
        self.resume: tuple[int, Any] | None = None
        self.seed = 0
        self.opened: RandomState | None = None

    def __iter__(self) -> Iterator[tuple[Any, Share | None, int | None, Any]]:
        """The batch, its share where it is ragged, once per process a fingerprint of the stream, a worker's state."""
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        seed = None if worker is None else self.seed
        size = self.batch_size * self.shard.world_size
        (number, state), self.resume = self.resume or (0, None), None
        # A worker is seeded; here the order may come from the generators as they were when the epoch began.
        again = number > 0 and state is None and worker is None
        with drawing_under(self.opened if again else None):
            items = self._open(number, state, seed)
        tells = worker is not None and is_stateful(self.dataset)
        fingerprint: int | None = None
        told = False
        first_number = number
        while group := _read(items, size, number, seed):
            if number == first_number:
                fingerprint = checksum(group)
            if len(group) < size and self.drop_last:
                break
            if (number - first_number) % step == first:
                if len(group) == size:
                    start = self.shard.rank * self.batch_size
                    mine, share = group[start : start + self.batch_size], None
                else:
                    mine, share = slice_evenly(group, self.shard)
                state = self.dataset.state_dict() if tells else None  # type: ignore[attr-defined]
                if seed is not None:
                    seed_here(mix(seed, number, 1 + self.shard.rank))
                yield self.collate(mine), share, None if told else fingerprint, state
                told = True
            number += 1
        if not told:
            yield None, None, fingerprint or 0, None  # nothing for this worker, which still tells what it has read

    def _open(self, number: int, state: Any, seed: int | None) -> Iterator[Any]:
        """The stream after `number` global batches."""
        if seed is not None:
            seed_here(mix(seed))
        if state is not None:
            self.dataset.load_state_dict(state)  # type: ignore[attr-defined]
            return iter(self.dataset)
        items = iter(self.dataset)
        for skipped in range(number):
            _read(items, self.batch_size * self.shard.world_size, skipped, seed)
        return items


def _read(items: Iterator[Any], size: int, number: int, seed: int | None) -> list[Any]:
    """The global batch with that number, drawn from generators that are seeded for it, with a seed."""
    if seed is not None:
        seed_here(mix(seed, number, 0))
    return list(islice(items, size))


def identity(value: Any) -> Any:
    """The collate function of a loader whose dataset yields ready batches."""
    return value


def check_same_stream(fingerprint: int, sync: Callable[[Any], Any]) -> None:
    """Refuse a stream that differs between ranks: slices of different streams repeat and miss samples."""
    if sync(fingerprint) != fingerprint:
        raise UsageError(
            "shard='stride' needs a dataset that yields the same samples in the same order on every rank, but this "
            "rank's first samples differ from rank 0's; seed its shuffling alike, or let it split itself "
            "and leave shard out."
        )


def check_unsplit(fingerprint: int, first: int) -> None:
    """Refuse a stream that differs between this rank's workers: the dataset has split it already."""
    if fingerprint != first:
        raise UsageError(
            "shard='stride' needs a dataset that yields the same samples in every worker, but this rank's workers read "
            "different ones; leave out the dataset's own split by get_worker_info(), or leave shard out and let the "
            "dataset split itself by rank too."
        )


def warn_if_same(first: Any, rank: int, sync: Callable[[Any], Any]) -> None:
    """Tell the user, on ranks above 0, when the first batch is rank 0's: every sample would count once per rank."""
    mine = None if first is None else checksum(first)
    theirs = sync(mine)
    if rank > 0 and mine is not None and mine == theirs:
        warnings.warn(
            "this rank reads the same first batch as rank 0, so every sample counts once per rank: an IterableDataset "
            "is not split unless you say so. Use lite.setup_dataloaders(loader, shard='stride'), or split it in the "
            "dataset by rank and worker. With a Trainer return self.trainer.lite.setup_dataloaders(loader, "
            "shard='stride') from train_dataloader, val_dataloader, ..., or pass what "
            "trainer.lite.setup_dataloaders(loader, shard='stride') returns.",
            stacklevel=3,
        )
