"""How many batches and samples a loader has, as far as it can say, and how many of its batches count."""

from __future__ import annotations

from typing import Any

from torch.utils.data import BatchSampler, DataLoader

from lite.data.sampler import ShardedSampler
from lite.errors import ConfigError

INFINITE = float("inf")


def length(loader: Any) -> int | None:
    """Number of batches, or None where it is unknown."""
    try:
        return len(loader)
    except (TypeError, NotImplementedError):
        return None


def limit_batches(limit: int | float, count: int | None, name: str) -> float:
    """How many batches count: a whole number of them, or a share of all.

    Raises:
        ConfigError: A share of an unknown number, or one that leaves nothing.

    Example:
        >>> limit_batches(0.5, 9, "limit_val_batches"), limit_batches(20, 9, "limit_val_batches")
        (4, 9)
    """
    if isinstance(limit, int):
        return min(limit, count) if count is not None else limit
    if count is None:
        if limit in (0.0, 1.0):
            return INFINITE if limit else 0
        raise ConfigError(f"{name}={limit!r} is a share of a loader without a length; give a whole number of batches.")
    wanted = int(count * limit)
    if wanted == 0 and limit > 0 and count > 0:
        raise ConfigError(
            f"{name}={limit!r} of {count} batches is none; give at least {1 / count:.3g}, or a whole number of batches."
        )
    return wanted


def sizes_of(loader: Any) -> tuple[int | None, int | None]:
    """Samples of a full batch and of an epoch, as far as the loader's sampler reaches; None: nobody knows."""
    if not isinstance(loader, DataLoader):
        return None, None
    sampler: Any = loader.batch_sampler
    if type(sampler) not in (BatchSampler, ShardedSampler) or sampler.batch_size is None:
        return None, None
    try:
        count = len(sampler.sampler)
    except TypeError:
        count = None
    return getattr(sampler, "group_size", sampler.batch_size), count
