"""What samplers that want to know the epoch (`set_epoch`) have been told, by the user or by lite."""

from __future__ import annotations

import weakref
from typing import Any
from weakref import WeakKeyDictionary

from lite.disguise import disguise

_known: WeakKeyDictionary[Any, EpochTeller] = WeakKeyDictionary()


class EpochTeller:
    """Hears what one sampler is told, and tells it the next epoch where nobody else does.

    Attributes:
        epoch: What it was told last; None where nobody has told it anything yet.
    """

    def __init__(self, sampler: Any) -> None:
        self.epoch: int | None = None
        self._sampler = weakref.ref(sampler)
        self._calls = self._calls_before = 0

    def begin_pass(self, *, first: bool) -> None:
        """A pass over the loader begins: tell the sampler the next epoch, unless it was told since the pass before."""
        if not first and self._calls == self._calls_before:
            start = getattr(self._sampler(), "epoch", 0)
            self._tell((start if isinstance(start, int) else 0) + 1 if self.epoch is None else self.epoch + 1)
        self._calls_before = self._calls

    def restore(self, epoch: int | None) -> None:
        """Tell the sampler what it had been told when a state was stored, which it counts on from."""
        if epoch is not None:
            self._tell(epoch)
            self._calls_before = self._calls

    def _tell(self, epoch: int) -> None:
        sampler = self._sampler()
        if sampler is not None:
            sampler.set_epoch(epoch)

    def heard(self, epoch: Any) -> None:
        """Somebody has called `set_epoch`."""
        self.epoch = epoch if isinstance(epoch, int) else None
        self._calls += 1


def epoch_teller(sampler: Any) -> EpochTeller | None:
    """The sampler's teller, one for each; None for a sampler that has no `set_epoch`, or can't be listened to."""
    own = getattr(sampler, "set_epoch", None)
    if not callable(own):
        return None
    teller = EpochTeller(sampler)
    in_class = getattr(type(sampler), "set_epoch", None)

    def set_epoch(self: Any, epoch: Any, *args: Any, **kwargs: Any) -> Any:
        result = own(epoch, *args, **kwargs) if in_class is None else in_class(self, epoch, *args, **kwargs)
        teller.heard(epoch)
        return result

    try:
        known = _known.setdefault(sampler, teller)
        if known is teller:
            disguise(sampler, {"set_epoch": set_epoch})
    except TypeError:  # it can't be referred to weakly, or its class can't be exchanged
        return None
    return known
