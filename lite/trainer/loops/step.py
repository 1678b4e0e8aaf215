"""What is done with one training batch, put together once per epoch out of what this run really needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.optim import LBFGS, Optimizer

from lite.errors import UsageError
from lite.trainer.hooks import indexed, overrides
from lite.trainer.loops.calling import Step, pick_loss, step_caller
from lite.trainer.loops.declared_step import compose_declared
from lite.trainer.loops.gradient import (
    NO_GRAPH,
    before_step_hooks,
    clipping,
    drop_gradients,
    old_settings,
    run_backward,
    skipper,
)
from lite.trainer.loops.manual_step import manual_step
from lite.trainer.manual import in_hands
from lite.trainer.module import LightningModule


def compose_step(trainer: Any, window: Any, num_batches: float) -> Step:
    """The function of (batch, batch_idx) for this epoch; it returns what `training_step` returned."""
    if not trainer.module.automatic_optimization:
        return manual_step(trainer)
    if trainer.declared:
        return compose_declared(trainer, num_batches)
    return _automatic_step(trainer, window, lambda batch_idx: batch_idx + 1 >= num_batches)


def _automatic_step(trainer: Any, window: Any, is_last: Callable[[int], bool]) -> Step:
    """forward; drop old gradients; backward; and, when the window is complete, clip and step."""
    module, progress = trainer.module, trainer.fit_loop.progress
    compute = _compute(trainer, window, is_last)
    if not trainer.optimizers:
        return compute
    optimizer: Optimizer = trainer.optimizers[0]
    before_step = before_step_hooks(trainer, clipping(trainer))
    # Called by name at each step: other things (schedulers) may put their own in the instance's place.
    if not _wants_closure(module, optimizer):
        if window is None and before_step is None and not _hooked(trainer):
            return _plain_step(trainer, optimizer)

        def step(batch: Any, batch_idx: int) -> Any:
            output = compute(batch, batch_idx)
            if window is not None and not window.ready:
                return output
            if before_step is not None:
                before_step(optimizer)
            optimizer.step()
            progress.updates += 1
            progress.stepped += 1
            return output

        return step

    steps = [0]  # counted when the override is over, as in Lightning

    def after() -> None:
        steps[0] += 1

    # It steps with a closure, as an override of optimizer_step and LBFGS want it.
    pending = [False]  # a closure that the override has called by itself

    def before(which: Optimizer) -> None:
        if before_step is not None and pending[0]:
            before_step(which)
        pending[0] = False

    handle = in_hands(optimizer, before=before, after=after, zero=lambda which: None, module=module)

    own_step = indexed(module.optimizer_step, **old_settings(optimizer))

    def closed_step(batch: Any, batch_idx: int) -> Any:
        if window is not None and not is_last(batch_idx):
            before_this = 0 if window.ready else window.count
            if before_this + 1 < window.steps:
                return compute(batch, batch_idx)
        outputs: list[Any] = []

        def closure() -> Any:
            output = compute(batch, batch_idx)
            outputs.append(output)
            pending[0] = True
            return pick_loss(output)

        steps[0] = 0
        own_step(progress.epoch, batch_idx, handle, closure)
        progress.updates += steps[0]
        progress.stepped += steps[0] > 0
        return outputs[-1] if outputs else None

    return closed_step


def _hooked(trainer: Any) -> bool:
    """Whether anybody looks on between forward and step."""
    hooks, module = trainer.hooks, trainer.module
    own = any(overrides(module, name, LightningModule) for name in ("backward", "optimizer_zero_grad"))
    return bool(own or hooks.on_before_zero_grad or hooks.on_before_backward or hooks.on_after_backward)


def _plain_step(trainer: Any, optimizer: Optimizer) -> Step:
    """The step where nobody looks on: a raw loop's. Old gradients go before the forward, which so needs less memory."""
    progress, backward = trainer.fit_loop.progress, trainer.lite.backward
    call, skip = _training_call(trainer), skipper(trainer)

    def plain_step(batch: Any, batch_idx: int) -> Any:
        optimizer.zero_grad()
        output = call(batch, batch_idx)
        loss = output if output.__class__ is Tensor else pick_loss(output)
        if loss is None:
            skip()
        elif loss.requires_grad:
            backward(loss)
        else:
            raise UsageError(NO_GRAPH)
        optimizer.step()
        progress.updates += 1
        progress.stepped += 1
        return output

    return plain_step


def _training_call(trainer: Any) -> Callable[[Any, int], Any]:
    call, old = step_caller(trainer.module.training_step), trainer.fit_loop.epoch_loop.old
    if trainer.wrap_hook is not None:
        call = trainer.wrap_hook("training_step", trainer.module, call)
    return call if old is None else old.around(call)


def _compute(trainer: Any, window: Any, is_last: Callable[[int], bool]) -> Step:
    """forward, loss, backward of one batch, in a window of accumulation where there is one."""
    metrics, call = trainer.metrics, _training_call(trainer)
    backward, skip = run_backward(trainer, next(iter(trainer.optimizers), None)), skipper(trainer)
    optimizers = trainer.optimizers
    zero_grad = drop_gradients(trainer, optimizers[0]) if optimizers else lambda batch_idx: None
    weighs = getattr(window, "weigh", None)
    always, ragged = trainer.fit_loop.epoch_loop.sizes_vary

    if window is None:

        def compute(batch: Any, batch_idx: int) -> Any:
            output = call(batch, batch_idx)
            loss = pick_loss(output)
            zero_grad(batch_idx)
            if loss is None:
                skip()
            else:
                backward(loss)
            return output

        return compute

    def compute_within(batch: Any, batch_idx: int) -> Any:
        first = window.ready or window.count == 0
        with window(last=is_last(batch_idx)):
            output = call(batch, batch_idx)
            loss = pick_loss(output)
            if first:
                zero_grad(batch_idx)
            if loss is None:
                if weighs is not None and (always or ragged(batch_idx)):
                    weighs(0.0)
                skip()
                return output
            if weighs is not None:
                weight = output.get("weight") if isinstance(output, Mapping) else None
                if weight is None and (always or ragged(batch_idx)):
                    weight = metrics.batch_size()
                if weight is not None:
                    weighs(weight)
                backward(loss)
            else:
                backward(loss / window.steps)
        return output

    return compute_within


def _wants_closure(module: Any, optimizer: Optimizer) -> bool:
    """Whether somebody looks at the closure: an override, LBFGS, or an optimizer that isn't torch's."""
    if overrides(module, "optimizer_step", LightningModule) or isinstance(optimizer, LBFGS):
        return True
    return not type(optimizer).__module__.startswith("torch.optim")
