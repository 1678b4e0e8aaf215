"""Training from the first epoch to the last.

start hooks
until epochs, steps or someone's wish end it:
    loaders anew where that is due; epoch-start hooks
    the epoch's batches (train_epoch.py), validation within them where it is due
    epoch-end hooks; the epoch's metrics; schedulers that follow a metric; saves
end hooks
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from lite import collectives
from lite.seed import RandomState
from lite.trainer.data.counting import INFINITE, sizes_of
from lite.trainer.data.stage import StageData
from lite.trainer.events import Event
from lite.trainer.logging.metric_objects import epoch_sums
from lite.trainer.loops.evaluate import EvaluationLoop
from lite.trainer.loops.saves import Saves
from lite.trainer.loops.train_epoch import TrainEpochLoop, discard
from lite.trainer.old import find_old_hooks
from lite.trainer.optimization.schedules import step_schedulers
from lite.trainer.planning import check_monitored
from lite.trainer.progress import Progress
from lite.trainer.validation import ValidationSchedule


class FitLoop:
    """Trains over epochs. Its state is the progress, with the loops within it.

    Args:
        min_epochs: Epochs before which nobody's wish to stop counts. What is None here, and below, a loop takes over
            from the one in whose place it is put.
        max_epochs: Epochs in all; -1 for no limit.
        min_steps: As `min_epochs`, in optimizer steps.
        max_steps: As `max_epochs`, in optimizer steps.
        schedule: When validation is due.

    Attributes:
        progress: The cursor and the clocks.
        wants_stop: Training is to stop (`trainer.should_stop`): the same on all ranks.
        events: The kinds of events that are given.
        wish: What this rank alone wishes of that; the others hear of it at the next vote. None for nothing.
        empty: There is nothing to train on.
        follows_metrics: Schedulers that follow a metric step; not in a fit that only tries something out.
        data, val_data: The loaders.
    """

    def __init__(
        self,
        min_epochs: int | None = None,
        max_epochs: int | None = None,
        min_steps: int | None = None,
        max_steps: int | None = None,
        schedule: ValidationSchedule | None = None,
    ) -> None:
        self._given = (min_epochs, max_epochs, min_steps, max_steps, schedule)
        self.min_epochs, self.max_epochs = min_epochs or 0, 1000 if max_epochs is None else max_epochs
        self.min_steps, self.max_steps = min_steps or 0, -1 if max_steps is None else max_steps
        self.schedule = schedule or ValidationSchedule()
        self.progress = Progress()
        self.epoch_loop = TrainEpochLoop()
        self.val_loop = EvaluationLoop("validate")
        self.data = StageData()
        self.val_data = StageData()
        self.wants_stop = self.stopped_by_signal = self.interrupted = self.empty = False
        self.wish: bool | None = None
        self.follows_metrics = True
        self.events = {"batch", "epoch"}
        self.data_parts = 1  # how many ranks have different samples
        self.stop_poll: Callable[[], bool] | None = None
        self.moment: RandomState | None = None
        self.sums_before: dict[str, Any] | None = None  # an epoch that is cut off may be gone on with
        self.shown_after: dict[str, Any] | None = None  # what such an epoch came to, of a checkpoint
        self._monitors_checked = self._cut_off = False
        self.begun: list[str] | None = None  # whose hooks at the epoch's end have begun, while these run
        self._started: list[str] = []  # the same at its start
        self._ending: bool | None = None  # the epoch's end is being saved, of a complete epoch or one that was cut off
        self.saves = Saves()

    def run(self, trainer: Any) -> Iterator[Event]:
        """Train; gives an event after each batch and each epoch."""
        hooks, metrics, progress = trainer.hooks, trainer.metrics, self.progress
        metrics.at(metrics.place("train", "on_train_start"))
        hooks.call("on_train_start")
        if trainer.world_size > 1:
            self.vote()  # time may be over before it begins
        progress.start_clock()
        self.epoch_loop.old, self.epoch_loop.weights = find_old_hooks(trainer.module, "train"), {}
        epoch_done = Event("epoch", trainer)
        try:
            self._show_again(trainer)
            self._finish_saves(trainer)
            while not self.is_over(trainer) or self.is_unsettled:
                if not progress.within:
                    self._begin_epoch(trainer)
                yield from self.epoch_loop.run(trainer)
                if self.stopped_by_signal:
                    break
                self._end_epoch(trainer)
                if self.progress.within:  # cut off in the middle
                    self._cut_off = True
                    break
                if "epoch" in self.events:
                    yield epoch_done
        finally:
            progress.stop_clock()
        if self.stopped_by_signal:
            return
        if self.interrupted:  # in the last hooks of an epoch
            raise KeyboardInterrupt
        if trainer.stops_for_signal(now=True):  # the same
            return
        trainer.lite.strategy.end_period()
        metrics.at(metrics.place("train", "on_train_end"))
        hooks.call("on_train_end")
        for callback in trainer.checkpoint_callbacks:
            callback.after_training(trainer)

    # ---- an epoch

    def _begin_epoch(self, trainer: Any) -> None:
        progress, metrics = self.progress, trainer.metrics
        self.epoch_loop.begin()
        every = trainer.reload_dataloaders_every_n_epochs
        if every and progress.epoch > 0 and progress.epoch - max(progress.reloaded, 0) >= every:
            trainer.load_data(self, again=True)
            progress.reloaded = progress.epoch
        if self.moment is not None:
            discard(self.data.loaders[0])
        self.restore_moment()
        metrics.at(metrics.place("train", "on_train_epoch_start"))
        trainer.hooks.call_rest("on_train_epoch_start", self._started)
        self._started = []
        progress.within = True

    def _end_epoch(self, trainer: Any) -> None:
        """Hooks, metrics, schedulers, saves; and on to the next epoch, unless this one was cut off."""
        hooks, metrics, progress = trainer.hooks, trainer.metrics, self.progress
        complete = not self.is_cut_off(trainer)
        self.sums_before = None if complete else epoch_sums(trainer)
        if hooks.on_train_epoch_end or self.epoch_loop.old is not None:
            metrics.show("train")
        metrics.at(metrics.place("train", "on_train_epoch_end"))
        if self.epoch_loop.old is not None:
            self.epoch_loop.old.end()
        self.begun = self.begun or []
        hooks.call_rest("on_train_epoch_end", self.begun)
        self.begun = None
        row, _ = metrics.finish("train")
        trainer.write_row(row)
        if self.sums_before is not None:
            self.sums_before["shown"] = metrics.shown()
        for hook in hooks.monitors:
            hook()
        if complete and not self._monitors_checked:
            self._monitors_checked = check_monitored(trainer)
        if complete and self.follows_metrics and trainer.module.automatic_optimization:
            configs = [c for c in trainer.lr_scheduler_configs if c.interval == "epoch" and c.reduce_on_plateau]
            step_schedulers(trainer, configs, progress.epoch + 1)
        if trainer.world_size > 1:
            self.vote()
        self._save(trainer, complete)
        if complete:
            self._advance(progress)

    def _save(self, trainer: Any, complete: bool, left: list[str] | None = None) -> None:
        """Let callbacks save: all, or those that are left."""
        if not trainer.checkpoint_callbacks:
            return
        self._ending = complete
        try:
            moment = {"complete": complete, "progress": self.progress.state_dict()}
            self.saves.make(trainer.checkpoint_callbacks, left, lambda one: one.after_epoch(trainer), **moment)
        finally:
            self._ending = None

    def _show_again(self, trainer: Any) -> None:
        """Where nothing is left to train, show what the epoch that was cut off came to, and keep its sums for later."""
        shown, self.shown_after = self.shown_after, None
        if shown is not None and self.is_over(trainer) and not self.is_unsettled:
            self.sums_before = {**epoch_sums(trainer), "shown": shown}
            trainer.metrics.reset("train")
            trainer.metrics.show_again(shown)

    def _finish_saves(self, trainer: Any) -> None:
        """What was still to be saved of the epoch at whose end the run was saved."""
        due = self.saves.take()
        if due is None or not (due["complete"] or self.is_over(trainer)):  # a cut-off epoch that goes on ends again
            return
        self.progress.load_state_dict(due["progress"])
        if self.moment is not None:
            self.moment.restore()
            self.moment = RandomState.capture(cuda=True)  # the next epoch begins under it, too
        self._save(trainer, due["complete"], due["left"])
        if due["complete"]:
            self._advance(self.progress)

    def forget_saves(self) -> None:
        """Of the saves at a moment when the run was saved none is to come any more."""
        self.saves.take()
        self.epoch_loop.saves.take()

    def _advance(self, progress: Progress) -> None:
        progress.samples += self.epoch_samples()
        progress.epoch, progress.batch, progress.within = progress.epoch + 1, 0, False

    def is_cut_off(self, trainer: Any) -> bool:
        """Whether the epoch ends before its last batch because the run does."""
        return not self.epoch_loop.complete and self.is_over(trainer)

    def epoch_samples(self) -> int:
        """Samples of this epoch so far over all ranks, where the loader knows; each once."""
        loader = self.data.loaders[0] if self.data.loaders else None
        size, count = sizes_of(loader)
        size = int(getattr(loader, "batch_size", None) or 0) if size is None else size
        samples = self.progress.batch * size
        samples = samples if count is None else min(samples, count)
        shard = getattr(getattr(loader, "batch_sampler", None), "shard", None)
        return samples * (self.data_parts // (1 if shard is None else shard.world_size))

    # ---- the end

    def is_over(self, trainer: Any) -> bool:
        """Whether training ends here."""
        progress = self.progress
        if self.empty or 0 <= self.max_steps <= progress.updates:
            return True
        if 0 <= self.max_epochs <= progress.epoch:
            return True
        return self.stopped_by_signal or (self.wants_stop and self.may_stop_early())

    @property
    def is_unsettled(self) -> bool:
        """Whether something is still due after a batch or at an epoch's end, as in a resumed run that is over."""
        loop = self.epoch_loop
        due = not loop.settled or loop.saves.state is not None or loop.complete or self.begun is not None
        return self.progress.within and due

    @property
    def is_unfinished(self) -> bool:
        """The same, or other callbacks' saves of an epoch that is over are still to come."""
        return self.is_unsettled or (self.saves.state is not None and len(self.saves.state["left"]) > 1)

    def may_stop_early(self) -> bool:
        """Whether a wish to stop counts by now."""
        progress = self.progress
        epochs = progress.epoch + (progress.batch >= self.data.num_batches)
        return epochs >= self.min_epochs and progress.updates >= self.min_steps

    def ask_to_stop(self, value: bool = True, *, alone: bool) -> None:
        """Wish for a stop (or not any more); `alone`: nobody else has to be told."""
        if alone:
            self.wants_stop = value
        self.wish = None if alone else value

    def vote(self) -> None:
        """Let one rank's wish to stop be everyone's, or one's to go on. Collective."""
        stops = collectives.any_rank(self.wants_stop or self.wish is True)
        self.wants_stop = stops and not collectives.any_rank(self.wish is False)
        self.wish = None

    def replaces(self, other: FitLoop) -> None:
        """Take over from another loop what this one was not given."""
        taken = (other.min_epochs, other.max_epochs, other.min_steps, other.max_steps, other.schedule)
        found: list[Any] = [b if a is None else a for a, b in zip(self._given, taken, strict=True)]
        self.min_epochs, self.max_epochs, self.min_steps, self.max_steps, self.schedule = found

    def interrupt(self) -> None:
        """Ctrl-C was pressed: the loop ends when the batch is done."""
        self.interrupted = True
        self.epoch_loop.look_now()

    def is_called_off(self, trainer: Any) -> bool:
        """Whether Ctrl-C has been pressed, or a signal has come to the only process; several agree batch by batch."""
        poll = self.stop_poll if trainer.world_size == 1 else None
        return self.interrupted or (poll is not None and poll())

    # ---- validation

    def validates(self, trainer: Any) -> bool:
        """Whether this run validates at all, and has not just done so."""
        return self.val_data.num_batches > 0 and self.progress.validated != self.progress.batches

    def validation_is_due(self, trainer: Any, count: int) -> bool:
        """Whether validation comes after this batch."""
        if not self.validates(trainer):
            return False
        due = self.schedule.is_due(self.progress, count, self.data.num_batches)
        if self.schedule.interval_s is None or trainer.world_size == 1:
            return due
        # Clocks differ, so rank 0's counts; it is asked as often as ranks talk anyway.
        if self.progress.stepped % trainer.ranks_talk_every:
            return False
        return collectives.any_rank(due and trainer.is_global_zero)

    def validates_at_end(self, trainer: Any) -> bool:
        """Whether validation comes at the end of an epoch of unknown length."""
        return self.validates(trainer) and self.schedule.is_due_at_end(self.progress)

    def next_validation(self, trainer: Any, count: int) -> float:
        """The batch after which validation may be due next."""
        if not self.val_data.num_batches:
            return INFINITE
        return self.schedule.next_look(self.progress, count, self.data.num_batches)

    def validate_if(self, trainer: Any, due: bool) -> bool:
        """Validate now, where that is due; returns whether it was."""
        if not due:
            return False
        manual = not trainer.module.automatic_optimization
        if trainer.hooks.on_validation_model_zero_grad:
            trainer.hooks.call("on_validation_model_zero_grad")
        elif not self.epoch_loop.window_is_open and not manual:
            trainer.module.zero_grad()
        self._validate(trainer)
        self._has_validated()
        return True

    def finish_validation(self, trainer: Any) -> None:
        """Go on with a validation that was interrupted."""
        self._validate(trainer)
        self._has_validated()

    def _has_validated(self) -> None:
        if not self.stopped_by_signal:
            self.progress.validated, self.progress.validated_epoch = self.progress.batches, self.progress.epoch
            self.schedule.done()

    def _validate(self, trainer: Any) -> None:
        trainer.load_data(self, "val")
        trainer.lite.strategy.end_period()

        def look(*, now: bool = False) -> bool:
            if self.interrupted:
                raise KeyboardInterrupt
            stops: bool = trainer.stops_for_signal(now=now)
            return stops

        with trainer.in_stage("validate"):
            # Not inference_mode: what the model keeps of it may be needed by the next backward.
            self.val_loop.run(trainer, self.val_data, no_grad=torch.no_grad, go_on=self.restore_moment, look=look)

    # ---- state

    def restore_moment(self) -> None:
        """Put back the random state of the moment that a resumed run goes on from; once."""
        moment, self.moment = self.moment, None
        if moment is not None:
            moment.restore()

    def state_dict(self) -> dict[str, Any]:
        """Plain values: the progress and the loops within."""
        progress = Progress()
        progress.load_state_dict(self.progress.state_dict())
        if self._ending:
            self._advance(progress)
        return {
            "progress": progress.state_dict(),
            "epoch_loop": self.epoch_loop.state_dict(),
            "val_loop": {**self.val_loop.state_dict(), "position": None},
            "schedule": self.schedule.state_dict(),
            "begun": None if self.begun is None else list(self.begun),
            "started": list(self._started),
            "stops": self.wants_stop and self.is_unsettled,
            "saves": self.saves.state,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.progress.load_state_dict(state["progress"])
        self.epoch_loop.load_state_dict(state["epoch_loop"])
        self.val_loop.load_state_dict(state["val_loop"])
        self.schedule.load_state_dict(state["schedule"])
        self.begun, self._started = state.get("begun"), state.get("started", [])
        self.wants_stop, self.saves.state = state.get("stops", False), state.get("saves")

    def begin_epoch_anew(self) -> None:
        """Forget what the epoch that is under way has done, of which too little is known to go on."""
        self.progress.batch, self.progress.within, self.begun, self._started = 0, False, None, []
        self.val_loop.restoring = self.wants_stop = False

    def begin(self) -> int:
        """A call of `fit` begins.

        Returns:
            Batches of an epoch that an exception or Ctrl-C ended in the fit before this one: the epoch begins anew.
        """
        self.wants_stop = self.stopped_by_signal = self.interrupted = self.empty = False
        self.wish = None
        self.moment = self.sums_before = self.shown_after = self.begun = None
        self._started = []
        self.forget_saves()
        self._monitors_checked = False
        if not self.val_loop.restoring:
            seen, self.val_loop = self.val_loop.seen, EvaluationLoop("validate")
            self.val_loop.seen = seen
        progress = self.progress
        left = 0 if self._cut_off or not progress.within else progress.batch
        progress.epoch += self._cut_off  # its end has been, so the next one comes
        progress.batch, progress.within, self._cut_off = (0 if progress.within else progress.batch), False, False
        self._started_s = time.monotonic()
        return left
