"""An interrupted epoch goes on exactly: same samples, same augmentation, same random numbers afterwards."""

from __future__ import annotations

import io
import itertools
import random
import tempfile
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    WeightedRandomSampler,
    get_worker_info,
)

from lite import Lite
from lite.data.loader import setup_dataloader
from lite.data.shares import BatchWeight, Shard
from lite.errors import CheckpointError, UsageError
from lite.seed import RandomState
from tests.data.test_split import Generated, OwnGenerator, RankZero


class Augmented(Dataset):
    """Index and a draw from each generator, one number per sample; counts what it read."""

    def __init__(self, n: int = 23) -> None:
        self.n = n
        self.read: list[int] = []

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> torch.Tensor:
        self.read.append(index)
        noise = [torch.rand(()).item(), random.random(), np.random.rand()]
        return torch.tensor([index, *noise], dtype=torch.float64)


def prepare(loader: DataLoader[Any], rank: int = 0, world: int = 1, **options: Any) -> Any:
    options = {"device": None, "weight": BatchWeight(), "sync": lambda x: x, **options}
    return setup_dataloader(loader, shard=Shard(rank, world), **options)


def seed(value: int) -> None:
    torch.manual_seed(value)
    random.seed(value)
    np.random.seed(value)


def through_a_file(state: Any) -> Any:
    """What `torch.load(weights_only=True)` gives back."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def train(loader: Any, batches: int, log: list[Any]) -> Iterator[None]:
    """A loop that draws from every generator, over as many epochs as it takes; it can be left at any batch."""
    while len(log) < batches:
        for batch in loader:
            draws = torch.rand(1).item(), random.random(), np.random.rand()
            log.append((batch.tolist() if isinstance(batch, torch.Tensor) else batch, draws))
            yield
            if len(log) == batches:
                return


def interrupted_equals_uninterrupted(
    make: Callable[[], DataLoader[Any]], cuts: tuple[int, ...], batches: int, **options: Any
) -> list[Any]:
    """Run `batches` batches at once, then with an interruption after each of `cuts`; compare everything."""
    seed(3)
    whole: list[Any] = []
    for _ in train(prepare(make(), **options), batches, whole):
        pass
    after = RandomState.capture()
    for cut in cuts:
        seed(3)
        log: list[Any] = []
        loader = prepare(make(), **options)
        running = train(loader, batches, log)
        for _ in range(cut):
            next(running)
        saved = through_a_file({"loader": loader.state_dict(), "rng": RandomState.capture().state_dict()})
        running.close()
        del loader
        seed(99)  # a new process stands anywhere
        loader = prepare(make(), **options)
        loader.load_state_dict(saved["loader"])
        RandomState.from_state_dict(saved["rng"]).restore()
        for _ in train(loader, batches, log):
            pass
        assert log == whole, f"cut after {cut}"
        assert after.same_globals(RandomState.capture())
    return whole


class Permuted:
    """A sampler of the user's that draws its order from one of the global generators, at once or item by item."""

    def __init__(self, n: int, kind: str) -> None:
        self.n = n
        self.kind = kind

    def __len__(self) -> int:
        return self.n

    def __iter__(self) -> Iterator[int]:
        if self.kind == "eager":
            return iter(np.random.permutation(self.n).tolist())
        return self._lazily()

    def _lazily(self) -> Iterator[int]:
        left = list(range(self.n))
        while left:
            yield left.pop(int(torch.randint(len(left), ())) if random.random() < 0.5 else np.random.randint(len(left)))


class Counting:
    """A sampler that only its own state can bring back."""

    def __init__(self) -> None:
        self.epochs = 0

    def __len__(self) -> int:
        return 9

    def __iter__(self) -> Iterator[int]:
        self.epochs += 1
        return iter([(i * self.epochs) % 9 for i in range(9)])

    def state_dict(self) -> dict[str, int]:
        return {"epochs": self.epochs}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epochs = state["epochs"]


class ByEpoch(Counting):
    """The same by `set_epoch`."""

    state_dict = None  # type: ignore[assignment]

    def __init__(self) -> None:
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return iter([(i + self.epoch) % 9 for i in range(9)])


class Seeded(ByEpoch):
    """By a name of its own, beside another number about epochs."""

    def __init__(self) -> None:
        self.num_epochs = 10
        self.base = self.seed = 7

    def set_epoch(self, epoch: int) -> None:
        self.seed = self.base + epoch

    def __iter__(self) -> Iterator[int]:
        return iter([(i * self.seed) % 9 for i in range(9)])


def shuffled(**options: Any) -> DataLoader[Any]:
    return DataLoader(Augmented(), batch_size=4, shuffle=True, **options)


LOADERS: dict[str, Callable[[], DataLoader[Any]]] = {
    "sequential": lambda: DataLoader(Augmented(), batch_size=4),
    "shuffled": shuffled,
    "drop_last": lambda: shuffled(drop_last=True),
    "generator": lambda: shuffled(generator=torch.Generator().manual_seed(4)),
    "without batches": lambda: DataLoader(Augmented(), batch_size=None, shuffle=True),
    "replacement": lambda: DataLoader(
        Augmented(), batch_size=4, sampler=RandomSampler(range(23), replacement=True, num_samples=50)
    ),
    "weighted": lambda: DataLoader(Augmented(), batch_size=4, sampler=WeightedRandomSampler([1.0] * 23, 23)),
    "batch sampler": lambda: DataLoader(Augmented(), batch_sampler=BatchSampler(RandomSampler(range(23)), 4, True)),
    "eager": lambda: DataLoader(Augmented(), batch_size=4, sampler=Permuted(23, "eager")),
    "lazy": lambda: DataLoader(Augmented(), batch_size=4, sampler=Permuted(23, "lazy")),
    "own batches": lambda: DataLoader(Augmented(), batch_sampler=[[1, 2], [3], [4, 5, 6], [0]]),
    "own generator": lambda: DataLoader(Augmented(50), batch_size=9, sampler=OwnGenerator(1, hidden=False)),
    "stateful sampler": lambda: DataLoader(Augmented(), batch_size=2, sampler=Counting()),
    "epoch sampler": lambda: DataLoader(Augmented(), batch_size=2, sampler=ByEpoch()),
    "seeded epochs": lambda: DataLoader(Augmented(), batch_size=2, sampler=Seeded()),
    "generated": lambda: Generated(Augmented(), batch_size=4, shuffle=True),
}


@pytest.mark.parametrize("name", LOADERS)
def test_a_resumed_epoch_equals_the_uninterrupted_one(name: str) -> None:
    """At any batch, in the first epoch and later ones, at an epoch's last batch and between epochs."""
    whole = interrupted_equals_uninterrupted(LOADERS[name], (1, 3, 6, 7, 11), 16)
    assert len(whole) == 16


@pytest.mark.parametrize("done", [0, 1, 2])
@pytest.mark.parametrize("name", LOADERS)
def test_the_epoch_after_a_state_between_epochs_is_the_next_one(name: str, done: int) -> None:
    """Generators and epochs of samplers, and their own state, are those of the uninterrupted run; also before any."""

    def epochs(loader: Any, count: int) -> list[Any]:
        return [batch.tolist() for _ in range(count) for batch in loader]

    seed(3)
    loader = prepare(LOADERS[name]())
    epochs(loader, done)
    saved = through_a_file({"loader": loader.state_dict(), "rng": RandomState.capture().state_dict()})
    expected = epochs(loader, 2)
    seed(99)
    loader = prepare(LOADERS[name]())
    loader.load_state_dict(saved["loader"])
    RandomState.from_state_dict(saved["rng"]).restore()
    assert epochs(loader, 2) == expected


def test_only_the_first_of_several_loaders_takes_the_random_state_back() -> None:
    """Whatever was drawn since belongs to the resumed run."""
    lite = Lite(accelerator="cpu")

    def loaders() -> dict[str, Any]:
        pair = lite.setup_dataloaders(shuffled(), shuffled())
        return {"a": pair[0], "b": pair[1]}

    def rest(state: dict[str, Any]) -> list[Any]:
        rows = [batch.tolist() for batch in state["a"]]
        drawn = torch.rand(()).item()
        return [rows, drawn, [batch.tolist() for batch in state["b"]]]

    seed(3)
    state = loaders()
    running = [iter(loader) for loader in state.values()]
    for batches in running:
        next(batches)
    with tempfile.TemporaryDirectory() as folder:
        lite.save(f"{folder}/a.ckpt", state)
        rows = [batch.tolist() for batch in running[0]]
        drawn = torch.rand(()).item()
        expected = [rows, drawn, [batch.tolist() for batch in running[1]]]
        seed(99)
        state = loaders()
        lite.load(f"{folder}/a.ckpt", state)
        torch.rand(3)
        assert rest(state) == expected


WORKERS: dict[str, Callable[[], DataLoader[Any]]] = {
    "one": lambda: shuffled(num_workers=1),
    "two": lambda: shuffled(num_workers=2, prefetch_factor=3),
    "persistent": lambda: shuffled(num_workers=2, persistent_workers=True),
    "sequential": lambda: DataLoader(Augmented(), batch_size=4, num_workers=2),
    "generator": lambda: shuffled(num_workers=2, generator=torch.Generator().manual_seed(4)),
    "lazy": lambda: DataLoader(Augmented(), batch_size=4, sampler=Permuted(23, "lazy"), num_workers=2),
    "own batches": lambda: DataLoader(Augmented(), batch_sampler=[[1, 2], [3], [4, 5, 6], [0]], num_workers=2),
    "without batches": lambda: DataLoader(Augmented(), batch_size=None, shuffle=True, num_workers=2),
    "generated": lambda: Generated(Augmented(), batch_size=4, shuffle=True, num_workers=1),
}


@pytest.mark.parametrize("name", WORKERS)
def test_with_workers_too(name: str) -> None:
    """What was prefetched and not consumed is read again; augmentation in workers is the same."""
    whole = interrupted_equals_uninterrupted(WORKERS[name], (2, 8), 11)
    noise = [row[1:] for batch, _ in whole for row in (batch if isinstance(batch[0], list) else [batch])]
    assert len({tuple(n) for n in noise}) == len(noise)


def test_the_number_of_workers_may_change() -> None:
    """Order and augmentation depend on the batch's number alone, and each epoch has its own."""
    runs = []
    for workers in (1, 2):
        seed(3)
        loader = prepare(shuffled(num_workers=workers))
        runs.append([batch.tolist() for _ in range(2) for batch in loader])
    assert runs[0] == runs[1]
    assert runs[0][:6] != runs[0][6:]
    seed(3)
    loader = prepare(shuffled(num_workers=2))
    passing = iter(loader)
    head = [next(passing).tolist() for _ in range(2)]
    state = loader.state_dict()
    other = prepare(shuffled(num_workers=1))
    other.load_state_dict(state)
    assert head + [batch.tolist() for batch in other] == runs[0][:6]
    alone = prepare(shuffled())
    alone.load_state_dict(state)
    indices = [[row[0] for row in batch.tolist()] for batch in alone]
    assert indices == [[row[0] for row in batch] for batch in runs[0][2:6]]


def test_resuming_reads_nothing_of_what_is_skipped() -> None:
    """The dataset is asked for the rest alone."""
    seed(1)
    loader = prepare(shuffled())
    passing = iter(loader)
    for _ in range(4):
        next(passing)
    again = shuffled()
    resumed = prepare(again)
    resumed.load_state_dict(loader.state_dict())
    assert len(list(resumed)) == 2
    assert len(again.dataset.read) == 23 - 16  # type: ignore[attr-defined]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("name", ["sequential", "shuffled", "generator", "weighted", "eager", "lazy"])
def test_another_number_of_processes_takes_the_same_samples_in_the_same_order(name: str, workers: int) -> None:
    """2 -> 1 -> 2 processes at the same global batch, cut in mid-epoch: one stream, no sample twice or left out."""

    def make(batch_size: int) -> DataLoader[Any]:
        made = LOADERS[name]()
        options = {"batch_size": batch_size, "generator": made.generator, "num_workers": workers}
        if name == "sequential":
            return DataLoader(range(23), **options)
        if name in ("shuffled", "generator"):
            return DataLoader(range(23), shuffle=True, **options)
        return DataLoader(range(23), sampler=made.sampler, **options)

    def stretch(world: int, state: Any, batches: int | None) -> tuple[list[list[int]], Any]:
        zero, parts, states = RankZero(), [], []
        for rank in range(world):
            seed(5 + rank)
            cell = BatchWeight()
            loader = prepare(make(8 // world), rank, world, sync=zero.sync(rank), weight=cell)
            if state is not None:
                loader.load_state_dict(state)
            mine = []
            for batch in loader:
                real = batch.tolist()[: len(batch) if cell.num_real is None else cell.num_real]
                mine.append(real)
                if len(mine) == batches:
                    break
            parts.append(mine)
            states.append(through_a_file(loader.state_dict()))
        return [[i for part in group for i in part] for group in zip(*parts, strict=True)], states[0]

    for first in (1, 2):
        whole, _ = stretch(first, None, None)
        head, state = stretch(first, None, 1)
        middle, state = stretch(3 - first, state, 1)
        tail, state = stretch(first, state, None)
        assert head + middle + tail == whole
        assert sorted(i for group in whole for i in group) == list(range(23)) or name == "weighted"


def test_another_global_batch_keeps_the_samples_and_says_so() -> None:
    """No sample twice, none left out, in other batches."""
    seed(1)
    loader = prepare(DataLoader(range(10), batch_size=2, shuffle=True))
    passing = iter(loader)
    seen = [i for _ in range(2) for i in next(passing).tolist()]
    other = prepare(DataLoader(range(10), batch_size=3, shuffle=True))
    with pytest.warns(UserWarning, match="global batch was 2"):
        other.load_state_dict(loader.state_dict())
    rest = [i for batch in other for i in batch.tolist()]
    assert sorted(seen + rest) == list(range(10))


class Drawn:
    """A sampler that draws each item as it is asked for."""

    def __init__(self, draw: Callable[[], int]) -> None:
        self.draw = draw

    def __len__(self) -> int:
        return 12

    def __iter__(self) -> Iterator[int]:
        for _ in range(12):
            yield self.draw()


DRAWS: list[Callable[[], int]] = [
    lambda: random.randrange(1000),
    lambda: int(torch.randint(1000, (1,))),
    lambda: int(np.random.randint(1000)),
]


@pytest.mark.parametrize("draw", DRAWS, ids=["python", "torch", "numpy"])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_sampler_that_draws_item_by_item_is_the_raw_loops_and_repeats_nothing(
    draw: Callable[[], int], workers: int
) -> None:
    """While nobody else draws, its order and what it leaves behind are the raw loader's. Otherwise epochs differ."""

    def make() -> DataLoader[Any]:
        return DataLoader(range(1000), batch_size=2, sampler=Drawn(draw), num_workers=workers)

    seed(5)
    raw = make()
    expected = [[b.tolist() for b in raw] for _ in range(3)]
    after = RandomState.capture()
    seed(5)
    loader = prepare(make())
    assert [[b.tolist() for b in loader] for _ in range(3)] == expected
    assert after.same_globals(RandomState.capture())
    loader, epochs = prepare(make()), []
    for _ in range(4):
        epochs.append([])
        for batch in loader:
            epochs[-1].extend(batch.tolist())
            torch.rand(1), random.random(), np.random.rand()
    runs = {tuple(epoch[i : i + 3]) for epoch in epochs for i in range(10)}
    assert len(runs) == 40  # no stretch of 3 items of 1000 comes twice


def test_a_state_that_does_not_fit_is_refused() -> None:
    """Another dataset; another sampler, or one that would yield other samples than before."""
    loader = prepare(DataLoader(range(10), batch_size=2))
    next(iter(loader))
    with pytest.raises(CheckpointError, match="10 samples, but this one has 11"):
        prepare(DataLoader(range(11), batch_size=2)).load_state_dict(loader.state_dict())
    with pytest.raises(CheckpointError, match="by SequentialSampler, but this loader's is by RandomSampler"):
        prepare(DataLoader(range(10), batch_size=2, shuffle=True)).load_state_dict(loader.state_dict())
    loader = prepare(DataLoader(range(50), batch_size=2, sampler=OwnGenerator(0, hidden=True)))
    next(iter(loader))
    other = prepare(DataLoader(range(50), batch_size=2, sampler=OwnGenerator(1, hidden=True)))
    other.load_state_dict(loader.state_dict())
    with pytest.raises(UsageError, match="OwnGenerator gives other samples"):
        next(iter(other))
    for done in (1, 5):  # in an epoch, and after it
        loader = prepare(DataLoader(range(10), batch_size=2, shuffle=True, generator=torch.Generator()))
        for _ in itertools.islice(loader, done):
            pass
        with pytest.raises(CheckpointError, match=r"with 1 generators, but this one has 0; give .*generator="):
            prepare(DataLoader(range(10), batch_size=2, shuffle=True)).load_state_dict(loader.state_dict())


class Pairs(DataLoader):
    """Gives out two of its batches at a time."""

    def __iter__(self) -> Iterator[Any]:
        yield from zip(*[super().__iter__()] * 2, strict=True)


def test_a_class_whose_batches_are_not_the_samplers_is_refused_in_mid_epoch() -> None:
    """Its batch's number doesn't tell what was read; between epochs it may be stored."""
    loader = prepare(Pairs(range(8), batch_size=2))
    assert len(list(loader)) == 2
    assert "items" not in loader.state_dict()
    next(iter(loader))
    with pytest.raises(UsageError, match="read 2 batches and given out 1"):
        loader.state_dict()


class Stream(IterableDataset):
    """Split by worker, with random augmentation."""

    def __init__(self, n: int = 21) -> None:
        self.n = n

    def __iter__(self) -> Iterator[torch.Tensor]:
        info = get_worker_info()
        first, step = (info.id, info.num_workers) if info else (0, 1)
        for i in range(first, self.n, step):
            yield torch.tensor([i, torch.rand(()).item(), random.random(), np.random.rand()])


class StatefulStream(IterableDataset):
    """The same, which knows its position."""

    def __init__(self, n: int = 21) -> None:
        self.n = n
        self.next = 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        info = get_worker_info()
        first, step = (info.id, info.num_workers) if info else (0, 1)
        mine = list(range(first, self.n, step))
        while self.next < len(mine):
            self.next += 1
            noise = [torch.rand(()).item(), random.random(), np.random.rand()]
            yield torch.tensor([mine[self.next - 1], *noise])
        self.next = 0

    def state_dict(self) -> dict[str, int]:
        return {"next": self.next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.next = state["next"]


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_stateful_stream_goes_on_by_its_state(workers: int, persistent: bool) -> None:
    """Also at the ragged end, where one worker has no more than the others; augmentation included."""
    if persistent and not workers:
        return
    options = {"num_workers": workers, "persistent_workers": persistent}
    interrupted_equals_uninterrupted(
        lambda: DataLoader(StatefulStream(), batch_size=2, **options), (1, 4, 9, 11, 13, 16), 19
    )


class Restarting(IterableDataset):
    """A stream that a loaded state lets begin there, once; `ahead`: at its end it stands at the next epoch's begin."""

    def __init__(self, ahead: bool) -> None:
        self.ahead = ahead
        self.epoch = self.next = self.start = 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        self.next, self.start = self.start, 0
        while self.next < 6:
            self.next += 1
            yield torch.tensor([self.epoch, self.next, torch.rand(()).item()])
        self.epoch += 1
        if self.ahead:
            self.next = 0

    def state_dict(self) -> dict[str, int]:
        # Who has come to the end without `ahead` stands there in the epoch before.
        ended = self.next == 6 and not self.ahead
        return {"next": self.next, "epoch": self.epoch - ended}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.start, self.epoch = state["next"], state["epoch"]


@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("ahead", [False, True])
def test_a_stateful_stream_begins_anew_after_an_epochs_end(ahead: bool, twice: bool) -> None:
    """Whether its state is there that of the end or of a beginning; also of a state that is stored once more."""

    def epochs(loader: Any, count: int) -> list[Any]:
        return [[batch.tolist() for batch in loader] for _ in range(count)]

    seed(1)
    whole = epochs(prepare(DataLoader(Restarting(ahead), batch_size=4)), 3)
    seed(1)
    first, second = (prepare(DataLoader(Restarting(ahead), batch_size=4)) for _ in range(2))
    begun = epochs(first, 1)
    second.load_state_dict(through_a_file(first.state_dict()))
    if twice:
        state, second = second.state_dict(), prepare(DataLoader(Restarting(ahead), batch_size=4))
        second.load_state_dict(state)
    assert begun + epochs(second, 2) == whole


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("shard", [None, "stride"])
@pytest.mark.parametrize("begun", [False, True])
def test_a_loaded_state_can_be_stored_before_the_next_batch(shard: str | None, workers: int, begun: bool) -> None:
    """As it was, though a dataset is given its own state late."""

    def fresh() -> Any:
        return prepare(DataLoader(StatefulStream(), batch_size=2, num_workers=workers), iterable_shard=shard)

    first = fresh()
    passing = iter(first)
    for _ in range(3):
        next(passing)
    state = first.state_dict()
    wanted = [batch[:, 0].tolist() for batch in passing]
    second, third = fresh(), fresh()
    second.load_state_dict(state)
    held = iter(second) if begun else None
    third.load_state_dict(second.state_dict())
    assert [batch[:, 0].tolist() for batch in third] == wanted
    assert [batch[:, 0].tolist() for batch in held or second] == wanted


def test_an_iterator_that_was_begun_before_a_state_was_loaded_gives_nothing_more() -> None:
    """Its batches would come twice."""
    loader = prepare(DataLoader(Augmented(), batch_size=4))
    passing = iter(loader)
    next(passing)
    loader.load_state_dict(loader.state_dict())
    with pytest.raises(UsageError, match="begin it anew"):
        next(passing)
    assert [batch[0, 0].item() for batch in loader] == [4, 8, 12, 16, 20]


@pytest.mark.parametrize("workers", [1, 2])
def test_other_streams_are_read_again_which_is_said(workers: int) -> None:
    """Exact with workers, whose draws depend on the batch's number."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        interrupted_equals_uninterrupted(
            lambda: DataLoader(Stream(), batch_size=2, num_workers=workers), (1, 4, 13), 16
        )
    messages = [str(w.message) for w in caught]
    assert any("Stream has no state_dict" in m and "reads the 4 batches" in m for m in messages), messages


def test_a_stream_without_workers_and_state_is_read_again_from_the_epochs_random_state() -> None:
    """Exact where nothing else draws from the generators that it draws from."""
    seed(2)
    whole = [b.tolist() for b in prepare(DataLoader(Stream(), batch_size=2))]
    seed(2)
    loader = prepare(DataLoader(Stream(), batch_size=2))
    passing = iter(loader)
    head = [next(passing).tolist() for _ in range(3)]
    state, rng = loader.state_dict(), RandomState.capture()
    seed(7)
    resumed = prepare(DataLoader(Stream(), batch_size=2))
    resumed.load_state_dict(state)
    rng.restore()
    with pytest.warns(UserWarning, match="reads the 3 batches"):
        assert head + [b.tolist() for b in resumed] == whole


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("kind", [Stream, StatefulStream])
def test_a_strided_stream_goes_on_with_any_number_of_processes(kind: type, workers: int) -> None:
    """One stream over all ranks: 2 -> 1 -> 2 processes in mid-epoch; with workers, what the dataset draws too."""

    def stretch(world: int, state: Any, batches: int | None) -> tuple[list[list[Any]], Any]:
        parts, states = [], []
        for rank in range(world):
            cell = BatchWeight()
            raw = DataLoader(Whole(kind()), batch_size=8 // world, num_workers=workers)
            loader = prepare(raw, rank, world, iterable_shard="stride", weight=cell)
            seed(2)
            if state is not None:
                loader.load_state_dict(state)
            mine = []
            for batch in loader:
                rows = [(int(i), noise if workers else 0.0) for i, noise in batch.tolist()]
                mine.append(rows[: len(rows) if cell.num_real is None else cell.num_real])
                if len(mine) == batches:
                    break
            parts.append(mine)
            states.append(through_a_file(loader.state_dict()))
        return [[i for part in group for i in part] for group in zip(*parts, strict=True)], states[0]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        whole, _ = stretch(2, None, None)
        head, state = stretch(2, None, 1)
        middle, state = stretch(1, state, 1)
        tail, _ = stretch(2, state, None)
    assert [i for group in whole for i, _ in group] == list(range(21))
    assert len({noise for group in whole for _, noise in group}) == (21 if workers else 1)
    assert head + middle + tail == whole


@pytest.mark.parametrize("persistent", [False, True])
def test_a_strided_streams_workers_draw_anew_in_each_epoch(persistent: bool) -> None:
    """Persistent ones are started anew, since they keep what they were told."""
    raw = DataLoader(Whole(Stream()), batch_size=4, num_workers=1, persistent_workers=persistent)
    loader = prepare(raw, iterable_shard="stride")
    epochs = [tuple(b[:, 1].sum().item() for b in loader) for _ in range(3)]
    assert len(set(epochs)) == 3


class Shuffling(IterableDataset):
    """One stream for all, in an order of each epoch's."""

    def __iter__(self) -> Iterator[int]:
        return (i for i in torch.randperm(21).tolist())


@pytest.mark.parametrize("workers", [0, 1])
def test_a_strided_stream_that_shuffles_goes_on_in_its_order(workers: int) -> None:
    """Read again from the state that the epoch began from, whatever was drawn since."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for cut in (1, 3, 8, 12):
            log: list[Any] = []
            saved: Any = None
            rng = RandomState.capture()
            for resumed in (False, True):
                seed(99 if resumed else 3)
                raw = DataLoader(Shuffling(), batch_size=3, num_workers=workers)
                loader = prepare(raw, iterable_shard="stride")
                if resumed:
                    loader.load_state_dict(saved)
                    rng.restore()
                    del log[cut:]
                while len(log) < 18:
                    for batch in loader:
                        log.append([*batch.tolist(), torch.rand(1).item()])
                        if len(log) == cut:
                            saved, rng = through_a_file(loader.state_dict()), RandomState.capture()
                if not resumed:
                    whole = list(log)
            assert log == whole, cut


class Whole(IterableDataset):
    """A stream that doesn't split itself, with the state of the one within, if it has any."""

    def __init__(self, stream: Any) -> None:
        self.n = stream.n
        if isinstance(stream, StatefulStream):
            self.next = 0
            self.state_dict = lambda: {"next": self.next}
            self.load_state_dict = lambda state: setattr(self, "next", state["next"])

    def __iter__(self) -> Iterator[torch.Tensor]:
        position = getattr(self, "next", 0)
        while position < self.n:
            position += 1
            self.next = position
            yield torch.tensor([float(position - 1), random.random() + np.random.rand() + torch.rand(()).item()])
        self.next = 0


class OwnState(DataLoader):
    """Keeps its position itself."""

    def state_dict(self) -> dict[str, int]:
        return {"mine": 1}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.loaded = state


def test_a_loader_with_a_state_of_its_own_keeps_it() -> None:
    """On one process nothing is put into it; on several the user is told."""
    raw = OwnState(range(8), batch_size=2)
    loader = prepare(raw)
    assert loader.state_dict() == {"mine": 1}
    assert loader.batch_sampler is raw.batch_sampler
    with pytest.warns(UserWarning, match="OwnState keeps its position"):
        assert [b.tolist() for b in prepare(OwnState(range(8), batch_size=2), 1, 2)] == [[2, 3], [6, 7]]
