"""How the main script came to its end, asked while the interpreter shuts down; CPython tells nobody of a SystemExit."""

from __future__ import annotations

import dis
import gc
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any


class ScriptEnd:
    """Sees a SystemExit that ends the script, also one that sys.exit did not raise.

    CPython (3.10 to 3.14) flushes sys.stderr when `python script.py` has run and before it drops the exception, from C,
    with no frame behind it. `python -m` and `python -c` don't: there only `was_raised` is known afterwards.

    Args:
        post: Called with the exception.
    """

    def __init__(self, post: Callable[[BaseException], None]) -> None:
        self._post = post
        self._script = _outermost(sys._getframe())
        stream: Any = sys.stderr
        self._stream = stream
        self._before = vars(stream).get("flush") if hasattr(stream, "__dict__") else None
        self._flush_stream = getattr(stream, "flush", None)
        self._own = self._flush  # a bound method is a new object each time
        try:
            stream.flush = self._own
        except AttributeError:  # a stream of the user's, with slots, or none at all
            self._stream = None

    def was_raised(self) -> bool:
        """Whether the script is over, by an exception."""
        if _outermost(sys._getframe()) is self._script:
            return False
        return _raised(self._script)

    def close(self) -> None:
        """Leave the stream as it was, unless someone has changed it since."""
        if self._stream is None or vars(self._stream).get("flush") is not self._own:
            return
        if self._before is None:
            del self._stream.flush
        else:
            self._stream.flush = self._before

    def _flush(self) -> Any:
        if sys._getframe().f_back is None and self.was_raised():
            end = next((end for generation in range(3) for end in _exits(generation)), None)
            if end is not None:
                self._post(end)
        return self._flush_stream() if self._flush_stream is not None else None


def _exits(generation: int) -> list[SystemExit]:
    """Those that are alive, the newest first, without those that a function caught and returned after."""
    found = [thing for thing in gc.get_objects(generation) if issubclass(type(thing), SystemExit)]
    # In flight, the traceback begins at the last frame that had a handler for it; there may be none.
    return [end for end in reversed(found) if end.__traceback__ is None or _raised(end.__traceback__.tb_frame)]


def _raised(frame: FrameType) -> bool:
    """Whether the frame, which is over, was left by an exception."""
    return not dis.opname[frame.f_code.co_code[frame.f_lasti]].startswith("RETURN")


def _outermost(frame: FrameType) -> FrameType:
    while frame.f_back is not None:
        frame = frame.f_back
    return frame
