"""`seed_everything` with Lightning's arguments."""

from __future__ import annotations

import os

from lite.errors import ConfigError
from lite.lite import Lite

_VARIABLE = "PL_GLOBAL_SEED"


def seed_everything(seed: int | None = None, workers: bool = True, verbose: bool = True) -> int:
    """Seed Python, numpy and torch alike on all ranks.

    Args:
        seed: A whole number from 0 to 2**32 - 1; None takes the environment's PL_GLOBAL_SEED, or else 0.
        workers: Always so: loader workers draw from this seed, those of different ranks different numbers.
        verbose: Not used: nothing is printed.

    Returns:
        The seed.

    Raises:
        ConfigError: It is no such number.
    """
    if seed is None:
        given = os.environ.get(_VARIABLE, "0")
        if not given.isdigit():
            raise ConfigError(f"{_VARIABLE}={given!r} is not a whole number from 0 to 4294967295.")
        seed = int(given)
    return Lite.seed_everything(seed)
