"""What a loader's worker processes begin with: their rank's own random numbers, and no ear for a stop of the run."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

# Signals that ask this process for a stop. Schedulers send them to all processes of a job, workers included; but those
# must live on, or the process that was asked has no data to finish its step with.
stop_signals: set[signal.Signals] = set()


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


@contextmanager
def shielded(loader: DataLoader[Any]) -> Iterator[None]:
    """Workers that the block starts outlive a stop signal to the whole process group."""
    if loader.num_workers == 0 or not stop_signals:
        yield
        return
    init = loader.worker_init_fn
    loader.__dict__["worker_init_fn"] = _ShieldedInit(tuple(stop_signals), init)
    # A new process begins with what is blocked here, until it can say itself what it does with a signal.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, stop_signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        loader.__dict__["worker_init_fn"] = init


class _ShieldedInit:
    """In the worker: ignore stop signals, then run the user's `worker_init_fn`.

    torch and multiprocessing end a worker that hangs by a SIGTERM each; the second one does.
    """

    def __init__(self, signals: tuple[signal.Signals, ...], then: Callable[[int], None] | None) -> None:
        self.signals = signals
        self.then = then

    def __call__(self, worker_id: int) -> None:
        for number in self.signals:
            signal.signal(number, _default_next if number == signal.SIGTERM else signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self.signals)
        if self.then is not None:
            self.then(worker_id)


def _default_next(number: int, frame: Any) -> None:
    signal.signal(number, signal.SIG_DFL)
