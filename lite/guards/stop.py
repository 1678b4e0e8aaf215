"""A stop that one rank asks for becomes one agreed last step on all ranks, without a collective per step.

Ranks count the boundaries of steps. Rank 0 announces one window ahead: at a poll point it writes, under the number of
the next one, whether the ranks stop there and where the one after it lies. So what a rank reads at a poll point was
written a whole window ago, all ranks decide alike, and between poll points a boundary is one comparison of integers.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from lite.errors import PeerError, UsageError
from lite.guards.failure import FailureWatch

INTERVAL_S = 0.25
# Steps that suddenly take long (an evaluation in between) must not put the next poll point out of reach.
MAX_WINDOW = 128
_TIMEOUT_S = 1800.0


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
    """What rank 0 announces for one poll point: stop there or not, where the following one lies, whether it is time."""

    following: int
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
        interval_s: About how far apart poll points are.

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
        interval_s: float = INTERVAL_S,
    ) -> None:
        self.count = 0
        self.agreed: Request | None = None
        self.due = False
        self._alone = store is None or world_size == 1
        self._store: Any = store
        self._name, self._rank, self._world_size, self._watch = name, rank, world_size, watch
        self._interval_s = interval_s
        self._wanted: Request | None = None
        self._published = False
        self._deadline: tuple[float, Request] | None = None
        self._clock: Callable[[], bool] | None = None
        self._next = 0 if self._alone else 1  # every boundary, where asking costs nothing
        self._polled_at, self._polled_count, self._window = time.monotonic(), 0, 1
        self._word = _Word(2, None)
        if not self._alone and rank == 0:
            self._announce(1, self._word)

    def step(self) -> bool:
        """Count one boundary between steps; whether it is the last one. Call it equally often on all ranks."""
        self.count += 1
        if self.count < self._next:
            return False
        return self._poll()

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
            with suppress(RuntimeError):  # the next poll point tries again
                self._publish()

    def watch_clock(self, strikes: Callable[[], bool] | None) -> None:
        """Let rank 0 ask `strikes()` at its poll points, and all ranks find `due` true at the same step afterwards."""
        self._clock, self.due = strikes, False

    def progress(self) -> str:
        """For people: how many steps this rank has counted."""
        return f"{self.count} steps counted by should_stop"

    def _poll(self) -> bool:
        if self.agreed is not None:
            return True
        if self._deadline is not None and time.monotonic() >= self._deadline[0]:
            self._wanted = self._wanted or self._deadline[1]
        if self._alone:
            self.agreed, self.due = self._wanted, self._strikes()
            return self.agreed is not None
        self._publish()
        here = self.count
        word = self._word if self._rank == 0 else self._read(here)
        if word.request is not None:
            self.agreed, self._next = word.request, 0
            return True
        self._next, self.due = word.following, word.due
        if self._rank == 0:
            self._word = _Word(word.following + self._choose_window(), self._find_request(), self._strikes())
            self._announce(word.following, self._word)
        return False

    def _strikes(self) -> bool:
        # What has struck already is not asked again before somebody has acted on it.
        return not self.due and self._clock is not None and self._clock()

    def _choose_window(self) -> int:
        """Steps between poll points such that they are `interval_s` apart at the pace of the last window."""
        now = time.monotonic()
        pace_s = (now - self._polled_at) / (self.count - self._polled_count)
        self._polled_at, self._polled_count = now, self.count
        wanted = self._interval_s / pace_s if pace_s > 0 else MAX_WINDOW
        self._window = max(1, int(min(wanted, 2 * self._window, MAX_WINDOW)))
        return self._window

    # ---- the store

    def _publish(self) -> None:
        """Put this rank's request where rank 0 looks."""
        if self._wanted is not None and not self._published and not self._alone:
            self._store.compare_set(f"{self._name}/request", "", json.dumps(asdict(self._wanted)))
            self._published = True

    def _find_request(self) -> Request | None:
        if not self._store.check([f"{self._name}/request"]):
            return None
        return Request(**json.loads(self._store.get(f"{self._name}/request")))

    def _announce(self, point: int, word: _Word) -> None:
        self._store.set(f"{self._name}/{point}", json.dumps(asdict(word)))

    def _read(self, point: int) -> _Word:
        """Rank 0's word for this poll point; the last reader removes it, so the store doesn't grow."""
        key = f"{self._name}/{point}"
        if not self._store.check([key]):
            self._wait(key)
        content = json.loads(self._store.get(key))
        if self._store.add(f"{key}/read", 1) == self._world_size - 1:
            self._store.delete_key(key)
            self._store.delete_key(f"{key}/read")
        request = content["request"]
        return _Word(content["following"], Request(**request) if request else None, content["due"])

    def _wait(self, key: str) -> None:
        """Rank 0 is a window behind: wait as a collective would, but not for a rank that has failed or ended."""
        timeout_s = min(_TIMEOUT_S, self._store.timeout.total_seconds())
        started = looked = time.monotonic()
        watch = self._watch if self._watch is not None and not self._watch.closed else None
        while not self._store.check([key]):
            time.sleep(0.001)
            now = time.monotonic()
            if now > started + timeout_s:
                raise watch.timed_out("should_stop") if watch is not None else PeerError("should_stop timed out.")
            if watch is None or now < looked + 0.2:
                continue
            looked = now
            failed = watch.peer_failure()
            if failed is not None:
                raise failed
            if watch.has_left(0) and not self._store.check([key]):
                raise UsageError(
                    f"should_stop was called {self.count} times here, but rank 0 has ended after fewer calls; call it "
                    "equally often on all ranks, once per step."
                )
