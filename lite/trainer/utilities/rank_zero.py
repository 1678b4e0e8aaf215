"""What runs on rank 0 alone, before a Trainer is there, too."""

from __future__ import annotations

import functools
import logging
import os
import warnings
from collections.abc import Callable
from typing import Any

from torch import distributed

from lite import collectives
from lite.environments import detect_environment

_log = logging.getLogger("lite")


class _RankZeroOnly:
    """A decorator: the function runs on rank 0, and gives `default` on the others."""

    @property
    def rank(self) -> int:
        """This process's number: of the process group, or, where there is none yet, what the launcher says."""
        if distributed.is_available() and distributed.is_initialized():
            return collectives.rank()
        return detect_environment(os.environ).global_rank()

    def __call__(self, fn: Callable[..., Any], default: Any = None) -> Callable[..., Any]:
        @functools.wraps(fn)
        def on_rank_zero(*args: Any, **kwargs: Any) -> Any:
            return fn(*args, **kwargs) if self.rank == 0 else default

        return on_rank_zero


rank_zero_only = _RankZeroOnly()


def rank_zero_warn(message: Any, stacklevel: int = 1, **kwargs: Any) -> None:
    """`warnings.warn` on rank 0."""
    if rank_zero_only.rank == 0:
        warnings.warn(message, stacklevel=stacklevel + 1, **kwargs)


def rank_zero_info(*args: Any, **kwargs: Any) -> None:
    """Log on rank 0, by the logger "lite"."""
    if rank_zero_only.rank == 0:
        _log.info(*args, **kwargs)
