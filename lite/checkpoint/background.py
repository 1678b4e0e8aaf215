"""One write at a time beside training, whose failure is told at the next occasion, at the latest when Python ends."""

from __future__ import annotations

import atexit
import functools
import importlib
import logging
import os
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable
from typing import Any

_untold: list[Background] = []
_running: weakref.WeakSet[Background] = weakref.WeakSet()


class Background:
    """Runs one function at a time in a thread. Python doesn't end before it has.

    Attributes:
        keep: What the writes need from one to the next (buffers, a process group); dropped with this object.
        settled: All ranks have heard what became of the last one.
    """

    def __init__(self) -> None:
        self.settled = True
        self.keep: dict[str, Any] = {}
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def is_busy(self) -> bool:
        """Whether a write is under way."""
        thread = self._thread  # another thread may set it to None meanwhile
        return thread is not None and thread.is_alive()

    def start(self, write: Callable[[], None]) -> None:
        """Run `write` in a thread; wait for the one before it first."""
        self.wait()
        self.settled = False
        _wait_at_exit()
        _running.add(self)
        # Not a daemon: the interpreter waits for it.
        self._thread = threading.Thread(target=self._run, args=(write,), name="lite.save", daemon=False)
        self._thread.start()

    def wait(self) -> None:
        """Wait until nothing is under way."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def take_error(self) -> BaseException | None:
        """The error of the last write, once."""
        if self.is_busy:
            return None
        error, self._error = self._error, None
        if self in _untold:
            _untold.remove(self)
        return error

    def _run(self, write: Callable[[], None]) -> None:
        try:
            write()
        except BaseException as error:
            self._error = error
            _untold.append(self)


@functools.cache
def _wait_at_exit() -> None:
    """Let Python wait for writes before it closes the pools of threads that they use.

    It waits for threads by itself, but closes the pools of concurrent.futures first; what is registered after those
    runs before them. There is no public function for it (Python 3.9 to 3.14).
    """
    importlib.import_module("concurrent.futures.thread")  # registers its own

    register: Any = getattr(threading, "_register_atexit", None)
    if register is not None:
        register(wait_for_all)


def wait_for_all(timeout_s: float | None = None) -> bool:
    """Wait until no write is under way in this process; whether that is so. From any thread."""
    end = None if timeout_s is None else time.monotonic() + timeout_s
    for background in list(_running):
        thread = background._thread
        if thread is not None:
            thread.join(None if end is None else max(0.0, end - time.monotonic()))
    return not any(background.is_busy for background in list(_running))


def _tell_at_exit() -> None:
    """Print the errors that nobody was there to hear, and end with exit code 1."""
    if not _untold:
        return
    for background in _untold:
        print("lite: a checkpoint that was being saved in the background was not written:", file=sys.stderr)
        error = background._error
        assert error is not None
        traceback.print_exception(type(error), error, error.__traceback__, file=sys.stderr)
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)  # an exception here would not change the exit code


# Registered when lite is imported, so that it runs after most other functions of this kind.
atexit.register(_tell_at_exit)
