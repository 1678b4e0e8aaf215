"""The kinds of device, and the look at what this machine has."""

from __future__ import annotations

import torch

from lite.accelerators.base import Accelerator, DeviceProbe
from lite.accelerators.cpu import CPUAccelerator
from lite.accelerators.cuda import CUDAAccelerator
from lite.accelerators.mps import MPSAccelerator

__all__ = [
    "ACCELERATORS",
    "Accelerator",
    "CPUAccelerator",
    "CUDAAccelerator",
    "DeviceProbe",
    "MPSAccelerator",
    "probe_devices",
]

ACCELERATORS: dict[str, type[Accelerator]] = {"cpu": CPUAccelerator, "cuda": CUDAAccelerator, "mps": MPSAccelerator}


def probe_devices() -> DeviceProbe:
    """Look at this machine, without beginning to use CUDA, after which this process could not fork."""
    return DeviceProbe(cuda=torch.cuda.device_count(), mps=torch.backends.mps.is_available())
