"""One optimizer's part in the training batches: forward, backward and, when its window is complete, its step.

forward; drop old gradients; backward with its hooks
and when the window is complete: hooks, clipping; step; count it; schedulers
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from lite.errors import ConfigError, UsageError
from lite.gradients import Accumulation
from lite.trainer.hooks import indexed, overrides
from lite.trainer.loops.calling import Step, Weights, alone_weight, pick_loss
from lite.trainer.loops.gradient import NO_GRAPH, before_step_hooks, drop_gradients, old_settings, run_backward, skipper
from lite.trainer.module import LightningModule
from lite.trainer.optimization.manual import in_hands
from lite.trainer.optimization.windows import weighing


@dataclass(frozen=True)
class OptimizerPart:
    """What belongs to the steps of one optimizer.

    Args:
        call: The step function of (batch, batch_idx), which returns the loss.
        optimizer: The optimizer; None where the module is trained without.
        index: Its position.
        window: Its window of accumulation; None where every batch is a step.
        is_last: Whether that batch is its last one of the epoch.
        weighs: Whether the window that begins with that batch is weighed by its batches' sizes; None without one.
        clip: Its clipping, or None.
        stepped: Told after steps how many there were: it counts them, and steps schedulers.
    """

    call: Step
    optimizer: Optimizer | None
    index: int = 0
    window: Accumulation | None = None
    is_last: Callable[[int], bool] = lambda batch_idx: False
    weighs: Callable[[int], bool] | None = None
    clip: Callable[[Optimizer], Any] | None = None
    stepped: Callable[[int], None] = lambda count: None


def compose_part(trainer: Any, part: OptimizerPart) -> tuple[Step, Callable[[], None]]:
    """The part as a function of (batch, batch_idx), which returns what `call` returned; and what ends an open window.

    Raises:
        ConfigError: LBFGS would accumulate.
    """
    compute = _compute(trainer, part)
    if part.optimizer is None:
        return compute, (lambda: None) if part.window is None else part.window.flush
    if wants_closure(trainer.module, part.optimizer):
        return _closed_step(trainer, part, part.optimizer, compute)
    optimizer, window, stepped = part.optimizer, part.window, part.stepped
    before_step = before_step_hooks(trainer, part.clip)

    def update() -> None:
        if before_step is not None:
            before_step(optimizer)
        optimizer.step()  # by name: other things (schedulers) may put their own in the instance's place
        stepped(1)

    def step(batch: Any, batch_idx: int) -> Any:
        output = compute(batch, batch_idx)
        if window is None or window.ready:
            update()
        return output

    def flush() -> None:
        if window is not None and window.is_open:
            window.flush()
            update()

    return step, flush


def differentiation(trainer: Any, optimizer: Optimizer | None, index: int = 0) -> Callable[[Any], None]:
    """Backward, with its hooks, of what a step function returned for a batch that is a step by itself."""
    lite, metrics, skip = trainer.lite, trainer.metrics, skipper(trainer)
    weights, weighs = agreed_weights(trainer, index), trainer.accumulation != "reference"
    own = _own_backward(trainer, optimizer, index)
    backward = run_backward(trainer, lite.backward if own is None else own)
    # What is differentiated past Lite has to know what a ragged batch counts.
    is_ragged = weighing(trainer, 1) if own is not None and weights is not None else lambda batch_idx: False
    alone: Accumulation | None = None

    def differentiate(output: Any) -> None:
        nonlocal alone
        loss = pick_loss(output)
        weight = None
        if weights is not None:
            weight = weights.of(output, loss)
        elif weighs and loss is not output and loss is not None:
            weight = alone_weight(output)
        if weight is None and loss is not None and is_ragged(trainer.fit_loop.progress.batch):
            weight = metrics.batch_size()
        if loss is None:
            skip()
        elif not loss.requires_grad:
            raise UsageError(NO_GRAPH)
        elif weight is None:
            backward(loss)
        elif own is None:
            share = _share(lite, 0.0 if metrics.filler else weight)
            backward(loss, weight=share.to(loss.dtype))
        else:
            alone = alone or lite.accumulate(trainer.module, steps=1, optimizer=optimizer)
            with alone(last=True):
                alone.weigh(weight)
                backward(alone.scaled(loss))

    return differentiate


def agreed_weights(trainer: Any, index: int = 0) -> Weights | None:
    """What the run knows of the weights of the steps at that position; None where ranks have nothing to agree on."""
    return None if trainer.world_size == 1 or trainer.accumulation == "reference" else _weights(trainer, index)


def _weights(trainer: Any, index: int) -> Weights:
    known: dict[int, Weights] = trainer.fit_loop.epoch_loop.weights
    return known.setdefault(index, Weights())


def _share(lite: Any, weight: Any) -> Tensor:
    """A rank's weight over the mean of all ranks' weights: what makes the mean of their gradients that of all tokens.

    Collective: call on all ranks.
    """
    dtype = torch.float64 if lite.device.type != "mps" else torch.float32
    mine = torch.as_tensor(weight).detach().to(lite.device, dtype).reshape(())
    mean = lite.all_reduce(mine, "mean")
    return torch.where(mean > 0, mine / mean, 0.0)


def _own_backward(trainer: Any, optimizer: Optimizer | None, index: int) -> Callable[..., None] | None:
    """The module's own `backward`, which need not go through Lite's."""
    if not overrides(trainer.module, "backward", LightningModule):
        return None
    return indexed(trainer.module.backward, index, optimizer=optimizer)


# ---- forward and backward


def _compute(trainer: Any, part: OptimizerPart) -> Step:
    """forward, loss, backward of one batch, in its window where it has one."""
    call, window, optimizer = part.call, part.window, part.optimizer
    zero_grad = drop_gradients(trainer, optimizer, part.index) if optimizer is not None else lambda batch_idx: None
    if window is not None:
        return _compute_within(trainer, part, window, zero_grad)
    differentiate, loop = differentiation(trainer, optimizer, part.index), trainer.fit_loop.epoch_loop

    def compute(batch: Any, batch_idx: int) -> Any:
        output = loop.output = call(batch, batch_idx)
        zero_grad(batch_idx)
        differentiate(output)
        return output

    return compute


def _compute_within(trainer: Any, part: OptimizerPart, window: Accumulation, zero_grad: Callable[[int], None]) -> Step:
    call, is_last, weighs, metrics = part.call, part.is_last, part.weighs, trainer.metrics
    own = _own_backward(trainer, part.optimizer, part.index)
    inner, skip = trainer.lite.backward if own is None else own, skipper(trainer)
    reference = trainer.accumulation == "reference"
    by_size = window.weighted  # the window that is open
    weights, loop = _weights(trainer, part.index), trainer.fit_loop.epoch_loop

    def enter(loss: Tensor, *args: Any, **kwargs: Any) -> None:
        loop.entered = True
        inner(loss, *args, **kwargs)

    backward = run_backward(trainer, enter)

    def compute_within(batch: Any, batch_idx: int) -> Any:
        nonlocal by_size
        first = not window.is_open
        if first:
            by_size = weighs is not None and weighs(batch_idx)
        with window(last=is_last(batch_idx)):
            output = loop.output = call(batch, batch_idx)
            loss = pick_loss(output)
            if first:
                zero_grad(batch_idx)
            weight = None if reference else weights.of(output, loss)
            if weight is None and (by_size or (loss is None and window.weighted)):
                weight = 0.0 if loss is None else metrics.batch_size()
            if weight is not None:
                window.weigh(weight)
            if loss is None:
                skip()
                return output
            if not loss.requires_grad:
                raise UsageError(NO_GRAPH)
            # What comes next may go past Lite, or expects the divided loss as in Lightning.
            backward(loss if own is None and not reference else window.scaled(loss))
        return output

    return compute_within


# ---- steps with a closure


def wants_closure(module: Any, optimizer: Optimizer) -> bool:
    """Whether somebody looks at the closure: an override, LBFGS, or an optimizer that isn't torch's."""
    if overrides(module, "optimizer_step", LightningModule) or isinstance(optimizer, LBFGS):
        return True
    return not type(optimizer).__module__.startswith("torch.optim")


def _closed_step(
    trainer: Any, part: OptimizerPart, optimizer: Optimizer, compute: Step
) -> tuple[Step, Callable[[], None]]:
    """As `compose_part`, by `optimizer_step` with a closure, which may call it, leave it, or call it again."""
    window, progress, stepped = part.window, trainer.fit_loop.progress, part.stepped
    if window is not None and isinstance(optimizer, LBFGS):
        raise ConfigError(
            f"accumulate_grad_batches={window.steps} with LBFGS, which evaluates its loss several times per step and "
            "would need all batches of the window each time; set accumulate_grad_batches=1 and a larger batch size."
        )
    before_step = before_step_hooks(trainer, part.clip)
    steps, waiting = 0, False  # gradients wait for a step: a closure has run by itself
    newest: Any = None

    def before(which: Optimizer) -> None:
        nonlocal waiting
        if before_step is not None and waiting:
            before_step(which)
        waiting = False

    def after() -> None:
        nonlocal steps
        steps += 1

    handle = in_hands(optimizer, before=before, after=after, zero=lambda which: None, module=trainer.module)
    own_step = indexed(trainer.module.optimizer_step, part.index, **old_settings(optimizer))

    def update(batch_idx: int, closure: Callable[[], Any]) -> None:
        nonlocal steps
        steps = 0
        own_step(progress.epoch, batch_idx, handle, closure)
        if steps:  # counted when the override is over, as in Lightning
            stepped(steps)

    def step(batch: Any, batch_idx: int) -> Any:
        nonlocal newest
        newest = None
        if window is not None and not _is_complete_with(window, part.is_last(batch_idx)):
            newest = compute(batch, batch_idx)
            return newest
        calls = 0

        def closure() -> Any:
            nonlocal newest, waiting, calls
            if window is not None and calls:
                raise UsageError(_evaluated_again(optimizer, window))
            calls += 1
            newest = compute(batch, batch_idx)
            waiting = True
            return pick_loss(newest)

        update(batch_idx, closure)
        return newest

    def flush() -> None:
        nonlocal waiting
        if window is not None and window.is_open:
            window.flush()
            waiting = True
            update(progress.batch - 1, lambda: pick_loss(newest))

    return step, flush


def _is_complete_with(window: Accumulation, last: bool) -> bool:
    """Whether the next batch completes the window."""
    return last or (window.count if window.is_open else 0) + 1 == window.steps


def _evaluated_again(optimizer: Optimizer, window: Accumulation) -> str:
    return (
        f"{type(optimizer).__name__}.step or optimizer_step called the closure again in a window of accumulation, of "
        f"which it evaluates the last of {window.count} batches alone; set accumulate_grad_batches=1 and a larger "
        "batch size, or call the closure once."
    )
