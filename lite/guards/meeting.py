"""Calls that all ranks must make: who makes one alone is told so, instead of waiting for ever.

Ranks meet in the store before such a call. One that waits there is in no collective, so it asks where the others are,
and gives up on one that can't come: it has ended, or is past the place, or stands still in a collective that needs the
rank that waits, or in what follows a backward that this rank has yet to begin.
"""

from __future__ import annotations

import sys
import time

from lite.errors import UsageError
from lite.guards.failure import Answer, FailureWatch

_LATE_S = 1.0  # how long a rank waits for others before it asks them where they are
_ASK_AGAIN_S = 5.0
_STILL_S = 8.0  # how long nothing must have moved on a rank that stands still
_TELL_S = 30.0  # how long a rank waits before it says so
_LONGEST_PAUSE_S = 0.05  # between two looks


def meet(watch: FailureWatch, what: str, remedy: str) -> None:
    """Wait until all ranks are in this call, but not for one that can't come. Collective, and rare.

    Args:
        watch: Tells where ranks are.
        what: The call, in words; the so-manieth of each rank belong together.
        remedy: What to do where a rank doesn't come.

    Raises:
        UsageError: A rank has gone on, or has ended, without the call.
        PeerError: A rank has failed, or it takes too long.
    """
    if watch.closed:
        return
    here, client = watch.new_meeting(what), watch.client
    everyone = [f"{here}/{rank}" for rank in range(watch.world_size)]
    client.set(everyone[watch.rank], "")
    if client.add(f"{here}/came", 1) == watch.world_size:
        client.set(f"{here}/met", "")
    still = _Stillness(watch)
    started = time.monotonic()
    ask_at, pause, told = started + _LATE_S, 0.0005, False
    while not client.check([f"{here}/met"]):
        time.sleep(pause)
        pause = min(1.5 * pause, _LONGEST_PAUSE_S)
        if time.monotonic() < ask_at:
            continue
        failed = watch.peer_failure()
        if failed is not None:
            raise failed
        if ask_at > started + watch.timeout_s:
            raise watch.timed_out(what)
        answers = watch.ask_all()
        ask_at = time.monotonic() + _ASK_AGAIN_S
        # Asked again after their answers: whoever was on its way has come, whoever is past the place never will.
        away = [one for one in answers if not client.check([everyone[one.rank]])]
        gone = [one for one in away if watch.has_left(one.rank) or one.position > watch.place()]
        gone = gone or still.all_of(away)
        if gone:
            ranks = ", ".join(str(one.rank) for one in gone)
            raise UsageError(f"{what} on rank {watch.rank}, but not on rank {ranks}: {_places(gone)}. {remedy}")
        if away and not told and time.monotonic() > started + _TELL_S:
            told = True
            print(
                f"[rank {watch.rank}] lite: {what} and waits for all ranks. {_places(away)}. {remedy}", file=sys.stderr
            )
    if client.add(f"{here}/left", 1) == watch.world_size:
        for key in (*everyone, *(f"{here}/{name}" for name in ("came", "met", "left"))):
            client.delete_key(key)


def _places(answers: list[Answer]) -> str:
    return "; ".join(f"rank {one.rank} is {one.where}" for one in answers)


class _Stillness:
    """Which ranks have not moved from one answer to the next, where they need this one to go on."""

    def __init__(self, watch: FailureWatch) -> None:
        self._watch = watch
        self._since: dict[int, tuple[Answer, float]] = {}

    def all_of(self, away: list[Answer]) -> list[Answer]:
        """These ranks, where none of them moves; one that does may be what the others wait for."""
        return away if all([self._holds(answer) for answer in away]) else []

    def _holds(self, answer: Answer) -> bool:
        now = time.monotonic()
        needs_us = answer.communicates or answer.begun > self._watch.begun()
        before, since = self._since.get(answer.rank, (None, now))
        if not needs_us or before is None or not before.same_moment(answer):
            since = now
        self._since[answer.rank] = answer, since
        return needs_us and now - since >= _STILL_S
