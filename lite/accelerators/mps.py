"""Apple's GPU through Metal: one device, one process."""

from __future__ import annotations

from typing import Any

import torch

from lite.accelerators.base import Accelerator, DeviceProbe
from lite.accelerators.indices import parse_indices


class MPSAccelerator(Accelerator):
    """Runs on the one Metal device."""

    name = "mps"

    def is_available(self, probe: DeviceProbe) -> bool:
        return probe.mps

    def devices(self, request: Any, probe: DeviceProbe, shown: str) -> tuple[int, ...]:
        return parse_indices(request, int(probe.mps), "Metal device", shown)

    def stats(self, device: torch.device) -> dict[str, float]:
        return {"allocated_bytes": torch.mps.current_allocated_memory()}
