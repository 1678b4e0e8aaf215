"""Ranks take slices of one stream: every sample once, in one process's order."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler, WeightedRandomSampler

from lite.data.loader import setup_dataloader
from lite.data.shares import BatchWeight, Shard


def stream(make: Any, world: int, epochs: int = 2, diverge: bool = False) -> list[list[list[int]]]:
    """The sample indices of every rank: [rank][batch]. Rank 0's states reach the others as they would by broadcast."""
    told: list[Any] = []
    batches: list[list[list[int]]] = []
    for rank in range(world):
        seed = 7 + (rank if diverge else 0)
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        answers = iter(told)

        def sync(obj: Any, rank: int = rank, answers: Iterator[Any] = answers) -> Any:
            if rank == 0:
                told.append(obj)
                return obj
            return next(answers)

        cell = BatchWeight()
        loader = setup_dataloader(make(world), shard=Shard(rank, world), device=None, weight=cell, sync=sync)
        mine = []
        for _ in range(epochs):
            for batch in loader:
                batch = batch.tolist() if isinstance(batch, torch.Tensor) else batch
                mine.append(batch if cell.num_real is None or isinstance(batch, int) else batch[: cell.num_real])
                torch.rand(rank + 1 if diverge else 1)
        batches.append(mine)
    return batches


def merged(batches: list[list[list[int]]]) -> list[list[int]]:
    return [[i for part in parts for i in part] for parts in zip(*batches, strict=True)]


class LazySampler:
    """Draws from every global generator whenever it likes, and has no length."""

    def __iter__(self) -> Iterator[int]:
        for _ in range(10):
            yield int(torch.randint(100, ())) + 100 * random.randrange(9) + 1000 * int(np.random.randint(9))


class OwnOrder:
    """A custom sampler with a length that draws at its start."""

    def __len__(self) -> int:
        return 11

    def __iter__(self) -> Iterator[int]:
        return iter(np.random.permutation(11).tolist())


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_every_sample_once_with_right_weights_and_lengths(batch_size: int, world: int, drop_last: bool) -> None:
    """For every size: the same number of batches on each rank, every sample once, weights that average to the mean."""
    for n in range(1, 20):
        seen: list[int] = []
        counts = set()
        weights: list[list[tuple[float, int]]] = []
        for rank in range(world):
            cell = BatchWeight()
            loader = DataLoader(list(range(n)), batch_size=batch_size, drop_last=drop_last)
            loader = setup_dataloader(loader, shard=Shard(rank, world), device=None, weight=cell, sync=lambda x: x)
            mine = []
            for batch in loader:
                real = len(batch) if cell.num_real is None else cell.num_real
                mine.append((cell.value, real))
                seen.extend(batch.tolist()[:real])
            assert len(loader) == len(mine)
            counts.add(len(mine))
            weights.append(mine)
        whole = n - n % (batch_size * world) if drop_last else n
        assert sorted(seen) == list(range(whole))
        assert len(counts) == 1
        for parts in zip(*weights, strict=True):
            total = sum(real for _, real in parts)
            for weight, real in parts:
                assert weight == pytest.approx(real * world / total)


MAKERS = {
    "shuffle": lambda w: DataLoader(range(13), batch_size=4 // w, shuffle=True),
    "generator": lambda w: DataLoader(
        range(13), batch_size=4 // w, shuffle=True, generator=torch.Generator().manual_seed(4)
    ),
    "weighted": lambda w: DataLoader(
        range(13), batch_size=4 // w, sampler=WeightedRandomSampler(torch.arange(1.0, 14.0).tolist(), 13)
    ),
    "own order": lambda w: DataLoader(range(11), batch_size=4 // w, sampler=OwnOrder()),
    "explicit batch sampler": lambda w: DataLoader(
        range(13), batch_sampler=BatchSampler(RandomSampler(range(13)), 4 // w, False)
    ),
    "workers": lambda w: DataLoader(range(13), batch_size=4 // w, shuffle=True, num_workers=2, prefetch_factor=2),
}


@pytest.mark.parametrize("diverge", [False, True])
@pytest.mark.parametrize("name", MAKERS)
def test_two_ranks_take_what_one_process_with_the_doubled_batch_takes(name: str, diverge: bool) -> None:
    """Same samples in the same order, anew in each epoch, also where the ranks' random states have drifted apart."""
    make = MAKERS[name]
    one = merged(stream(make, 1))
    assert merged(stream(make, 2, diverge=diverge)) == one
    assert one[: len(one) // 2] != one[len(one) // 2 :]


def test_a_sampler_that_draws_at_any_time_gives_each_sample_to_one_rank() -> None:
    """The ranks' order can't drift apart: the first ten items are split, whatever else draws in between."""

    def make(world: int) -> DataLoader[Any]:
        return DataLoader(range(10000), batch_size=2, sampler=LazySampler())

    first, second = stream(make, 2, epochs=1, diverge=True)
    alone = stream(make, 2, epochs=1)
    assert [len(b) for b in first] == [2, 2, 1]
    assert merged([first, second])[0] == merged(alone)[0]
    assert merged([first, second]) == merged(alone)


class Chunks:
    """A custom batch sampler of unequal batches; making another one would lose its state."""

    def __init__(self) -> None:
        self.sizes = [1, 3, 2, 2, 4]

    def __len__(self) -> int:
        return len(self.sizes)

    def __iter__(self) -> Iterator[list[int]]:
        start = 0
        for size in self.sizes:
            yield list(range(start, start + size))
            start += size


def test_a_custom_batch_sampler_is_split_as_a_stream_of_batches() -> None:
    """Rank r takes the r-th of each group; the incomplete group's samples are split evenly."""
    first, second = stream(lambda _: DataLoader(range(12), batch_sampler=Chunks()), 2, epochs=1)
    assert first == [[0], [4, 5], [8, 9]]
    assert second == [[1, 2, 3], [6, 7], [10, 11]]


def test_a_loader_without_batching_is_split_by_item() -> None:
    """batch_size=None: each item is a batch; the rank without a fifth one repeats it with weight 0."""
    first, second = stream(lambda _: DataLoader(range(5), batch_size=None, sampler=SequentialSampler(range(5))), 2, 1)
    assert first == [0, 2, 4]
    assert second == [1, 3, 4]
