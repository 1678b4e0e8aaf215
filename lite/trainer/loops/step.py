"""What is done with one training batch, put together once per epoch out of what this run really needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lite.errors import UsageError
from lite.trainer.hooks import overrides
from lite.trainer.loops.calling import Step, training_call
from lite.trainer.loops.declared_step import compose_declared
from lite.trainer.loops.gradient import NO_GRAPH, before_step_hooks, clipping
from lite.trainer.loops.manual_step import manual_step
from lite.trainer.loops.optimizer_part import (
    OptimizerPart,
    agreed_weights,
    compose_part,
    differentiation,
    wants_closure,
)
from lite.trainer.module import LightningModule
from lite.trainer.optimization.schedules import stepping
from lite.trainer.optimization.windows import weighing


def compose_step(trainer: Any, window: Any, num_batches: float) -> Step:
    """The function of (batch, batch_idx) for this epoch; it returns what `training_step` returned."""
    if not trainer.module.automatic_optimization:
        return manual_step(trainer)
    if trainer.declared:
        return compose_declared(trainer, num_batches)
    return _automatic_step(trainer, window, lambda batch_idx: batch_idx + 1 >= num_batches)


def _automatic_step(trainer: Any, window: Any, is_last: Callable[[int], bool]) -> Step:
    """`training_step` with the one optimizer, or without any."""
    optimizer: Optimizer | None = next(iter(trainer.optimizers), None)
    schedule = _scheduling(trainer)
    if optimizer is not None and window is None and not _looked_at(trainer, optimizer):
        return _scheduled(trainer, _plain_step(trainer, optimizer), schedule)
    progress = trainer.fit_loop.progress

    def stepped(count: int) -> None:
        progress.updates += count
        progress.stepped += 1
        if schedule is not None:
            schedule(progress.stepped)

    weighs = None if window is None else weighing(trainer, window.steps)
    part = OptimizerPart(
        training_call(trainer), optimizer, 0, window, is_last, weighs, clip=clipping(trainer), stepped=stepped
    )
    step, flush = compose_part(trainer, part)
    trainer.fit_loop.epoch_loop.flushes = [flush]
    return step


def _scheduling(trainer: Any) -> Callable[[int], None] | None:
    """Schedulers that step with the optimizer, as a function of the number of steps; None where there are none."""
    configs = [config for config in trainer.lr_scheduler_configs if config.interval == "step"]
    return stepping(trainer, configs) if configs else None


def _scheduled(trainer: Any, step: Step, schedule: Callable[[int], None] | None) -> Step:
    """The step, and then the schedulers."""
    if schedule is None:
        return step
    progress = trainer.fit_loop.progress

    def scheduled_step(batch: Any, batch_idx: int) -> Any:
        output = step(batch, batch_idx)
        schedule(progress.stepped)
        return output

    return scheduled_step


def _looked_at(trainer: Any, optimizer: Optimizer) -> bool:
    """Whether anybody looks on between forward and step."""
    hooks, module = trainer.hooks, trainer.module
    own = any(overrides(module, name, LightningModule) for name in ("backward", "optimizer_zero_grad"))
    if own or hooks.on_before_zero_grad or hooks.on_before_backward or hooks.on_after_backward:
        return True
    return wants_closure(module, optimizer) or before_step_hooks(trainer, clipping(trainer)) is not None


def _plain_step(trainer: Any, optimizer: Optimizer) -> Step:
    """The step where nobody looks on: a raw loop's. Old gradients go before the forward, which so needs less memory."""
    loop, progress, backward = trainer.fit_loop.epoch_loop, trainer.fit_loop.progress, trainer.lite.backward
    call, differentiate, weights = training_call(trainer), None, agreed_weights(trainer)

    def loss_alone() -> type | None:
        """The class of output that holds nothing but the loss, where no rank waits for word of a weight."""
        return Tensor if weights is None or weights.given is False else None

    plain: Any = loss_alone()

    def plain_step(batch: Any, batch_idx: int) -> Any:
        nonlocal differentiate, plain
        optimizer.zero_grad()
        output = loop.output = call(batch, batch_idx)
        if output.__class__ is not plain:
            if differentiate is None:
                differentiate = differentiation(trainer, optimizer)
            differentiate(output)
            plain = loss_alone()
        elif output.requires_grad:
            backward(output)
        else:
            raise UsageError(NO_GRAPH)
        optimizer.step()
        progress.updates += 1
        progress.stepped += 1
        return output

    return plain_step
