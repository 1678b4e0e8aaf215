"""Seeding of every random number generator that a training run draws from; it keeps no state of its own."""

from __future__ import annotations

import random

import numpy as np
import torch

from lite.errors import ConfigError

MAX_SEED = 2**32 - 1


def seed_everything(seed: int) -> int:
    """Seed Python's, numpy's and torch's generators (CPU and every accelerator) with `seed`.

    All ranks get the same seed, so that models built on each rank start out equal; what has to differ between ranks
    (random augmentation in loader workers) is set apart by `setup_dataloaders`.

    Args:
        seed: A whole number from 0 to 2**32 - 1, the range that numpy takes.

    Returns:
        The seed.

    Raises:
        ConfigError: `seed` is not a whole number in that range.

    Example:
        >>> seed_everything(7)
        7
    """
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or not 0 <= int(seed) <= MAX_SEED:
        raise ConfigError(f"seed={seed!r} is not a whole number from 0 to {MAX_SEED}; numpy takes no other.")
    seed = int(seed)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    return seed
