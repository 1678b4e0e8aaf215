"""One training batch in manual optimisation: `training_step` runs backward and steps by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer

from lite.trainer.hooks import indexed, overrides
from lite.trainer.loops.calling import Step, training_call
from lite.trainer.loops.gradient import before_step_hooks, hooked, run_backward
from lite.trainer.optimization.manual import Optimisation, in_hands


def manual_step(trainer: Any) -> Step:
    """The module's own hand: it runs backward and steps; the optimizers that it has been given count."""
    module, call = trainer.module, training_call(trainer)
    progress = trainer.fit_loop.progress

    def step(batch: Any, batch_idx: int) -> Any:
        updates = progress.updates
        output = module.manual_step(call, batch, batch_idx)
        if progress.updates > updates:
            progress.stepped += 1
        return output

    return step


def manual_optimizers(trainer: Any) -> list[Any]:
    """The run's optimizers for `training_step`: their steps run the hooks and count."""
    progress = trainer.fit_loop.progress

    def nothing(optimizer: Optimizer) -> None:
        """Nobody looks on."""

    def after() -> None:
        progress.updates += 1

    parts = {
        "before": before_step_hooks(trainer, None) or nothing,
        "after": after,
        "zero": hooked(trainer, "on_before_zero_grad") or nothing,
        "module": trainer.module,
    }
    return [in_hands(optimizer, **parts) for optimizer in trainer.optimizers]


def manual_backward(trainer: Any) -> Callable[..., None]:
    """The module's backward with its hooks."""
    backward = own = trainer.module.backward
    if overrides(trainer.module, "backward", Optimisation):
        present = indexed(own, None, optimizer=None)

        def backward(loss: Any, *args: Any, **kwargs: Any) -> None:
            (own if args else present)(loss, *args, **kwargs)  # who gives more knows the method's form

    return run_backward(trainer, backward)
