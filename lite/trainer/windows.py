"""Windows of accumulation beyond Lite's own: Lightning's arithmetic, and several that belong to one run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import nn

from lite.gradients import put_back_gradients, waiting_gradients


class ReferenceWindow:
    """Lightning's arithmetic of accumulation: every loss divided by the number of micro-batches in a full window.

    Args:
        lite: The Lite object.
        module: The model.
        steps: Micro-batches per window.
        rescale: Whether a partial window becomes the mean over what it really held.
    """

    state_is_per_rank = True

    def __init__(self, lite: Any, module: nn.Module, steps: int, *, rescale: bool = False) -> None:
        self.steps, self.count, self.ready = steps, 0, False
        self._lite, self._module, self._rescale = lite, module, rescale

    @contextmanager
    def __call__(self, *, last: bool = False) -> Iterator[None]:
        if self.ready:
            self.count, self.ready = 0, False
        boundary = last or self.count + 1 == self.steps
        sync: AbstractContextManager[None] = self._lite.no_backward_sync(self._module, not boundary)
        with sync:
            yield
        self.count += 1
        if boundary:
            self._finish()

    def _finish(self) -> None:
        self.ready = True
        if self._rescale and self.count != self.steps:
            self._lite.strategy.multiply_gradients(self._module.parameters(), self.steps / self.count)

    def flush(self) -> None:
        """End an open window."""
        if self.ready or not self.count:
            return
        for parameter in self._module.parameters():
            if parameter.grad is not None:
                parameter.grad.copy_(self._lite.all_reduce(parameter.grad, "mean"))
        self._finish()

    @property
    def is_open(self) -> bool:
        """Whether gradients wait for more batches."""
        return self.count > 0 and not self.ready

    def state_dict(self) -> dict[str, Any]:
        """The open window with its gradients so far; each rank has its own."""
        if not self.is_open:
            return {}
        return {"count": self.count, "gradients": waiting_gradients(self._module.parameters())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on within that window."""
        self.count, self.ready = state.get("count", 0), False
        if self.count:
            put_back_gradients(self._module.parameters(), state["gradients"])


class Windows:
    """The windows of one run, by name, as one entry of a checkpoint.

    Attributes:
        named: The windows.
    """

    state_is_per_rank = True

    def __init__(self) -> None:
        self.named: dict[str, Any] = {}
        self._states: dict[str, Any] = {}

    @property
    def windows(self) -> list[Any]:
        """All of them."""
        return list(self.named.values())

    @property
    def is_open(self) -> bool:
        """Whether gradients wait in one of them."""
        return any(window.is_open for window in self.named.values())

    def add(self, name: str, window: Any) -> Any:
        """Have a window, which goes on where a loaded one of that name was; returns it."""
        self.named[name] = window
        state = self._states.pop(name, None)
        if state:
            window.load_state_dict(state)
        return window

    def clear(self) -> None:
        """Have none any more; loaded states still wait for theirs."""
        self.named = {}

    def state_dict(self) -> dict[str, Any]:
        """The open ones."""
        return {name: window.state_dict() for name, window in self.named.items() if window.is_open}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the windows go on there as they come."""
        self._states = dict(state)
