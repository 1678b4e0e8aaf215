"""What `setup_dataloaders` hands back: a copy of the user's loader that gives out this rank's part of each global
batch.

The user's loader is never constructed anew: the copy shares everything it was given and differs in what it samples and
in what iteration does around each batch.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler

from lite.data.delivery import Delivery
from lite.data.iterable import StridedStream, identity
from lite.data.iteration import Iteration, Sync
from lite.data.sampler import ShardedSampler
from lite.data.shares import BatchWeight, Shard
from lite.data.split import interleave, is_distributed, keep_order, split_samplers
from lite.data.stream import StreamTracker
from lite.data.workers import RankedWorkerInit, start_shielded
from lite.disguise import disguise
from lite.errors import ConfigError, UsageError
from lite.seed import Moment

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
    same: Callable[[Any], bool] | None = None,
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
        same: Where several ranks have the same part: whether an object is equal on all of them. Collective.

    Raises:
        ConfigError: `loader` is no DataLoader, or it can't be split as asked.
        UsageError: It is set up already.
    """
    if isinstance(loader, (list, tuple)) and any(isinstance(one, DataLoader) for one in loader):
        raise ConfigError(
            f"setup_dataloaders got a {type(loader).__name__} of DataLoaders; unpack it: "
            "lite.setup_dataloaders(*loaders)."
        )
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
    ready = copied(loader)
    split = shard.world_size > 1 and bool(use_distributed_sampler)
    stream = isinstance(loader.dataset, IterableDataset)
    own_state = hasattr(type(loader), "state_dict")
    seed_rank = shard.rank if ready.num_workers > 0 and not own_state else None
    if not use_distributed_sampler:
        same = None
    strided: DataLoader[Any] | None = None
    sampler: ShardedSampler | None = None
    tracker: StreamTracker | None = None
    if stream and iterable_shard is not None and use_distributed_sampler:
        strided = _strided_loader(loader, shard)
    elif stream:
        tracker = None if own_state else StreamTracker(ready, seed_rank)
    else:
        # Asked on one process too: a sampler that is split for others would leave data out.
        sliced = bool(use_distributed_sampler) and not is_distributed(loader, shard) and split
        if sliced and use_distributed_sampler == "interleaved":
            interleave(ready, loader, shard)
            sliced = False
        if sliced or not own_state:
            part, agree = (shard, sync) if sliced else (Shard(0, 1), _itself if same is None else sync)
            sampler = split_samplers(ready, part, agree, seed_rank=seed_rank)
        if sliced:
            keep_order(ready)
    if own_state and split:
        warnings.warn(
            f"{type(loader).__name__} keeps its position by its own state_dict, which need not be exact on several "
            "processes; a plain DataLoader's is, after setup_dataloaders.",
            stacklevel=3,
        )
    if ready.num_workers > 0 and shard.rank > 0:
        # Not for a strided stream, which all ranks must read alike.
        ready.__dict__["worker_init_fn"] = RankedWorkerInit(shard.rank, ready.worker_init_fn)
    moves = device is not None and device.type != "cpu"
    delivery = Delivery(
        sampler=sampler,
        tracker=tracker,
        strided=strided is not None,
        weight=weight,
        device=device if moves else None,
        sync=sync,
        rank=shard.rank,
        watched=split and tracker is not None,
        same=same,
        own_iter=type(loader).__iter__ is not DataLoader.__iter__,
    )
    iteration = Iteration(
        ready, delivery, sampler=sampler, tracker=tracker, strided=strided, weight=weight, sync=sync, shard=shard
    )
    _give_iteration(ready, iteration, shard, own_state=own_state)
    _set_up.add(loader)
    _set_up.add(ready)
    return ready


def release_dataloader(loader: DataLoader[Any]) -> None:
    """Let the user's own loader be set up once more."""
    _set_up.discard(loader)


def _itself(obj: Any) -> Any:
    """The `sync` of a loader that is not split: every rank goes its own way."""
    return obj


def copied(loader: DataLoader[Any]) -> DataLoader[Any]:
    """The same loader once more; what it was given is shared, a running iterator is not."""
    twin = object.__new__(type(loader))
    twin.__dict__.update(loader.__dict__)
    # Private in torch, and checked with 2.13: where a DataLoader keeps the iterator of its persistent workers.
    twin.__dict__["_iterator"] = None
    return twin


def in_order(loader: DataLoader[Any]) -> DataLoader[Any]:
    """The same loader once more, with its dataset's items in their order; it has no batch sampler of the user's."""
    twin = copied(loader)
    sampler = SequentialSampler(loader.dataset)  # type: ignore[arg-type]
    twin.__dict__["sampler"] = sampler
    if loader.batch_sampler is not None:
        twin.__dict__["batch_sampler"] = BatchSampler(sampler, loader.batch_size or 1, loader.drop_last)
    return twin


def _give_iteration(loader: DataLoader[Any], iteration: Iteration, shard: Shard, *, own_state: bool) -> None:
    """Put the iteration around the loader's own, by a subclass that looks like the user's class."""
    raw = type(loader)
    raw_iter, raw_get_iterator = raw.__iter__, raw._get_iterator

    def routed_iter(self: DataLoader[Any]) -> Any:
        current = iteration.begin()
        source = iteration.open_strided(current) if iteration.strided is not None else raw_iter(self)
        return iteration.around(source, current)

    # torch 2.13 makes the workers, and draws their base seed, in this method.
    def _get_iterator(self: DataLoader[Any]) -> Any:
        with iteration.making_workers():
            return iteration.watch(start_shielded(self, lambda: raw_get_iterator(self)))

    def strided_len(self: DataLoader[Any]) -> int:
        assert self.batch_size is not None
        size, dataset = self.batch_size * shard.world_size, self.dataset
        count = len(dataset)  # type: ignore[arg-type]  # without a length: TypeError, as it is raw
        return count // size if self.drop_last else -(-count // size)

    def state_dict(self: DataLoader[Any], *, undone: int = 0) -> dict[str, Any]:
        """How far the user's loop has come, counted in batches that it was given; see `Lite.setup_dataloaders`.

        `undone` of them are to be given again: 1 within a step, whose batch is not done.
        """
        return iteration.state_dict(undone=undone)

    def check_state_dict(self: DataLoader[Any], state: dict[str, Any]) -> None:
        """Refuse a state that means nothing here; `Lite.load` asks before it changes anything."""
        iteration.check_state_dict(state)

    def load_state_dict(self: DataLoader[Any], state: dict[str, Any]) -> None:
        """Let the next iteration go on from there."""
        iteration.load_state_dict(state)
        for one in (self, iteration.strided):
            if one is not None:
                one._iterator = None  # workers that run already have prefetched something else

    def go_on_under(self: DataLoader[Any], moment: Moment) -> None:
        """What a loaded position is gone on with; `Lite.load` knows it."""
        iteration.go_on_under(moment)

    body: dict[str, Any] = {"__iter__": routed_iter, "_get_iterator": _get_iterator}
    if iteration.strided is not None:
        body["__len__"] = strided_len
    if own_state:
        body["state_is_per_rank"] = shard.world_size > 1
    else:
        body.update(state_dict=state_dict, check_state_dict=check_state_dict)
        body.update(load_state_dict=load_state_dict, go_on_under=go_on_under)
        body["batches_done"] = property(lambda self: iteration.batches_done)
        body["progress"] = lambda self: iteration.progress()
        body["note_epoch"] = lambda self: iteration.note_epoch()
        body["is_beside"] = property(lambda self: iteration.is_beside)
        body["is_held"] = lambda self, unread=False: iteration.is_held(unread=unread)
        body["state_is_per_rank"] = iteration.per_rank
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
    inner = copied(loader)
    inner.__class__ = DataLoader
    dataset: Any = loader.dataset
    dataset = StridedStream(dataset, loader.batch_size, loader.drop_last, loader.collate_fn, shard)
    inner.__dict__.update(dataset=dataset, batch_size=None, batch_sampler=None, drop_last=False, collate_fn=identity)
    return inner
