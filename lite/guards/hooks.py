"""Where a process hears that it fails, and how its user's thread is interrupted; what follows is decided elsewhere."""

from __future__ import annotations

import ctypes
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

from lite.errors import PeerError
from lite.guards.endings import ScriptEnd

# Ignored by processes that don't want it, and made to interrupt.
_URGENT = getattr(signal, "SIGURG", None)

_uncaught_exit: Callable[[BaseException], None] | None = None


class Hooks:
    """Chained to sys.excepthook, sys.exit and the end of the script, and to SIGURG where it is free, until `close`.

    Args:
        post: Called with each exception that ends this process, before it is printed.
        explain: The error to show in place of one that a broken communication raised, or None.
        interrupted: The error that `interrupt` raises, or None when there is no need any more.
    """

    def __init__(
        self,
        *,
        post: Callable[[BaseException], None],
        explain: Callable[[RuntimeError], PeerError | None],
        interrupted: Callable[[], PeerError | None],
    ) -> None:
        global _uncaught_exit
        self._post, self._explain, self._interrupted = post, explain, interrupted
        self._thread = threading.current_thread()
        self._hook_before, self._exit_before = sys.excepthook, sys.exit
        # Bound methods are new objects each time; these are to be recognised.
        self._hook, self._exit, self._handler = self._excepthook, self._leave, self._handle
        sys.excepthook, sys.exit = self._hook, self._exit
        _uncaught_exit = post
        self._end = ScriptEnd(post) if self._thread is threading.main_thread() else None
        self._urgent = False
        if _URGENT is not None and self._thread is threading.main_thread():
            self._urgent = signal.getsignal(_URGENT) == signal.SIG_DFL
            if self._urgent:
                signal.signal(_URGENT, self._handler)

    def interrupt(self) -> None:
        """Raise in the thread that made this object, out of a sleep where that is possible."""
        ident = self._thread.ident or 0
        if self._urgent and _URGENT is not None and signal.getsignal(_URGENT) == self._handler:
            signal.pthread_kill(ident, _URGENT)
        else:
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(ident), ctypes.py_object(PeerError))

    def script_was_left(self) -> bool:
        """Whether the script is over, by an exception that nobody has posted."""
        return self._end is not None and self._end.was_raised()

    def close(self) -> None:
        """Put back what was there before. Whoever has chained to it since then keeps it; it only hands on."""
        global _uncaught_exit
        _uncaught_exit = None
        if self._end is not None:
            self._end.close()
        if sys.excepthook is self._hook:
            sys.excepthook = self._hook_before
        if sys.exit is self._exit:
            sys.exit = self._exit_before
        if self._urgent and _URGENT is not None and threading.current_thread() is threading.main_thread():
            if signal.getsignal(_URGENT) == self._handler:
                signal.signal(_URGENT, signal.SIG_DFL)
            self._urgent = False

    def _excepthook(self, kind: type[BaseException], error: BaseException, trace: Any) -> None:
        # Of a collective that the user called without lite.
        better = self._explain(error) if isinstance(error, RuntimeError) else None
        self._post(better or error)
        if better is None:
            self._hook_before(kind, error, trace)
        else:
            better.__cause__ = error
            self._hook_before(PeerError, better, None)

    def _leave(self, status: Any = None, /) -> Any:
        raise SystemExit(status) if status is None or status == 0 else _Exit(status)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        error = self._interrupted()
        if error is not None:
            raise error


class _Exit(SystemExit):
    """What sys.exit raises for a code other than 0.

    Nothing is told of a SystemExit that ends the process. But Python drops it then when no frame is left that could
    have caught it, and that can be seen.
    """

    def __del__(self) -> None:
        if sys._getframe().f_back is None and _uncaught_exit is not None:
            _uncaught_exit(self)
