"""One training batch where `configure_optimizers` has declared several optimizers.

for each optimizer whose turn it is:
    only its parameters want gradients: its step function, and what follows (part.py)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lite.trainer.loops.calling import Step, training_call
from lite.trainer.loops.gradient import clipping
from lite.trainer.loops.optimizer_part import OptimizerPart, compose_part
from lite.trainer.optimization.declared import Declared
from lite.trainer.optimization.manual import parameters_of_others
from lite.trainer.optimization.schedules import stepping
from lite.trainer.optimization.windows import make_window, weighing


def compose_declared(trainer: Any, num_batches: float) -> Step:
    """The function of (batch, batch_idx); it returns a dict of what each step function returned, by its name."""
    loop, progress = trainer.fit_loop.epoch_loop, trainer.fit_loop.progress
    parts: list[tuple[str, int, Step]] = []
    flushes = []
    for index, declared in enumerate(trainer.declared):
        step, flush = _compose(trainer, index, declared, num_batches)
        parts.append((declared.step, declared.every_n_batches, step))
        flushes.append(flush)

    counted = False  # the newest batch is one that stepped

    def step_all(batch: Any, batch_idx: int) -> Any:
        nonlocal counted
        number, before = progress.batches + 1, progress.updates
        outputs: dict[str, Any] = {}
        for name, every, step in parts:
            if number % every == 0:
                outputs[name] = step(batch, batch_idx)
        counted = progress.updates > before
        progress.stepped += counted
        return outputs

    def flush_all() -> None:
        before = progress.updates
        for flush in flushes:
            flush()
        progress.stepped += progress.updates > before and not counted

    loop.flushes = [flush_all]
    return step_all


def _compose(trainer: Any, index: int, declared: Declared, num_batches: float) -> tuple[Step, Callable[[], None]]:
    """One optimizer's step, while no other's parameters want gradients; and what ends its open window."""
    module, loop, progress = trainer.module, trainer.fit_loop.epoch_loop, trainer.fit_loop.progress
    optimizer, every = trainer.optimizers[index], declared.every_n_batches
    count = declared.accumulate_grad_batches or trainer.accumulate_grad_batches
    window = loop.windows.add(declared.step, make_window(trainer, count, optimizer)) if count > 1 else None
    weighs = None if window is None else weighing(trainer, None)
    configs = [config for config in trainer.lr_scheduler_configs if config.interval == "step"]
    schedule = stepping(trainer, [c for c in configs if c.optimizer is optimizer])

    def stepped(count: int) -> None:
        progress.updates += count
        schedule(loop.count_step(index))

    part = OptimizerPart(
        training_call(trainer, declared.step),
        optimizer,
        index,
        window,
        is_last=lambda batch_idx: num_batches - batch_idx - 1 < every,
        weighs=weighs,
        clip=clipping(trainer, index, declared),
        stepped=stepped,
    )
    run, flush = compose_part(trainer, part)
    others = parameters_of_others(optimizer, trainer.optimizers)

    def step(batch: Any, batch_idx: int) -> Any:
        with module.freezing(others):
            return run(batch, batch_idx)

    return step, flush
