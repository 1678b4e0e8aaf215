"""A set-up loader is the user's loader in everything but what it samples."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torch.utils.data.distributed import DistributedSampler

from lite import ConfigError, Lite, UsageError
from lite.data.loader import setup_dataloader
from lite.data.shares import BatchWeight, Shard
from tests.support.processes import run_distributed


def prepare(loader: DataLoader[Any], rank: int = 0, world: int = 1, **options: Any) -> DataLoader[Any]:
    options = {"device": None, "weight": BatchWeight(), "sync": lambda x: x, **options}
    return setup_dataloader(loader, shard=Shard(rank, world), **options)


def double(samples: list[int]) -> torch.Tensor:
    return torch.tensor(samples) * 2


def init(worker_id: int) -> None:
    torch.set_num_threads(1)


class Special(DataLoader):
    """A subclass with required arguments and attributes of its own."""

    def __init__(self, dataset: Any, colour: str, **options: Any) -> None:
        super().__init__(dataset, **options)
        self.colour = colour

    def __iter__(self) -> Iterator[Any]:
        for batch in super().__iter__():
            yield self.colour, batch


@pytest.mark.parametrize("world", [1, 2])
def test_everything_the_user_gave_is_kept(world: int) -> None:
    """Options, subclass and attributes; the user's own loader is left alone."""
    options = {
        "batch_size": 2,
        "num_workers": 2,
        "collate_fn": double,
        "worker_init_fn": init,
        "timeout": 30,
        "prefetch_factor": 3,
        "persistent_workers": True,
        "multiprocessing_context": "fork",
        "generator": torch.Generator(),
        "drop_last": True,
    }
    raw = Special(range(9), "red", **options)
    raw_sampler = raw.batch_sampler
    loader = prepare(raw, 0, world)
    assert isinstance(loader, Special)
    assert type(loader).__name__ == "Special"
    for name, value in options.items():
        kept = getattr(loader, name)
        assert kept is value or kept == value or name == "multiprocessing_context"
    assert loader.dataset is raw.dataset
    assert loader.colour == "red"
    assert raw.batch_sampler is raw_sampler
    batches = list(loader)
    assert batches[0][0] == "red"
    assert batches[0][1].tolist() == [0, 2]
    assert len(loader) == len(batches) == (4 if world == 1 else 2)


def test_one_process_draws_exactly_as_raw() -> None:
    """Order and every generator's state after two epochs are those of the raw loader."""

    def run(prepared: bool) -> tuple[list[list[int]], Any]:
        torch.manual_seed(1)
        loader = DataLoader(range(10), batch_size=3, shuffle=True)
        loader = prepare(loader) if prepared else loader
        order = [batch.tolist() for _ in range(2) for batch in loader]
        return order, torch.get_rng_state()

    (order, state), (raw_order, raw_state) = run(True), run(False)
    assert order == raw_order
    assert torch.equal(state, raw_state)


def test_setting_up_twice_is_refused() -> None:
    """Both the loader that was given and the one that came back."""
    raw = DataLoader(range(4))
    ready = prepare(raw)
    for loader in (raw, ready):
        with pytest.raises(UsageError, match="set up already"):
            prepare(loader)


def test_teardown_releases_the_users_loader() -> None:
    """Another Lite may set it up, also in one process."""
    raw = DataLoader(range(4))
    for precision in ("32-true", "64-true"):
        lite = Lite(accelerator="cpu", precision=precision)
        assert len(list(lite.setup_dataloaders(raw))) == 4
        lite.teardown()


def test_the_weight_is_told_with_the_batch_not_with_its_prefetch() -> None:
    """Workers run ahead; the ragged batch is the last one given out."""
    cell = BatchWeight()
    loader = prepare(DataLoader(range(7), batch_size=2, num_workers=2), 1, 2, weight=cell)
    told = []
    for batch in loader:
        told.append((batch.tolist(), cell.value, cell.num_real))
    assert told[0] == ([2, 3], 1.0, None)
    assert told[1] == ([6], pytest.approx(2 / 3), 1)
    assert (cell.value, cell.num_real) == (1.0, None)


def test_a_distributed_sampler_is_not_split_again_but_shuffled_anew() -> None:
    """Its epoch advances by itself, unless the user sets it."""
    sampler = DistributedSampler(range(8), num_replicas=2, rank=1, shuffle=True)
    loader = prepare(DataLoader(range(8), batch_size=2, sampler=sampler), 1, 2)
    orders = [[b.tolist() for b in loader] for _ in range(2)]
    assert orders[0] != orders[1]
    assert all(sum(len(b) for b in order) == 4 for order in orders)
    sampler.set_epoch(0)
    assert [b.tolist() for b in loader] == orders[0]
    wrong = DataLoader(range(8), sampler=DistributedSampler(range(8), num_replicas=4, rank=3))
    with pytest.raises(ConfigError, match="num_replicas=4"):
        prepare(wrong, 1, 2)


def test_interleaved_is_torchs_order() -> None:
    """For those who compare with DistributedSampler."""
    for shuffle in (False, True):
        mine = prepare(DataLoader(range(9), batch_size=2, shuffle=shuffle), 1, 2, use_distributed_sampler="interleaved")
        sampler = DistributedSampler(range(9), 2, 1, shuffle=shuffle)
        torchs = DataLoader(range(9), batch_size=2, sampler=sampler)
        for epoch in range(2):
            sampler.set_epoch(epoch)
            assert [b.tolist() for b in mine] == [b.tolist() for b in torchs]


def test_false_gives_every_rank_everything() -> None:
    """use_distributed_sampler=False."""
    loader = prepare(DataLoader(range(5), batch_size=2), 1, 2, use_distributed_sampler=False)
    assert [b.tolist() for b in loader] == [[0, 1], [2, 3], [4]]


class Noise(Dataset):
    """Random augmentation from all three generators."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> tuple[float, float, float]:
        return torch.rand(()).item(), random.random(), np.random.rand()


def test_workers_of_different_ranks_draw_different_numbers() -> None:
    """Rank 0's workers stay as torch seeds them."""
    draws = []
    for rank, world in ((0, 1), (0, 2), (1, 2)):
        torch.manual_seed(0)
        loader = prepare(DataLoader(Noise(), batch_size=4 // world, num_workers=1), rank, world)
        draws.append([[round(v, 6) for v in part.tolist()] for part in next(iter(loader))])
    assert [part[:2] for part in draws[0]] == draws[1]
    pairs = [(a, b) for x, y in zip(draws[1], draws[2], strict=True) for a, b in zip(x, y, strict=True)]
    assert all(a != b for a, b in pairs)


class Count(IterableDataset):
    """Counts to n."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.n))


@pytest.mark.parametrize("num_workers", [0, 1, 2])
@pytest.mark.parametrize("n", [8, 9, 11])
def test_a_strided_stream_is_one_stream_for_any_number_of_workers(n: int, num_workers: int) -> None:
    """Global batches in order, every sample once, the same number of batches on each rank."""
    parts = []
    for rank in range(2):
        cell = BatchWeight()
        loader = DataLoader(Count(n), batch_size=2, num_workers=num_workers)
        loader = prepare(loader, rank, 2, iterable_shard="stride", weight=cell)
        parts.append([(b.tolist()[: 2 if cell.num_real is None else cell.num_real]) for b in loader])
        assert loader.dataset.n == n
    assert len(parts[0]) == len(parts[1]) == -(-n // 4)
    assert [i for pair in zip(*parts, strict=True) for part in pair for i in part] == list(range(n))


@torch.no_grad()
def iterable_messages() -> list[str]:
    lite = Lite(accelerator="cpu")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        list(lite.setup_dataloaders(DataLoader(Count(4), batch_size=2)))
    messages = [str(w.message) for w in caught]
    strided = lite.setup_dataloaders(DataLoader(Count(5 + lite.global_rank), batch_size=1), shard="stride")
    list(strided)
    different = lite.setup_dataloaders(DataLoader(Offset(lite.global_rank), batch_size=1), shard="stride")
    try:
        list(different)
    except UsageError as error:
        messages.append(str(error))
    return messages


class Offset(Count):
    """Another stream on each rank."""

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.n, self.n + 4))


def test_the_user_is_told_of_streams_that_repeat_or_differ() -> None:
    """Ranks that read identical first batches are warned; strided streams that differ are refused."""
    first, second = run_distributed(iterable_messages)
    assert first == []
    assert len(second) == 2
    assert "shard='stride'" in second[0]
    assert "differ from rank 0's" in second[1]


def evaluate(n: int) -> tuple[list[int], int, list[str], list[str]]:
    lite = Lite(accelerator="cpu")
    loader = lite.setup_dataloaders(DataLoader(list(range(n)), batch_size=2))
    seen = []
    with torch.no_grad():
        for batch in loader:
            out = lite.gather_for_metrics({"x": batch, "names": [str(i) for i in batch.tolist()]})
            assert [str(i) for i in out["x"].tolist()] == out["names"]
            seen.extend(out["x"].tolist())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with torch.no_grad():
            count = sum(len(batch) for batch in loader)
        total = lite.all_reduce(count, "sum")
    return seen, total, [str(w.message) for w in caught], []


@pytest.mark.parametrize("n", [8, 9, 11])
def test_evaluation_counts_every_sample_once(n: int) -> None:
    """Law 7, in the dataset's order; a naive sum that would count a filler is told so."""
    for seen, total, messages, _ in (results := run_distributed(evaluate, n)):
        assert seen == list(range(n))
        assert (total == n) == (n != 9)
        del messages
    assert any("gather_for_metrics" in m for m in results[1][2]) == (n == 9)


def gather_late(n: int) -> list[str]:
    lite = Lite(accelerator="cpu")
    loader = lite.setup_dataloaders(DataLoader(list(range(n)), batch_size=4))
    messages = []
    with torch.no_grad():
        for ahead in (True, False):
            before = None
            try:
                for batch in loader:
                    if not ahead:
                        lite.gather_for_metrics(torch.stack([batch, batch], 1).flatten())
                    elif before is not None:
                        lite.gather_for_metrics(before)
                    before = batch
            except UsageError as error:
                messages.append(str(error))
    return messages


@pytest.mark.parametrize("n", [11, 13])
def test_rows_that_are_not_the_current_batchs_samples_are_refused(n: int) -> None:
    """On all ranks, instead of losing samples: a loop that looks one batch ahead, flattened rows."""
    for ahead, flat in run_distributed(gather_late, n):
        assert "4 rows" in ahead and "before the loop takes the next one" in ahead
        assert "no flattened one" in flat
