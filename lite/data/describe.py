"""What became of a loader, in words."""

from __future__ import annotations

from collections.abc import Sized
from typing import Any

from torch.utils.data import DataLoader, IterableDataset
from torch.utils.data.distributed import DistributedSampler

from lite.data.split import samplers_of


def describe_dataloader(
    ready: DataLoader[Any], loader: DataLoader[Any], parts: int, split: bool | str, iterable_shard: str | None
) -> str:
    """One line for `explain`: who gets which samples, steps per epoch, and what happens to the last samples.

    Args:
        ready: What `setup_dataloader` returned.
        loader: The user's own.
        parts: Over how many ranks it could be split.
        split: The `use_distributed_sampler` that was asked for.
        iterable_shard: The `shard` that was asked for.
    """
    text = f"loader of {type(loader.dataset).__name__}: "
    if parts == 1:
        return f"{text}whole, on the one rank{_steps(ready)}"
    if not split:
        return f"{text}not split, each of {parts} ranks has all of it{_steps(ready)}"
    if isinstance(loader.dataset, IterableDataset):
        if iterable_shard is None:
            return f"{text}split by nobody but the dataset itself, on {parts} ranks{_steps(ready)}"
        return f"{text}each global batch of its one stream is split over {parts} ranks{_steps(ready)}"
    own = next((s for s in samplers_of(loader) if isinstance(s, DistributedSampler)), None)
    sampler = (
        own if own is not None else next((s for s in samplers_of(ready) if isinstance(s, DistributedSampler)), None)
    )
    if sampler is not None:
        whose = "by its own DistributedSampler" if own is not None else "in torch's DistributedSampler order"
        return f"{text}split {whose} over {parts} ranks{_steps(ready)}{_padding(sampler)}"
    batch, source = loader.batch_size, loader.sampler
    if batch is None:
        dealt = f"its batches go to the {parts} ranks in turn"
        if loader.batch_sampler is not None:
            return f"{text}{dealt}, the rest of them divided in the last step{_steps(ready)}"
        return f"{text}{dealt}{_steps(ready)}; in the last one a rank without one repeats another's, which counts 0"
    text += f"global batch {batch * parts} ({batch} on each of {parts} ranks){_steps(ready)}"
    rest = len(source) % (batch * parts) if isinstance(source, Sized) else 0
    if not rest:
        return f"{text}, all batches full" if isinstance(source, Sized) else text
    fate = "dropped" if loader.drop_last else "split evenly over the ranks in the last step, none padded"
    return f"{text}, the last {rest} samples {fate}"


def _steps(loader: DataLoader[Any]) -> str:
    try:
        return f"; {len(loader)} steps per epoch"
    except TypeError:
        return "; length unknown"


def _padding(sampler: DistributedSampler[Any]) -> str:
    extra = sampler.total_size - len(sampler.dataset)  # type: ignore[arg-type]
    if extra > 0:
        return f", {extra} samples repeated so that all ranks have as many"
    return f", {-extra} samples dropped so that all ranks have as many" if extra < 0 else ""
