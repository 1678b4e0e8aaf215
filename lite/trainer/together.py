"""Calls that every rank of a run must make: who makes such a call alone is told so, instead of waiting for ever."""

from __future__ import annotations

import weakref
from typing import Any

from lite.guards import meeting
from lite.guards.failure import current_watch


def meet(trainer: Any, what: str, remedy: str) -> None:
    """Wait until all ranks are here, but not for one that has gone on. Collective, and rare."""
    watch = current_watch() if trainer.world_size > 1 and not trainer.barebones else None
    if watch is not None:
        meeting.meet(watch, what, remedy, in_order=True)


def report_position(trainer: Any) -> None:
    """Let ranks that wait in `meet` know which batch this one is in, whether in its step, and after which hooks."""
    watch = current_watch() if trainer.world_size > 1 else None
    if watch is None:
        return
    reference = weakref.ref(trainer)

    def position() -> tuple[int, ...]:
        trainer = reference()
        if trainer is None or not hasattr(trainer, "hooks"):
            return ()
        # Each number only grows while ranks have counted alike, and what is read first is never too large for the rest.
        fit, begun = trainer.fit_loop, trainer.state.stage is not None  # before that a checkpoint may be loaded
        batches, loop = fit.progress.batches if begun else 0, fit.epoch_loop
        in_step = loop.under_way and trainer.metrics.here.hook == "training_step"
        return batches, int(in_step), trainer.hooks.done

    watch.report_position(position)
