"""Indices that carry a seed: a loader's worker is seeded anew for each batch, just before it fetches it.

So what a dataset draws for a batch depends on the batch's number alone, neither on the batches before it nor on the
number of workers: a resumed epoch draws what the uninterrupted one drew. The seed travels with the batch's index and is
put in place as the worker unpickles it; without workers nothing is pickled, and nothing is seeded.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lite.seed import mix, seed_here


class Seeded:
    """An index (or list of them) that arrives in a worker as itself, with the worker's generators seeded.

    Args:
        index: What the worker's dataset is asked for.
        seed: From which, with `number` and `rank`, the batch's own seed is made; the same on all ranks.
        number: The batch's number in its epoch.
        rank: The rank whose batch it is.
    """

    __slots__ = ("index", "number", "rank", "seed")

    def __init__(self, index: Any, seed: int, number: int, rank: int) -> None:
        self.index = index
        self.seed = seed
        self.number = number
        self.rank = rank

    def __reduce__(self) -> tuple[Any, ...]:
        return _arrive, (self.index, self.seed, self.number, self.rank)


_ended: set[int] = set()


def end_pass(seed: int) -> None:
    """In a worker: its part of the pass with that seed was read to the end before an interruption."""
    _ended.add(seed)


def _arrive(index: Any, seed: int, number: int, rank: int) -> Any:
    if seed in _ended:
        return []  # with nothing to read, torch's fetcher reports the end of the stream (torch 2.13)
    seed_here(mix(seed, number, rank))
    return index


class SeededRequests:
    """Stands in the place of the endless sampler with which a loader asks an IterableDataset for its batches.

    Args:
        requests: The loader's own sampler or batch sampler; every item of it is the same.
        rank: This rank.

    Attributes:
        seed: The seed of the epoch that is iterated next.
        first: The number of that epoch's first batch.
    """

    def __init__(self, requests: Any, rank: int) -> None:
        self._requests = requests
        self._rank = rank
        self.seed = 0
        self.first = 0

    def __iter__(self) -> Iterator[Seeded]:
        seed, first = self.seed, self.first
        for number, request in enumerate(self._requests, first):
            yield Seeded(request, seed, number, self._rank)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_requests"], name)
