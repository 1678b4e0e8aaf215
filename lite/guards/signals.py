"""Signals that ask for a stop, and what a scheduler is told about it; the last step is decided elsewhere."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import Any

from lite.data.workers import stop_signals
from lite.errors import ConfigError, UsageError

# A scheduler that signals every process of a job reaches torchrun's agent too, which hands the signal on once more.
_SAME_S = 1.0
# How long the handler of a second signal may wait for its turn: none runs while Python is in native code.
_NATIVE_S = 0.5
_END = bytes([0])  # no signal has this number


def exit_code(number: int) -> int:
    """The exit code of a process that ended because of a signal, as shells and schedulers write it: 128 + number.

    Example:
        >>> exit_code(signal.SIGTERM)
        143
    """
    return 128 + int(number)


class StopSignals:
    """Signal handlers that ask for a stop, from now to `close` or the end of a `with` block.

    The second signal of a kind (more than a second after the first) ends the process as if nothing had been installed;
    with exit code 128 + number where it hangs in native code, a collective say. Processes that this one forks end at
    the first; workers of loaders that were set up go on, so that the last step has its data.

    Args:
        signals: Which; "SIGTERM" and the like are fine too.
        request: Called with a reason and the signal's number at the first signal of each kind.

    Attributes:
        received: The first signal that this process got, or None.

    Raises:
        ConfigError: Something is no signal that can be handled.
        UsageError: This is not the main thread, the only one that Python lets install handlers.
    """

    def __init__(self, signals: Sequence[signal.Signals | int | str], request: Callable[[str, int], None]) -> None:
        if threading.current_thread() is not threading.main_thread():
            raise UsageError(
                f"stop_on_signals was called in the thread {threading.current_thread().name!r}, but Python allows "
                "signal handlers in the main thread only; call it there."
            )
        self.received: signal.Signals | None = None
        self._request = request
        self._first_at: dict[int, float] = {}
        self._before: dict[signal.Signals, Any] = {}
        self._shields: set[signal.Signals] = set()
        self._pid = os.getpid()
        self._ear: _Ear | None = None
        for number in dict.fromkeys(_parse(s) for s in signals):
            try:
                self._before[number] = signal.signal(number, self._handle)
            except (OSError, ValueError) as error:
                self.close()
                raise ConfigError(f"{number.name} can't be handled by a process ({error}); leave it out.") from None
        self._shields = set(self._before) - stop_signals
        stop_signals.update(self._shields)
        self._ear = _Ear.listen(set(self._before))

    def __enter__(self) -> StopSignals:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def close(self) -> None:
        """Put back the handlers that were there before."""
        for number, before in self._before.items():
            # None: a handler that wasn't installed by Python, which can't be put back.
            signal.signal(number, signal.SIG_DFL if before is None else before)
        self._before.clear()
        stop_signals.difference_update(self._shields)
        self._shields.clear()
        if self._ear is not None:
            self._ear.close()
            self._ear = None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:  # forked, and not the process that was asked to listen
            _act_as_default(number)
            return
        now = time.monotonic()
        first_at = self._first_at.setdefault(number, now)
        if first_at == now:
            name = signal.Signals(number)
            self.received = self.received or name
            self._request(f"got {name.name}", number)
        elif now > first_at + _SAME_S:
            _act_as_default(number)


class _Ear:
    """A thread that hears signals while the main thread is in native code, and ends the process at the second one.

    Args:
        signals: Which.
        theirs: The socket that Python writes their numbers to.
        ours: Its other end.
    """

    def __init__(self, signals: set[signal.Signals], theirs: socket.socket, ours: socket.socket) -> None:
        self._signals = signals
        self._theirs = theirs
        self._ours = ours
        _ears.add(self)
        threading.Thread(target=self._listen, name="lite-signals", daemon=True).start()

    @classmethod
    def listen(cls, signals: set[signal.Signals]) -> _Ear | None:
        """Begin; None where someone else (asyncio, say) listens already, for only one can."""
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        before = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
        if before == -1:
            return cls(signals, theirs, ours)
        signal.set_wakeup_fd(before)
        ours.close()
        theirs.close()
        return None

    def close(self) -> None:
        """Stop listening. Only the main thread can."""
        current = signal.set_wakeup_fd(-1)
        if current != self._theirs.fileno():
            signal.set_wakeup_fd(current)  # of someone who has come since
        _ears.discard(self)
        self._theirs.send(_END)  # closing alone does not tell: a forked process may have it open still
        self._theirs.close()

    def _listen(self) -> None:
        first_at: dict[int, float] = {}
        with self._ours:
            while numbers := self._ours.recv(64):
                now = time.monotonic()
                if _END in numbers:
                    return
                for number in numbers:
                    if number in self._signals and now > first_at.setdefault(number, now) + _SAME_S:
                        time.sleep(_NATIVE_S)
                        os._exit(exit_code(number))


_ears: set[_Ear] = set()


def _be_deaf() -> None:
    """In a forked process, which would write what it gets to its parent's ear."""
    if _ears:
        signal.set_wakeup_fd(-1)
        _ears.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_be_deaf)


def _act_as_default(number: int) -> None:
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def requeue_slurm_job(environ: Mapping[str, str]) -> bool:
    """Ask SLURM to put this job into the queue again. Call it on one rank, after the last checkpoint.

    Args:
        environ: The environment variables; SLURM_JOB_ID says which job.

    Returns:
        False where this is no SLURM job.

    Raises:
        UsageError: SLURM refuses; the message has its words.

    Source: https://slurm.schedmd.com/scontrol.html#OPT_requeue
    """
    job = environ.get("SLURM_JOB_ID")
    if not job:
        return False
    # An array's tasks are requeued one by one, by the number of the task.
    if environ.get("SLURM_ARRAY_JOB_ID") and environ.get("SLURM_ARRAY_TASK_ID"):
        job = f"{environ['SLURM_ARRAY_JOB_ID']}_{environ['SLURM_ARRAY_TASK_ID']}"
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UsageError(f"scontrol requeue {job} can't be run: {error}; is SLURM's scontrol on PATH?") from error
    if done.returncode != 0:
        raise UsageError(f"scontrol requeue {job} ended with {done.returncode}: {(done.stderr or done.stdout).strip()}")
    return True


def _parse(value: signal.Signals | int | str) -> signal.Signals:
    try:
        if isinstance(value, str):
            return signal.Signals[value if value.startswith("SIG") else f"SIG{value}"]
        return signal.Signals(value)
    except (KeyError, ValueError):
        raise ConfigError(f"signals: {value!r} is no signal; use signal.SIGTERM, 'SIGUSR1' or the like.") from None
