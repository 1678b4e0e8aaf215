"""NVIDIA (and ROCm) GPUs through torch.cuda."""

from __future__ import annotations

from typing import Any

import torch

from lite.accelerators.base import Accelerator, DeviceProbe
from lite.accelerators.indices import parse_indices


class CUDAAccelerator(Accelerator):
    """Runs each rank on one CUDA device."""

    name = "cuda"

    def is_available(self, probe: DeviceProbe) -> bool:
        return probe.cuda > 0

    def devices(self, request: Any, probe: DeviceProbe, shown: str) -> tuple[int, ...]:
        return parse_indices(request, probe.cuda, "CUDA device", shown)

    def activate(self, device: torch.device) -> None:
        torch.cuda.set_device(device)

    def computes_in(self, dtype: torch.dtype, device: torch.device) -> bool:
        if dtype is not torch.bfloat16:
            return True
        with torch.cuda.device(device):
            return bool(torch.cuda.is_bf16_supported(including_emulation=False))

    def stats(self, device: torch.device) -> dict[str, float]:
        return {
            "allocated_bytes": torch.cuda.memory_allocated(device),
            "max_allocated_bytes": torch.cuda.max_memory_allocated(device),
            "reserved_bytes": torch.cuda.memory_reserved(device),
        }
