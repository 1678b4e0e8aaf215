"""Data-parallel training by DeepSpeed: ZeRO, whose stages divide optimizer state, gradients and weights over the ranks.

DeepSpeed's engine and optimizers do the work; here it is decided what they are asked to do, and
`lite.strategies.deepspeed_engine` says how they are wired. What lite has a call or an argument for (precision,
accumulation, clipping, optimizers, schedulers) is lite's, and a configuration that says otherwise is refused.
"""

from __future__ import annotations

import logging
import os
import re
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lite import collectives
from lite.environments.base import Environment
from lite.errors import ConfigError, UsageError, check_flag
from lite.first_rank import refuse_alone
from lite.precision.base import Precision
from lite.state import parameters_of
from lite.strategies import provenance
from lite.strategies.base import Engine, Strategy, refuse_foreign
from lite.strategies.deepspeed_config import complete, read
from lite.strategies.deepspeed_process import bring_in, check_installed, let_go
from lite.strategies.deepspeed_refusals import check_optimizer, check_parameters
from lite.strategies.deepspeed_wiring import check_config
from lite.strategies.process_group import ProcessGroup

if TYPE_CHECKING:
    from lite.strategies.deepspeed_engine import DeepSpeedEngine

_log = logging.getLogger("lite")
_PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")
_DOES = {
    0: "averages gradients",
    1: "divides the optimizer's state",
    2: "divides gradients and the optimizer's state",
    3: "divides weights, gradients and the optimizer's state",
}
_EMPTY = re.compile(r"tensor [ab] \(0\)|\[0\]")  # in what torch says of a weight that stage 3 has given back
_NO_OUTPUT = (
    "lite.backward got a loss that does not come from the output of a model that lite.setup returned, so gradients "
    "would stay different on each rank; compute it from the output of the model, not of a submodule or a copy of it."
)


class DeepSpeedStrategy(Strategy):
    """Each stage of ZeRO divides more over the ranks: 0 nothing, 1 the optimizer's state, 2 gradients too, 3 weights
    too. With one process it does nothing at all: the model stays as it is.

    The loop stays as it is under every strategy, and so do the model, its Parameters and the optimizer as objects.
    `optimizer.state_dict()` is the raw optimizer's whole state, on the CPU, and collective, as `model.state_dict()` is
    in stage 3; `optimizer.state` is empty.

    From stage 1 on `p.grad` is no gradient to read: it is this rank's own in stage 1, and None in 2 and 3. So torch's
    `clip_grad_norm_` clips something else than the gradients, or nothing, without an error: use `lite.clip_gradients`.
    Read a gradient by `deepspeed.utils.safe_get_full_grad(p)`, on all ranks, after `lite.clip_gradients(model,
    optimizer, max_norm=inf)`, which finishes their reduction and changes nothing; before that it is each rank's own in
    stage 1, and an error in stage 2. Drop gradients by the `zero_grad` of the model or the optimizer: `p.grad = None`,
    or the `zero_grad` of a submodule, changes nothing where DeepSpeed has taken them already. A step uses them up, also
    where nobody calls `zero_grad`. `lite.no_backward_sync` saves communication in stage 0; stage 1 reduces gradients
    once per step anyway, and 2 and 3 at each backward, since they divide them.

    Write into weights of stage 3 within `deepspeed.zero.GatheredParameters(params, modifier_rank=0)`; `p.numel()` is 0
    there, and `p.ds_numel` says. A model that holds a Parameter itself is trained through its forward alone there.

    One optimizer trains a whole model, element by element (AdamW, SGD, ...); several models may each have their own.
    Precision is "32-true", or "bf16-mixed" or "16-mixed", which are autocast over float32 weights. In stage 3 call the
    model, and methods of it that compute, on all ranks, also for evaluation; a backward goes through a forward once
    (no `retain_graph`). What is trained is decided at setup: freeze and unfreeze before, or after `lite.teardown()`.
    Until then the model, and from stage 1 on the optimizer, can't be pickled or copied.

    Needs the extra: pip install lite[deepspeed].

    Args:
        stage: 0, 1, 2 or 3; None is the configuration's, or 2.
        config: DeepSpeed's configuration, as a dict or the path of a JSON file: `zero_optimization` and its buckets,
            logging, profiling. Values of "auto" are left to DeepSpeed. What lite has arguments or calls for is refused,
            and so are keys that DeepSpeed would ignore.
        broadcast_buffers: Whether each forward that trains starts with rank 0's buffers, as under DDP.
        process_group_backend: "gloo", "nccl", ...; None chooses by device.
        timeout: How long a collective may wait for the other ranks; None is torch's default.
        start_method: How `Lite.launch` starts processes: "spawn", "fork" or "forkserver".

    Raises:
        ConfigError: An argument is wrong, the configuration can't be read, or contradicts what lite decides.
        MissingExtraError: DeepSpeed is not installed.

    Source: https://www.deepspeed.ai/docs/config-json/; https://deepspeed.readthedocs.io/en/latest/zero3.html;
        Rajbhandari et al. 2019, https://arxiv.org/abs/1910.02054 (ZeRO)
    """

    name = "deepspeed"
    distributed = True
    refuses_after_failure = True

    def __init__(
        self,
        stage: int | None = None,
        config: Mapping[str, Any] | str | os.PathLike[str] | None = None,
        *,
        broadcast_buffers: bool = True,
        process_group_backend: str | None = None,
        timeout: timedelta | None = None,
        start_method: str = "spawn",
    ) -> None:
        self.stage, self._config = read(stage, config)
        check_flag("broadcast_buffers", broadcast_buffers)
        check_installed()
        self.divides_models = self.stage > 0
        self._broadcast_buffers = broadcast_buffers
        self._group = ProcessGroup(process_group_backend, timeout)
        self.start_method = start_method
        self._world_size = 1
        self._saving = False
        self._all: list[weakref.ref[DeepSpeedEngine]] = []
        self._checked: weakref.ref[nn.Module] | None = None
        self._running: list[DeepSpeedEngine] = []
        self._watch: Any = None  # a hook of the loss whose backward runs
        self._marks: list[provenance.Mark] = []
        self._done: weakref.WeakSet[provenance.Mark] = weakref.WeakSet()
        self._again = False

    def _engines(self) -> Iterator[DeepSpeedEngine]:
        return (engine for ref in self._all if (engine := ref()) is not None and not engine.closed)

    @property
    def _divides(self) -> bool:
        return self._world_size > 1 and self.stage > 0

    # ---- joining

    def connect(self, environment: Environment, device: torch.device) -> Any:
        self._world_size = environment.world_size()
        self.shards = self._divides
        self.has_gradients = not self._divides
        store = self._group.join(environment, device)
        if self._world_size > 1:
            bring_in(device)
        return store

    def close(self) -> None:
        self._group.leave()
        let_go()

    # ---- models

    def check_precision(self, precision: Precision) -> None:
        if precision.name not in _PRECISIONS:
            raise ConfigError(
                f"precision={precision.name!r} can't run under strategy='deepspeed', whose optimizers keep float32; "
                f"use {', '.join(map(repr, _PRECISIONS[:-1]))} or {_PRECISIONS[-1]!r}, or strategy='ddp' or 'fsdp'."
            )

    def check_module(self, module: nn.Module) -> None:
        if self._world_size == 1:
            return
        check_config(complete(self._config, module))
        self._checked = weakref.ref(module)
        check_parameters(module, self.stage)

    def wrap(self, module: nn.Module, device: torch.device) -> Engine | None:
        if self._world_size == 1:
            return None
        from lite.strategies.deepspeed_engine import DeepSpeedEngine

        refuse_alone("lite.setup")
        strategy = weakref.ref(self)

        def is_saving() -> bool:
            it = strategy()
            return it is not None and it._saving

        engine = DeepSpeedEngine(
            module,
            self.stage,
            complete(self._config, module),
            device,
            buffers=self._broadcast_buffers,
            is_saving=is_saving,
        )
        self._all = [ref for ref in self._all if ref() is not None]
        self._all.append(weakref.ref(engine))
        return engine

    def explain(self, module: nn.Module) -> str:
        if self._world_size == 1:
            return super().explain(module)
        return f"DeepSpeed's engine (ZeRO stage {self.stage}): {_DOES[self.stage]} over {self._world_size} ranks"

    # ---- backward

    def prepare_backward(self, loss: Tensor, *, partial: bool = False) -> Tensor:
        provenance.check_has_graph(loss)
        if partial:
            raise UsageError(
                "lite.backward(loss, inputs=[...]) leaves out parameters whose gradients DeepSpeed waits for; leave "
                "inputs= out, or use torch.autograd.grad and average by lite.all_reduce."
            )
        if self._watch is not None:
            self._watch.remove()  # of a backward that has failed
        marks, leaves = provenance.origins([loss])
        reached = {engine for mark in marks for ref in mark.states if (engine := ref()) is not None}
        for leaf in leaves:
            if not isinstance(leaf, nn.Parameter):
                continue
            owner = next((engine for engine in self._engines() if id(leaf) in engine.names), None)
            if owner is None or self.stage == 3:
                raise UsageError(
                    f"lite.backward got a loss that depends on a parameter of shape {tuple(leaf.shape)} outside of the "
                    "forward of a model that is set up"
                    + (
                        ", so its gradient would stay different on each rank; make it part of a model that you pass to "
                        "lite.setup."
                        if owner is None
                        else ", where stage 3 has only a part of it; compute with it in the forward, or use stage 2."
                    )
                )
            reached.add(owner)
        if not reached:
            raise UsageError(_NO_OUTPUT)
        for engine in reached:
            if engine.closed:
                raise UsageError(
                    "lite.backward got a loss of a model that lite.teardown() has given back since its forward; call "
                    "backward before teardown."
                )
            if not engine.is_ready and any(p.requires_grad for p in engine.module.parameters()):
                raise UsageError(
                    f"lite.backward through {type(engine.module).__name__} before its optimizer is set up, with which "
                    "DeepSpeed divides its gradients; call lite.setup(model, optimizer), or lite.setup_optimizers."
                )
        self._running = [engine for engine in self._engines() if engine in reached and engine.is_ready]
        for engine in self._running:
            engine.gradients.begin_backward()
        self._again = any(mark in self._done for mark in marks)
        self._marks = marks
        running = self._running

        def note(gradient: Tensor) -> None:
            for engine in running:
                engine.gradients.note_begun()

        self._watch = loss.register_hook(note)  # type: ignore[no-untyped-call]
        return loss

    def finish_backward(self) -> None:
        running, self._running = self._running, []
        self._watch.remove()
        self._done.update(self._marks)
        self._marks = []
        for engine in running:
            engine.gradients.end_backward()

    def explain_backward_error(self, error: RuntimeError) -> str | None:
        if self.stage < 3 or not (self._again or _EMPTY.search(str(error))):
            return None
        return (
            "lite.backward went through a forward a second time (retain_graph=True), and stage 3 has given the "
            "weights that it used back after the first; add the losses up and call backward once, run the forward "
            f"again, or use stage 2. Call lite.teardown() and set up again to go on. torch says: {error}"
        )

    # ---- optimizers

    def check_new_optimizer(self, optimizer: Optimizer) -> None:
        if not self._divides:
            return
        recent = self._checked() if self._checked is not None else None
        models = [*([recent] if recent is not None else []), *(engine.module for engine in self._engines())]
        check_optimizer(optimizer, models)

    def check_optimizer(self, optimizer: Optimizer) -> None:
        known: set[int] = set().union(*(engine.names for engine in self._engines()))
        refuse_foreign(optimizer, lambda p: id(p) in known)

    def divide_optimizer(self, optimizer: Optimizer) -> Callable[[], None] | None:
        if not self._divides:
            return None
        refuse_alone("lite.setup")
        held = {id(p) for p in parameters_of(optimizer)}
        engine = next(engine for engine in self._engines() if held & engine.names.keys())
        undo = engine.adopt(optimizer)
        if collectives.rank() == 0:
            _log.info("%s: %s", type(engine.module).__name__, self.explain(engine.module))
        return undo

    # ---- gradients

    def _reached(self, parameters: Iterable[nn.Parameter]) -> list[DeepSpeedEngine]:
        wanted = {id(p) for p in parameters}
        return [engine for engine in self._engines() if wanted & engine.names.keys()]

    def local_gradients(self, parameters: Iterable[nn.Parameter]) -> list[Tensor] | None:
        if not self._divides:
            return None
        return [part for engine in self._reached(parameters) for part in engine.gradients.parts()]

    def norms_agree(self) -> bool:
        return all(engine.gradients.agree for engine in self._engines())

    def grad_norm(self, parameters: list[nn.Parameter], norm_type: float) -> Tensor:
        parts = self.local_gradients(parameters)
        if parts is None:
            return super().grad_norm(parameters, norm_type)
        total = nn.utils.get_total_norm(parts, norm_type) if parts else torch.zeros(())
        if norm_type == float("inf"):
            together: Tensor = collectives.all_reduce(total, "max")
            return together
        powers: Tensor = collectives.all_reduce(total.double() ** norm_type, "sum")
        return (powers ** (1 / norm_type)).to(total.dtype)

    def clip_norm(self, parameters: list[nn.Parameter], max_norm: float, total_norm: Tensor) -> None:
        parts = self.local_gradients(parameters)
        if parts is None:
            super().clip_norm(parameters, max_norm, total_norm)
        elif parts:
            factor = torch.clamp(max_norm / (total_norm + 1e-6), max=1.0)  # as torch's clip_grads_with_norm_
            torch._foreach_mul_(parts, factor.to(parts[0].device))

    def clip_value(self, parameters: Iterable[nn.Parameter], clip_value: float) -> None:
        parameters = list(parameters)
        parts = self.local_gradients(parameters)
        if parts is None:
            super().clip_value(parameters, clip_value)
        elif parts:
            torch._foreach_clamp_min_(parts, -clip_value)
            torch._foreach_clamp_max_(parts, clip_value)

    def multiply_gradients(self, parameters: Iterable[nn.Parameter], factor: Tensor | float) -> None:
        parameters = list(parameters)
        parts = self.local_gradients(parameters)
        if parts is None:
            super().multiply_gradients(parameters, factor)
        elif parts:
            torch._foreach_mul_(parts, factor.to(parts[0]) if isinstance(factor, Tensor) else factor)

    def replace_gradients(self, parameters: Iterable[nn.Parameter], *, by_zeros: bool) -> None:
        parameters = list(parameters)
        parts = self.local_gradients(parameters)
        if parts is None:
            super().replace_gradients(parameters, by_zeros=by_zeros)
        elif by_zeros and parts:
            torch._foreach_zero_(parts)
        elif not by_zeros:
            for engine in self._reached(parameters):
                engine.gradients.drop()

    # ---- checkpoints and averages

    @contextmanager
    def saving(self) -> Iterator[None]:
        self._saving = True
        try:
            yield
        finally:
            self._saving = False

    def partition(self, model: nn.Module) -> Any:
        if not self._divides or self.stage < 3:
            return None
        engine = next(engine for engine in self._engines() if engine.module is model)
        if engine.parts is None:
            raise UsageError(
                f"lite.ema of a {type(model).__name__} whose optimizer is not set up: DeepSpeed divides its weights "
                "when that is; call lite.setup(model, optimizer) before lite.ema."
            )
        return engine.parts

    def no_sync(self, engine: Engine | None, enabled: bool) -> AbstractContextManager[None]:
        return super().no_sync(engine, enabled and self.stage == 0)
