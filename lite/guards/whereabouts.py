"""Where a thread of this process is, in the user's own terms."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path

import torch

_TORCH = str(Path(torch.__file__).parent)
_LITE = str(Path(__file__).resolve().parents[1])


def whereabouts(thread_id: int) -> str:
    """The innermost line of the user's code that a thread runs, and whether it communicates there.

    Args:
        thread_id: `threading.Thread.ident`.

    Example:
        >>> import threading
        >>> "in " in whereabouts(threading.get_ident())
        True
    """
    frame = sys._current_frames().get(thread_id)
    if frame is None:
        return "its main thread has ended"
    stack = traceback.extract_stack(frame)
    own = [entry for entry in stack if not entry.filename.startswith((_TORCH, _LITE, "<frozen"))]
    place = (own or stack)[-1]
    inside = any(f"{_TORCH}/distributed" in entry.filename or "_run_backward" in entry.name for entry in stack)
    doing = " (in a backward or a collective)" if inside else ""
    return f"at {place.filename}:{place.lineno} in {place.name}{doing}: {place.line}"
