"""When one rank fails, the others end within seconds and say why, instead of hanging in a collective.

A rank that fails leaves its traceback in the store. The others find it when their own communication breaks, or their
watcher thread does, which looks into the store twice a second and costs a step nothing.
"""

from __future__ import annotations

import atexit
import json
import os
import re
import sys
import threading
import time
import traceback
import uuid
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from lite import collectives
from lite.checkpoint.background import wait_for_all
from lite.errors import LiteError, PeerError
from lite.guards.hooks import Hooks
from lite.launchers.notes import asked_for, leave_note

POLL_S = 0.5
_NOTE_S = 2.0  # how long a rank whose communication broke waits for another's note
_GRACE_S = 5.0  # how long a rank may go on after another one has failed
_CLEANUP_S = 30.0  # how long it may take to end once it knows
_SAVE_S = 300.0  # how long a background save may then take: a whole checkpoint is worth it
_LINGER_S = 3.0  # how long the rank that hosts the store stays for the others
_AT_REST_S = 0.2  # what a main thread that only waits computes at most between two answers
_MAX_CHARS = 20_000

_COMMUNICATION = re.compile(r"gloo|nccl|c10d|monitoredBarrier", re.IGNORECASE)
_LOST = re.compile(
    r"connection (closed|reset|refused|was likely closed)|broken pipe|ncclRemoteError|remote process exit|"
    r"failed to (send|recv)",
    re.IGNORECASE,
)
_LATE = re.compile(r"timed out|timeout|failed to pass monitoredBarrier", re.IGNORECASE)
_OWN_ADVICE = re.compile(r"Detected mismatch between collectives")

_current: FailureWatch | None = None


@dataclass(frozen=True)
class Failure:
    """What a rank leaves behind: who it is, and what became of it."""

    rank: int
    text: str


@dataclass(frozen=True)
class Answer:
    """Where a rank is.

    Attributes:
        where: In words.
        position: As numbers that grow as it goes on; none of a rank that doesn't answer.
        moment: What tells two moments of its main thread apart: where it is, the backwards that it has begun, and the
            seconds that it has computed.
        communicates: Whether that is in a collective, or in a backward.
    """

    rank: int
    where: str
    position: list[int] = field(default_factory=list)
    moment: list[float] = field(default_factory=list)
    communicates: bool = False

    def is_past(self, place: list[int]) -> bool:
        """Whether it has come further than there, as far as that can be compared."""
        return len(self.position) == len(place) and self.position > place

    def stands_as(self, before: Answer) -> bool:
        """Whether nothing has moved since that answer: the same line, no backward, and hardly anything computed."""
        if self.moment[:-1] != before.moment[:-1] or not self.moment:
            return False
        return self.moment[-1] - before.moment[-1] < _AT_REST_S


def current_watch() -> FailureWatch | None:
    """This process's watch, if it has one."""
    return None if _current is None or _current.closed else _current


def watch_failures(store: Any) -> FailureWatch:
    """Return this process's watch over the default process group, which it joins. Collective: call on all ranks.

    Args:
        store: What the ranks of the group share. Without a TCP store nothing is watched.
    """
    global _current
    group = dist.group.WORLD
    if _current is not None and _current.group() is group and not _current.closed:
        return _current
    if _current is not None:
        _current.close(linger=False)
    # The store outlives a job that torchrun restarts, and may serve several: a name of its own keeps them apart.
    name = f"lite/{collectives.broadcast(uuid.uuid4().hex)}"
    _current = FailureWatch(own_client(store), name, group, timeout_s=store.timeout.total_seconds())
    return _current


class FailureWatch:
    """One rank's part in the consensus about failures.

    Args:
        client: A connection to the store that nobody else uses, or None to do nothing.
        name: What this job's keys in the store start with.
        group: The process group that is watched.
        timeout_s: How long ranks may wait for each other.

    Attributes:
        begun: Counts the backwards and the like that this rank has begun.
        failure: The first failure of the job, once this rank knows of it.
        closed: Whether this watch has ended.
    """

    def __init__(self, client: Any, name: str, group: Any, *, timeout_s: float) -> None:
        self.name = name
        self.group = weakref.ref(group)
        self.rank = collectives.rank()
        self.world_size = collectives.world_size()
        self.failure: Failure | None = None
        self.closed = False
        self.client, self.timeout_s = client, timeout_s
        self._pid = os.getpid()
        self._posted = self._told = self._acknowledged = False
        self._answered = self._names = 0
        self._progress: Callable[[], str] = str
        self._count: Callable[[], int] = int
        self._position: Callable[[], tuple[int, ...]] = tuple
        self.begun: Callable[[], int] = int
        self._meetings: dict[str, int] = {}
        self._before_close: list[Callable[[], Any]] = []
        self._stop = threading.Event()
        self._user_thread = threading.current_thread()
        # torchrun's agent hosts the store where it says so; else it ends with rank 0.
        self._hosts = self.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        if client is None:
            self.closed = True
            return
        self._hooks = Hooks(post=self.post, explain=self.explain, interrupted=self._interrupted)
        self._thread = threading.Thread(target=self._watch, name="lite-failure-watch", daemon=True)
        self._thread.start()
        collectives.set_explainer(self.explain)
        atexit.register(self.close)

    def new_name(self, what: str) -> str:
        """Where keys of something new begin; the same on all ranks when they ask in the same order."""
        self._names += 1
        return f"{self.name}/{what}{self._names}"

    def begin_anew(self, begun: Callable[[], int]) -> None:
        """Let nothing of a Lite before be in this rank's answers: ranks leave it at different times.

        Args:
            begun: Counts the backwards and the like that this rank has begun.
        """
        self.begun = begun
        self._progress, self._count, self._position = str, int, tuple

    def report_progress(self, progress: Callable[[], str], count: Callable[[], int]) -> None:
        """Let this rank's answer to "where are you" hold what `progress()` returns, in words, and `count()`."""
        self._progress, self._count = progress, count

    def report_position(self, position: Callable[[], tuple[int, ...]]) -> None:
        """Let it hold `position()` too, which tells places of one count apart: later ones are greater."""
        self._position = position

    def new_meeting(self, what: str) -> str:
        """Where keys of the next meeting of that name begin; the so-manieth of each rank belong together."""
        number = self._meetings[what] = self._meetings.get(what, 0) + 1
        return f"{self.name}/meet/{what}/{number}"

    def forget_meeting(self, what: str) -> None:
        """Let the newest meeting of that name not have been."""
        self._meetings[what] -= 1

    def place(self) -> list[int]:
        """How far this rank has come: later places are greater."""
        return [self._count(), *self._position()]

    def before_close(self, end: Callable[[], Any]) -> None:
        """Let `end()` be called before this rank says that it needs the store no more."""
        self._before_close.append(end)

    def post(self, error: BaseException) -> None:
        """Tell the other ranks that this one ends with `error`; the first failure of the job counts."""
        if isinstance(error, SystemExit) and not error.code:
            return
        if isinstance(error, KeyboardInterrupt):
            text = f"rank {self.rank} was interrupted (KeyboardInterrupt)."
        elif isinstance(error, SystemExit):
            text = f"rank {self.rank} called sys.exit({error.code!r})."
        elif isinstance(error, PeerError):
            text = f"rank {self.rank} gave up: {error}"
        else:
            text = f"rank {self.rank} failed:\n\n{''.join(traceback.format_exception(error))[-_MAX_CHARS:]}"
        if self._posted or self.closed or os.getpid() != self._pid:
            return
        self._posted = True
        folder = asked_for()
        if folder is not None:
            with suppress(OSError):  # a full disk, say; the others are told all the same
                leave_note(folder, self.rank, error, text)
        if self.failure is not None:
            return  # another rank's, which counts; the store may be gone with it
        try:
            self.client.compare_set(f"{self.name}/failure", "", json.dumps(asdict(Failure(self.rank, text))))
        except RuntimeError:
            return  # the store is gone, and with it whoever could read it

    def explain(self, error: RuntimeError) -> PeerError | None:
        """The error about the rank that is behind a communication that broke here; None where none is."""
        text = str(error)
        if isinstance(error, LiteError) or _OWN_ADVICE.search(text) or self.closed or self._posted:
            return None
        if not (_COMMUNICATION.search(text) or isinstance(error, dist.DistError)):
            return None
        late, lost = _LATE.search(text), _LOST.search(text)
        try:
            found = self.peer_failure()
            if found is not None or not (late or lost):
                return found
            return self.timed_out("a collective") if late and not lost else self._vanished(text)
        except RuntimeError:
            self._told = True
            return PeerError(
                "a collective failed and the job's store is gone, so the process that hosts it (rank 0, or torchrun) "
                "has ended; its output says why."
            )

    def peer_failure(self) -> PeerError | None:
        """The error about another rank's failure, if there is one."""
        failure = self._look()
        if failure is None or failure.rank == self.rank:
            return None
        self._told = True
        return PeerError(f"another rank ended, so this one can't go on: {failure.text}")

    def timed_out(self, what: str) -> PeerError:
        """The error about a wait that took too long: it says where every rank is."""
        self._told = True
        places = "\n".join(f"  rank {one.rank}: {one.where}" for one in self.ask_all())
        return PeerError(
            f"{what} timed out: not every rank has joined it. Where they are:\n{places}\nA rank that takes longer on "
            "purpose needs DDPStrategy(timeout=timedelta(...)); LITE_DEBUG=1 names collectives that don't match."
        )

    def has_left(self, rank: int) -> bool:
        """Whether `rank` has ended by itself, without an error that it could tell."""
        return bool(self.client.check([f"{self.name}/left/{rank}"]))

    def _how_left(self, rank: int) -> str:
        return str(self.client.get(f"{self.name}/left/{rank}").decode())

    def close(self, *, linger: bool = True) -> None:
        """Stop watching: this process ends, or leaves the group. The hooks are what they were before."""
        if self.closed or os.getpid() != self._pid:
            return
        for end in self._before_close:
            end()
        self._stop.set()
        self._thread.join(timeout=_NOTE_S)
        self.closed = True
        # The code of a SystemExit is not known where the interpreter has dropped it unseen.
        how = "by raising SystemExit" if self._hooks.script_was_left() else "without an error"
        self._hooks.close()
        collectives.set_explainer(None)
        atexit.unregister(self.close)
        if linger:
            with suppress(RuntimeError):  # the store is gone
                self._leave(how)

    def _leave(self, how: str) -> None:
        if not self._posted:
            self.client.set(f"{self.name}/left/{self.rank}", how)
        self._acknowledge()
        deadline = time.monotonic() + _LINGER_S
        while self._hosts and time.monotonic() < deadline:
            if self.client.add(f"{self.name}/gone", 0) >= self.world_size:
                break
            time.sleep(0.02)

    def _acknowledge(self) -> None:
        """Once per rank: it needs the store no more, or knows what it had to know."""
        if not self._acknowledged:
            self._acknowledged = True
            self.client.add(f"{self.name}/gone", 1)

    def _look(self) -> Failure | None:
        if self.failure is None and self.client.check([f"{self.name}/failure"]):
            self.failure = Failure(**json.loads(self.client.get(f"{self.name}/failure")))
        return self.failure

    def _vanished(self, text: str) -> PeerError:
        """A connection broke: wait for the note of whoever broke it."""
        deadline = time.monotonic() + _NOTE_S
        waiting = False
        while True:
            found = self.peer_failure()
            if found is not None:
                return found
            left = [rank for rank in range(self.world_size) if rank != self.rank and self.has_left(rank)]
            if left or time.monotonic() > deadline:
                break
            if not waiting:
                # torchrun may end this process before the wait is over.
                waiting = True
                print(
                    f"[rank {self.rank}] lite: another rank vanished in the middle of a collective, without a word so "
                    "far (killed?).",
                    file=sys.stderr,
                    flush=True,
                )
            time.sleep(0.05)
        self._told = True
        if left:
            ends = "; ".join(f"rank {rank} had ended already, {self._how_left(rank)}" for rank in left)
            return PeerError(f"{ends}, while this rank was still in a collective; every rank must make the same calls.")
        return PeerError(
            "another rank vanished without a word in the middle of a collective: killed (by the kernel, out of memory, "
            "or by the scheduler), its machine is gone, or it aborted since ranks made different calls (an all_reduce "
            "on rank 0 alone, say; LITE_DEBUG=1 names them)."
        )

    def ask_all(self) -> list[Answer]:
        """Every rank's whereabouts, as its watcher tells them."""
        number = self.client.add(f"{self.name}/asked", 1)
        answers = {self.rank: self._answer("waiting")}
        deadline = time.monotonic() + 3 * POLL_S + 1.0
        while len(answers) < self.world_size and time.monotonic() < deadline:
            for rank in set(range(self.world_size)) - set(answers):
                key = f"{self.name}/answer/{number}/{rank}"
                if self.client.check([key]):
                    answers[rank] = Answer(**json.loads(self.client.get(key)))
                elif self.has_left(rank):
                    answers[rank] = Answer(rank, f"ended already, {self._how_left(rank)}")
            time.sleep(0.02)
        for rank in set(answers) - {self.rank}:
            self.client.delete_key(f"{self.name}/answer/{number}/{rank}")
        silent = "no answer: its process is gone, or its Python is blocked"
        return [answers.get(rank, Answer(rank, silent)) for rank in range(self.world_size)]

    def _answer(self, doing: str) -> Answer:
        from lite.guards.whereabouts import whereabouts

        here, progress = whereabouts(self._user_thread.ident or 0), self._progress()
        where = f"{doing}, {here.text}, {progress}" if progress else f"{doing}, {here.text}"
        moment = [here.moment, self.begun(), _computed(self._user_thread)]
        return Answer(self.rank, where, self.place(), moment, here.communicates)

    def _watch(self) -> None:
        """The watcher thread."""
        try:
            while not self._stop.wait(POLL_S):
                asked = self.client.add(f"{self.name}/asked", 0)
                if asked != self._answered:
                    answer = json.dumps(asdict(self._answer("alive")))
                    for number in range(self._answered + 1, asked + 1):  # several may have asked
                        self.client.set(f"{self.name}/answer/{number}/{self.rank}", answer)
                    self._answered = asked
                if self._look() is not None:
                    self._acknowledge()
                    break
        except RuntimeError:
            return  # the store is gone: the job ends
        if self.failure is not None and self.failure.rank != self.rank:
            self._end_soon(self.failure)

    def _end_soon(self, failure: Failure) -> None:
        """Give the user's thread time to end by itself, then raise in it, then end the process, but for its save."""
        if self._stop.wait(_GRACE_S):
            return
        if not self._told:
            print(f"[rank {self.rank}] lite ends this rank: {failure.text}", file=sys.stderr, flush=True)
            self._hooks.interrupt()
            if self._stop.wait(_GRACE_S):
                return
        if self._told and self._stop.wait(_CLEANUP_S):
            return
        if not wait_for_all(0.0):
            print(
                f"[rank {self.rank}] lite waits up to {_SAVE_S:.0f} s for a checkpoint that is being written.",
                file=sys.stderr,
                flush=True,
            )
            wait_for_all(_SAVE_S)
        print(f"[rank {self.rank}] lite ends this process: it did not end by itself.", file=sys.stderr, flush=True)
        os._exit(1)

    def _interrupted(self) -> PeerError | None:
        """What `Hooks.interrupt` raises in the user's thread, once."""
        if self.failure is None or self._told or self.closed:
            return None
        self._told = True
        return PeerError(f"another rank ended, so this one can't go on: {self.failure.text}")


def _computed(thread: threading.Thread) -> float:
    """The seconds that a thread has computed, where the system tells."""
    if thread.ident is None or not thread.is_alive() or not hasattr(time, "pthread_getcpuclockid"):
        return 0.0
    return time.clock_gettime(time.pthread_getcpuclockid(thread.ident))


def own_client(store: Any) -> Any:
    """Another connection to the store's server, or None: a thread that waits on one must not block the others."""
    # Undocumented in torch, and checked with 2.13: what a PrefixStore prefixes, here the TCPStore that has the address.
    while hasattr(store, "underlying_store"):
        store = store.underlying_store
    if not isinstance(store, dist.TCPStore):  # type: ignore[attr-defined]
        return None
    return dist.TCPStore(  # type: ignore[attr-defined]
        store.host, store.port, None, False, timeout=timedelta(seconds=10), wait_for_workers=False
    )
