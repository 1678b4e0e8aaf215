"""One training batch where `configure_optimizers` has declared several optimizers.

for each optimizer whose turn it is:
    only its parameters want gradients: its step function; drop old gradients; backward
    and, when its window is complete, clip and step; its schedulers
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lite.trainer.declared import Declared
from lite.trainer.hooks import indexed, overrides
from lite.trainer.loops.calling import Step, pick_loss, step_caller
from lite.trainer.loops.gradient import before_step_hooks, drop_gradients, old_settings, run_backward, skipper
from lite.trainer.manual import clip_by, in_hands
from lite.trainer.module import LightningModule
from lite.trainer.schedules import step_schedulers


def compose_declared(trainer: Any, num_batches: float) -> Step:
    """The function of (batch, batch_idx); it returns a dict of what each step function returned, by its name."""
    loop, progress = trainer.fit_loop.epoch_loop, trainer.fit_loop.progress
    parts = [_Part(trainer, index, one, num_batches) for index, one in enumerate(trainer.declared)]
    loop.flushes = [part.flush for part in parts]

    def step(batch: Any, batch_idx: int) -> Any:
        number, before = progress.batches + 1, progress.updates
        outputs: dict[str, Any] = {}
        for part in parts:
            if number % part.every == 0:
                outputs[part.name] = part.run(batch, batch_idx)
        progress.stepped += progress.updates > before
        return outputs

    return step


class _Part:
    """One optimizer with all that belongs to its steps."""

    def __init__(self, trainer: Any, index: int, declared: Declared, num_batches: float) -> None:
        module = trainer.module
        self._trainer, self._module, self._optimizer = trainer, module, trainer.optimizers[index]
        self.name, self.every = declared.step, declared.every_n_batches
        self._call = step_caller(getattr(module, declared.step))
        self._num_batches, self._index = num_batches, index
        count = declared.accumulate_grad_batches or trainer.accumulate_grad_batches
        loop = trainer.fit_loop.epoch_loop
        self._window: Any = None
        if count > 1:
            window = trainer.lite.accumulate(module, steps=count, optimizer=self._optimizer)
            self._window = loop.windows.add(declared.step, window)
        self._weighs = loop.always_weighs
        self._zero_grad = drop_gradients(trainer, self._optimizer, index)
        self._backward = run_backward(trainer, self._optimizer, index)
        self._skip = skipper(trainer)
        self._before_step = before_step_hooks(trainer, _clipping(trainer, declared, index))
        self._schedulers = [
            c
            for c in trainer.lr_scheduler_configs
            if c.interval == "step" and getattr(c.scheduler, "optimizer", None) is self._optimizer
        ]
        self._count: Callable[[int], int] = loop.count_step
        self._step = self._raw_step
        if overrides(module, "optimizer_step", LightningModule):
            nothing: Callable[..., None] = lambda *args: None  # noqa: E731
            parts = {"before": nothing, "after": self._own_stepped, "zero": nothing, "module": module}
            self._handle = in_hands(self._optimizer, **parts)
            self._own = indexed(module.optimizer_step, index, **old_settings(self._optimizer))
            self._step = self._own_step

    def run(self, batch: Any, batch_idx: int) -> Any:
        with self._module.toggled_optimizer(self._optimizer):
            window = self._window
            if window is None:
                output = self._call(batch, batch_idx)
                loss = pick_loss(output)
                self._zero_grad(batch_idx)
                self._skip() if loss is None else self._backward(loss)
            else:
                left = self._num_batches - batch_idx - 1
                first = not window.is_open
                with window(last=left < self.every):
                    output = self._call(batch, batch_idx)
                    loss = pick_loss(output)
                    if first:
                        self._zero_grad(batch_idx)
                    weight = output.get("weight") if isinstance(output, Mapping) else None
                    if weight is None and self._weighs:
                        weight = self._trainer.metrics.batch_size()
                    if weight is not None:
                        window.weigh(0.0 if loss is None else weight)
                    self._skip() if loss is None else self._backward(loss)
                if not window.ready:
                    return output
            self._finish(batch_idx, loss)
        return output

    def flush(self) -> None:
        """The epoch has ended before anybody knew: an open window steps."""
        if self._window is not None and self._window.is_open:
            self._window.flush()
            self._finish(self._trainer.fit_loop.progress.batch - 1, None)

    def _finish(self, batch_idx: int, loss: Any) -> None:
        updates = self._trainer.fit_loop.progress.updates
        if self._before_step is not None:
            self._before_step(self._optimizer)
        self._step(batch_idx, loss)
        if self._trainer.fit_loop.progress.updates > updates:
            number = self._count(self._index)
            if self._schedulers:
                step_schedulers(self._trainer, self._schedulers, number)

    def _raw_step(self, batch_idx: int, loss: Any) -> None:
        self._optimizer.step()
        self._stepped()

    def _own_step(self, batch_idx: int, loss: Any) -> None:
        """By the module's `optimizer_step`; the closure has run already, and says what came out."""
        epoch = self._trainer.fit_loop.progress.epoch
        self._own_steps = 0
        self._own(epoch, batch_idx, self._handle, lambda: loss)
        self._trainer.fit_loop.progress.updates += self._own_steps

    def _own_stepped(self) -> None:
        self._own_steps += 1

    def _stepped(self) -> None:
        self._trainer.fit_loop.progress.updates += 1


def _clipping(trainer: Any, declared: Declared, index: int) -> Callable[[Any], Any] | None:
    module = trainer.module
    value = declared.gradient_clip_val if declared.gradient_clip_val is not None else trainer.gradient_clip_val
    algorithm = declared.gradient_clip_algorithm or trainer.gradient_clip_algorithm
    if overrides(module, "configure_gradient_clipping", LightningModule):
        own = indexed(module.configure_gradient_clipping, index)
        return lambda optimizer: own(optimizer, value, algorithm)
    if not value:
        return None
    return lambda optimizer: clip_by(trainer.lite, module, optimizer, value, algorithm)
