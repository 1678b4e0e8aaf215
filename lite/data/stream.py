"""How far an IterableDataset was read, in this process or in workers, and going on from there."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, NamedTuple

from torch.utils.data import DataLoader, get_worker_info

from lite.data.position import Pass
from lite.data.seeded import SeededRequests, end_pass
from lite.errors import CheckpointError
from lite.seed import RandomState, drawing_under, mix
from lite.state import is_stateful

_ENDED = "ended"


class StreamTracker:
    """Keeps the position in a loader over an IterableDataset that splits itself, or that every rank reads whole.

    A dataset with `state_dict` and `load_state_dict` is resumed by its state, others by reading again what was read.

    Args:
        loader: The copy of the user's loader; it is changed.
        seed_rank: This rank, where workers are seeded for each batch.
    """

    def __init__(self, loader: DataLoader[Any], seed_rank: int | None) -> None:
        self._loader: DataLoader[Any] = weakref.proxy(loader)  # which holds this, and must end its workers when dropped
        self._dataset: Any = loader.dataset
        self._stateful = is_stateful(loader.dataset)
        self._requests: SeededRequests | None = None
        self.opened: RandomState | None = None  # as the iterator of a resumed pass was made
        self._telling: _Telling | None = None
        if self._stateful:
            self._telling = _Telling(loader.collate_fn, loader.batch_size)
            loader.__dict__["collate_fn"] = self._telling
        if seed_rank is None:
            return
        name = "batch_sampler" if loader.batch_sampler is not None else "sampler"
        self._requests = SeededRequests(getattr(loader, name), seed_rank)
        loader.__dict__[name] = self._requests

    @property
    def reads_here(self) -> bool:
        """Whether the dataset is read in this process, not in workers."""
        return self._requests is None

    def open(self, current: Pass) -> None:
        """A pass begins: bring the dataset, or what the workers get, to where it starts."""
        if not current.resumed:
            current.seed = mix(current.start.before.digest(), current.epoch)
        if self._requests is not None:
            self._requests.seed = current.seed
            self._requests.first = self._first_read(current)
        if not self._stateful:
            return
        if self._telling is not None:
            self._telling.ended = False
        if self._requests is None:
            if current.resumed and current.stream != _ENDED:
                self._dataset.load_state_dict(current.stream)
            return
        init: Any = self._loader.worker_init_fn
        init = init.then if isinstance(init, _Restoring) else init
        self._loader.__dict__["worker_init_fn"] = (
            _Restoring(current.stream["workers"], current.seed, init) if current.resumed else init
        )
        if current.resumed and len(current.stream["workers"]) != self._loader.num_workers:
            raise CheckpointError(
                f"the loader's state is of {len(current.stream['workers'])} workers, each with its own part of the "
                f"stream, and this loader has num_workers={self._loader.num_workers}; resume with as many as before."
            )

    def end_pass(self, state: Any) -> None:
        """Bring a dataset that is read here to where a pass that has ended left it.

        Loading a state lets the next pass go on from there, and there is nothing left of that one; where the state is
        the next one's beginning already, there is something.

        Args:
            state: The dataset's, taken after the pass.
        """
        self._dataset.load_state_dict(state)
        with drawing_under(RandomState.capture()):
            rest = iter(self._dataset)
            is_over = next(rest, _ENDED) is _ENDED
            del rest  # which, as it closes, may change the state
            if not is_over:
                self._dataset.load_state_dict(state)

    def _first_read(self, current: Pass) -> int:
        """The number of the first batch that workers read in this pass."""
        if not current.resumed or not self._stateful:
            return 0
        return current.first - int(current.stream["since"])

    def around(self, batches: Iterator[Any], current: Pass) -> Iterator[Any]:
        """Leave out what a resumed pass reads again."""
        if self._stateful and self._requests is None:
            return iter(()) if current.resumed and current.stream == _ENDED else batches
        if self._stateful:
            return self._rounds(batches, current)
        return self._fast_forward(batches, current) if current.first else batches

    def state(self, current: Pass) -> Any:
        """The position as plain values; None where the number of batches says it all."""
        if self._telling is not None and self._requests is None:
            return _ENDED if self._telling.ended else self._dataset.state_dict()
        return current.stream

    def _fast_forward(self, batches: Iterator[Any], current: Pass) -> Iterator[Any]:
        warn_of_reading_again(self._dataset, current.first)
        with drawing_under(self.opened if self._requests is None else None):
            next(islice(batches, current.first, current.first), None)
        yield from batches

    def _rounds(self, batches: Iterator[Any], current: Pass) -> Iterator[Any]:
        """Keep every worker's state as the present round of all workers began, and the batches since then."""
        saved: Any = current.stream if current.resumed else {"workers": [None] * self._loader.num_workers, "since": 0}
        latest, leave_out = list(saved["workers"]), saved["since"]
        began, since, last = list(latest), 0, -1
        for batch, worker, state in batches:
            if worker <= last:
                began, since = list(latest), 0
            latest[worker], last, since = state, worker, since + 1
            current.stream = {"workers": began, "since": since}
            if leave_out:
                leave_out -= 1
            else:
                yield batch


class _Told(NamedTuple):
    """A batch from a worker, with the state of the worker's dataset after it."""

    batch: Any
    worker: int
    state: Any


class _Telling:
    """A collate function that notices the end of the stream, and in a worker sends its dataset's state along.

    At the end a dataset's state is that of its beginning, for the next epoch.
    """

    def __init__(self, collate: Callable[[Any], Any], batch_size: int | None) -> None:
        self._collate = collate
        self._batch_size = batch_size
        self.ended = False

    def __call__(self, data: Any) -> Any:
        ended = self._batch_size is not None and len(data) < self._batch_size
        batch = self._collate(data)
        info: Any = get_worker_info()
        if info is None:
            self.ended = ended
            return batch
        return _Told(batch, info.id, _ENDED if ended else info.dataset.state_dict())


class _Restoring:
    """A `worker_init_fn` that runs the user's, then gives the worker's dataset its state."""

    def __init__(self, states: list[Any], seed: int, then: Callable[[int], None] | None) -> None:
        self._states = states
        self._seed = seed
        self.then = then

    def __call__(self, worker_id: int) -> None:
        if self.then is not None:
            self.then(worker_id)
        state = self._states[worker_id]
        info: Any = get_worker_info()
        if state == _ENDED:
            end_pass(self._seed)
        elif state is not None:
            info.dataset.load_state_dict(state)


def warn_of_reading_again(dataset: Any, batches: int) -> None:
    """Tell the user what resuming a dataset without a state costs."""
    warnings.warn(
        f"{type(dataset).__name__} has no state_dict and load_state_dict, so resuming reads the {batches} batches that "
        "came before the interruption once more and drops them, which takes as long as it took then; give it both "
        "methods to resume at once.",
        stacklevel=2,
    )
