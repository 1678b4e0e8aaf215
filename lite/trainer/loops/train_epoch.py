"""One epoch of training.

for each batch that is left:
    start hooks (which may skip the rest); step; schedulers; end hooks
    and where one of them is due: a row for the loggers, validation, the decision to stop, a save; in this order
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from torch import nn

from lite import collectives
from lite.errors import ConfigError
from lite.trainer.callbacks.progress_bar import ProgressBar
from lite.trainer.data.combined import CombinedLoader
from lite.trainer.data.counting import INFINITE, length
from lite.trainer.data.stage import StageData
from lite.trainer.events import Event
from lite.trainer.hooks import overrides
from lite.trainer.logging.metric_objects import unchanged_metrics
from lite.trainer.logging.metrics import Metrics
from lite.trainer.loops.calling import Step, Weights, hook_outputs
from lite.trainer.loops.saves import Saves
from lite.trainer.loops.step import compose_step
from lite.trainer.module import LightningModule
from lite.trainer.old import OldHooks
from lite.trainer.optimization.schedules import step_schedulers
from lite.trainer.optimization.windows import Windows, make_window
from lite.trainer.together import meet

_SKIPPED = (
    "on_train_batch_start returned -1",
    "Let it return -1 on all ranks or on none, by what lite.all_reduce or lite.broadcast says, for example.",
)


class TrainEpochLoop:
    """Trains on the batches of one epoch; its cursor is the fit loop's progress.

    Attributes:
        window: The window of accumulation, or None where every batch is a step.
        windows: The run's windows: that one, or those of several optimizers.
        flushes: What ends open windows, and lets them step, where an epoch's end comes unannounced.
        settled: What was due after the newest batch has been done, up to the saves.
        under_way: A batch has been given out whose step is not done.
        saves: Those of the newest batch.
        entered: A batch of a window has had a backward; it counts while it is `under_way`.
        complete: The epoch has had its last batch, and what comes of that.
        output: What `training_step` returned for the newest batch. Steps put it here before the backward, so that the
            one before goes with its graph, as in a raw loop: kept longer it costs 2 % of a small GPT's step.
        weights: What the run knows of the weights that step functions return, by their optimizers' positions.
        old: The module's hooks of older versions, where it has any.
    """

    def __init__(self) -> None:
        self.window: Any = None
        self.output: Any = None
        self.weights: dict[int, Weights] = {}
        self.old: OldHooks | None = None
        self.windows = Windows()
        self.flushes: list[Callable[[], None]] = []
        self.settled = True
        self.under_way = self.complete = self.entered = False
        self._steps: dict[int, int] = {}  # of optimizers with a step function each, by their position
        self._look_at: float = 0
        self._show_at: float = 0
        self._validated_at_s = time.monotonic()
        self._stepped = self._updates = 0
        self.saves = Saves()
        self._bars: list[ProgressBar] = []
        self._iterator: Iterator[Any] | None = None

    def run(self, trainer: Any) -> Iterator[Event]:
        """Train until the epoch or the run is over; gives an event after each batch."""
        fit, hooks, metrics = trainer.fit_loop, trainer.hooks, trainer.metrics
        progress, data = fit.progress, fit.data
        num_batches = data.num_batches
        count = progress.batch
        self._make_window(trainer)
        old = self.old
        if old is not None and count:
            old.tell_of_outputs_before()
        step = compose_step(trainer, self.window, num_batches)
        on_start, on_end = hooks.on_train_batch_start, hooks.on_train_batch_end
        in_start = metrics.place("train", "on_train_batch_start")
        in_end = metrics.place("train", "on_train_batch_end")
        training, at, begin_batch = metrics.place("train", "training_step"), metrics.at, metrics.begin_batch
        move, driven = data.move, "batch" in fit.events
        splits = trainer.world_size > 1 and not data.combined
        real = trainer.lite.real_samples if splits else None
        if splits:
            step = _without_counting(step, metrics, trainer.module)
        stop_polled = fit.stop_poll if trainer.world_size > 1 else None  # alone, the signal itself lets the loop look
        event = Event("batch", trainer)
        if self.settled:
            self._stepped = progress.stepped
        self._bars = [callback for callback in trainer.callbacks if isinstance(callback, ProgressBar)]
        batches = self._open(trainer, data, count)
        over = fit.begun is not None and fit.is_over(trainer)  # saved as the epoch that ends the run was ending
        if not over and count < num_batches and not self.complete:
            fit.begun = None  # the run is to go on further than when it was saved
        over = over or (not self.settled and self._settle(trainer, count))
        due = self.saves.take()
        if due is not None:
            fit.restore_moment()
            self._save(trainer, due["validated"], due["left"])
            over = over or fit.is_over(trainer)
        fit.restore_moment()
        self._set_look(trainer, count)
        self._show_at = 0
        for batch in () if over else batches:
            if move is not None:
                batch = move(batch, 0)
            begin_batch(batch, in_start if on_start else training)
            self.under_way, self.entered, self._updates = True, False, progress.updates
            if real is not None:
                metrics.filler = real() == 0
            if on_start:
                if any([hook(batch, count) == -1 for hook in on_start]):
                    self.under_way = False
                    meet(trainer, *_SKIPPED)
                    self._end_unannounced(trainer, count, validates=False)
                    break
                at(training)
            self.output = step(batch, count)
            count += 1
            if old is not None and not metrics.filler:
                old.keep(hook_outputs(self.output))
            self.under_way = False
            progress.batches += 1
            progress.batch = count
            if count >= num_batches:
                self._end_of_batches(trainer)
            if on_end:
                at(in_end)
                outputs = hook_outputs(self.output)
                self.settled = False
                for hook in on_end:
                    hook(outputs, batch, count - 1)
                self.settled = True
            if count >= self._look_at or fit.wants_stop or (stop_polled is not None and stop_polled()):
                metrics.end_batches()
                ends = self._look(trainer, count)
                if driven:
                    yield event
                if ends:
                    break
                continue
            if count >= self._show_at:
                self._show(trainer, count)
            if driven:
                yield event
        else:
            if count < num_batches and not over:  # the loader had fewer than it said, or nobody knew
                self._end_unannounced(trainer, count, validates=fit.validates_at_end(trainer))
        metrics.end_batches()
        self._iterator = None
        self.output = None
        self.under_way = False

    # ---- batches

    def _open(self, trainer: Any, data: StageData, count: int) -> Iterator[Any]:
        """The batches that are left, from an iterator that is begun here, or gone on with after an interruption."""
        loader, fit = data.loaders[0], trainer.fit_loop
        left = data.num_batches - count
        if left <= 0 or self.complete:
            if fit.moment is not None:
                discard(loader)
            return iter(())
        batches: Iterator[Any] = iter(loader)
        if data.combined:
            batches = (batch for batch, _, _ in batches)
        if count and not hasattr(loader, "load_state_dict"):
            next(islice(batches, count, count), None)  # a plain iterable is read again up to here
        if data.may_end_alone:
            batches = _until_any_ends(batches)
        self._iterator = batches
        if left < INFINITE and left != _remaining(loader, count):
            batches = islice(batches, int(left))
        return batches

    def _end_of_batches(self, trainer: Any) -> None:
        """The last batch of the epoch is done: an open window steps, and so do schedulers by the epoch."""
        self.complete = True
        for flush in self.flushes:
            flush()
        configs = [c for c in trainer.lr_scheduler_configs if c.interval == "epoch" and not c.reduce_on_plateau]
        if configs and trainer.module.automatic_optimization:
            step_schedulers(trainer, configs, trainer.fit_loop.progress.epoch + 1)

    def _end_unannounced(self, trainer: Any, count: int, *, validates: bool) -> None:
        """The epoch is over and nobody knew its last batch as such: what comes of it, and what is due after that."""
        before = trainer.fit_loop.progress.stepped
        if not self.complete:
            self._end_of_batches(trainer)
        if validates or trainer.fit_loop.progress.stepped > before:
            self._look(trainer, count, validates=validates)

    # ---- accumulation

    def _make_window(self, trainer: Any) -> None:
        steps, self.window, self.flushes = trainer.accumulate_grad_batches, None, []
        self.windows.clear()
        if steps > 1 and not trainer.declared and trainer.module.automatic_optimization:
            self.window = self.windows.add("window", make_window(trainer, steps))

    def window_of(self, trainer: Any, optimizer: Any, steps: int) -> Any:
        """The window of one optimizer in manual optimisation; the same one throughout an epoch."""
        number = next((i for i, one in enumerate(trainer.optimizers) if one is optimizer), None)
        if number is None:
            raise ConfigError("accumulate got an optimizer that configure_optimizers did not return.")
        name = str(number)
        window = self.windows.named.get(name)
        if window is None or window.steps != steps:
            window = self.windows.add(name, make_window(trainer, steps, optimizer))
        return window

    @property
    def has_mixed_gradients(self) -> bool:
        """Whether the batch that is under way has added its gradients to those of others that wait for a step."""
        return self.under_way and self.entered and any(window.count for window in self.windows.windows)

    def has_stepped(self, updates: int) -> bool:
        """Whether an optimizer has stepped in the batch that is under way, by the count of all steps."""
        return self.under_way and updates > self._updates

    @property
    def window_is_open(self) -> bool:
        """Whether gradients wait for more batches."""
        return self.windows.is_open

    def count_step(self, index: int) -> int:
        """Count a step of the optimizer at that position, where each has its own; returns the count."""
        self._steps[index] = count = self._steps.get(index, 0) + 1
        return count

    # ---- what is not due at each batch

    def _look(self, trainer: Any, count: int, *, validates: bool | None = None) -> bool:
        """Do what is due after this batch; whether the epoch ends here. `validates` is known at an unannounced end."""
        fit = trainer.fit_loop
        self.settled = False
        if fit.interrupted:
            raise KeyboardInterrupt
        progress = fit.progress
        every = trainer.log_every_n_steps
        new_step = progress.stepped > self._stepped
        self._stepped = progress.stepped
        stops = fit.wants_stop and fit.may_stop_early()
        if new_step and ((every and progress.stepped % every == 0) or stops or trainer.fast_dev_run):
            trainer.write_row(trainer.metrics.step_row("train"))
        talks = fit.wants_stop or (new_step and progress.stepped % trainer.ranks_talk_every == 0)
        if trainer.world_size > 1 and talks:
            fit.vote()
        if trainer.stops_for_signal():
            return True
        due = fit.validation_is_due(trainer, count) if validates is None else validates
        validated = fit.validate_if(trainer, due)
        if not validated and fit.wants_stop and fit.may_stop_early():
            validated = fit.validate_if(trainer, fit.validates(trainer))
        return self._decide(trainer, count, validated=validated)

    def _decide(self, trainer: Any, count: int, *, validated: bool) -> bool:
        """Whether the epoch ends here; and saves, which have all that came before."""
        fit = trainer.fit_loop
        if fit.stopped_by_signal:  # within validation, which is gone on with
            return True
        self.settled = True
        ends: bool = fit.is_over(trainer)
        self._save(trainer, validated)
        self._show(trainer, count)
        self._set_look(trainer, count)
        return ends

    def _save(self, trainer: Any, validated: bool, left: list[str] | None = None) -> None:
        """Let callbacks save: all, or those that are left."""
        callbacks = trainer.checkpoint_callbacks
        if not callbacks:
            return
        self.saves.make(callbacks, left, lambda one: one.after_batch(trainer, validated=validated), validated=validated)

    def _show(self, trainer: Any, count: int) -> None:
        """Let progress bars look, which is a rank's own affair."""
        for bar in self._bars:
            bar.after_batch(trainer, count)
        self._show_at = count + min([bar.next_look() for bar in self._bars], default=INFINITE)

    def _settle(self, trainer: Any, count: int) -> bool:
        """Do what was still due after the newest batch when the run was saved; whether the epoch ends here."""
        fit = trainer.fit_loop
        if fit.val_loop.restoring:  # it goes on under the random state of that moment
            fit.finish_validation(trainer)
            return self._decide(trainer, count, validated=True)
        fit.restore_moment()
        return self._look(trainer, count)

    def look_now(self) -> None:
        """Let the batch that runs be followed by a look at what is due."""
        self._look_at = 0

    def _set_look(self, trainer: Any, count: int) -> None:
        """Set the batch after which to look next: the one that comes, where a signal came while nobody looked."""
        self._look_at = self._next_look(trainer, count)
        if trainer.fit_loop.is_called_off(trainer):  # asked last, since a signal may come at any time
            self.look_now()

    def _next_look(self, trainer: Any, count: int) -> float:
        """The batch of this epoch after which something may be due, the same on all ranks; until then a batch costs one
        comparison.
        """
        fit, every = trainer.fit_loop, trainer.log_every_n_steps
        progress = fit.progress
        look: float = min(fit.data.num_batches, fit.next_validation(trainer, count))
        if trainer.world_size > 1:
            every = trainer.ranks_talk_every
        if every and (trainer.loggers or trainer.world_size > 1):
            look = min(look, count + every - progress.stepped % every)
        steps = min([c.next_look(progress.updates) for c in trainer.checkpoint_callbacks], default=INFINITE)
        if fit.max_steps >= 0:
            steps = min(steps, fit.max_steps - progress.updates)
        if steps < INFINITE:
            look = min(look, count + (1 if _may_step_twice(trainer) else steps))
        return max(look, count + 1)

    # ---- state

    def state_dict(self) -> dict[str, Any]:
        """Counts, and what is still due; the cursor is the fit loop's, and open windows are an entry of their own."""
        due = None if self.settled else {"stepped": self._stepped}
        return {"steps": dict(self._steps), "due": due, "ended": self.complete, "saves": self.saves.state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on counting, and do what is still due."""
        self._steps = dict(state.get("steps", {}))
        due = state.get("due")
        self.settled, self.complete = due is None, state.get("ended", False)
        self.saves.state = state.get("saves")
        self.under_way = self.entered = False  # of a fit before this one
        if due is not None:
            self._stepped = due["stepped"]

    def begin(self) -> None:
        """An epoch begins."""
        self.settled, self.complete, self.under_way = True, False, False
        self.saves.take()


def discard(loader: Any) -> None:
    """Let go of a pass that a loaded state asks for and of which nothing is wanted any more."""
    if isinstance(loader, CombinedLoader):
        loader.forget_position()
        for part in loader.flattened:
            discard(part)
        return
    progress = getattr(loader, "progress", None)
    if progress is not None and progress()[1]:
        next(iter(loader), None)


def _may_step_twice(trainer: Any) -> bool:
    """Whether a batch may have several optimizer steps: of several optimizers, or by a hand of one's own."""
    module = trainer.module
    own = not module.automatic_optimization or overrides(module, "optimizer_step", LightningModule)
    return own or bool(trainer.declared)


def _remaining(loader: Any, count: int) -> float | None:
    total = length(loader)
    return None if total is None else total - count


def _without_counting(step: Step, metrics: Metrics, module: nn.Module) -> Step:
    """The step, in which metrics leave out a batch that only keeps this rank in step."""

    def counted(batch: Any, batch_idx: int) -> Any:
        if not metrics.filler:
            return step(batch, batch_idx)
        with unchanged_metrics(module):
            return step(batch, batch_idx)

    return counted


def _until_any_ends(batches: Iterator[Any]) -> Iterator[Any]:
    """Batches as long as every rank has one, so that none waits for a rank that has ended. Collective per batch."""
    ended = object()
    while True:
        batch = next(batches, ended)
        if collectives.any_rank(batch is ended):
            return
        yield batch
