"""One training batch in manual optimisation: `training_step` runs backward and steps by itself."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

from lite.trainer.loops.calling import Step, step_caller
from lite.trainer.loops.gradient import log_norms, tracked_norm
from lite.trainer.manual import in_hands


def manual_step(trainer: Any) -> Step:
    """The module's own hand: it runs backward and steps; the optimizers that it has been given count."""
    module = trainer.module
    call = step_caller(module.training_step)
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
    hooks, metrics, progress = trainer.hooks, trainer.metrics, trainer.fit_loop.progress
    before_step, zero = hooks.on_before_optimizer_step, hooks.on_before_zero_grad
    norm_type = tracked_norm(trainer)
    places = {name: metrics.place("train", name) for name in ("on_before_optimizer_step", "on_before_zero_grad")}

    def run(name: str, methods: Any, optimizer: Optimizer) -> None:
        if not methods:
            return
        here = metrics.here
        metrics.at(places[name])
        for hook in methods:
            hook(optimizer)
        metrics.at(here)

    def before(optimizer: Optimizer) -> None:
        run("on_before_optimizer_step", before_step, optimizer)
        if norm_type is not None:
            log_norms(trainer.module, norm_type)

    def after() -> None:
        progress.updates += 1

    def zeroing(optimizer: Optimizer) -> None:
        run("on_before_zero_grad", zero, optimizer)

    parts = {"before": before, "after": after, "zero": zeroing, "module": trainer.module}
    return [in_hands(optimizer, **parts) for optimizer in trainer.optimizers]
