"""What a loader's worker processes begin with: their rank's own random numbers, and no ear for a stop of the run."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

# Signals that may ask this process for a stop. Schedulers send them to all processes of a job, workers included; but
# those must live on, or the process that was asked has no data to finish its step with.
DEFAULT_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))
stop_signals = set(DEFAULT_SIGNALS)


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


def start_shielded(loader: DataLoader[Any], make: Callable[[], Any]) -> Any:
    """Return the iterator that `make` makes of the loader; its workers outlive a stop signal to the process group."""
    if loader.num_workers == 0 or not hasattr(signal, "pthread_sigmask"):
        return make()
    init, signals = loader.worker_init_fn, tuple(stop_signals)
    loader.__dict__["worker_init_fn"] = _ShieldedInit(signals, init)
    # A new process begins with what is blocked here, until it can say itself that it ignores them.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        batches = make()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        loader.__dict__["worker_init_fn"] = init
    for worker in getattr(batches, "_workers", ()):
        # torch and multiprocessing end a worker that hangs by a SIGTERM (torch 2.13, Python 3.10 to 3.14).
        worker.terminate = worker.kill
        worker._popen.terminate = worker._popen.kill
    return batches


class _ShieldedInit:
    """In the worker: ignore stop signals, then run the user's `worker_init_fn`."""

    def __init__(self, signals: tuple[signal.Signals, ...], then: Callable[[int], None] | None) -> None:
        self.signals = signals
        self.then = then

    def __call__(self, worker_id: int) -> None:
        for number in self.signals:
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self.signals)
        if self.then is not None:
            self.then(worker_id)
