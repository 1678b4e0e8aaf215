"""Moving a batch to a device: every tensor in whatever nesting a collate function made, and nothing else."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from torch import Tensor


def move_to_device(data: Any, device: torch.device) -> Any:
    """Return `data` with its tensors on `device`; tensors that are there already are returned as they are.

    Args:
        data: A tensor, a dict, list, tuple, namedtuple or dataclass of such, or an object with a method `to(device)`.
            Other leaves are returned unchanged.
        device: The target. Copies from pinned memory to CUDA don't block.

    Example:
        >>> move_to_device({"x": torch.ones(2), "name": "a"}, torch.device("cpu"))
        {'x': tensor([1., 1.]), 'name': 'a'}
    """
    if isinstance(data, Tensor):
        # A current device without an index ("cuda") counts as any of its kind.
        if data.device == device or (device.index is None and data.device.type == device.type):
            return data
        return data.to(device, non_blocking=device.type == "cuda" and data.device.type == "cpu" and data.is_pinned())
    if data is None or isinstance(data, (str, bytes, int, float, bool)):
        return data
    if type(data) not in (dict, list, tuple) and callable(getattr(data, "to", None)):
        # Before the containers: a PackedSequence is a tuple of which one part must stay on the CPU.
        return data.to(device)
    if isinstance(data, dict):
        moved = {key: move_to_device(value, device) for key, value in data.items()}
        return moved if type(data) is dict else _refill(data, moved)
    if isinstance(data, tuple):
        parts = [move_to_device(value, device) for value in data]
        return data._make(parts) if hasattr(data, "_make") else tuple(parts)
    if isinstance(data, list):
        return [move_to_device(value, device) for value in data]
    if dataclasses.is_dataclass(data) and not isinstance(data, type):
        twin: Any = copy.copy(data)
        for field in dataclasses.fields(data):
            object.__setattr__(twin, field.name, move_to_device(getattr(data, field.name), device))
        return twin
    return data


def _refill(data: Any, moved: dict[Any, Any]) -> Any:
    """A dict subclass (OrderedDict, defaultdict, a user's own) with new values."""
    filled = copy.copy(data)
    for key, value in moved.items():
        filled[key] = value
    return filled
