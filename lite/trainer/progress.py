"""How far a run has come: one cursor and its clocks, which are the state that a run is resumed from."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from typing import Any


@dataclass
class Progress:
    """Where training stands.

    Attributes:
        epoch: The epoch that is under way, or comes next; as many are complete.
        batch: Batches of that epoch that are done.
        within: The epoch has begun: its start hooks have run.
        batches: Clock: training batches so far.
        updates: Clock: optimizer steps so far, `global_step`.
        stepped: Batches so far after which an optimizer stepped.
        samples: Clock: samples of complete epochs, over all ranks; those of the current one come on top.
        seconds: Clock: training time before this process began to count.
        validated: What `batches` was at the last validation, so that none is repeated.
        validated_epoch: The epoch of the last validation.
        reloaded: The epoch in which loaders were last asked for.
    """

    epoch: int = 0
    batch: int = 0
    within: bool = False
    batches: int = 0
    updates: int = 0
    stepped: int = 0
    samples: int = 0
    seconds: float = 0.0
    validated: int = -1
    validated_epoch: int = -1
    reloaded: int = -1

    def __post_init__(self) -> None:
        self._started_at: float | None = None

    def start_clock(self) -> None:
        """Training time runs from now on."""
        if self._started_at is None:
            self._started_at = time.monotonic()

    def stop_clock(self) -> None:
        """Training time stands still."""
        self.seconds, self._started_at = self.elapsed_s(), None

    def elapsed_s(self) -> float:
        """Seconds of training so far, those before an interruption included."""
        return self.seconds + (0.0 if self._started_at is None else time.monotonic() - self._started_at)

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        counts = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        return {**counts, "seconds": self.elapsed_s()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        for field in dataclasses.fields(self):
            if field.name in state:
                setattr(self, field.name, state[field.name])
        if self._started_at is not None:
            self._started_at = time.monotonic()
