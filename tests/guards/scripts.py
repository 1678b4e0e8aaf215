"""Scripts that the guards' tests run under torchrun; the first argument says what happens to rank 1."""

from __future__ import annotations

import os
import signal
import sys
import time
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from lite import DDPStrategy, Lite, PeerError


class Samples(Dataset[Any]):
    """A data set that can fail."""

    def __init__(self, fails: bool) -> None:
        self.fails = fails

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> Any:
        if self.fails and index >= 8:
            raise ValueError("boom in the data")
        return torch.ones(4)


class Bad(torch.autograd.Function):
    """Fails in backward."""

    @staticmethod
    def forward(ctx: Any, x: Any) -> Any:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        raise ValueError("boom in backward")


def train(what: str) -> None:
    timeout_s = 8 if what == "hang" else 60
    lite = Lite(accelerator="cpu", strategy=DDPStrategy(timeout=timedelta(seconds=timeout_s)))
    one = lite.global_rank == 1
    model = nn.Linear(4, 4)
    lite.setup(model, optimizer := torch.optim.SGD(model.parameters(), lr=0.1))
    loader = lite.setup_dataloaders(DataLoader(Samples(one and what == "data"), batch_size=2))
    try:
        for step, x in enumerate(loader):
            bad = one and step == 2
            if bad and what == "before":
                raise ValueError("boom before")
            if bad and what == "exit":
                sys.exit(3)
            if bad and what == "raise":
                raise SystemExit(3)
            if bad and what == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if bad and what == "early":
                return
            if bad and what == "hang":
                time.sleep(100)
            y = model(x)
            lite.backward((Bad.apply(y) if bad and what == "backward" else y).sum())
            optimizer.step()
            if bad and what == "after":
                raise ValueError("boom after")
            if step == 2 and what == "asleep":  # rank 0 waits without a collective
                if bad:
                    raise ValueError("boom while rank 0 sleeps")
                time.sleep(100)
            if step == 2 and what == "barrier":
                if bad:
                    raise ValueError("boom at the barrier")
                lite.barrier()
            if step == 2 and what == "first":
                with lite.rank_zero_first():
                    if one:
                        raise ValueError("boom in rank_zero_first")
                lite.barrier()
            if step == 2 and what == "own":  # a collective that lite doesn't know of
                if bad:
                    raise ValueError("boom at my own")
                torch.distributed.barrier()
    finally:
        print(f"rank {lite.global_rank} cleans up", flush=True)


def lives() -> None:
    """The first life fails on rank 1 while a stop is asked for; the second knows nothing of it."""
    life = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    lite = Lite(accelerator="cpu")
    stopped = lite.should_stop()
    if life == 0:
        lite.request_stop("first life")
        time.sleep(1)
        for _ in range(3):
            lite.should_stop()
        if lite.global_rank == 1:
            raise ValueError("boom in the first life")
        time.sleep(100)
    started = time.monotonic()
    count = 0
    while time.monotonic() < started + 8:  # past every grace period
        lite.barrier()
        time.sleep(0.05)
        count += 1
        if count < 80:
            stopped = lite.should_stop()
        elif count == 80:
            break
    print(f"life {life} rank {lite.global_rank} stopped {stopped} reason {lite.stop_reason}", flush=True)


def save_alone(folder: str, strategy: str, case: str) -> None:
    """Rank 0 saves, and rank 1 goes on without, has ended, or is only late."""
    from lite.guards import meeting

    meeting._ASK_AGAIN_S, meeting._LONGEST_S, meeting._STILL_S = 0.5, 1.0, 2.0  # soon
    lite = Lite(accelerator="cpu", strategy=strategy)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    model, optimizer = lite.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))

    def train(steps: int) -> None:
        for _ in range(steps):
            lite.backward(model(torch.rand(4, 4)).sum())
            optimizer.step()
            optimizer.zero_grad()

    train(2)
    if case == "late" and lite.global_rank == 1:  # it sleeps, then has more backwards than the other rank
        time.sleep(3)
        with lite.no_backward_sync(model):
            end = time.monotonic() + 3
            while time.monotonic() < end:
                lite.backward(model(torch.rand(4, 4)).sum())
        optimizer.zero_grad()
    if case == "late" or lite.global_rank == 0:
        lite.save(f"{folder}/x.ckpt", {"model": model})
    train(0 if case == "last" else 2)


def stop_on_sigterm() -> None:
    lite = Lite(accelerator="cpu")
    with lite.stop_on_signals() as signals:
        for step in range(10_000):
            time.sleep(0.01)
            if step == 20:
                print("ready", flush=True)
            if lite.should_stop():
                break
    print(f"rank {lite.global_rank} step {step} {lite.stop_signal} {signals.received!r}", flush=True)
    lite.barrier()


def save_meanwhile(path: str) -> None:
    """Rank 1 fails while rank 0 writes in the background, in a loop that nothing ends."""
    from lite.guards import failure
    from lite.storage import Storage

    failure._GRACE_S = failure._CLEANUP_S = 0.2
    real = Storage.replace
    Storage.replace = lambda *args: time.sleep(4) or real(*args)  # type: ignore[assignment,func-returns-value]
    lite = Lite(accelerator="cpu")
    lite.save(path, {"w": torch.ones(3)}, async_save=True)
    if lite.global_rank == 1:
        raise ValueError("boom during a save")
    while True:
        with suppress(PeerError):
            time.sleep(100)


if __name__ == "__main__":
    scripts = {"save": save_meanwhile, "alone": save_alone, "lives": lives, "sigterm": stop_on_sigterm}
    name, *arguments = sys.argv[1:]
    if name in scripts:
        scripts[name](*arguments)
    else:
        train(name)
