"""Data-parallel training on torch's DistributedDataParallel, wired to the user's own model, its traps guarded."""

from __future__ import annotations

import inspect
import math
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lite.environments.base import Environment
from lite.errors import ConfigError, UsageError, check_flag, choose
from lite.first_rank import refuse_alone
from lite.strategies.base import Engine, Strategy, refuse_sync_batch_norm
from lite.strategies.comm_hooks import PowerSGD, check_hook, registration
from lite.strategies.process_group import ProcessGroup

if TYPE_CHECKING:
    from lite.strategies.ddp_engine import Engines
    from lite.strategies.footprint import Footprint

_OURS = {"self", "module", "init_sync", "process_group"}


class DDPStrategy(Strategy):
    """Each rank holds the whole model; gradients are averaged over the ranks while backward runs.

    With one process it does nothing at all: the model stays as it is.

    Args:
        find_unused_parameters: Allow a forward that leaves some parameters out; costs a walk over the graph per step.
        static_graph: The graph is the same at every step; lets DDP handle re-entrant checkpointing.
        gradient_as_bucket_view: Let gradients be views into the communication buffers, which saves their memory.
        bucket_cap_mb: Size of a communication buffer in MiB; None is torch's default.
        comm_hook: "fp16" or "bf16" to send gradients in 16 bits, "powersgd", `PowerSGD(rank=2, ...)` or a dict of its
            options to send them as products of thin matrices, or a hook as
            `DistributedDataParallel.register_comm_hook` takes it.
        zero_optimizer: Keep each parameter's optimizer state on one rank alone (ZeRO-1, by torch's
            ZeroRedundancyOptimizer): 1 / n of it on each of n ranks, for a broadcast of the parameters per step. The
            optimizer stays your own object, with `state` holding this rank's share; its `state_dict()` is the whole
            state, and collective. An optimizer must compute each parameter's step from that parameter alone (as Adam
            does; LBFGS is refused), and hold parameters of one dtype.
        process_group_backend: "gloo", "nccl", ...; None chooses by device.
        timeout: How long a collective may wait for the other ranks; None is torch's default.
        start_method: How `Lite.launch` starts processes: "spawn", "fork" or "forkserver".
        **ddp_options: Any other argument of `torch.nn.parallel.DistributedDataParallel`.

    Source: https://pytorch.org/docs/stable/generated/torch.nn.parallel.DistributedDataParallel.html
    """

    name = "ddp"
    distributed = True

    def __init__(
        self,
        *,
        find_unused_parameters: bool = False,
        static_graph: bool = False,
        gradient_as_bucket_view: bool = False,
        bucket_cap_mb: float | None = None,
        comm_hook: str | PowerSGD | dict[str, Any] | Callable[..., Any] | None = None,
        zero_optimizer: bool = False,
        process_group_backend: str | None = None,
        timeout: timedelta | None = None,
        start_method: str = "spawn",
        **ddp_options: Any,
    ) -> None:
        self._comm_hook = check_hook(comm_hook)
        if bucket_cap_mb is not None:
            is_number = isinstance(bucket_cap_mb, (int, float)) and not isinstance(bucket_cap_mb, bool)
            if not is_number or not 0 <= bucket_cap_mb < math.inf:
                raise ConfigError(
                    f"bucket_cap_mb={bucket_cap_mb!r} must be a number of at least 0: MiB of one communication buffer."
                )
        known = set(inspect.signature(nn.parallel.DistributedDataParallel.__init__).parameters) - _OURS
        for option in ddp_options:
            if option not in known:
                choose("DDPStrategy's option", option, sorted(known | set(inspect.signature(DDPStrategy).parameters)))
        self._group = ProcessGroup(process_group_backend, timeout)
        self.start_method = start_method
        check_flag("find_unused_parameters", find_unused_parameters)
        check_flag("static_graph", static_graph)
        check_flag("gradient_as_bucket_view", gradient_as_bucket_view)
        check_flag("zero_optimizer", zero_optimizer, "your optimizer keeps its own class")
        self._zero = zero_optimizer
        self._ddp_options = {
            "find_unused_parameters": find_unused_parameters,
            "static_graph": static_graph,
            "gradient_as_bucket_view": gradient_as_bucket_view,
            "bucket_cap_mb": bucket_cap_mb,
            **ddp_options,
        }
        self._world_size = 1
        self._device = torch.device("cpu")
        self._engines: Engines | None = None

    def connect(self, environment: Environment, device: torch.device) -> Any:
        self._world_size, self._device = environment.world_size(), device
        if not environment.started:
            return None
        if self._world_size > 1:
            from lite.strategies.ddp_engine import Engines  # one process needs nothing of it

            self._engines = Engines()
        return self._group.join(environment, device)

    def check_module(self, module: nn.Module) -> None:
        if self._world_size > 1:
            refuse_sync_batch_norm(module, self._device)

    def wrap(self, module: nn.Module, device: torch.device) -> Engine | None:
        if self._world_size == 1:
            return None
        from lite.strategies.ddp_engine import DDPEngine

        refuse_alone("lite.setup")
        assert self._engines is not None
        options = {k: v for k, v in self._ddp_options.items() if v is not None}
        options["process_group"] = self._group.for_ddp()
        return DDPEngine(module, self._engines, registration(self._comm_hook), options)

    def footprint(self, module: nn.Module, world_size: int) -> Footprint | None:
        from lite.strategies.footprint import Footprint

        return Footprint(
            gradient_copy=world_size > 1 and not self._ddp_options["gradient_as_bucket_view"],
            state_ranks=world_size if self._zero else 1,
        )

    def explain(self, module: nn.Module) -> str:
        if self._world_size == 1:
            return super().explain(module)
        if not any(p.requires_grad for p in module.parameters()):
            return "the module itself: it has no parameter to train, so there are no gradients to average"
        zero = "; each optimizer's state is divided among them (ZeRO-1)" if self._zero else ""
        return f"DistributedDataParallel around its forward: gradients are averaged over {self._world_size} ranks{zero}"

    def prepare_backward(self, loss: Tensor, *, partial: bool = False) -> Tensor:
        return loss if self._engines is None else self._engines.prepare_backward(loss, partial=partial)

    def finish_backward(self) -> None:
        if self._engines is not None:
            self._engines.finish_backward()

    def abandon_backward(self) -> None:
        if self._engines is not None:
            self._engines.abandon_backward()

    def explain_backward_error(self, error: RuntimeError) -> str | None:
        if "mark a variable ready only once" not in str(error) and "marked as ready twice" not in str(error):
            return None
        return (
            "a parameter got its gradient twice in one backward, which DDP can't average: it was used again outside of "
            "the forward, or in several checkpointed parts; use torch.utils.checkpoint with use_reentrant=False, "
            "DDPStrategy(static_graph=True), or sum the losses of one forward."
        )

    def check_optimizer(self, optimizer: Optimizer) -> None:
        if self._engines is not None:
            self._engines.check_optimizer(optimizer)

    def check_new_optimizer(self, optimizer: Optimizer) -> None:
        if self._zero and self._world_size > 1:
            from lite.strategies.zero import check

            check(optimizer)

    def divide_optimizer(self, optimizer: Optimizer) -> Callable[[], None] | None:
        if not self._zero or self._world_size == 1:
            return None
        from lite.strategies.zero import Sharded

        refuse_alone("lite.setup")
        share = Sharded(optimizer)
        reference = weakref.ref(optimizer)

        def undo() -> None:
            if (it := reference()) is not None:
                share.undo(it)

        return undo

    def join(
        self, engines: Sequence[Engine | None], optimizers: Sequence[Optimizer], **options: Any
    ) -> AbstractContextManager[None]:
        if self._world_size == 1:
            return nullcontext()
        if self._zero:
            raise UsageError(
                "lite.join does not go with DDPStrategy(zero_optimizer=True): a rank without batches gets no gradients "
                "for its share of the parameters; leave zero_optimizer out, or give all ranks equally many batches."
            )
        from lite.strategies.ddp_engine import DDPEngine
        from lite.strategies.ddp_join import join

        refuse_alone("lite.join")
        assert self._engines is not None
        joined = [engine for engine in engines if isinstance(engine, DDPEngine)]
        return join(joined, optimizers, self._engines, **options)

    def norms_agree(self) -> bool:
        return self._engines is None or all(engine.gradients_agree for engine in self._engines)

    def close(self) -> None:
        self._group.leave()
