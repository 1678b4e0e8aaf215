"""What an exact position costs per batch: a plain DataLoader and the same one set up by lite, on the tiniest dataset.

python -m benchmarks.loader
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.harness import arguments, compare, finish, interleave
from lite import Lite

BATCH_SIZE = 8


def passes(loader: Any) -> Callable[[], None]:
    """A function that goes through the loader once."""

    def run() -> None:
        for _ in loader:
            pass

    return run


def main() -> None:
    args = arguments(__doc__, rounds=30, batches=500)
    torch.set_num_threads(1)
    dataset = TensorDataset(torch.zeros(BATCH_SIZE * args.batches, 2))
    lite = Lite(accelerator="cpu")
    rows = []
    for workers in (0, 2):
        options: dict[str, Any] = {"batch_size": BATCH_SIZE, "num_workers": workers, "persistent_workers": workers > 0}
        for order in ("sequential", "shuffled"):
            make = {"raw": DataLoader, "raw again": DataLoader}
            loaders = {name: kind(dataset, shuffle=order == "shuffled", **options) for name, kind in make.items()}
            loaders["lite"] = lite.setup_dataloaders(DataLoader(dataset, shuffle=order == "shuffled", **options))
            clock = time.perf_counter if workers else time.process_time
            contenders = {name: passes(loader) for name, loader in loaders.items()}
            times = interleave(contenders, args.rounds, args.batches, clock=clock)
            rows += compare(f"{order}, {workers} workers, batch {BATCH_SIZE} (us/step is us per batch)", times)
            del loaders
    finish(rows, args.json)


if __name__ == "__main__":
    main()
