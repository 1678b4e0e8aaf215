"""Data-parallel training on torch's DistributedDataParallel, wired to the user's own model, its traps guarded."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from lite.environments.base import Environment, check_company
from lite.errors import ConfigError, UsageError
from lite.strategies import provenance
from lite.strategies.base import Engine, Strategy

COMM_HOOKS = ("fp16", "bf16")
_GLOO_DRAIN_S = 0.1


class DDPStrategy(Strategy):
    """Each rank holds the whole model; gradients are averaged over the ranks while backward runs.

    With one process it does nothing at all: the model stays as it is.

    Args:
        find_unused_parameters: Allow a forward that leaves some parameters out; costs a walk over the graph per step.
        static_graph: The graph is the same at every step; lets DDP handle re-entrant checkpointing.
        gradient_as_bucket_view: Let gradients be views into the communication buffers, which saves their memory.
        bucket_cap_mb: Size of a communication buffer in MiB; None is torch's default.
        comm_hook: "fp16" or "bf16" to send gradients in 16 bits, or a hook as
            `DistributedDataParallel.register_comm_hook` takes it.
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
        comm_hook: str | Callable[..., Any] | None = None,
        process_group_backend: str | None = None,
        timeout: timedelta | None = None,
        start_method: str = "spawn",
        **ddp_options: Any,
    ) -> None:
        if isinstance(comm_hook, str) and comm_hook not in COMM_HOOKS:
            raise ConfigError(f"comm_hook={comm_hook!r} is not known; choose 'fp16' or 'bf16', or pass a function.")
        if timeout is not None and not isinstance(timeout, timedelta):
            raise ConfigError(f"timeout={timeout!r} is not a timedelta; use datetime.timedelta(seconds={timeout!r}).")
        self.process_group_backend = process_group_backend
        self.timeout = timeout
        self.start_method = start_method
        self._comm_hook = comm_hook
        self._ddp_options = {
            "find_unused_parameters": find_unused_parameters,
            "static_graph": static_graph,
            "gradient_as_bucket_view": gradient_as_bucket_view,
            "bucket_cap_mb": bucket_cap_mb,
            **ddp_options,
        }
        self._owns_group = False
        self._world_size = 1

    def connect(self, environment: Environment, device: torch.device) -> Any:
        self._world_size = environment.world_size()
        if not environment.started:
            return None
        backend = self.process_group_backend or ("nccl" if device.type == "cuda" else "gloo")
        if dist.is_initialized():
            if dist.get_world_size() != self._world_size:
                raise ConfigError(
                    f"a process group of {dist.get_world_size()} ranks exists, but {environment.name} started "
                    f"{self._world_size} processes; remove your own init_process_group call."
                )
            return dist.distributed_c10d._get_default_store()
        rank = environment.global_rank()
        store, _, _ = next(rendezvous(environment.init_method() or "env://", rank, self._world_size))
        store.set_timeout(self.timeout or timedelta(minutes=30))
        check_company(store, environment, device)
        # torch 2.13: torchrun's store keeps the addresses of the processes that it restarted, and gloo would try them.
        life = f"lite/{environment.num_restarts()}"
        dist.init_process_group(
            backend,
            store=PrefixStore(life, store),
            rank=rank,
            world_size=self._world_size,
            timeout=self.timeout,
            device_id=device if backend == "nccl" else None,
        )
        self._owns_group = True
        return store

    def wrap(self, module: nn.Module, device: torch.device) -> Engine | None:
        if self._world_size == 1 or not any(p.requires_grad for p in module.parameters()):
            return None
        return DDPEngine(module, self._comm_hook, {k: v for k, v in self._ddp_options.items() if v is not None})

    def explain(self, module: nn.Module) -> str:
        if self._world_size == 1:
            return super().explain(module)
        if not any(p.requires_grad for p in module.parameters()):
            return "the module itself: it has no parameter to train, so there are no gradients to average"
        return f"DistributedDataParallel around its forward: gradients are averaged over {self._world_size} ranks"

    def check_backward(self, loss: Tensor) -> None:
        if self._world_size == 1:
            return
        found = provenance.marks(loss)
        if not found:
            if not loss.requires_grad:
                raise UsageError(
                    "lite.backward got a loss that needs no gradient; was the forward run under torch.no_grad(), or "
                    "the "
                    "loss detached?"
                )
            raise UsageError(
                "lite.backward got a loss that does not come from the output of a model that lite.setup returned, so "
                "its "
                "gradients would stay different on each rank; compute it from the output of the model (or of one of "
                "its "
                "own public methods), not of a submodule or a copy of it."
            )
        engines = [engine for mark in found if (engine := mark.check()) is not None]
        for engine in set(engines):
            engine.backwards += 1

    def close(self) -> None:
        if self._owns_group and dist.is_initialized():
            gloo = "gloo" in dist.get_backend()
            dist.destroy_process_group()
            if gloo:
                # torch 2.13: once a DDP was built, gloo's threads outlive the group, and one that still drops the last
                # collective's tensors while the interpreter shuts down aborts the process. This lets it finish.
                time.sleep(_GLOO_DRAIN_S)
        self._owns_group = False


class _Adapter(nn.Module):
    """What DDP holds: the user's model as a submodule, and a forward that runs whatever it is given."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return run(*args, **kwargs)


def _identity(outputs: Any) -> Any:
    return outputs


@dataclass(frozen=True)
class _Mark:
    """On the graph of one forward's outputs: whose they are, and what was agreed then."""

    engine: weakref.ref[DDPEngine]
    synchronised: bool
    backwards: int

    def check(self) -> DDPEngine | None:
        """Return the engine if this backward will synchronise it; refuse one that would leave it out unnoticed."""
        engine = self.engine()
        if engine is None:
            return None
        if self.synchronised != engine.ddp.require_backward_grad_sync:
            where = ("outside", "inside") if self.synchronised else ("inside", "outside")
            raise UsageError(
                f"the forward ran {where[0]} no_backward_sync but the backward {where[1]} it; DDP decides at the "
                "forward, so "
                "put both into the same `with lite.no_backward_sync(model, ...)` block."
            )
        if self.synchronised and self.backwards != engine.backwards:
            raise UsageError(
                "a second backward after one forward phase would not be synchronised: the gradients of this model were "
                "already averaged by an earlier lite.backward since this forward. Add the losses up and call "
                "lite.backward once, call each backward right after its own forward, or put all but the last pair into "
                "lite.no_backward_sync(model)."
            )
        return engine if self.synchronised else None


class DDPEngine(Engine):
    """DDP around one model, without a trace of it in the model's own attributes or keys."""

    def __init__(self, module: nn.Module, comm_hook: str | Callable[..., Any] | None, options: dict[str, Any]) -> None:
        adapter = _Adapter(module)
        ignored = getattr(module, "_ddp_params_and_buffers_to_ignore", None)
        if ignored:
            adapter._ddp_params_and_buffers_to_ignore = [f"module.{name}" for name in ignored]  # type: ignore[assignment]
        self.ddp = nn.parallel.DistributedDataParallel(adapter, **options)
        if comm_hook is not None:
            self.ddp.register_comm_hook(None, _comm_hook(comm_hook))
        self.syncs_buffers = bool(self.ddp.broadcast_buffers)
        self.backwards = 0
        self._module = weakref.ref(module)
        self._frozen = tuple((n, p) for n, p in module.named_parameters() if not p.requires_grad)
        self._started = False

    def forward(self, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not torch.is_grad_enabled():
            return self.ddp(run, *args, **kwargs)
        self._check_frozen()
        try:
            outputs = self.ddp(run, *args, **kwargs)
        except RuntimeError as error:
            self._explain_unused(error)
            raise
        self._tag(outputs)
        return outputs

    def announce(self, outputs: Any) -> Any:
        if not torch.is_grad_enabled() or next(provenance.tensors_with_grad(outputs), None) is None:
            return outputs
        self._check_frozen()
        # The method has run already: broadcasting buffers now would change what its backward needs.
        self.ddp.require_forward_param_sync = False
        try:
            outputs = self.ddp(_identity, outputs)
        except RuntimeError as error:
            self._explain_unused(error)
            raise
        self._tag(outputs)
        return outputs

    def no_sync(self) -> AbstractContextManager[None]:
        if self.ddp.static_graph and not self._started:
            raise UsageError(
                "no_backward_sync on the first step is impossible with DDPStrategy(static_graph=True); let the first "
                "step synchronise (enabled=False), or leave static_graph out."
            )
        return self._no_sync()

    @contextmanager
    def _no_sync(self) -> Iterator[None]:
        with self.ddp.no_sync():
            yield

    def close(self) -> None:
        # The reducer's hooks on the parameters go with it.
        del self.ddp

    def _check_frozen(self) -> None:
        for name, parameter in self._frozen:
            if parameter.requires_grad:
                raise UsageError(
                    f"parameter {name!r} was frozen at lite.setup and requires a gradient now, which would not be "
                    "averaged "
                    "over the ranks; unfreeze before lite.setup, or call lite.teardown() and set up again."
                )

    def _tag(self, outputs: Any) -> None:
        self._started = True
        provenance.tag(outputs, _Mark(weakref.ref(self), bool(self.ddp.require_backward_grad_sync), self.backwards))

    def _explain_unused(self, error: RuntimeError) -> None:
        if "Expected to have finished reduction in the prior iteration" not in str(error):
            return
        module = self._module()
        assert module is not None
        unused = [n for n, p in module.named_parameters() if p.requires_grad and p.grad is None]
        which = f" ({', '.join(unused[:8])}{', ...' if len(unused) > 8 else ''})" if unused else ""
        raise UsageError(
            f"some parameters{which} got no gradient in the last backward, so its synchronisation never finished; use "
            'strategy="ddp_find_unused_parameters_true", or make every parameter take part in the loss.'
        ) from error


def _comm_hook(hook: str | Callable[..., Any]) -> Callable[..., Any]:
    if callable(hook):
        return hook
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[hook]

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
