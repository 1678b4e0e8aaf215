"""When a checkpoint is due: by optimizer steps, epochs, validations or time. Numbers in, decisions out."""

from __future__ import annotations

import math
import time


class SaveSchedule:
    """Decides by one of these; it knows no Trainer, so a plan of a run asks a copy of it.

    Args:
        every_n_steps: Every so many optimizer steps; 0: they don't count.
        every_n_epochs: Every so many epochs, or validations of such epochs; 0: they don't count.
        interval_s: Every so many seconds; None: time does not count.

    Attributes:
        seen: Optimizer steps when it was last asked after a batch; None where nobody knows.
        saved: Optimizer steps when something was last saved, or -1.
    """

    def __init__(self, every_n_steps: int = 0, every_n_epochs: int = 0, interval_s: float | None = None) -> None:
        self.every_n_steps, self.every_n_epochs, self.interval_s = every_n_steps, every_n_epochs, interval_s
        self.begin()

    def begin(self) -> None:
        """A run begins."""
        self.seen: int | None = None
        self.saved = -1
        self._saved_at_s = time.monotonic()

    def after_batch(self, step: int, epoch: int, *, validated: bool) -> bool:
        """Whether a save is due after a batch; by the clock, see `struck`.

        Args:
            step: Optimizer steps so far.
            epoch: The epoch that is under way, from 0.
            validated: A validation came after the batch that saves by epochs go by.
        """
        # Several optimizers may step over a multiple within one batch.
        before = max(step - 1, 0) if self.seen is None else self.seen
        self.seen = step
        if step == self.saved:
            return False
        every = self.every_n_steps
        return bool(every and step // every > before // every) or (validated and self._counts(epoch))

    def after_epoch(self, step: int, epoch: int) -> bool:
        """Whether a save is due as an epoch ends, where saves by epochs go by their ends."""
        return step != self.saved and self._counts(epoch)

    def struck(self) -> bool:
        """Whether so much time has passed since the newest save."""
        return self.interval_s is not None and time.monotonic() - self._saved_at_s >= self.interval_s

    def done(self, step: int) -> None:
        """It has been saved."""
        self.saved, self._saved_at_s = step, time.monotonic()

    def next_look(self, step: int) -> float:
        """After how many more optimizer steps a save may be due without a validation; by time, at any."""
        if self.interval_s is not None:
            return 1
        return self.every_n_steps - step % self.every_n_steps if self.every_n_steps else math.inf

    def _counts(self, epoch: int) -> bool:
        return self.every_n_epochs >= 1 and (epoch + 1) % self.every_n_epochs == 0
