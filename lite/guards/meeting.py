"""Calls that all ranks must make: who makes one alone is told so, instead of waiting for ever.

Ranks meet in the store before such a call. One that waits there is in no collective, so it asks where the others are,
and gives up on those that can't come: one that has ended, or is past the place; or all, where each of them stands still
in a collective or a backward. Whoever may come is waited for: a healthy job must not end here.
"""

from __future__ import annotations

import sys
import time

from lite import collectives
from lite.errors import UsageError
from lite.guards.failure import Answer, FailureWatch

_LATE_S = 1.0  # how long the first rank waits for others before it asks them where they are
_OTHERS_LATE_S = 60.0  # how long the others do, who mostly learn from it
_ASK_AGAIN_S = 5.0  # at first, and then twice as long each time
_LONGEST_S = 60.0
_STILL_S = 30.0  # how long nothing must have moved on ranks that stand still
_TELL_S = 30.0  # how long a rank waits before it says so
_LONGEST_PAUSE_S = 0.05  # between two looks


@collectives.explained
def meet(watch: FailureWatch, what: str, remedy: str, *, in_order: bool = False) -> None:
    """Wait until all ranks are in this call, but not for those that can't come. Collective, and rare.

    It also ends where a rank doesn't even answer: the collective that follows tells why.

    Args:
        watch: Tells where ranks are.
        what: The call, in words; the so-manieth of each rank belong together.
        remedy: What to do where a rank doesn't come.
        in_order: Whether a rank at a later place has missed the call for certain.

    Raises:
        UsageError: A rank has gone on, or has ended, without the call.
        PeerError: A rank has failed, or it takes too long.
    """
    if watch.closed:
        return
    here, client = watch.new_meeting(what), watch.client
    everyone = [f"{here}/{rank}" for rank in range(watch.world_size)]
    client.set(everyone[watch.rank], "")
    came = client.add(f"{here}/came", 1)
    if came == watch.world_size:
        client.set(f"{here}/met", "")
    try:
        _wait(watch, here, everyone, (what, remedy), first=came == 1, in_order=in_order)
    except (UsageError, KeyboardInterrupt):  # after which the next call of the kind may be everyone's
        client.delete_key(everyone[watch.rank])
        client.add(f"{here}/came", -1)
        watch.forget_meeting(what)
        raise
    if client.add(f"{here}/left", 1) == watch.world_size:
        for key in (*everyone, *(f"{here}/{name}" for name in ("came", "met", "left"))):
            client.delete_key(key)


def _wait(
    watch: FailureWatch, here: str, everyone: list[str], call: tuple[str, str], *, first: bool, in_order: bool
) -> None:
    client, (what, remedy) = watch.client, call
    still = _Stillness()
    started = time.monotonic()
    ask_at, interval = started + (_LATE_S if first else _OTHERS_LATE_S), _ASK_AGAIN_S
    pause, told = 0.0005, False
    silent: set[int] = set()
    while not client.check([f"{here}/met"]):
        time.sleep(pause)
        pause = min(1.5 * pause, _LONGEST_PAUSE_S)
        if pause == _LONGEST_PAUSE_S and (failed := watch.peer_failure()) is not None:
            raise failed
        if time.monotonic() < ask_at:
            continue
        if ask_at > started + watch.timeout_s:
            raise watch.timed_out(f"{what}, and")
        answers = watch.ask_all()
        ask_at, interval = time.monotonic() + interval, min(2 * interval, _LONGEST_S)
        # Asked again after their answers: whoever was on its way has come, whoever is past the place never will.
        away = [one for one in answers if not client.check([everyone[one.rank]])]
        gone = [one for one in away if watch.has_left(one.rank) or (in_order and one.is_past(watch.place()))]
        gone = gone or still.all_of(away)
        if gone:
            ranks = ", ".join(str(one.rank) for one in gone)
            raise UsageError(f"{what} on rank {watch.rank}, but not on rank {ranks}: {_places(gone)}. {remedy}")
        silent_before, silent = silent, {one.rank for one in away if not one.position}
        if silent & silent_before:
            return
        if away and not told and time.monotonic() > started + _TELL_S:
            told = True
            text = f"{what} and waits for all ranks. {_places(away)}. {remedy}"
            print(f"[rank {watch.rank}] lite: {text}", file=sys.stderr)


def _places(answers: list[Answer]) -> str:
    return "; ".join(f"rank {one.rank} is {one.where}" for one in answers)


class _Stillness:
    """Which ranks have not moved from one answer to the next, in what other ranks take part in."""

    def __init__(self) -> None:
        self._since: dict[int, tuple[Answer, float]] = {}

    def all_of(self, away: list[Answer]) -> list[Answer]:
        """These ranks, where none of them moves; one that does may be what the others wait for."""
        return away if all([self._holds(answer) for answer in away]) else []

    def _holds(self, answer: Answer) -> bool:
        now = time.monotonic()
        before, since = self._since.get(answer.rank, (answer, now))
        if not answer.stands_as(before):
            since = now
        self._since[answer.rank] = answer, since
        return answer.communicates and now - since >= _STILL_S
