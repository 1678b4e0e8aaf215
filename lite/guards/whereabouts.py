"""Where a thread of this process is, in the user's own terms."""

from __future__ import annotations

import sys
import traceback
from dataclasses import dataclass
from pathlib import Path

import torch

_TORCH = str(Path(torch.__file__).parent)
_LITE = str(Path(__file__).resolve().parents[1])
_DISTRIBUTED = f"{_TORCH}/distributed"
# Which write files, and start processes.
_OTHERS = tuple(f"{_DISTRIBUTED}/{name}/" for name in ("checkpoint", "elastic", "launcher"))
_DDP = f"{_TORCH}/nn/parallel/distributed.py"
_INNERMOST = 3  # a collective is called through torch._ops, say


@dataclass(frozen=True)
class Whereabouts:
    """Where a thread is.

    Attributes:
        text: The innermost line of the user's code that it runs, and whether it communicates there.
        moment: What tells two lines of code, with what has called them, apart.
        communicates: Whether its innermost frames are in a collective, or in a backward.
    """

    text: str
    moment: int = 0
    communicates: bool = False


def whereabouts(thread_id: int) -> Whereabouts:
    """Where a thread of this process is.

    Args:
        thread_id: `threading.Thread.ident`.

    Example:
        >>> import threading
        >>> "in " in whereabouts(threading.get_ident()).text
        True
    """
    frame = sys._current_frames().get(thread_id)
    if frame is None:
        return Whereabouts("its main thread has ended")
    moment = hash(tuple((id(f.f_code), f.f_lasti) for f, _ in traceback.walk_stack(frame)))
    stack = traceback.extract_stack(frame)
    own = [entry for entry in stack if not entry.filename.startswith((_TORCH, _LITE, "<frozen"))]
    place = (own or stack)[-1]
    through = [_communicates(entry.filename) for entry in stack]
    backward = ["_run_backward" in entry.name for entry in stack]
    communicates = any(through[-_INNERMOST:]) or stack[-1].filename == _DDP or backward[-1]
    inside = communicates or any(through) or any(backward)
    doing = " (in a backward or a collective)" if inside else ""
    text = f"at {place.filename}:{place.lineno} in {place.name}{doing}: {place.line}"
    return Whereabouts(text, moment, communicates)


def _communicates(file: str) -> bool:
    return file.startswith(_DISTRIBUTED) and not file.startswith(_OTHERS)
