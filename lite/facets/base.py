"""What every side of `Lite` stands on: the plan, who this process is, and whether it has joined its job."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer

from lite.accelerators import Accelerator
from lite.data.shares import BatchWeight
from lite.data.transfer import move_to_device
from lite.errors import UsageError
from lite.gradients import Accumulation
from lite.plan import Plan
from lite.precision.base import Precision
from lite.prepared import Prepared
from lite.sharded import whole_tensors
from lite.strategies.base import Engine, Strategy

if TYPE_CHECKING:
    from lite.guards.failure import FailureWatch


class Facet:
    """Base of the sides of `Lite`. It owns these attributes, which `Lite.__init__` and `Lite._connect` fill."""

    _plan: Plan
    _device: torch.device
    _store: Any
    _connected: bool
    _callbacks: tuple[Any, ...]
    _modules: dict[nn.Module, Engine | None]
    _weight: BatchWeight
    _prepared: Prepared
    _windows: list[tuple[Accumulation, set[nn.Module], Optimizer | None]]
    _watch: FailureWatch | None = None

    @property
    def device(self) -> torch.device:
        """This rank's device."""
        self._require_connected("device")
        return self._device

    @property
    def global_rank(self) -> int:
        """This process's number among all, from 0."""
        return self._plan.environment.global_rank()

    @property
    def local_rank(self) -> int:
        """This process's number on its machine, from 0."""
        return self._plan.environment.local_rank()

    @property
    def node_rank(self) -> int:
        """This machine's number, from 0."""
        return self._plan.environment.node_rank()

    @property
    def world_size(self) -> int:
        """Number of processes on all machines."""
        return self._plan.world_size

    @property
    def is_global_zero(self) -> bool:
        """Whether this is rank 0."""
        return self.global_rank == 0

    @property
    def strategy(self) -> Strategy:
        """The strategy in use."""
        return self._plan.strategy

    @property
    def precision(self) -> Precision:
        """The precision in use."""
        return self._plan.precision

    @property
    def accelerator(self) -> Accelerator:
        """The kind of device in use."""
        return self._plan.accelerator

    @property
    def is_accumulating(self) -> bool:
        """Whether a window of `accumulate` has gradients that wait for its remaining micro-batches."""
        return any(window.is_open for window, *_ in self._windows)

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches so far in the windows of `accumulate`."""
        return sum(window.total_count for window, *_ in self._windows)

    def explain(self) -> str:
        """Every setting with where it came from, and, once they are set up, what was done to models and loaders."""
        width = max(len(s.name) for s in self._plan.settings)
        lines = []
        for setting in self._plan.settings:
            source = f"from {setting.source}" if setting.source.startswith("LITE_") else setting.source
            lines.append(f"{setting.name:<{width}}  {setting.outcome}  ({source}: {setting.value!r})")
        launcher = type(self._plan.launcher).__name__
        lines.append(
            f"{'processes':<{width}}  " + ("running" if self._plan.started else f"to be started by {launcher}")
        )
        return "\n".join([*lines, *self._prepared.facts])

    def _require_connected(self, call: str) -> None:
        if not self._connected:
            count = len(self._plan.devices)
            raise UsageError(
                f"{call} needs the {count} processes that this Lite asks for, and they don't run yet; put the loop "
                "into a function and call lite.launch(fn), or start the script with torchrun "
                f"--nproc-per-node={count}."
            )

    def _meet(self, what: str, remedy: str) -> None:
        """Wait until all ranks make this call, but not for one that has gone on without. Collective, and rare."""
        if self._watch is not None:
            from lite.guards.meeting import meet

            meet(self._watch, what, remedy)

    def _for_group(self, data: Any) -> Any:
        """What can be sent: sharded tensors put together, and for NCCL on the device."""
        if self.strategy.shards:
            data = whole_tensors(data)
        return move_to_device(data, self._device) if self._device.type == "cuda" and self.world_size > 1 else data
