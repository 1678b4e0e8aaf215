"""Loops whose ranks run out of batches at different steps, under DDP.

Relies on parts of torch that it doesn't document, as they are in torch 2.13: `Joinable._join_config`, which torch
leaves as it was in the block, and `DistributedDataParallel.reducer._set_forward_pass_work_handle`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.join import Join, Joinable, JoinHook, _JoinConfig
from torch.optim import Optimizer

from lite import collectives
from lite.strategies.ddp_engine import DDPEngine, Engines


@contextmanager
def join(
    engines: Sequence[DDPEngine],
    optimizers: Sequence[Optimizer],
    job: Engines,
    *,
    divide_by_initial_world_size: bool,
    throw_on_early_termination: bool,
) -> Iterator[None]:
    """Let ranks that are done answer the others; give everyone the last rank's model and optimizer state at the end."""
    trained = {engine: ddp for engine in engines if (ddp := engine.ddp) is not None}
    ddps = list(trained.values())
    if not ddps:
        yield
        return
    last = _Last(ddps[0])
    answering = Join(
        [*ddps, last],
        throw_on_early_termination=throw_on_early_termination,
        divide_by_initial_world_size=divide_by_initial_world_size,
    )
    try:
        with answering, job.in_turn(trained):
            yield
    finally:
        for ddp in ddps:  # else each later forward would tell ranks that no longer answer, and go by how many did
            ddp._join_config = _JoinConfig.construct_disabled_join_config()  # type: ignore[no-untyped-call]
            ddp.reducer._set_forward_pass_work_handle(None, True)  # type: ignore[arg-type]
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
