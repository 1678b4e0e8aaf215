"""Why started processes failed: each leaves a note where the process that started it looks, which tells the first."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from torch import multiprocessing

# Set by a launcher that runs a script again, whose processes have nobody around them to catch what they raise.
VARIABLE = "LITE_LAUNCH_NOTES"


def leave_note(folder: Path, rank: int | str, error: BaseException, text: str) -> None:
    """Write down what this rank ended with.

    Args:
        folder: Where the launcher looks.
        rank: This rank.
        error: What it ended with.
        text: The same in words.
    """
    (folder / f"{time.time_ns()}-{rank}-{type(error).__name__}.note").write_text(text)


def asked_for() -> Path | None:
    """Where this process's launcher wants a note, if it does: the process that set VARIABLE is this one's parent."""
    parent, _, folder = os.environ.get(VARIABLE, "").partition(":")
    return Path(folder) if parent == str(os.getppid()) and os.path.isdir(folder) else None


def end_with_launcher() -> None:
    """Let the system end this process when the launcher that runs the script again is killed; on Linux alone."""
    if asked_for() is not None:
        # What torch's own started processes do; private, and checked with 2.13.
        multiprocessing._prctl_pr_set_pdeathsig(signal.SIGTERM)  # type: ignore[attr-defined]


def first_failure(folder: Path, error: Any) -> str:
    """What failed first: a process that was killed, else the earliest note; a PeerError only tells of another.

    Args:
        folder: Where the notes are.
        error: torch's ChildFailedError.
    """
    notes = sorted(folder.glob("*.note"), key=lambda note: (note.stem.endswith("-PeerError"), note.name))
    texts = [note.read_text() for note in notes]
    known = {note.name.split("-")[1] for note in notes}
    told = any(not note.stem.endswith("-PeerError") for note in notes)
    for rank, failure in error.failures.items():
        # After a first failure the launcher itself ends the others by SIGTERM.
        if failure.exitcode < 0 and str(rank) not in known and not (told and failure.exitcode == -signal.SIGTERM):
            name = signal.Signals(-failure.exitcode).name
            hint = ", as the system does it when memory is short" if name == "SIGKILL" else ""
            return "\n\n".join([f"rank {rank} was ended by {name}{hint}", *texts[:1]])
    if texts:
        return texts[0]
    rank, failure = error.get_first_failure()
    return f"the process of rank {rank} ended with exit code {failure.exitcode}; its own output above may say why"
