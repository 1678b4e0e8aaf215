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


def probe_devices(*, bf16: bool = False) -> DeviceProbe:
    """Look at this machine.

    Args:
        bf16: Also find out about bfloat16. That initialises CUDA in this process, after which it can't fork workers
            that use CUDA, so it is asked for only when the precision needs it.
    """
    count = torch.cuda.device_count()
    return DeviceProbe(
        cuda=count,
        cuda_bf16=bf16 and count > 0 and torch.cuda.is_bf16_supported(including_emulation=False),
        mps=torch.backends.mps.is_available(),
    )
