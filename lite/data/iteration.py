"""The passes over one loader: what they begin from, how far they have come, and the state that makes them go on."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator, Sized
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.data import DataLoader

from lite.data.delivery import Delivery
from lite.data.epochs import epoch_teller
from lite.data.iterable import StridedStream
from lite.data.position import VERSION, Pass, Start, check_state
from lite.data.sampler import ShardedSampler
from lite.data.shares import BatchWeight, Shard
from lite.data.split import generators_of, samplers_of
from lite.data.stream import StreamTracker, warn_of_reading_again
from lite.data.workers import start_shielded
from lite.errors import UsageError
from lite.seed import Moment, RandomState, drawing_under, mix
from lite.state import is_stateful

Sync = Callable[[Any], Any]


class Iteration:
    """The passes over one loader.

    Args:
        loader: The copy of the user's loader.
        delivery: What hands its batches out.
        sampler: What slices its sampler's stream; None for an IterableDataset.
        tracker: What knows how far an IterableDataset was read; None for others.
        strided: The loader over one stream that all ranks read, where that is how it is split.
        weight: Told what each batch counts, as it is given out.
        sync: Returns rank 0's object on every rank.
        shard: This rank's part.

    Attributes:
        is_beside: The pass under way is one over several epochs of a run, beside the epochs' own.
    """

    def __init__(
        self,
        loader: DataLoader[Any],
        delivery: Delivery,
        *,
        sampler: ShardedSampler | None,
        tracker: StreamTracker | None,
        strided: DataLoader[Any] | None,
        weight: BatchWeight,
        sync: Sync,
        shard: Shard,
    ) -> None:
        self.strided = strided
        self._sampler = sampler
        self._tracker = tracker
        self._weight = weight
        self._sync = sync
        self._dataset: Any = loader.dataset
        self._delivery = delivery
        self.per_rank = shard.world_size > 1 and strided is None and not delivery.sliced
        samplers = [] if sampler is None else [s for s in samplers_of(loader) if s is not sampler]
        self._generators = generators_of(loader)
        self._epochs = [teller for s in samplers if (teller := epoch_teller(s)) is not None]
        self._stateful_samplers = [s for s in samplers if is_stateful(s)]
        self._next: Pass | None = None  # the pass that a loaded state asks for
        self._moment: Moment | None = None  # the random state of the moment from which that pass goes on
        self._pass: Pass | None = None  # the newest one
        self._iterator: weakref.ref[Any] | None = None  # what gives out its batches
        self._stream_before: Any = None  # the loaded state of a dataset whose pass has ended
        self.is_beside = False
        self.epoch = 0

    # ---- a pass

    def begin(self) -> Pass:
        """Start a pass: count the epoch, and tell it to samplers that want to know and weren't told by the user."""
        self._weight.filler_pending = False
        if self._weight.outer() is None:
            self._weight.clear()
        if self._pass is not None and not self._pass.finished:
            self.is_beside = False  # that pass was left, and this one begins in its place
        current, self._next = self._next or self._fresh_pass(), None
        if self._moment is not None:
            self._moment.restore()
            self._moment = None
        current.uses = current.began = self._weight.uses
        self.epoch = current.epoch + 1
        self._pass = current
        if self._sampler is not None:
            self._sampler.upcoming = current
        if self._tracker is not None:
            if self._stream_before is not None:
                self._tracker.end_pass(self._stream_before)
                self._stream_before = None
            self._tracker.open(current)
        return current

    def _fresh_pass(self) -> Pass:
        for teller in self._epochs:
            teller.begin_pass(first=self.epoch == 0)
        before = self._capture()
        samplers = [sampler.state_dict() for sampler in self._stateful_samplers]
        epochs = [teller.epoch for teller in self._epochs]
        return Pass(self.epoch, Start(before, samplers=samplers, epochs=epochs))

    def _capture(self) -> RandomState:
        # A sampler's draws are captured by themselves; an IterableDataset's may be of any kind.
        return RandomState.capture(self._generators, torch_only=self._tracker is None and self.strided is None)

    @contextmanager
    def making_workers(self) -> Iterator[None]:
        """The block makes the loader's iterator and draws its workers' base seed: in a resumed pass, the same again."""
        current = self._pass
        if current is None or not current.resumed:
            if current is not None:
                current.start.before = self._capture()
            yield
            return
        current.start.before.restore_generators(self._generators)
        with drawing_under(current.start.before):
            yield
            if self._tracker is not None:
                self._tracker.opened = RandomState.capture()
            elif self.strided is not None:
                self._stream().opened = RandomState.capture()

    def around(self, batches: Iterator[Any], current: Pass) -> Iterator[Any]:
        """Give out the batches of a pass."""
        iterator = self._delivery.around(batches, current)
        self._iterator = weakref.ref(iterator)
        return iterator

    def watch(self, batches: Any) -> Any:
        """The iterator that reads the batches, which a class that iterates in a way of its own goes through."""
        return self._delivery.watch(batches, lambda: self._pass)

    # ---- its state

    def state_dict(self, *, undone: int = 0) -> dict[str, Any]:
        """Plain values: how far the user's loop has come; the same on all ranks unless `per_rank`.

        Args:
            undone: How many of the batches that it was given last are to be given again.

        Raises:
            UsageError: The position can't be stored, or not that of a batch before.
        """
        current = self._next or self._pass
        size = 1 if self._sampler is None else self._sampler.group_size
        length, order = _length(self._dataset), self._order()
        state = {"version": VERSION, "epoch": self.epoch, "size": size, "length": length, "order": order}
        if current is None or current.finished:
            # What the next epoch begins with, where it is not in the global generators.
            generators = RandomState.capture(self._generators, torch_only=True)
            samplers = [sampler.state_dict() for sampler in self._stateful_samplers]
            epochs = [teller.epoch for teller in self._epochs]
            rest = {"samplers": samplers, "epochs": epochs, "stream": self._rest_of_stream()}
            rest["apart"] = None if self._sampler is None else self._sampler.apart()
            return {**state, "rest": {**rest, "generators": list(generators.generator_states)}}
        if self._delivery.own_iter and current.read != current.consumed:
            raise UsageError(
                f"the position of this loader can't be stored: its class has read {current.read} batches and "
                f"given out {current.consumed}, so they don't tell how far the loop has come. Store it at the end of "
                "an epoch, or give the class state_dict and load_state_dict."
            )
        stream, consumed = self._stream_state(current), current.consumed - undone
        if undone and (stream is not None or consumed < 0):
            raise UsageError("the dataset tells only where it is, so its last batch can't be given again.")
        items = current.skip + consumed * size
        length = None if self._sampler is None else _length(self._sampler.sampler)
        return {
            **state,
            "epoch": current.epoch,
            "batches": current.first + consumed,
            "items": items if length is None else min(items, length),
            "seed": current.seed,
            "crc": current.crc_after(consumed),
            "start": current.start.state_dict(),
            "stream": stream,
            "apart": None if self._sampler is None else self._sampler.apart(),
        }

    def go_on_under(self, moment: Moment) -> None:
        """Let a loaded position be gone on with under this rank's random state, whatever is drawn until then."""
        if self._next is not None:
            self._moment = moment

    def progress(self) -> tuple[int, bool]:
        """Passes begun so far, and whether one is under way."""
        current = self._next or self._pass
        return self.epoch, current is not None and not current.finished

    def note_epoch(self) -> None:
        """An epoch of a run begins; a pass that somebody goes on with is none of it."""
        self.is_beside = self.is_held()

    def is_held(self, *, unread: bool = False) -> bool:
        """Whether somebody holds the iterator of a pass that is under way; `unread`: and was given no batch of it."""
        current = self._pass
        held = self._next is None and self._iterator is not None and self._iterator() is not None
        return held and current is not None and not current.finished and not (unread and current.consumed)

    @property
    def batches_done(self) -> int:
        """Batches of the newest pass that the loop was given, those before an interruption included."""
        current = self._next or self._pass
        return 0 if current is None else current.first + current.consumed

    def check_state_dict(self, state: dict[str, Any]) -> None:
        """Refuse a state that means nothing here.

        Raises:
            CheckpointError: It is of another dataset, sampler or generator, or of another version.
        """
        counts = (len(self._generators), len(self._stateful_samplers), len(self._epochs))
        check_state(state, _length(self._dataset), self._order(), counts)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next pass go on from there.

        Raises:
            CheckpointError: The state means nothing here.
        """
        self.check_state_dict(state)
        if self._pass is not None:
            self._pass.replaced = True
        self._pass = self._moment = self._stream_before = None
        self.epoch = state["epoch"]
        if "items" not in state:
            self._next = None
            self._begin_from(state["rest"])
            return
        size = 1 if self._sampler is None else self._sampler.group_size
        if size != state["size"]:
            warnings.warn(
                f"the loader's global batch was {state['size']} before the interruption and is {size} now: the epoch "
                "goes on with the same samples in the same order, in other batches. Change batch_size to keep it.",
                stacklevel=4,
            )
        current = Pass(
            state["epoch"],
            Start.from_state_dict(state["start"]),
            seed=state["seed"],
            skip=state["items"],
            resumed=True,
            first=state["batches"] if size == state["size"] else -(-state["items"] // size),
            crc=state["crc"],
            stream=state["stream"],
            apart=state["apart"],
        )
        self._restore_samplers(current.start.samplers, current.start.epochs)
        self._next = current

    def _order(self) -> str | None:
        """What the samples' order comes from: the class of the user's sampler."""
        return None if self._sampler is None else type(self._sampler.sampler).__qualname__

    def _begin_from(self, rest: dict[str, Any]) -> None:
        """Take over what the next epoch begins with."""
        RandomState(torch.empty(0), generator_states=tuple(rest["generators"])).restore_generators(self._generators)
        self._restore_samplers(rest["samplers"], rest["epochs"])
        if self._sampler is not None:
            self._sampler.begin_apart(rest["apart"])
        if rest["stream"] is not None and self._tracker is not None and self._tracker.reads_here:
            self._stream_before = rest["stream"]

    def _restore_samplers(self, states: list[Any], epochs: list[Any]) -> None:
        for teller, epoch in zip(self._epochs, epochs, strict=True):
            teller.restore(epoch)
        for sampler, saved in zip(self._stateful_samplers, states, strict=True):
            sampler.load_state_dict(saved)

    def _rest_of_stream(self) -> Any:
        """The state of a dataset that this process reads itself, between two epochs."""
        if self._stream_before is not None:
            return self._stream_before
        here = self._tracker is not None and self._tracker.reads_here
        return self._dataset.state_dict() if here and is_stateful(self._dataset) else None

    def _stream(self) -> StridedStream:
        """The one stream that all ranks read."""
        assert self.strided is not None
        stream: Any = self.strided.dataset
        return stream  # type: ignore[no-any-return]

    def open_strided(self, current: Pass) -> Iterator[Any]:
        """The iterator of the loader over the one stream."""
        stream, strided = self._stream(), self.strided
        assert strided is not None
        if current.resumed:
            if current.stream is None and current.first:
                warn_of_reading_again(stream.dataset, current.first)
            stream.resume = (current.first, current.stream)
        elif strided.num_workers > 0:
            strided._iterator = None  # workers that last would go on with the epoch's seed that they were started with
            current.seed = mix(self._sync(current.start.before).digest(), current.epoch)
        stream.seed = current.seed
        with self.making_workers():
            batches: Iterator[Any] = start_shielded(strided, lambda: iter(strided))
        if strided.num_workers > 0:
            stream.resume = None  # the workers have it; those of the next epoch begin at the beginning
        return batches

    def _stream_state(self, current: Pass) -> Any:
        if current.resumed and not current.consumed:
            return current.stream  # which the dataset may be given at its first sample alone
        if self._tracker is not None:
            return self._tracker.state(current)
        if self.strided is not None and self.strided.num_workers == 0 and is_stateful(self._dataset):
            return self._dataset.state_dict()
        return current.stream


def _length(value: Any) -> int | None:
    if not isinstance(value, Sized):
        return None
    try:
        return len(value)
    except (TypeError, NotImplementedError):
        return None
