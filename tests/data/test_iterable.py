"""Strided streams lose nothing without a word, and fingerprints never end a loop."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from lite.data.loader import setup_dataloader
from lite.data.shares import BatchWeight, Shard
from lite.errors import ConfigError, UsageError


def prepare(loader: DataLoader[Any], rank: int = 0, **options: Any) -> DataLoader[Any]:
    options = {"iterable_shard": "stride", **options}
    return setup_dataloader(
        loader, shard=Shard(rank, 2), device=None, weight=BatchWeight(), sync=lambda x: x, **options
    )


class Sized(IterableDataset):
    def __len__(self) -> int:
        return 9

    def __iter__(self) -> Iterator[int]:
        return iter(range(9))


class SplitByWorker(IterableDataset):
    """Splits itself, as torch's documentation shows."""

    def __iter__(self) -> Iterator[int]:
        info = get_worker_info()
        first, step = (info.id, info.num_workers) if info else (0, 1)
        return iter(range(first, 16, step))


class Named(DataLoader):
    def __iter__(self) -> Iterator[Any]:
        for batch in super().__iter__():
            yield "name", batch


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_len_is_the_number_of_batches_on_the_rank(batch_size: int, drop_last: bool) -> None:
    """Not the whole stream's."""
    for rank in range(2):
        loader = prepare(DataLoader(Sized(), batch_size=batch_size, drop_last=drop_last), rank)
        assert len(loader) == len(list(loader))
    with pytest.raises(TypeError):
        len(prepare(DataLoader(SplitByWorker())))


def test_a_dataset_that_splits_itself_by_worker_is_refused() -> None:
    """Split twice, it would lose samples; with one worker nothing is lost."""
    with pytest.raises(UsageError, match="get_worker_info"):
        list(prepare(DataLoader(SplitByWorker(), batch_size=2, num_workers=2)))
    with pytest.raises(UsageError, match="get_worker_info"):  # one worker's part is too short for a batch
        list(prepare(DataLoader(SplitByWorker(), batch_size=4, num_workers=2)))
    assert len(list(prepare(DataLoader(SplitByWorker(), batch_size=2, num_workers=1)))) == 4


def test_a_class_that_iterates_its_own_way_is_refused() -> None:
    """What it does around each batch would be left out."""
    with pytest.raises(ConfigError, match="Named"):
        prepare(Named(Sized(), batch_size=2))


class Odd(IterableDataset):
    """A sparse tensor and something that doesn't pickle."""

    def __iter__(self) -> Iterator[Any]:
        return iter([{"x": torch.eye(2).to_sparse(), "f": lambda: 1}])


def test_a_first_batch_that_cannot_be_compared_is_given_out_all_the_same() -> None:
    """The check for identical streams is a service, no condition."""
    assert len(list(prepare(DataLoader(Odd(), batch_size=None), iterable_shard=None))) == 1
