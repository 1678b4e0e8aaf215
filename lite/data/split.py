"""Which samplers a loader's copy gets on each rank; it changes copies only and draws nothing."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler
from torch.utils.data.distributed import DistributedSampler

from lite.data.sampler import Shard, ShardedSampler
from lite.errors import ConfigError

Sync = Callable[[Any], Any]


def split_samplers(
    ready: DataLoader[Any], loader: DataLoader[Any], shard: Shard, sync: Sync, *, interleaved: bool
) -> None:
    """Let the copy sample this rank's slices."""
    if interleaved:
        ready.__dict__.update(_interleaved(loader, shard))
        return
    # With batch_size=None the sampler itself may be a BatchSampler, for a dataset that takes lists of indices.
    automatic = loader.batch_sampler is not None
    batch_sampler: Any = loader.batch_sampler if automatic else loader.sampler
    plain = type(batch_sampler) is BatchSampler
    source: Any = batch_sampler.sampler if plain else batch_sampler
    sharded = ShardedSampler(
        source,
        shard,
        batch_size=batch_sampler.batch_size if plain else None,
        single=not automatic and not plain,
        drop_last=bool(batch_sampler.drop_last) if plain else False,
        generators=_generators(loader),
        sync=sync,
    )
    ready.__dict__["batch_sampler" if automatic else "sampler"] = sharded


def _interleaved(loader: DataLoader[Any], shard: Shard) -> dict[str, Any]:
    """torch's DistributedSampler in the place of a plain sampler."""
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
    return {"sampler": sampler, "batch_sampler": BatchSampler(sampler, loader.batch_size, loader.drop_last)}


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


def _generators(loader: DataLoader[Any]) -> list[torch.Generator]:
    """The generators that the user gave, each once."""
    candidates = [getattr(thing, "generator", None) for thing in (loader, *samplers_of(loader))]
    found: list[torch.Generator] = []
    for candidate in candidates:
        if isinstance(candidate, torch.Generator) and not any(candidate is g for g in found):
            found.append(candidate)
    return found


def keep_order(ready: DataLoader[Any]) -> None:
    """Batches in the sampler's order: out of order, ranks would mix slices of different global batches."""
    if ready.num_workers > 0 and not ready.in_order:
        warnings.warn(
            "in_order=False is ignored on several processes: each step takes the slices of one global batch.",
            stacklevel=5,
        )
        ready.__dict__["in_order"] = True
