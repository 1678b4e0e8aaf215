"""Where a loader's epoch began and how far it has come: the state that makes a resumed epoch go on exactly.

It knows numbers and random states, not loaders. Samples are counted over all ranks, so that a position means the same
for any number of them.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lite.data.shares import Share
from lite.errors import CheckpointError
from lite.seed import RandomState

VERSION = 1


@dataclass
class Start:
    """The random states from which an epoch's order was drawn.

    Args:
        before: As the loader's iterator was made, which draws its workers' base seed.
        opened: As the sampler's `__iter__` was called, where that may draw; None otherwise.
        drawn: As the sampler was asked for its first item; None where the order is fixed.
        samplers: What samplers with a `state_dict` returned then.
        epochs: What each sampler with `set_epoch` had been told last; None for nothing yet.
    """

    before: RandomState = field(default_factory=lambda: RandomState.capture(torch_only=True))
    opened: RandomState | None = None
    drawn: RandomState | None = None
    samplers: list[Any] = field(default_factory=list)
    epochs: list[Any] = field(default_factory=list)

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        states = {"before": self.before, "opened": self.opened, "drawn": self.drawn}
        plain = {name: state.state_dict() for name, state in states.items() if state is not None}
        return {**plain, "samplers": self.samplers, "epochs": self.epochs}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> Start:
        """What `state_dict` returned, as an object again."""
        states = {n: RandomState.from_state_dict(state[n]) for n in ("before", "opened", "drawn") if n in state}
        return cls(**states, samplers=state["samplers"], epochs=state["epochs"])


@dataclass
class Pass:
    """One iteration over a loader and its sampler.

    Args:
        epoch: Passes over this loader before this one.
        start: The random states that it began from.
        seed: From which the seeds of its workers' batches are made.
        skip: Items of the user's sampler that were consumed before an interruption.
        resumed: Whether this pass goes on with an interrupted one, so that `start` is given instead of recorded.
        first: The number of its first batch in the epoch.
        crc: The checksum of the skipped items, of a sampler that might yield others the next time.
        stream: The position in an IterableDataset.
        apart: What its sampler had drawn apart, where it had drawn all before an interruption; see `Draws.apart`.

    Attributes:
        ragged: This rank's share of each batch that is not full, counted from the first of this pass.
        taken: A sampler is making this pass.
        read: Batches that were read for a class that iterates in a way of its own.
        consumed: Batches that the user's loop has been given.
        began: The number of backwards and gatherings as it began.
        uses: The number of both as the newest batch was given out.
        ahead: The loop has taken a batch before it had used the one before.
        finished: The user's loop has come to the end.
        replaced: A state was loaded, so that another pass goes on from there.
    """

    epoch: int = 0
    start: Start = field(default_factory=Start)
    seed: int = 0
    skip: int = 0
    resumed: bool = False
    first: int = 0
    crc: int = 0
    stream: Any = None
    apart: dict[str, int] | None = None
    ragged: dict[int, Share] = field(default_factory=dict)
    taken: bool = False
    read: int = 0
    consumed: int = 0
    began: int = 0
    uses: int = 0
    ahead: bool = False
    finished: bool = False
    replaced: bool = False
    _crcs: list[int] = field(default_factory=list)

    def note(self, group: list[Any]) -> None:
        """The sampler has drawn the next group, of items that it might not yield again."""
        self._crcs.append(items_crc(group, self._crcs[-1] if self._crcs else self.crc))

    def crc_after(self, batches: int) -> int:
        """The checksum of all items in so many batches that the user's loop has been given, and of those skipped."""
        return self._crcs[batches - 1] if self._crcs and batches else self.crc


def items_crc(items: Iterable[Any], crc: int = 0) -> int:
    """A running checksum of a sampler's items."""
    for item in items:
        crc = zlib.crc32(repr(item).encode(), crc)
    return crc


def check_state(state: Any, length: int | None, order: str | None, counts: tuple[int, int, int]) -> None:
    """Refuse a loader's state that means nothing for a loader.

    Args:
        state: The state.
        length: Of the loader's dataset, where it has one.
        order: What its samples' order comes from.
        counts: How many generators, samplers with a `state_dict` and samplers with `set_epoch` it has.

    Raises:
        CheckpointError: It is of another dataset, sampler or generator, or of another version.
    """
    version = state.get("version") if isinstance(state, Mapping) else None
    if version != VERSION:
        raise CheckpointError(
            f"the loader's state has version {version!r}, and this lite reads {VERSION}; resume with the lite that "
            "wrote it."
        )
    if state["length"] != length:
        raise CheckpointError(
            f"the loader's state is of a dataset with {state['length']} samples, but this one has {length}; its "
            "position means nothing here. Leave the loader out of what is loaded to begin the data anew."
        )
    if "items" in state and state["order"] != order:
        raise CheckpointError(
            f"the loader's state is of an order by {state['order']}, but this loader's is by {order}; its position "
            "means nothing in that. Give the loader the sampler that it had, or leave it out of what is loaded to "
            "begin the data anew."
        )
    place = state["start"] if "items" in state else state["rest"]
    generators = place["before"].get("generators", ()) if "items" in state else place["generators"]
    then = (len(generators), len(place["samplers"]), len(place["epochs"]))
    kinds = ("generators", "samplers with a state_dict", "samplers with set_epoch")
    for kind, before, now in zip(kinds, then, counts, strict=True):
        if before != now:
            raise CheckpointError(
                f"the loader's state is of a loader with {before} {kind}, but this one has {now}; give the loader the "
                "generator= and sampler= that it had, or leave it out of what is loaded to begin the data anew."
            )
