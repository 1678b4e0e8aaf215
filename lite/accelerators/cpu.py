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

    def devices(self, request: Any, probe: DeviceProbe) -> tuple[int, ...]:
        if request == "auto":
            return (0,)
        count = int(request) if isinstance(request, str) and request.strip().isdigit() else request
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ConfigError(
                f"devices={request!r} can't be used with accelerator='cpu', which takes a number of processes; "
                "use devices=2, say."
            )
        return tuple(range(count))

    def device(self, index: int) -> torch.device:
        return torch.device("cpu")
