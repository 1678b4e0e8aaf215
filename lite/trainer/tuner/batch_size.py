"""The largest batch size that fits into memory, by short trainings with ever larger ones."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch

from lite import collectives

_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory", "cublas_status_alloc_failed")


def search(
    fits: Callable[[int], bool], start: int, *, mode: str, max_trials: int, limit: Callable[[], int | None]
) -> int:
    """The largest size that `fits` accepts, doubling from `start`; "binsearch" then halves what lies between.

    Args:
        fits: Tries a size.
        start: The first one.
        mode: "power" or "binsearch".
        max_trials: Tries at most.
        limit: Asked after each try: no size need be larger.

    Returns:
        The size; 0 where not even one sample fits.

    Example:
        >>> [search(lambda n: n <= 100, 2, mode=m, max_trials=25, limit=lambda: None) for m in ("power", "binsearch")]
        [64, 100]
    """
    good, bad, size = 0, None, start
    for _ in range(max_trials):
        if fits(size):
            good = size
        else:
            bad = size
        most = limit()
        if most is not None and good >= most:
            return most
        if bad is None:
            size = good * 2 if most is None else min(good * 2, most)
        elif good == 0:
            size = bad // 2
        elif mode == "power":
            break
        else:
            size = (good + bad) // 2
        if size == good or size == 0:
            break
    return good


def fits_into_memory(run: Callable[[], Any]) -> bool:
    """Whether `run` ends without a lack of memory, on all ranks. Collective: call on all ranks."""
    failed = False
    try:
        run()
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError) and not any(text in str(error).lower() for text in _OUT_OF_MEMORY):
            raise
        failed = True
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return not collectives.any_rank(failed)
