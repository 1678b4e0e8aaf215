"""What sends DDP's gradients instead of DDP itself: smaller, by name or by a function of the user's."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lite.errors import ConfigError, choose

NAMES = ("fp16", "bf16", "powersgd")
Register = Callable[[nn.parallel.DistributedDataParallel], None]


@dataclass(frozen=True)
class PowerSGD:
    """Gradients as products of two thin matrices: less to send, at the cost of computing them and of an approximation.

    The first steps are sent whole. What the approximation leaves out is kept on each rank and added to its next
    gradient (error feedback). That memory, and the step's number, are not part of a checkpoint: a resumed run sends its
    first `start_step` steps whole again, so it goes on well, but not bit for bit.

    Args:
        rank: Columns of the thin matrices; more are nearer to the gradient and slower.
        start_step: Steps that are sent whole at first; at least 2 with error feedback or warm start.
        min_compression_rate: Tensors that would not shrink by this factor are sent whole.
        error_feedback: Add to each gradient what was left out before.
        warm_start: Begin each approximation from the last one.
        seed: Of the first approximation; the same on all ranks.

    Source: Vogels et al. 2019, https://arxiv.org/abs/1905.13727;
        https://docs.pytorch.org/docs/stable/ddp_comm_hooks.html
    """

    rank: int = 1
    start_step: int = 1000
    min_compression_rate: float = 2.0
    error_feedback: bool = True
    warm_start: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("rank", 1), ("start_step", 2 if self.error_feedback or self.warm_start else 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                hint = ", since DDP changes its buckets in the first two" if least == 2 else ""
                raise ConfigError(f"PowerSGD({name}={value!r}) must be a whole number of at least {least}{hint}.")
        if not self.min_compression_rate > 0:
            raise ConfigError(f"PowerSGD(min_compression_rate={self.min_compression_rate!r}) must be above 0.")


def check_hook(hook: Any) -> str | PowerSGD | Callable[..., Any] | None:
    """The hook as DDPStrategy takes it.

    Raises:
        ConfigError: It is no known name, no options of one, and no function.
    """
    if isinstance(hook, dict):
        known = [field.name for field in dataclasses.fields(PowerSGD)]
        for name in hook:
            choose("comm_hook's option", name, known)
        return PowerSGD(**hook)
    if hook is None or isinstance(hook, PowerSGD) or (callable(hook) and not isinstance(hook, type)):
        return hook
    if hook not in NAMES:
        raise ConfigError(
            f"comm_hook={hook!r} is not known; choose {', '.join(map(repr, NAMES))}, or pass PowerSGD(...) or a "
            "function."
        )
    return PowerSGD() if hook == "powersgd" else hook


def registration(hook: str | PowerSGD | Callable[..., Any] | None) -> Register | None:
    """What gives a new DDP the hook; None where DDP sends by itself."""
    if hook is None:
        return None
    if isinstance(hook, PowerSGD):
        options = hook

        def register_powersgd(ddp: nn.parallel.DistributedDataParallel) -> None:
            from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook

            # Each DDP has buckets, and so a state, of its own.
            state = PowerSGDState(
                process_group=None,
                matrix_approximation_rank=options.rank,
                start_powerSGD_iter=options.start_step,
                min_compression_rate=options.min_compression_rate,
                use_error_feedback=options.error_feedback,
                warm_start=options.warm_start,
                random_seed=options.seed,
            )
            ddp.register_comm_hook(state, powerSGD_hook)

        return register_powersgd
    send = hook if callable(hook) else _half(hook)
    return lambda ddp: ddp.register_comm_hook(None, send)


def _half(name: str) -> Callable[..., Any]:
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[name]

    # DDP checks these annotations: the second must be a GradBucket.
    def compress(state: object, bucket: Any) -> torch.futures.Future[Tensor]:
        buffer = bucket.buffer()
        small = buffer.to(dtype).div_(dist.get_world_size())
        work = dist.all_reduce(small, async_op=True)
        assert work is not None
        future: torch.futures.Future[Tensor] = work.get_future().then(lambda done: buffer.copy_(done.value()[0]))
        return future

    # With postponed annotations DDP would see strings.
    compress.__annotations__.update(bucket=dist.GradBucket)  # type: ignore[attr-defined]
    compress.__annotations__["return"] = torch.futures.Future[Tensor]
    return compress
