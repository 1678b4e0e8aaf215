"""One-file checkpoints: written whole or not at all, checked and read without running code. It knows data, not models.

The file is torch.save's: `torch.load(path, weights_only=True)` reads it where lite is not installed.
"""

from __future__ import annotations

import io
import logging
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from lite.checkpoint.checksum import damage_in_zip
from lite.checkpoint.storage import Storage, locate
from lite.errors import CheckpointError

_log = logging.getLogger("lite")


def save_file(path: str | os.PathLike[str], content: dict[str, Any]) -> None:
    """Write `content` so that `path` holds either what it held before or all of the new content, whatever happens.

    The file is written beside its place, flushed to the disk, and renamed.

    Raises:
        CheckpointError: The folder can't be written, the disk is full, or `path` is a folder.
    """
    storage, target, _ = locate(path)
    check_is_no_folder(path)
    try:
        # A local file gets a path: torch's own writer then needs no interpreter lock while it writes.
        with storage.replace(target) as sink, _checksums():
            torch.save(content, sink)
    except Exception as error:
        raise CheckpointError(
            f"path={str(path)!r} could not be written: {reason(error)}; what it held before is unharmed."
        ) from error


def check_is_no_folder(path: str | os.PathLike[str]) -> None:
    """Refuse to write a file over a folder.

    Raises:
        CheckpointError: `path` is a folder.
    """
    storage, target, _ = locate(path)
    if storage.kind(target) == "folder":
        raise CheckpointError(
            f"path={str(path)!r} is a folder; give the name of a file in it, e.g. {storage.join(target, 'last.ckpt')}, "
            "or a name without a suffix for a sharded checkpoint."
        )


def load_file(
    path: str | os.PathLike[str], *, verify: bool = True, weights_only: bool = True, mapped: bool = False
) -> dict[str, Any]:
    """Read what `save_file` (or any `torch.save` of a dict) wrote, onto the CPU.

    Args:
        path: The file.
        verify: Whether every record's checksum is compared first, before anything is unpickled.
        weights_only: False runs whatever code the file brings; it is logged.
        mapped: Whether tensors stay in a local file, and are read from it as they are used.

    Raises:
        CheckpointError: There is no such file, it is damaged, or it holds objects that only code could rebuild.
    """
    storage, target, _ = locate(path)
    if storage.kind(target) != "file":
        raise CheckpointError(f"path={str(path)!r} does not exist or is no file{_beside(storage, target)}.")
    if not weights_only:
        _log.warning("loading path=%r with weights_only=False: code in it is run", str(path))
    try:
        if type(storage) is not Storage:
            with storage.view(target) as view:
                damage = damage_in_zip(view) if verify else None
                content = None if damage else _unpickle(io.BytesIO(view), weights_only)
        else:
            damage = damage_in_file(storage, target) if verify else None
            content = None if damage else _unpickle(target, weights_only, mapped and _is_archive(storage, target))
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"path={str(path)!r} holds more than plain data, or is damaged: {error}") from error
    except Exception as error:
        raise CheckpointError(f"path={str(path)!r} is damaged or is no checkpoint: {reason(error)}") from error
    if damage:
        raise CheckpointError(f"path={str(path)!r} is damaged: {damage}. Nothing was read from it.")
    if not isinstance(content, dict):
        raise CheckpointError(f"path={str(path)!r} holds a {type(content).__name__} instead of a dict.")
    return content


def damage_in_file(storage: Storage, target: str) -> str | None:
    """What is wrong with a checkpoint file, or None."""
    with storage.view(target) as view:
        # torch.save's format before zip archives has no checksums.
        return None if bytes(view[:2]) == b"\x80\x02" else damage_in_zip(view)


def reason(error: BaseException) -> str:
    """The operating system's word where there is one: torch's writer reports a failed write by its own, later error."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError):
            return str(seen)
        seen = seen.__cause__ or seen.__context__
    if "inline_container" in str(error) and "unexpected pos" in str(error):  # so in torch 2.13, without errno
        return f"torch's writer could not write all of it, as when the disk is full ({error})"
    return str(error) or type(error).__name__


def _unpickle(source: Any, weights_only: bool, mapped: bool = False) -> Any:
    return torch.load(source, map_location="cpu", weights_only=weights_only, mmap=mapped)


def _is_archive(storage: Storage, target: str) -> bool:
    with storage.view(target) as view:
        return bytes(view[:2]) == b"PK"


def _beside(storage: Storage, target: str) -> str:
    folder, _ = storage.split(target)
    there = [name for name in storage.names(folder) if not name.startswith(".")]
    return f"; beside it are {', '.join(there[:5])}" if there else ""


@contextmanager
def _checksums() -> Iterator[None]:
    """torch can be told to leave the records' checksums out; a checkpoint needs them."""
    serialization: Any = torch.serialization
    if not hasattr(serialization, "get_crc32_options") or serialization.get_crc32_options():
        yield
        return
    serialization.set_crc32_options(True)
    try:
        yield
    finally:
        serialization.set_crc32_options(False)
