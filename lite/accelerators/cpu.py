"""The CPU as an accelerator: `devices` is a number of processes."""

from __future__ import annotations

from typing import Any

import torch

from lite.accelerators.base import Accelerator, DeviceProbe
from lite.errors import ConfigError


class CPUAccelerator(Accelerator):
    """Runs each rank on the CPU."""

    name = "cpu"

    def is_available(self, probe: DeviceProbe) -> bool:
        return True

    def devices(self, request: Any, probe: DeviceProbe, shown: str) -> tuple[int, ...]:
        if isinstance(request, str) and request == "auto":
            return (0,)
        if isinstance(request, bool) or not isinstance(request, int) or request < 1:
            raise ConfigError(
                f"{shown} can't be used with accelerator='cpu', which takes a number of processes, at least 1; use "
                "devices=2, say."
            )
        return tuple(range(request))

    def device(self, index: int) -> torch.device:
        return torch.device("cpu")
