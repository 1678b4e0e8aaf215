"""Pipeline parallelism: a model's layers lie on different ranks, which work on different microbatches at a time."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from lite import collectives
from lite.agreement import control_device
from lite.disguise import disguise
from lite.environments.base import Environment
from lite.errors import ConfigError, UsageError
from lite.first_rank import refuse_alone
from lite.precision.base import Precision
from lite.state import parameters_of
from lite.strategies.base import Engine, Strategy, refuse_foreign
from lite.strategies.process_group import ProcessGroup
from lite.strategies.running_order import PipelinePlan, cut, running_order

if TYPE_CHECKING:
    from lite.strategies.pipeline_engine import PipelineEngine


class PipelineStrategy(Strategy):
    """Each rank holds some of the layers of a model, which `lite.setup_pipeline` splits; one process holds all of them.

    All ranks get the same batches. Weights and buffers become rank 0's. The layers that other ranks hold stay in the
    model on the meta device, so parameters, keys and the optimizer's groups are the whole model's on every rank;
    gradients and optimizer state are there for a rank's own layers alone. So until `teardown` neither the model and its
    optimizers nor their state dicts can be pickled (`torch.save`), nor the former copied.

    Args:
        process_group_backend: "gloo", "nccl", ...; None chooses by device.
        timeout: How long a rank may wait for the others; None is torch's default.
        start_method: How `Lite.launch` starts processes: "spawn", "fork" or "forkserver".

    Source: https://docs.pytorch.org/docs/stable/distributed.pipelining.html
    """

    name = "pipeline"
    distributed = True
    divides_models = True

    def __init__(
        self,
        *,
        process_group_backend: str | None = None,
        timeout: timedelta | None = None,
        start_method: str = "spawn",
    ) -> None:
        self._group = ProcessGroup(process_group_backend, timeout)
        self.start_method = start_method
        self._world_size = 1
        self._alone: Any = None
        self._precision = Precision()
        self._plans: weakref.WeakKeyDictionary[nn.Module, PipelinePlan] = weakref.WeakKeyDictionary()
        self._done: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()
        self._all: list[weakref.ref[PipelineEngine]] = []

    def _engines(self) -> Iterator[PipelineEngine]:
        return (engine for ref in self._all if (engine := ref()) is not None and not engine.closed)

    def connect(self, environment: Environment, device: torch.device) -> Any:
        self._world_size = environment.world_size()
        self.shards = self.distributes_layers = self._world_size > 1
        store = self._group.join(environment, device)
        if self._world_size > 1:
            # What is averaged over the data is so over this rank alone: the others have the same batches.
            groups = [dist.new_group([rank]) for rank in range(self._world_size)]
            self._alone = groups[collectives.rank()]
        return store

    def data_shards(self, world_size: int, rank: int) -> tuple[int, int]:
        return 1, 0

    def data_group(self) -> Any:
        return self._alone

    # ---- models

    def plan_pipeline(self, module: nn.Module, plan: PipelinePlan) -> None:
        if self._world_size > 1:
            self._cut(module, plan)
        self._plans[module] = plan

    def drop_pipeline(self, module: nn.Module) -> None:
        self._plans.pop(module, None)

    def _cut(self, module: nn.Module, plan: PipelinePlan) -> tuple[dict[str, nn.Module], list[list[str]]]:
        """The layers in the order in which they run, and the names of those of each stage."""
        order = running_order(module, plan.layers)
        names = plan.stages if isinstance(plan.stages, tuple) else None
        return order, cut(order, names, plan.num_stages(self._world_size))

    def check_module(self, module: nn.Module) -> None:
        if self._world_size > 1 and module not in self._plans:
            raise ConfigError(
                f"strategy='pipeline' puts the layers of {type(module).__name__} on {self._world_size} ranks, and "
                "lite.setup does not say how its loss is computed; use lite.setup_pipeline(model, optimizer, loss=..., "
                "microbatches=...), or strategy='ddp' for a model that every rank is to hold whole."
            )

    def forward_precision(self, precision: Precision) -> Precision:
        self._precision = precision
        return precision

    @property
    def moves_modules(self) -> bool:
        return self._world_size > 1

    def wrap(self, module: nn.Module, device: torch.device) -> Engine | None:
        if self._world_size == 1:
            return None
        from lite.strategies.pipeline_engine import PipelineEngine

        refuse_alone("lite.setup_pipeline")
        plan = self._plans.pop(module)
        order, stages = self._cut(module, plan)
        engine = PipelineEngine(module, [[order[n] for n in part] for part in stages], plan, self._precision, device)
        self._all = [ref for ref in self._all if ref() is not None]
        self._all.append(weakref.ref(engine))
        parts = "; ".join(f"{part[0]} to {part[-1]} on rank {i % self._world_size}" for i, part in enumerate(stages))
        self._done[module] = f"{len(stages)} stages by {plan.schedule}, {plan.microbatches} microbatches: {parts}"
        return engine

    def explain(self, module: nn.Module) -> str:
        return self._done.get(module) or super().explain(module)

    def prepare_backward(self, loss: Tensor, *, partial: bool = False) -> Tensor:
        raise UsageError(
            "lite.backward under strategy='pipeline': no rank has the whole graph of a loss; pipeline.forward_backward("
            "inputs, target) computes loss and gradients, where pipeline is what lite.setup_pipeline returned."
        )

    # ---- optimizers

    def successor(self, parameter: Tensor) -> nn.Parameter | None:
        return next((new for engine in self._engines() if (new := engine.successor(parameter)) is not None), None)

    def holds_elsewhere(self, parameter: Tensor) -> bool:
        return any(engine.holds(parameter) for engine in self._engines())

    def adopt_optimizer(self, optimizer: Optimizer) -> None:
        held = parameters_of(optimizer)
        for engine in self._engines():
            if any(engine.successor(p) is not None or engine.holds(p) for p in held):
                engine.adopt(optimizer)

    def check_new_optimizer(self, optimizer: Optimizer) -> None:
        if self._world_size > 1 and isinstance(optimizer, torch.optim.LBFGS):
            raise ConfigError(
                "LBFGS takes all parameters for one vector, of which each rank holds a part under "
                "strategy='pipeline'; use an optimizer that looks at each parameter by itself (AdamW, SGD, ...)."
            )

    def check_optimizer(self, optimizer: Optimizer) -> None:
        refuse_foreign(optimizer, lambda p: self.holds_elsewhere(p) or self.successor(p) is not None)

    def follow_optimizer(self, optimizer: Optimizer) -> Callable[[], None] | None:
        if self._world_size == 1:
            return None
        from lite.strategies.pipeline_engine import refuse_copy

        raw, reference = type(optimizer), weakref.ref(optimizer)
        disguise(optimizer, dict.fromkeys(("__reduce_ex__", "__deepcopy__"), refuse_copy))

        def undo() -> None:
            if (it := reference()) is not None:
                it.__class__ = raw

        return undo

    # ---- gradients

    def norms_agree(self) -> bool:
        return True

    def grad_norm(self, parameters: list[nn.Parameter], norm_type: float) -> Tensor:
        if self._world_size == 1:
            return super().grad_norm(parameters, norm_type)
        counted = [p for p in parameters if not any(engine.counts_elsewhere(p) for engine in self._engines())]
        grads = [p.grad for p in counted if p.grad is not None]
        device = next((p.device for p in parameters if not p.is_meta), None) or control_device(None)
        own = nn.utils.get_total_norm(grads, norm_type) if grads else torch.zeros((), device=device)
        norm = own.to(device, torch.float64)  # stages may be of several dtypes, and one without gradients of none
        if norm_type in (float("inf"), 0.0):
            dist.all_reduce(norm, dist.ReduceOp.MAX if norm_type else dist.ReduceOp.SUM)
        elif norm_type == 2.0:
            norm = norm.square()
            dist.all_reduce(norm)
            norm = norm.sqrt()
        else:
            norm = norm**norm_type if grads else norm
            dist.all_reduce(norm)
            norm = norm ** (1.0 / norm_type)
        return norm.to(next((p.dtype for p in parameters if p.is_floating_point()), torch.float32))

    def local_gradients(self, parameters: Iterable[nn.Parameter]) -> list[Tensor] | None:
        if self._world_size == 1:
            return None
        parameters = list(parameters)
        grads = [p.grad for p in parameters if p.grad is not None]
        # A rank whose layers are frozen takes part in the question whether one has found an inf.
        device = next((p.device for p in parameters if not p.is_meta), None) or control_device(None)
        return grads or [torch.zeros(1, device=device)]

    def close(self) -> None:
        self._group.leave()
