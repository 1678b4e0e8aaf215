"""What `setup_dataloaders` hands back: a copy of the user's loader that gives out this rank's part of each global
batch.

The user's loader is never constructed anew: the copy shares everything it was given and differs in what it samples and
in what iteration does around each batch.
"""

from __future__ import annotations

import random
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset

from lite.data.iterable import StridedStream, check_same_stream, check_unsplit, identity, warn_if_same
from lite.data.sampler import BatchWeight, Shard, ShardedSampler, Share
from lite.data.split import is_distributed, keep_order, samplers_of, split_samplers
from lite.data.transfer import move_to_device
from lite.disguise import disguise
from lite.errors import ConfigError, UsageError

Sync = Callable[[Any], Any]

_set_up: weakref.WeakSet[Any] = weakref.WeakSet()


def setup_dataloader(
    loader: DataLoader[Any],
    *,
    shard: Shard,
    device: torch.device | None,
    weight: BatchWeight,
    use_distributed_sampler: bool | str = True,
    iterable_shard: str | None = None,
    sync: Sync,
) -> DataLoader[Any]:
    """Return a copy of `loader` for this rank; see `Lite.setup_dataloaders`.

    Args:
        loader: The user's loader, which stays as it is.
        shard: This rank's part of each global batch.
        device: Where batches are moved; None or the CPU moves nothing.
        weight: Told what each batch counts, as it is given out.
        use_distributed_sampler: True, False or "interleaved".
        iterable_shard: None or "stride".
        sync: Returns rank 0's object on every rank.

    Raises:
        ConfigError: `loader` is no DataLoader, or it can't be split as asked.
        UsageError: It is set up already.
    """
    if not isinstance(loader, DataLoader):
        raise ConfigError(
            f"setup_dataloaders got a {type(loader).__name__}, not a torch DataLoader; wrap it in one, or split it "
            "yourself by lite.global_rank and move its batches with lite.to_device."
        )
    if loader in _set_up:
        raise UsageError("this DataLoader is set up already; use the loader that the first call returned.")
    if use_distributed_sampler not in (True, False, "interleaved"):
        raise ConfigError(
            f"use_distributed_sampler={use_distributed_sampler!r} is not known; use True, False or 'interleaved'."
        )
    ready = _copy(loader)
    split = shard.world_size > 1 and bool(use_distributed_sampler)
    stream = isinstance(loader.dataset, IterableDataset)
    strided = None
    if stream and iterable_shard is not None and use_distributed_sampler:
        strided = _strided_loader(loader, shard)
    elif use_distributed_sampler and not stream and not is_distributed(loader, shard) and split:
        split_samplers(ready, loader, shard, sync, interleaved=use_distributed_sampler == "interleaved")
        keep_order(ready)
    if ready.num_workers > 0 and shard.rank > 0:
        for one in (ready, strided):
            if one is not None:
                one.__dict__["worker_init_fn"] = RankedWorkerInit(shard.rank, loader.worker_init_fn)
    moves = device is not None and device.type != "cpu"
    iteration = _Iteration(
        ready,
        strided,
        weight,
        device if moves else None,
        sync,
        rank=shard.rank,
        watch=split and stream and strided is None,
    )
    _give_iteration(ready, iteration, shard, plain=not split and strided is None and not moves)
    _set_up.add(loader)
    _set_up.add(ready)
    return ready


def release_dataloader(loader: DataLoader[Any]) -> None:
    """Let the user's own loader be set up once more."""
    _set_up.discard(loader)


class _Iteration:
    """What happens around the batches of one loader."""

    def __init__(
        self,
        loader: DataLoader[Any],
        strided: DataLoader[Any] | None,
        weight: BatchWeight,
        device: torch.device | None,
        sync: Sync,
        *,
        rank: int,
        watch: bool,
    ) -> None:
        self.strided = strided
        self._weight = weight
        self._device = device
        self._sync = sync
        self._rank = rank
        self._watch = watch
        self._sharded = next((s for s in (loader.batch_sampler, loader.sampler) if isinstance(s, ShardedSampler)), None)
        self.epoch = 0
        self._epoch_samplers = [s for s in samplers_of(loader) if callable(getattr(s, "set_epoch", None))]
        self._last_epochs: list[Any] = []
        self._begun: Any = None

    def begin(self) -> None:
        """Count the epoch, and tell it to samplers that want to know and weren't told by the user."""
        self._weight.clear()
        self._begun = None if self._sharded is None else self._sharded.ragged
        for i, sampler in enumerate(self._epoch_samplers):
            if self.epoch > 0 and _epochs(sampler) == self._last_epochs[i]:
                last = next((e for e in _epochs(sampler).values() if isinstance(e, int)), self.epoch - 1)
                sampler.set_epoch(last + 1)
        self._last_epochs = [_epochs(sampler) for sampler in self._epoch_samplers]
        self.epoch += 1

    def around(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Give out batches in place, with their weights told."""
        if self.strided is not None:
            batches = self._unpack(batches)
        elif self._sharded is not None:
            batches = self._weigh(batches, self._sharded, self._sharded.ragged, self._begun)
        if self._watch and self.epoch == 1:
            batches = self._compare(batches)
        return batches if self._device is None else self._move(batches, self._device)

    def _weigh(
        self, batches: Iterator[Any], sharded: ShardedSampler, ragged: dict[int, Share], begun: dict[int, Share]
    ) -> Iterator[Any]:
        # Each iteration of the sampler has a table of its own. Where the user's class iterates in a generator, the
        # sampler starts with the first batch only.
        weight = self._weight
        for number, batch in enumerate(batches):
            if ragged is begun:
                ragged = _table_of_started(sharded, begun)
            weight.clear()
            if number in ragged:
                weight.set(ragged[number])
            yield batch
        weight.clear()

    def _unpack(self, batches: Iterator[Any]) -> Iterator[Any]:
        weight = self._weight
        first = None
        for batch, share, fingerprint in batches:
            if fingerprint is not None:
                first = fingerprint if first is None else first
                check_unsplit(fingerprint, first)
                check_same_stream(fingerprint, self._sync)
            weight.clear()
            if share is not None:
                weight.set(share)
            yield batch
        weight.clear()

    def _compare(self, batches: Iterator[Any]) -> Iterator[Any]:
        first = next(batches, None)
        warn_if_same(first, self._rank, self._sync)
        if first is not None:
            yield first
            yield from batches

    def _move(self, batches: Iterator[Any], device: torch.device) -> Iterator[Any]:
        for batch in batches:
            yield move_to_device(batch, device)


class RankedWorkerInit:
    """Lets the workers of different ranks draw different random numbers, then runs the user's `worker_init_fn`.

    Args:
        rank: The rank, above 0; rank 0's workers stay as torch seeds them.
        then: The user's function, or None.
    """

    def __init__(self, rank: int, then: Callable[[int], None] | None) -> None:
        self.rank = rank
        self.then = then

    def __call__(self, worker_id: int) -> None:
        seed = (torch.initial_seed() + self.rank * 0x9E3779B97F4A7C15) % 2**63
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        if self.then is not None:
            self.then(worker_id)


def _copy(loader: DataLoader[Any]) -> DataLoader[Any]:
    """The same loader once more; what it was given is shared, a running iterator is not."""
    twin = object.__new__(type(loader))
    twin.__dict__.update(loader.__dict__)
    twin.__dict__["_iterator"] = None
    return twin


def _table_of_started(sharded: ShardedSampler, begun: dict[int, Share]) -> dict[int, Share]:
    """The newest iteration's table; a loader that gives out batches without starting its sampler is refused."""
    if sharded.ragged is begun:
        raise UsageError(
            "the DataLoader's class gives out batches of an iterator that it made before lite.setup_dataloaders, so "
            "they can't be split over the ranks; use a plain DataLoader (persistent_workers=True keeps its workers "
            "alive)."
        )
    return sharded.ragged


def _epochs(sampler: Any) -> dict[str, Any]:
    """Where a sampler keeps its epoch, by name: `epoch`, `_epoch`, `current_epoch`."""
    return {name: value for name, value in getattr(sampler, "__dict__", {}).items() if "epoch" in name}


def _give_iteration(loader: DataLoader[Any], iteration: _Iteration, shard: Shard, *, plain: bool) -> None:
    """Put the iteration around the loader's own, by a subclass that looks like the user's class."""
    raw = type(loader)
    raw_iter = raw.__iter__

    def plain_iter(self: DataLoader[Any]) -> Any:
        iteration.begin()
        return raw_iter(self)

    def routed_iter(self: DataLoader[Any]) -> Any:
        iteration.begin()
        source = iter(iteration.strided) if iteration.strided is not None else raw_iter(self)
        return iteration.around(source)

    def strided_len(self: DataLoader[Any]) -> int:
        assert self.batch_size is not None
        size, dataset = self.batch_size * shard.world_size, self.dataset
        count = len(dataset)  # type: ignore[arg-type]  # without a length: TypeError, as it is raw
        return count // size if self.drop_last else -(-count // size)

    body: dict[str, Any] = {"__iter__": plain_iter if plain else routed_iter}
    if iteration.strided is not None:
        body["__len__"] = strided_len
    disguise(loader, body)


def _strided_loader(loader: DataLoader[Any], shard: Shard) -> DataLoader[Any]:
    """A loader like the user's over the strided stream, which makes whole batches itself."""
    if loader.batch_size is None:
        raise ConfigError(
            "shard='stride' needs a batch_size: with batch_size=None the dataset makes the batches, so it must split "
            "them itself."
        )
    if type(loader).__iter__ is not DataLoader.__iter__:
        raise ConfigError(
            f"shard='stride' can't keep {type(loader).__name__}.__iter__; use a plain DataLoader, or split the dataset "
            "by rank and worker yourself and leave shard out."
        )
    inner = _copy(loader)
    inner.__class__ = DataLoader
    dataset: Any = loader.dataset
    dataset = StridedStream(dataset, loader.batch_size, loader.drop_last, loader.collate_fn, shard)
    inner.__dict__.update(dataset=dataset, batch_size=None, batch_sampler=None, drop_last=False, collate_fn=identity)
    return inner
