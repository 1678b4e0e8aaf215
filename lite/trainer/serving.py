"""What a run asks of its Trainer as it goes: to begin and end, to write rows, to hand out optimizers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lite import collectives
from lite.trainer.arguments import whole
from lite.trainer.callbacks.merging import merge_callbacks
from lite.trainer.hooks import Hooks
from lite.trainer.loggers import agree_on_versions
from lite.trainer.loops.manual_step import manual_backward, manual_optimizers
from lite.trainer.state import RunningStage, TrainerFn, TrainerStatus
from lite.trainer.view import View


class Serving(View):
    """The side of `Trainer` that loops, modules and callbacks call."""

    hooks: Hooks
    profiler: Any
    barebones: bool
    fast_dev_run: int
    datamodule: Any
    optimizers: list[Any]
    _in_hands: list[Any]
    _manual_backward: Callable[..., None] | None
    _loaded: set[str]
    _own_callbacks: list[Any]
    _merged: list[Any]
    _put_back: list[Callable[[], None]]

    def begin(self, fn: TrainerFn, module: Any, datamodule: Any) -> None:
        """A run of this module begins."""
        self.state.fn, self.state.status = fn, TrainerStatus.RUNNING
        self.module, self.datamodule = module, datamodule
        self.metrics.begin_run()
        self._loaded.clear()
        self._eval_data.clear()
        agree_on_versions(self.loggers)
        module.attach(self, self.metrics)
        if datamodule is not None:
            datamodule.attach(self)
        self._take_changed_callbacks()
        self.callbacks = merge_callbacks(self._own_callbacks, module)
        self._merged = list(self.callbacks)
        for callback in self.callbacks:
            if hasattr(callback, "attach"):
                callback.attach(module)

    def _take_changed_callbacks(self) -> None:
        """What the user has put into `trainer.callbacks`, or taken out of it, since the last run."""
        there, before = {id(c) for c in self.callbacks}, {id(c) for c in self._merged}
        self._own_callbacks = [c for c in self._own_callbacks if id(c) in there or id(c) not in before]
        self._own_callbacks += [c for c in self.callbacks if id(c) not in before]

    def end(self, module: Any, datamodule: Any, outcome: str | None) -> None:
        """It is over: everyone is let go, and loggers are told the outcome, where it was a run."""
        self.state.stage = None
        self.metrics.end_batches()
        self.metrics.at(self.metrics.place("", "the time after a run"))
        for callback in self.callbacks:
            if hasattr(callback, "attach"):
                callback.attach(None)
        if self.profiler is not None and hasattr(self.profiler, "describe"):
            self.profiler.describe(self)
        try:
            if outcome is not None and self.is_global_zero:
                for logger in self.loggers:
                    logger.finalize(outcome)
        finally:
            self.lite.teardown()
            while self._put_back:
                self._put_back.pop()()

    def agree_on_log_dir(self) -> None:
        """Every rank writes beside rank 0's logs."""
        self._log_dir = None
        self._log_dir = collectives.broadcast(self.log_dir if self.is_global_zero else None)

    @property
    def wrap_hook(self) -> Any:
        """What a profiler puts around each hook."""
        return None if self.profiler is None else self.profiler.wrap_hook

    @contextmanager
    def in_stage(self, stage: str) -> Iterator[None]:
        """The block is validation within training."""
        before = self.state.stage
        if before is not RunningStage.SANITY_CHECKING:
            self.state.stage = RunningStage(stage)
        place = self.metrics.here
        try:
            yield
        finally:
            self.state.stage = before
            self.metrics.at(place)

    def set_accumulation(self, batches: int) -> None:
        """From the next epoch on (or this one, as it begins), so many batches make an optimizer step."""
        self.accumulate_grad_batches = whole("accumulate_grad_batches", batches, 1)

    def optimizers_for_module(self, counting: bool) -> list[Any]:
        """The optimizers for the module's own hand."""
        if not counting or self.module.automatic_optimization:
            return self.optimizers
        if not self._in_hands:
            self._in_hands = manual_optimizers(self)
        return self._in_hands

    def manual_backward(self, loss: Any, *args: Any, **kwargs: Any) -> None:
        """Backward with its hooks."""
        if self._manual_backward is None:
            self._manual_backward = manual_backward(self)
        self.fit_loop.epoch_loop.entered = True
        self._manual_backward(loss, *args, **kwargs)

    def write_row(self, row: Mapping[str, Any], stage: str = "train") -> None:
        """Give loggers a row, with the epoch and the clocks in it."""
        if not row or self.sanity_checking or not self.loggers or self.fast_dev_run:
            return
        # A row of training has the number of its newest step, counted from 0; one after training comes behind.
        step = max(self.fit_loop.progress.stepped - self.fitting, 0)
        values = dict(row)
        if "step" in values:
            step = int(values.pop("step"))
        self.lite.log_dict({"epoch": self.current_epoch, **self.clocks(), **values}, step)

    def logs_eval_steps(self, stage: str) -> bool:
        """Whether evaluation may have values of single batches to write."""
        return bool(self.loggers) and not self.sanity_checking and not self.barebones

    def write_eval_step(self, stage: str, number: int) -> None:
        """Write the values of the evaluation batch of that number, where any were logged with on_step=True."""
        if self.metrics.has_step_values(stage):
            self.write_row({"step": number, **self.metrics.step_row(stage)}, stage)
