"""Loaders of every make are split so that two ranks are one process with the doubled batch, or refused."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, SequentialSampler
from torch.utils.data.distributed import DistributedSampler

from lite.data.loader import setup_dataloader
from lite.data.shares import BatchWeight, Shard
from lite.errors import ConfigError, UsageError


class RankZero:
    """Plays the broadcast between ranks that run one after the other."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    def sync(self, rank: int) -> Callable[[Any], Any]:
        if rank > 0:
            answers = iter(self.told)
            return lambda _: next(answers)

        def tell(obj: Any) -> Any:
            self.told.append(obj)
            return obj

        return tell


def prepare(loader: DataLoader[Any], rank: int = 0, world: int = 2, **options: Any) -> DataLoader[Any]:
    options = {"device": None, "weight": BatchWeight(), "sync": lambda x: x, **options}
    return setup_dataloader(loader, shard=Shard(rank, world), **options)


def told(loader: DataLoader[Any], cell: BatchWeight) -> list[tuple[list[int], float, int | None]]:
    return [(batch.tolist(), cell.value, cell.num_real) for batch in loader]


class Rows(Dataset):
    """Takes an index or a list of them, and makes the batch itself."""

    def __len__(self) -> int:
        return 7

    def __getitem__(self, index: Any) -> torch.Tensor:
        return torch.as_tensor(index)


class EagerBatches:
    """Draws as soon as it is iterated, before the DataLoader draws its workers' seed."""

    def __init__(self, draw: Callable[[], list[int]]) -> None:
        self.draw = draw

    def __len__(self) -> int:
        return 4

    def __iter__(self) -> Iterator[list[int]]:
        return iter([[i, i + 10] for i in self.draw()])


class LazyBatches(EagerBatches):
    """Draws at its first batch, after the DataLoader has drawn its workers' seed."""

    def __iter__(self) -> Iterator[list[int]]:
        yield from super().__iter__()


DRAWS = {
    "torch": lambda: torch.randperm(4).tolist(),
    "python": lambda: random.sample(range(4), 4),
    "numpy": lambda: np.random.permutation(4).tolist(),
}


@pytest.mark.parametrize("diverged", [False, True])
@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("batches", [EagerBatches, LazyBatches])
def test_custom_batch_samplers_draw_when_the_raw_loader_would(batches: Any, draw: str, diverged: bool) -> None:
    """Epoch after epoch, the ranks' batches are the raw loader's in turn, and each rank keeps its own random state."""

    def seed(value: int) -> None:
        torch.manual_seed(value)
        random.seed(value)
        np.random.seed(value)

    def loader() -> DataLoader[Any]:
        return DataLoader(range(20), batch_sampler=batches(DRAWS[draw]))

    seed(3)
    raw_loader = loader()
    raw = [batch.tolist() for _ in range(3) for batch in raw_loader]
    raw_state = torch.get_rng_state()
    zero, parts = RankZero(), []
    for rank in range(2):
        seed(3 + 5 * rank * diverged)
        mine = prepare(loader(), rank, sync=zero.sync(rank))
        parts.append([batch.tolist() for _ in range(3) for batch in mine])
        if rank == 0 or not diverged:
            assert torch.equal(torch.get_rng_state(), raw_state)
    assert [batch for pair in zip(*parts, strict=True) for batch in pair] == raw


class OwnGenerator:
    """Draws from a numpy generator of its own, an attribute or hidden in a closure."""

    def __init__(self, seed: int, hidden: bool) -> None:
        generator = np.random.default_rng(seed)
        self.draw = lambda: generator.permutation(50).tolist()
        self.generator = None if hidden else generator

    def __iter__(self) -> Iterator[int]:
        return iter(self.draw())


def test_a_samplers_own_generator_is_rank_zeros() -> None:
    """However each rank seeded it; one that can't be found must be seeded alike."""
    for hidden, seed in ((False, 0), (False, 1), (True, 0)):
        zero, parts = RankZero(), []
        for rank in range(2):
            sampler = OwnGenerator(rank * seed, hidden)
            loader = prepare(DataLoader(range(50), sampler=sampler), rank, sync=zero.sync(rank))
            parts.append([batch.item() for _ in range(2) for batch in loader])
        assert sorted(parts[0] + parts[1]) == sorted([*range(50)] * 2)
    zero = RankZero()
    list(prepare(DataLoader(range(50), sampler=OwnGenerator(0, True)), 0, sync=zero.sync(0)))
    with pytest.raises(UsageError, match="seed the sampler's own"):
        list(prepare(DataLoader(range(50), sampler=OwnGenerator(1, True)), 1, sync=zero.sync(1)))


def test_a_list_of_indices_needs_no_broadcast() -> None:
    """Its order is fixed."""

    def refuse(_: Any) -> Any:
        raise AssertionError("sync was called")

    loader = prepare(DataLoader(range(9), batch_size=2, sampler=[8, 6, 4, 2, 0]), 1, sync=refuse)
    assert [batch.tolist() for batch in loader] == [[4, 2], [0]]


def test_a_batch_sampler_as_sampler_is_split_by_samples() -> None:
    """batch_size=None with lists of indices: slices of each doubled list, with the ragged one's weights."""
    parts = []
    for rank in range(2):
        cell = BatchWeight()
        sampler = BatchSampler(SequentialSampler(range(7)), 2, False)
        parts.append(told(prepare(DataLoader(Rows(), batch_size=None, sampler=sampler), rank, weight=cell), cell))
    assert parts[0] == [([0, 1], 1.0, None), ([4, 5], pytest.approx(4 / 3), 2)]
    assert parts[1] == [([2, 3], 1.0, None), ([6], pytest.approx(2 / 3), 1)]


def test_a_dataset_that_makes_batches_keeps_all_their_samples_in_evaluation() -> None:
    """Without automatic batching the number of samples is the dataset's affair; only a filler is none."""

    class Batches(Dataset):
        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int) -> torch.Tensor:
            if index == 3:
                raise IndexError
            return torch.arange(5) + 10 * index

    real = []
    for rank in range(2):
        cell = BatchWeight()
        loader = prepare(DataLoader(Batches(), batch_size=None), rank, weight=cell)
        real.append([(value, num) for _, value, num in told(loader, cell)])
    assert real == [[(1.0, None), (2.0, None)], [(1.0, None), (0.0, 0)]]


class Generated(DataLoader):
    """Iterates in a generator, as subclasses do that wrap each batch."""

    def __iter__(self) -> Iterator[Any]:
        yield from super().__iter__()


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("kind", [DataLoader, Generated])
def test_the_ragged_weight_comes_in_every_epoch(kind: type[DataLoader], num_workers: int) -> None:
    """Also where the user's class starts the sampler only when the first batch is asked for."""
    cell = BatchWeight()
    options = {"num_workers": num_workers, "persistent_workers": num_workers > 0}
    loader = prepare(kind(range(7), batch_size=2, **options), 1, weight=cell)
    for _ in range(2):
        assert told(loader, cell) == [([2, 3], 1.0, None), ([6], pytest.approx(2 / 3), 1)]


def test_two_iterators_of_one_loader_have_their_own_weights() -> None:
    """zip(loader, loader)."""
    cell = BatchWeight()
    loader = prepare(DataLoader(range(7), batch_size=2), 1, weight=cell)
    first, second = iter(loader), iter(loader)
    seen = []
    for _ in range(2):
        next(first)
        seen.append(cell.value)
        next(second)
        seen.append(cell.value)
    assert seen == [1.0, 1.0, pytest.approx(2 / 3), pytest.approx(2 / 3)]


def weights(loader: Any, cell: BatchWeight, use: Any) -> list[tuple[list[int], float]]:
    """What each batch's loss is multiplied by in the loop `use`, on rank 1 of 2, whose last batch of 7 is ragged."""
    seen = []

    def backward(batch: Any) -> None:
        cell.uses += 1
        seen.append((batch.tolist(), 1.0 if cell.value == 1.0 else cell.use()))

    with torch.enable_grad():
        use(loader, backward)
    return seen


def plainly(loader: Any, backward: Any) -> None:
    for batch in loader:
        backward(batch)


RIGHT = [([2, 3], 1.0), ([6], pytest.approx(2 / 3))]


def ragged(kind: Any = DataLoader) -> tuple[Any, BatchWeight]:
    cell = BatchWeight()
    return prepare(kind(range(7), batch_size=2), 1, weight=cell), cell


def test_a_weight_left_by_a_loop_that_broke_off_is_used_once() -> None:
    """It belongs to the batch that was given out last, and to nothing that comes later."""

    def first_alone(loader: Any, backward: Any) -> None:
        backward(next(iter(loader)))
        backward(torch.tensor([9]))

    cell = BatchWeight()
    loader = prepare(DataLoader(range(3), batch_size=2), 1, weight=cell)
    assert weights(loader, cell, first_alone) == [([2], pytest.approx(2 / 3)), ([9], 1.0)]
    for _ in loader:  # in evaluation nothing is owed
        break
    assert (cell.value, cell.num_real) == (1.0, None)


def test_a_validation_loop_within_a_step_does_not_lose_the_weight() -> None:
    """Between the ragged batch and its backward."""
    loader, cell = ragged()
    other = prepare(DataLoader(range(9), batch_size=2), 1, weight=cell)

    def validating(loader: Any, backward: Any) -> None:
        for batch in loader:
            with torch.no_grad():
                for _ in other:
                    pass
            backward(batch)

    assert weights(loader, cell, validating) == RIGHT
    assert weights(loader, cell, plainly) == RIGHT


def test_loops_in_which_the_weight_goes_astray_are_told() -> None:
    """Looking one batch ahead."""

    def ahead(loader: Any, backward: Any) -> None:
        batches = iter(loader)
        current = next(batches)
        for batch in batches:
            backward(current)
            current = batch
        backward(current)

    cell = BatchWeight()
    with pytest.warns(UserWarning, match="looks one batch ahead"):
        weights(prepare(DataLoader(range(11), batch_size=2), 1, weight=cell), cell, ahead)


def test_right_loops_are_not_told_anything() -> None:
    """A backward without a loader after the loop."""

    def then_own(loader: Any, backward: Any) -> None:
        plainly(loader, backward)
        backward(torch.tensor([9]))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loader, cell = ragged()
        assert weights(loader, cell, then_own) == [*RIGHT, ([9], 1.0)]


def test_a_validation_loop_that_is_left_within_a_step_does_not_lose_the_weight() -> None:
    """By break, between the ragged batch and its backward."""
    loader, cell = ragged()
    other = prepare(DataLoader(range(9), batch_size=2), 1, weight=cell)

    def validating(loader: Any, backward: Any) -> None:
        for batch in loader:
            with torch.no_grad():
                for _ in other:
                    break
            backward(batch)

    assert weights(loader, cell, validating) == RIGHT


class Skipping(DataLoader):
    """Leaves its first batch out."""

    def __iter__(self) -> Iterator[Any]:
        batches = super().__iter__()
        next(batches)
        yield from batches


class Doubling(DataLoader):
    """Gives out each batch twice."""

    def __iter__(self) -> Iterator[Any]:
        for batch in super().__iter__():
            yield batch
            yield batch


def test_weights_follow_the_batches_that_are_read_not_those_that_a_class_makes_of_them() -> None:
    """Left out or repeated."""
    for kind, right in ((Skipping, RIGHT[1:]), (Doubling, [RIGHT[0], RIGHT[0], RIGHT[1], RIGHT[1]])):
        loader, cell = ragged(kind)
        assert weights(loader, cell, plainly) == right


class Endless(DataLoader):
    """Makes its iterator once and for all, as loaders do that keep their workers."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.iterator = super().__iter__()

    def __iter__(self) -> Iterator[Any]:
        for _ in range(len(self)):
            yield next(self.iterator)


def test_a_loader_that_iterates_what_it_made_before_is_refused() -> None:
    """Every rank would get every sample; on one process it stays as it is."""
    with pytest.raises(UsageError, match="persistent_workers"):
        list(prepare(Endless(range(8), batch_size=2), 1))
    assert len(list(prepare(Endless(range(8), batch_size=2), 0, 1))) == 4


class Private:
    """Keeps its epoch under a name of its own."""

    def __init__(self) -> None:
        self._epoch = 0
        self.told: list[int] = []

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch
        self.told.append(epoch)

    def __len__(self) -> int:
        return 4

    def __iter__(self) -> Iterator[int]:
        return iter(range(4))


def test_the_users_own_set_epoch_is_not_overruled() -> None:
    """Nor is a sampler left without one when the user doesn't call it."""
    sampler = Private()
    loader = prepare(DataLoader(range(4), sampler=sampler))
    for epoch in (5, 6, 7):
        sampler.set_epoch(epoch)
        list(loader)
    assert sampler.told == [5, 6, 7]
    list(loader)
    assert sampler.told == [5, 6, 7, 8]


def test_a_distributed_sampler_for_two_is_refused_on_one_process() -> None:
    """Half of the data would be left out without a word; use_distributed_sampler=False leaves it to the user."""

    def loader() -> DataLoader[Any]:
        return DataLoader(range(8), sampler=DistributedSampler(range(8), num_replicas=2, rank=0))

    with pytest.raises(ConfigError, match="num_replicas=2, rank=0, but this is rank 0 of 1"):
        prepare(loader(), 0, 1)
    assert len(list(prepare(loader(), 0, 1, use_distributed_sampler=False))) == 4


def test_out_of_order_workers_are_put_in_order() -> None:
    """A global batch's slices must meet in one step; the user is told."""
    with pytest.warns(UserWarning, match="in_order=False"):
        loader = prepare(DataLoader(range(8), num_workers=2, in_order=False))
    assert loader.in_order
    assert not prepare(DataLoader(range(8), num_workers=2, in_order=False), 0, 1).in_order


def test_workers_of_an_unsplit_loader_differ_between_ranks_too() -> None:
    """use_distributed_sampler=False."""
    options = {"use_distributed_sampler": False}
    assert prepare(DataLoader(range(3), num_workers=1), 1, **options).worker_init_fn is not None
    assert prepare(DataLoader(range(3), num_workers=1), 0, **options).worker_init_fn is None


@pytest.mark.parametrize("diverged", [False, True])
def test_single_items_are_shuffled_as_the_raw_loader_does(diverged: bool) -> None:
    """batch_size=None with torch's RandomSampler, which draws after the workers' seed."""

    def loader() -> DataLoader[Any]:
        return DataLoader(range(6), batch_size=None, sampler=RandomSampler(range(6)))

    torch.manual_seed(3)
    raw_loader = loader()
    raw = [item for _ in range(2) for item in raw_loader]
    zero, parts = RankZero(), []
    for rank in range(2):
        torch.manual_seed(3 + rank * diverged)
        mine = prepare(loader(), rank, sync=zero.sync(rank))
        parts.append([item for _ in range(2) for item in mine])
    assert [item for pair in zip(*parts, strict=True) for item in pair] == raw


def test_a_rank_with_another_random_state_keeps_it() -> None:
    """What the sampler draws under rank 0's state leaves no trace in this rank's own."""

    def state_after(sampler: Any, zero: RankZero | None) -> tuple[torch.Tensor, Any, Any]:
        torch.manual_seed(8)
        random.seed(8)
        np.random.seed(8)
        loader = DataLoader(range(20), batch_sampler=sampler)
        list(loader if zero is None else prepare(loader, 1, sync=zero.sync(1)))
        return torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()

    for draw in DRAWS.values():
        torch.manual_seed(1)
        random.seed(1)
        np.random.seed(1)
        zero = RankZero()
        list(prepare(DataLoader(range(20), batch_sampler=LazyBatches(draw)), 0, sync=zero.sync(0)))
        mine, undrawn = state_after(LazyBatches(draw), zero), state_after([[0, 1]], None)
        assert torch.equal(mine[0], undrawn[0])
        assert mine[1:] == undrawn[1:]


def test_generators_that_ranks_seeded_differently_follow_rank_zero() -> None:
    """A loader's own generator decides the order, so it is rank 0's."""
    zero, parts = RankZero(), []
    for rank in range(2):
        generator = torch.Generator().manual_seed(rank)
        loader = prepare(
            DataLoader(range(12), batch_size=2, shuffle=True, generator=generator), rank, sync=zero.sync(rank)
        )
        parts.append([i for _ in range(2) for batch in loader for i in batch.tolist()])
    assert sorted(parts[0] + parts[1]) == sorted([*range(12)] * 2)


def mark(worker_id: int) -> None:
    torch.utils.data.get_worker_info().dataset.marked = True  # type: ignore[union-attr]


class Marked(Dataset):
    marked = False

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> bool:
        return self.marked


def test_the_users_worker_init_fn_still_runs() -> None:
    """On ranks above 0 too, where the seeds are changed before it."""
    loader = prepare(DataLoader(Marked(), num_workers=1, worker_init_fn=mark), 1)
    assert [batch.tolist() for batch in loader] == [[True]]


def test_a_running_iterator_is_not_taken_over() -> None:
    """Persistent workers of a loader that was used before would go on with the whole data."""
    raw = DataLoader(range(8), batch_size=2, num_workers=1, persistent_workers=True)
    list(raw)
    loader = prepare(raw, 1)
    assert [batch.tolist() for batch in loader] == [[2, 3], [6, 7]]
    assert loader._iterator is not raw._iterator
