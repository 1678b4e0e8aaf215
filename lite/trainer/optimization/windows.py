"""The windows of accumulation of one run: how they are made, which of their batches are weighed, and what is saved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer
from torch.utils.data import IterableDataset

from lite import collectives
from lite.gradients import Accumulation
from lite.trainer.data.counting import sizes_of
from lite.trainer.data.stage import StageData


def make_window(trainer: Any, steps: int, optimizer: Optimizer | None = None) -> Accumulation:
    """A window by the Trainer's arithmetic: what was accumulated, or Lightning's full windows."""
    window: Accumulation = trainer.lite.accumulate(
        trainer.module, steps=steps, optimizer=optimizer, rescale=trainer.accumulation != "reference"
    )
    return window


def weighing(trainer: Any, steps: int | None) -> Callable[[int], bool]:
    """Whether the window that begins with that batch is weighed by its batches' sizes: where these may differ.

    Collective: call on all ranks, which decide alike.

    Args:
        trainer: The Trainer.
        steps: Batches in a window, one after another; None where a window may hold any.
    """
    data: StageData = trainer.fit_loop.data
    num_batches = data.num_batches
    if trainer.accumulation == "reference":
        return lambda batch_idx: False
    alike = collectives.smallest(_alike(data, num_batches))
    if alike == _ALL:
        return lambda batch_idx: False
    if alike == _NOT or steps is None:
        return lambda batch_idx: True
    return lambda batch_idx: batch_idx + steps >= num_batches


_NOT, _BUT_THE_LAST, _ALL = range(3)  # which batches have the same size for certain


def _alike(data: StageData, num_batches: float) -> int:
    if data.combined:  # a loader that begins anew has its last batch in the middle
        parts = [_alike_of(loader, num_batches) for loader in data.loaders[0].flattened]
        return _ALL if all(part == _ALL for part in parts) else _NOT
    return _alike_of(data.loaders[0], num_batches)


def _alike_of(loader: Any, num_batches: float) -> int:
    size, count = sizes_of(loader)
    if size is None:
        return _NOT
    if count is None or isinstance(loader.dataset, IterableDataset):  # whose workers each have a last batch
        return _NOT
    return _ALL if count % size == 0 or num_batches * size <= count else _BUT_THE_LAST


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
