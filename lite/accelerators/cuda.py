"""NVIDIA (and ROCm) GPUs through torch.cuda."""

from __future__ import annotations

from typing import Any

import torch

from lite.accelerators.base import Accelerator, DeviceProbe
from lite.errors import ConfigError


class CUDAAccelerator(Accelerator):
    """Runs each rank on one CUDA device."""

    name = "cuda"

    def is_available(self, probe: DeviceProbe) -> bool:
        return probe.cuda > 0

    def devices(self, request: Any, probe: DeviceProbe) -> tuple[int, ...]:
        return parse_indices(request, probe.cuda, "CUDA device")

    def activate(self, device: torch.device) -> None:
        torch.cuda.set_device(device)

    def stats(self, device: torch.device) -> dict[str, float]:
        return {
            "allocated_bytes": torch.cuda.memory_allocated(device),
            "max_allocated_bytes": torch.cuda.max_memory_allocated(device),
            "reserved_bytes": torch.cuda.memory_reserved(device),
        }


def parse_indices(request: Any, available: int, noun: str) -> tuple[int, ...]:
    """Turn a device request into indices: "auto" is the first device, -1 all, a number so many, a list those.

    Raises:
        ConfigError: The request is malformed, repeats a device or asks for one that isn't there.

    Example:
        >>> parse_indices("0,1", 4, "CUDA device")
        (0, 1)
    """
    shown = f"devices={request!r}"
    there = f"this machine has {available} {noun}{'' if available == 1 else 's'}"
    value: Any = request
    if isinstance(value, str) and value != "auto":
        try:
            value = [int(part) for part in value.split(",") if part.strip()] if "," in value else int(value)
        except ValueError:
            raise ConfigError(f"{shown} is neither a number, 'auto', nor a list such as '0,1'; {there}.") from None
    if value == "auto":
        return (0,)
    if isinstance(value, int) and not isinstance(value, bool):
        if value == -1:
            return tuple(range(available))
        if value < 1:
            raise ConfigError(f"{shown} must be at least 1 (or -1 for all); {there}.")
        if value > available:
            raise ConfigError(f"{shown} asks for more than there are: {there}.")
        return tuple(range(value))
    if (
        isinstance(value, (list, tuple))
        and value
        and all(isinstance(i, int) and not isinstance(i, bool) for i in value)
    ):
        if len(set(value)) != len(value):
            raise ConfigError(f"{shown} names a device twice; name each once.")
        if not all(0 <= i < available for i in value):
            raise ConfigError(f"{shown} names a device that isn't there: {there}, numbered from 0.")
        return tuple(value)
    raise ConfigError(f"{shown} is not understood; use a number, 'auto', -1 (all) or a list such as [0, 1]; {there}.")
