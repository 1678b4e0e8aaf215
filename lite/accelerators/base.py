"""What an accelerator offers: its devices, making one current, and memory statistics; it places no model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch


@dataclass(frozen=True)
class DeviceProbe:
    """What this machine has, looked up once, so that planning stays a pure function.

    Args:
        cuda: Number of CUDA devices that this process can see.
        mps: Whether Apple's Metal device can be used.
    """

    cuda: int = 0
    mps: bool = False


class Accelerator(ABC):
    """One kind of device. A third party subclasses it and passes an instance as `accelerator=`."""

    name: ClassVar[str]

    @abstractmethod
    def is_available(self, probe: DeviceProbe) -> bool:
        """Whether this machine has at least one such device."""

    @abstractmethod
    def devices(self, request: Any, probe: DeviceProbe, shown: str) -> tuple[int, ...]:
        """Turn `devices=` into local device indices.

        Args:
            request: A number, "auto", -1 (all) or a list of indices.
            probe: What this machine has.
            shown: The request as the user wrote it, for messages.

        Raises:
            ConfigError: The request can't be met.
        """

    def device(self, index: int) -> torch.device:
        """The torch device with that index."""
        return torch.device(self.name, index)

    def activate(self, device: torch.device) -> None:  # noqa: B027 - nothing to do is a fine default
        """Make `device` the current one of this process."""

    def computes_in(self, dtype: torch.dtype, device: torch.device) -> bool:
        """Whether the device computes in that dtype by itself; asked on the process that has the device."""
        return True

    def stats(self, device: torch.device) -> dict[str, float]:
        """Memory statistics in bytes; empty where the device keeps none."""
        return {}
