"""When validation is due within training."""

from __future__ import annotations

import time
from typing import Any

from lite.errors import ConfigError
from lite.trainer.data.counting import INFINITE
from lite.trainer.progress import Progress


class ValidationSchedule:
    """Decides by batches, epochs or time.

    Args:
        interval: A share of an epoch (float), or every so many batches (int).
        every_n_epochs: In every so-manieth epoch; None counts batches across epochs.
        interval_s: Every so many seconds instead.
    """

    def __init__(
        self, interval: int | float = 1.0, every_n_epochs: int | None = 1, interval_s: float | None = None
    ) -> None:
        self.interval, self.every_n_epochs, self.interval_s = interval, every_n_epochs, interval_s
        self._last_s = time.monotonic()

    @property
    def is_once_per_epoch(self) -> bool:
        """Whether one validation belongs to each epoch."""
        whole = isinstance(self.interval, float) and self.interval == 1.0
        return self.interval_s is None and whole and self.every_n_epochs == 1

    def check(self, num_batches: float) -> None:
        """Refuse an interval that no epoch of so many batches has.

        Raises:
            ConfigError: It doesn't fit.
        """
        if self.interval_s is not None or self.every_n_epochs is None:
            return
        if isinstance(self.interval, int):
            if self.interval > num_batches:
                raise ConfigError(
                    f"val_check_interval={self.interval} batches is more than the {num_batches} of an epoch; give at "
                    "most that, or check_val_every_n_epoch=None to count across epochs."
                )
        elif num_batches == INFINITE and self.interval not in (0.0, 1.0):
            raise ConfigError(
                f"val_check_interval={self.interval!r} is a share of an epoch of unknown length; give a whole number "
                "of batches."
            )

    def _every(self, num_batches: float) -> float:
        if isinstance(self.interval, int):
            return self.interval
        return num_batches if num_batches == INFINITE else max(1, int(num_batches * self.interval))

    def is_due(self, progress: Progress, count: int, num_batches: float) -> bool:
        """Whether it comes after `count` batches of the epoch."""
        if self.every_n_epochs is not None and (progress.epoch + 1) % self.every_n_epochs:
            return False
        if self.interval_s is not None:
            return time.monotonic() - self._last_s >= self.interval_s
        every = self._every(num_batches)
        if every == INFINITE:
            return False
        return (progress.batches if self.every_n_epochs is None else count) % every == 0

    def is_due_at_end(self, progress: Progress) -> bool:
        """Whether it comes at the end of an epoch whose length nobody knew."""
        if self.interval_s is not None or isinstance(self.interval, int) or self.every_n_epochs is None:
            return False
        return (progress.epoch + 1) % self.every_n_epochs == 0

    def next_look(self, progress: Progress, count: int, num_batches: float) -> float:
        """The batch of this epoch after which it is worth asking."""
        if self.interval_s is not None:
            return count + 1
        if self.every_n_epochs is not None and (progress.epoch + 1) % self.every_n_epochs:
            return INFINITE
        every = self._every(num_batches)
        if every == INFINITE:
            return INFINITE
        at = progress.batches if self.every_n_epochs is None else count
        return count + every - at % every

    def done(self) -> None:
        """It has happened."""
        self._last_s = time.monotonic()

    def state_dict(self) -> dict[str, Any]:
        """Seconds since the last one."""
        return {"since_s": time.monotonic() - self._last_s}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on counting."""
        self._last_s = time.monotonic() - state["since_s"]
