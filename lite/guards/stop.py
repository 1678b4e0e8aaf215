"""A stop that one rank asks for becomes one agreed last step on all ranks, without a collective per step.

Ranks count the boundaries of steps. A thread on each rank looks into the store four times a second, so a boundary is
one comparison of integers, however fast or slow steps are. Once a rank asks, there is a round:

1. Each rank's thread holds it (at its next boundary it waits for the word), and only then tells how far it has counted.
2. Rank 0 takes the largest count plus one, which lies behind nobody, for the boundary at which all act, and writes this
   word, with the request.
3. Each rank goes on to that boundary, and acts there.

Threads answer while their ranks compute or communicate, so no rank waits for one that waits for it. A request so takes
effect within two looks, half a second, plus the step that is under way and the next one.
"""

from __future__ import annotations

import json
import queue
import sys
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from lite.errors import PeerError, UsageError
from lite.guards.failure import FailureWatch, own_client

INTERVAL_S = 0.25
_SOON_S = 0.005  # between two looks of rank 0 while others are about to answer
_TIMEOUT_S = 1800.0
_NEVER = sys.maxsize
_END = "end"


@dataclass(frozen=True)
class Request:
    """A stop that was asked for.

    Attributes:
        reason: In words, with the rank that asked where there are several.
        signal: The number of the signal behind it, or 0.
    """

    reason: str
    signal: int = 0


@dataclass(frozen=True)
class _Word:
    """What rank 0 says in one round: where all ranks act, whether they stop there, and whether it is time."""

    at: int
    request: Request | None
    due: bool = False


class StopAgreement:
    """Counts the steps of this rank and knows which one is the last. Call `step` equally often on all ranks.

    Args:
        store: What the ranks share, or None with one process.
        name: What its keys in the store start with.
        rank: This rank.
        world_size: Number of ranks.
        watch: Ends a wait for a rank that has failed.
        threaded: A thread looks; without it somebody calls `look`.

    Attributes:
        count: Calls of `step` so far.
        agreed: The stop that all ranks have agreed on, or None.
        due: The clock of `watch_clock` has struck, on all ranks at the same step. Whoever acts on it sets it back.
    """

    def __init__(
        self,
        store: Any = None,
        *,
        name: str = "",
        rank: int = 0,
        world_size: int = 1,
        watch: FailureWatch | None = None,
        threaded: bool = True,
    ) -> None:
        self.count = 0
        self.agreed: Request | None = None
        self.due = False
        self._alone = store is None or world_size == 1
        self._name, self._rank, self._world_size = name, rank, world_size
        self._watch = watch if watch is not None and not watch.closed else None
        self._wanted: Request | None = None
        self._published = False
        self._deadline: tuple[float, Request] | None = None
        self._clock: Callable[[], bool] | None = None
        # The boundary from which `step` does more than count: with one process every one, where asking costs nothing.
        self._next = 0 if self._alone else _NEVER
        self._round = self._meetings = self._announced = 0
        self._held = False  # this rank has told its count in this round
        self._deciding = threading.Lock()
        self._wake: queue.SimpleQueue[str] = queue.SimpleQueue()  # its put, unlike an event's set, may be interrupted
        if self._alone:
            return
        self._timeout_s = min(_TIMEOUT_S, store.timeout.total_seconds())
        client = own_client(store)
        self._store: Any = store if client is None else client
        if threaded:
            self._start()

    def _start(self) -> None:
        thread = threading.Thread(target=_look_on, args=(weakref.ref(self), self._wake), name="lite-stop", daemon=True)
        thread.start()
        end = weakref.finalize(self, _end, thread, self._wake)
        if self._watch is not None:
            self._watch.before_close(end)

    def step(self, *, now: bool = False) -> bool:
        """Count one boundary between steps; whether it is the last one. Call it equally often on all ranks.

        Args:
            now: Whether all ranks wait for each other here, and find what any of them asked for before. They may have
                counted differently up to here.
        """
        self.count += 1
        if self.count < self._next and not now:
            return False
        stops = self.count >= self._next and self._poll()
        return stops or (now and not self._alone and self._meet())

    def request(self, reason: str, *, signal: int = 0, after_s: float = 0.0) -> None:
        """Ask for a stop, from any rank, also out of a signal handler. The first request counts.

        Args:
            reason: Why, for people.
            signal: The signal behind it, if there is one.
            after_s: Only after so many seconds from now.
        """
        where = f"{reason} (rank {self._rank})" if not self._alone else reason
        request = Request(where, int(signal))
        if after_s > 0:
            self._deadline = (time.monotonic() + after_s, request)
        elif self._wanted is None:
            self._wanted = request
            self._wake.put("")

    def watch_clock(self, strikes: Callable[[], bool] | None) -> None:
        """Let rank 0's thread ask `strikes()`, and all ranks find `due` true at the same step afterwards."""
        self._clock, self.due = strikes, False

    def progress(self) -> str:
        """For people: how many steps this rank has counted."""
        return f"{self.count} steps counted by should_stop"

    def counted(self) -> int:
        """The same as a number."""
        return self.count

    # ---- at a boundary

    def _poll(self) -> bool:
        if self.agreed is not None:
            return True
        if self._alone:
            self._look_at_deadline()
            self.agreed, self.due = self._wanted, self._strikes()
            return self.agreed is not None
        here = f"{self._name}/{self._round}"
        if self._next == 0:  # held: the word is on its way
            self._wait([f"{here}/word"], here)
            self._next = self._word().at
            if self.count < self._next:
                return False
        word = self._word()
        self._forget(here, "ask", "word")
        return self._act(word)

    def _act(self, word: _Word) -> bool:
        """All ranks are at the boundary that was agreed on; whether they stop here."""
        if word.request is not None:
            self.agreed, self._next = word.request, 0
            return True
        self.due = self.due or word.due
        self._round += 1
        self._next = _NEVER
        self._held = False  # the last of these: from here on the thread looks again
        return False

    def _meet(self) -> bool:
        """All ranks are in this call, or one has been stopped on its way; they count alike from here on."""
        self._meetings += 1
        here = f"{self._name}/now{self._meetings}"
        self._look_at_deadline()
        self._publish()
        self._store.set(f"{here}/{self._rank}", str(self.count))
        met = [f"{here}/{rank}" for rank in range(self._world_size)]
        if self._rank == 0 and self._wait(met, here, or_stop=True):
            with self._deciding:
                word = _Word(max(int(self._store.get(key)) for key in met), self._find_request())
                self._store.set(f"{here}/word", json.dumps(asdict(word)))
        if not self._wait([f"{here}/word"], here, or_stop=True):
            return self._act(self._word())
        word = self._parse(self._store.get(f"{here}/word"))
        self._forget(here, "word")
        if word.request is None:
            self.count = word.at
            return False  # a round that has begun meanwhile goes on
        return self._act(word)

    # ---- in the thread

    def look(self) -> float:
        """Take part in the round that has begun, or begin one; returns the seconds until it is worth looking again."""
        here = f"{self._name}/{self._round}"
        if self.agreed is not None:
            return INTERVAL_S
        self._look_at_deadline()
        if not self._held:
            if self._publish() or (self._rank == 0 and self._strikes()):
                self._store.set(f"{here}/ask", "")
            if not self._store.check([f"{here}/ask"]):
                return INTERVAL_S
            self._held = True
            self._next = 0  # before the count is read: `step` passes no boundary behind it any more
            self._store.set(f"{here}/{self._rank}", str(self.count))
        if self._rank != 0 or self._announced > self._round:
            return INTERVAL_S
        keys = [f"{here}/{rank}" for rank in range(self._world_size)]
        if not self._store.check(keys):
            return _SOON_S
        with self._deciding:
            word = _Word(1 + max(int(self._store.get(key)) for key in keys), self._find_request(), self._strikes())
            self._announced += 1
            self._store.set(f"{here}/word", json.dumps(asdict(word)))
        return INTERVAL_S

    def _look_at_deadline(self) -> None:
        if self._deadline is not None and time.monotonic() >= self._deadline[0]:
            self._wanted = self._wanted or self._deadline[1]

    def _strikes(self) -> bool:
        # What has struck already is not asked again before somebody has acted on it.
        return not self.due and self._clock is not None and self._clock()

    # ---- the store

    def _publish(self) -> bool:
        """Put this rank's request where rank 0 looks; whether there is one."""
        if self._wanted is not None and not self._published:
            self._store.compare_set(f"{self._name}/request", "", json.dumps(asdict(self._wanted)))
            self._published = True
        return self._published

    def _find_request(self) -> Request | None:
        if not self._store.check([f"{self._name}/request"]):
            return None
        return Request(**json.loads(self._store.get(f"{self._name}/request")))

    def _word(self) -> _Word:
        return self._parse(self._store.get(f"{self._name}/{self._round}/word"))

    def _parse(self, content: bytes) -> _Word:
        word = json.loads(content)
        request = word["request"]
        return _Word(word["at"], Request(**request) if request else None, word["due"])

    def _forget(self, here: str, *keys: str) -> None:
        """This rank needs these no more; the last one removes them, so the store doesn't grow."""
        if self._store.add(f"{here}/read", 1) == self._world_size:
            for key in (*keys, *map(str, range(self._world_size)), "read"):
                self._store.delete_key(f"{here}/{key}")

    def _wait(self, keys: list[str], here: str, *, or_stop: bool = False) -> bool:
        """Wait for other ranks' answers as a collective would, but not for a rank that has failed or ended.

        Args:
            keys: The answers.
            here: Where keys of all ranks begin.
            or_stop: Whether the wait ends, too, where this round stops the ranks that are still on their way.

        Returns:
            Whether the answers are there.
        """
        started = looked = time.monotonic()
        watch = self._watch if self._watch is not None and not self._watch.closed else None
        while not self._store.check(keys):
            # Asked in this order: rank 0 decides one thing at a time, so no answer without the request comes any more.
            if or_stop and self._stops_others() and not self._store.check(keys):
                return False
            time.sleep(0.001)
            now = time.monotonic()
            if now > started + self._timeout_s:
                raise watch.timed_out("should_stop") if watch is not None else PeerError("should_stop timed out.")
            if watch is None or now < looked + 0.2:
                continue
            looked = now
            failed = watch.peer_failure()
            if failed is not None:
                raise failed
            left = [rank for rank in range(self._world_size) if watch.has_left(rank)]
            gone = [rank for rank in left if rank == 0 or not self._store.check([f"{here}/{rank}"])]
            if gone and not self._store.check(keys):
                raise UsageError(
                    f"should_stop was called {self.count} times here, but rank {gone[0]} has ended after fewer calls; "
                    "call it equally often on all ranks, once per step."
                )
        return True

    def _stops_others(self) -> bool:
        key = f"{self._name}/{self._round}/word"
        return bool(self._store.check([key])) and self._word().request is not None


def _look_on(reference: weakref.ref[StopAgreement], wake: queue.SimpleQueue[str]) -> None:
    """The thread. It does not keep the agreement alive, and doesn't wait in the store, only between looks."""
    pause = INTERVAL_S
    while True:
        with suppress(queue.Empty):
            if wake.get(timeout=pause) == _END:
                return
        agreement = reference()
        if agreement is None:
            return
        try:
            pause = agreement.look()
        except RuntimeError:
            return  # the store is gone: the job ends
        del agreement


def _end(thread: threading.Thread, wake: queue.SimpleQueue[str]) -> None:
    wake.put(_END)
    if thread is not threading.current_thread():  # whose own reference was the last
        thread.join()
