"""Loops whose ranks run out of batches at different steps, under DDP."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.join import Join, Joinable, JoinHook
from torch.optim import Optimizer

from lite import collectives


@contextmanager
def join(
    ddps: Sequence[nn.parallel.DistributedDataParallel],
    optimizers: Sequence[Optimizer],
    *,
    divide_by_initial_world_size: bool,
    throw_on_early_termination: bool,
) -> Iterator[None]:
    """Let ranks that are done answer the others; give everyone the last rank's model and optimizer state at the end."""
    if not ddps:
        yield
        return
    last = _Last(ddps[0])
    with Join(
        [*ddps, last],
        throw_on_early_termination=throw_on_early_termination,
        divide_by_initial_world_size=divide_by_initial_world_size,
    ):
        yield
    # DDP sends the model alone, and a rank that stopped early would step on with old momentum.
    source = max(rank for rank, is_last in enumerate(collectives.all_gather_objects(last.is_last)) if is_last)
    for optimizer in optimizers:
        state = collectives.broadcast(optimizer.state_dict() if dist.get_rank() == source else None, source)
        if dist.get_rank() != source:
            optimizer.load_state_dict(state)


class _Last(Joinable):
    """Knows afterwards whether this rank was among the last that trained."""

    def __init__(self, ddp: nn.parallel.DistributedDataParallel) -> None:
        super().__init__()
        self._ddp = ddp
        self.is_last = False

    def join_hook(self, **kwargs: Any) -> JoinHook:
        return _Noting(self)

    @property
    def join_device(self) -> torch.device:
        return self._ddp.join_device  # type: ignore[no-any-return]

    @property
    def join_process_group(self) -> Any:
        return self._ddp.join_process_group


class _Noting(JoinHook):
    def __init__(self, last: _Last) -> None:
        self._last = last

    def post_hook(self, is_last_joiner: bool) -> None:
        self._last.is_last = is_last_joiner
