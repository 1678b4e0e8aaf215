"""Which samplers a loader's copy gets on each rank; it changes copies only and draws nothing."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler
from torch.utils.data.distributed import DistributedSampler

from lite.data.sampler import ShardedSampler
from lite.data.shares import Shard
from lite.errors import ConfigError
from lite.seed import Generator, is_generator

Sync = Callable[[Any], Any]


def split_samplers(ready: DataLoader[Any], shard: Shard, sync: Sync, *, seed_rank: int | None) -> ShardedSampler:
    """Let the copy sample this rank's slices, and return what does it.

    Args:
        ready: The copy of the user's loader.
        shard: This rank's part of each global batch; the only one where the loader is not split.
        sync: Returns rank 0's object on every rank; the same object where the loader is not split.
        seed_rank: This rank, where it has workers.
    """
    # With batch_size=None the sampler itself may be a BatchSampler, for a dataset that takes lists of indices.
    automatic = ready.batch_sampler is not None
    batch_sampler: Any = ready.batch_sampler if automatic else ready.sampler
    plain = type(batch_sampler) is BatchSampler
    source: Any = batch_sampler.sampler if plain else batch_sampler
    sharded = ShardedSampler(
        source,
        shard,
        batch_size=batch_sampler.batch_size if plain else None,
        single=not automatic and not plain,
        drop_last=bool(batch_sampler.drop_last) if plain else False,
        generators=generators_of(ready),
        sync=sync,
        seed_rank=seed_rank,
    )
    ready.__dict__["batch_sampler" if automatic else "sampler"] = sharded
    return sharded


def interleave(ready: DataLoader[Any], loader: DataLoader[Any], shard: Shard) -> None:
    """Put torch's DistributedSampler in the place of a plain sampler."""
    if type(loader.sampler) not in (SequentialSampler, RandomSampler) or type(loader.batch_sampler) is not BatchSampler:
        raise ConfigError(
            f"use_distributed_sampler='interleaved' can't replace a {type(loader.sampler).__name__} or a custom "
            "batch sampler; use True, which keeps it."
        )
    sampler: DistributedSampler[Any] = DistributedSampler(
        loader.dataset,
        shard.world_size,
        shard.rank,
        shuffle=isinstance(loader.sampler, RandomSampler),
        drop_last=loader.drop_last,
    )
    assert loader.batch_size is not None
    batch_sampler = BatchSampler(sampler, loader.batch_size, loader.drop_last)
    ready.__dict__.update(sampler=sampler, batch_sampler=batch_sampler)


def is_distributed(loader: DataLoader[Any], shard: Shard) -> bool:
    """Whether the user's sampler is split by rank already; one for other ranks is refused."""
    for sampler in samplers_of(loader):
        if isinstance(sampler, DistributedSampler):
            if (sampler.num_replicas, sampler.rank) != (shard.world_size, shard.rank):
                raise ConfigError(
                    f"the loader's DistributedSampler has num_replicas={sampler.num_replicas}, rank={sampler.rank}, "
                    f"but this is rank {shard.rank} of {shard.world_size}; leave the sampler out (use shuffle=True), "
                    "lite splits the data."
                )
            return True
    return False


def samplers_of(loader: DataLoader[Any]) -> list[Any]:
    """The loader's sampler, its batch sampler, and a sampler within that, each once."""
    found: list[Any] = []
    pending = [loader.batch_sampler, loader.sampler]
    while pending:
        sampler: Any = pending.pop()
        if sampler is None or any(sampler is s for s in found):
            continue
        found.append(sampler)
        pending.append(getattr(sampler, "sampler", None))
    return found


def generators_of(loader: DataLoader[Any]) -> list[Generator]:
    """The generators that the user gave to the loader or keeps in a sampler, each once."""
    found: list[Generator] = []
    for thing in (loader, *samplers_of(loader)):
        values = [loader.generator] if thing is loader else getattr(thing, "__dict__", {}).values()
        found.extend(v for v in values if is_generator(v) and not any(v is g for g in found))
    return found


def keep_order(ready: DataLoader[Any]) -> None:
    """Batches in the sampler's order: out of order, ranks would mix slices of different global batches."""
    if ready.num_workers > 0 and not ready.in_order:
        warnings.warn(
            "in_order=False is ignored on several processes: each step takes the slices of one global batch.",
            stacklevel=5,
        )
        ready.__dict__["in_order"] = True
