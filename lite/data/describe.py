"""What became of a loader, in words."""

from __future__ import annotations

from collections.abc import Sized
from typing import Any

from torch.utils.data import DataLoader


def describe_dataloader(loader: DataLoader[Any], parts: int, split: bool) -> str:
    """One line for `explain`: global batch, steps per epoch, and what happens to the last samples."""
    batch, dataset, sampler = loader.batch_size, loader.dataset, loader.sampler
    if batch is None or not hasattr(dataset, "__len__"):
        return f"loader of {type(dataset).__name__}: {'split over' if split else 'whole on'} {parts} rank(s)"
    shared = batch * parts if split else batch
    text = f"loader of {type(dataset).__name__}: global batch {batch * parts} ({batch} on each of {parts} rank(s))"
    try:
        steps = len(loader)
    except TypeError:
        return f"{text}; length unknown"
    rest = len(sampler) % shared if isinstance(sampler, Sized) else 0
    if not rest:
        return f"{text}; {steps} steps per epoch, all batches full"
    fate = "dropped" if loader.drop_last else "split evenly over the ranks in the last step, none padded"
    return f"{text}; {steps} steps per epoch, the last {rest} samples {fate}"
