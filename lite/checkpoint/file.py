"""One-file checkpoints: written whole or not at all, read without running code. It knows paths and data, not models."""

from __future__ import annotations

import os
import pickle
import uuid
from pathlib import Path
from typing import Any

import torch

from lite.errors import CheckpointError


def save_file(path: str | os.PathLike[str], content: dict[str, Any]) -> None:
    """Write `content` so that `path` holds either what it held before or all of the new content, whatever happens.

    The file is written beside its place, flushed to the disk, and renamed.

    Raises:
        CheckpointError: The folder can't be written, the disk is full, or `path` is a folder.
    """
    target = Path(path)
    if target.is_dir():
        raise CheckpointError(
            f"path={str(path)!r} is a folder; give the name of a file in it, e.g. {target / 'last.ckpt'}."
        )
    beside = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(beside, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, target)
        _sync_folder(target.parent)
    except (OSError, RuntimeError) as error:
        beside.unlink(missing_ok=True)
        raise CheckpointError(
            f"path={str(path)!r} could not be written: {error}; what it held before is unharmed."
        ) from error
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def load_file(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read what `save_file` (or any `torch.save` of plain data) wrote, onto the CPU, without running code from it.

    Raises:
        CheckpointError: There is no such file, it is damaged, or it holds objects that only code could rebuild.
    """
    target = Path(path)
    if not target.is_file():
        there = sorted(p.name for p in target.parent.glob("*") if p.is_file()) if target.parent.is_dir() else []
        beside = f"; beside it are {', '.join(there[:5])}" if there else ""
        raise CheckpointError(f"path={str(path)!r} does not exist or is no file{beside}.")
    try:
        content = torch.load(target, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"path={str(path)!r} holds more than plain data, or is damaged: {error}") from error
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise CheckpointError(f"path={str(path)!r} is damaged or is no checkpoint: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"path={str(path)!r} holds a {type(content).__name__} instead of a dict.")
    return content


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable, where the system can."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
