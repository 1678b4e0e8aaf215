"""The saves of one moment: a callback's file knows which come after it, for a run that goes on from it."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable
from typing import Any


class Saves:
    """Lets callbacks save one after another.

    Attributes:
        state: While they do, for checkpoints: the state keys of those that are not done, the one whose turn it is
            first, and what was said of the moment. None at other times.
    """

    def __init__(self) -> None:
        self.state: dict[str, Any] | None = None

    def make(
        self, callbacks: Iterable[Any], left: Container[str] | None, save: Callable[[Any], None], **moment: Any
    ) -> None:
        """Let each of them save, by `save(callback)`.

        Args:
            callbacks: Those.
            left: The state keys of those that are left to do so, where a run goes on; None for all.
            save: What is called with each.
            **moment: What has to be known to go on with them.
        """
        due = [callback for callback in callbacks if left is None or callback.state_key in left]
        try:
            for number, callback in enumerate(due):
                self.state = {**moment, "left": [one.state_key for one in due[number:]]}
                save(callback)
        finally:
            self.state = None

    def take(self) -> dict[str, Any] | None:
        """What is to be gone on with, if anything; from now on nothing is."""
        state, self.state = self.state, None
        return state
