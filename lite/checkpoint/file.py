"""One-file checkpoints: written whole or not at all, checked, and read without running code unless that is asked for.

The file is torch.save's: `torch.load(path, weights_only=True)` reads it where lite is not installed. This module knows
data, not models.
"""

from __future__ import annotations

import io
import logging
import os
import pickle
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from lite.checkpoint.checksum import damage_in_zip
from lite.errors import CheckpointError
from lite.storage import Storage, locate

_log = logging.getLogger("lite")


def save_file(path: str | os.PathLike[str], content: dict[str, Any]) -> None:
    """Write `content` so that `path` holds either what it held before or all of the new content, whatever happens.

    The file is written beside its place, flushed to the disk, and renamed. At a URL, flushing and renaming are what its
    file system makes of them.

    Raises:
        CheckpointError: The folder can't be written, the disk is full, or `path` is a folder.
    """
    storage, target, _ = locate(path)
    check_is_no_folder(path)
    before = sys.exc_info()[1]  # what the user is handling, a rescue
    try:
        # A local file gets a path: torch's own writer then needs no interpreter lock while it writes.
        with storage.replace(target) as sink, _checksums():
            torch.save(content, sink)
    except Exception as error:
        # torch's writer is still held by the frames that the errors came through, and its open file fills the disk.
        for one in _chain(error, before):
            traceback.clear_frames(one.__traceback__)
        raise CheckpointError(
            f"path={str(path)!r} could not be written: {reason(error, before)}; what it held before is unharmed."
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
        verify: Whether every record's checksum is compared first, before anything is unpickled. torch.save's format
            of before zip archives has none, and is read without.
        weights_only: False runs whatever code the file brings; it is logged.
        mapped: Whether tensors stay in a local file, and are read from it as they are used.

    Raises:
        CheckpointError: There is no such file, it is damaged, or it holds objects that only code could rebuild.
    """
    storage, target, _ = locate(path)
    if storage.kind(target) != "file":
        raise CheckpointError(f"path={str(path)!r} does not exist or is no file{_beside(storage, target)}.")
    if not weights_only:
        log_that_code_is_run(path)
    try:
        with storage.view(target) as view:
            damage = damage_in_zip(view) if verify and not is_without_checksums(view) else None
            if damage is None and type(storage) is not Storage:
                content = unpickle(io.BytesIO(view), str(path), weights_only=weights_only)
        if damage is None and type(storage) is Storage:
            content = unpickle(
                target, str(path), weights_only=weights_only, mapped=mapped and _is_archive(storage, target)
            )
    except CheckpointError:
        raise
    except Exception as error:
        more = "" if verify else "; verify=True tells what is damaged"
        raise CheckpointError(f"path={str(path)!r} is damaged or is no checkpoint: {reason(error)}{more}.") from error
    if damage:
        raise CheckpointError(f"path={str(path)!r} is damaged: {damage}. Nothing was read from it.")
    if not isinstance(content, dict):
        raise CheckpointError(f"path={str(path)!r} holds a {type(content).__name__} instead of a dict.")
    return content


def damage_in_file(storage: Storage, target: str) -> str | None:
    """What is wrong with a checkpoint file, or None where its checksums say that it is whole."""
    with storage.view(target) as view:
        if is_without_checksums(view):
            return (
                "it is a bare pickle, as torch.save wrote them before zip archives, and has no checksums to tell by; "
                "if it loads, save it anew"
            )
        return damage_in_zip(view)


def code_in_file(storage: Storage, target: str) -> str | None:
    """What in a file is more than plain data, so that loading it is refused; None where there is nothing."""
    with storage.open(target) as file:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    return f"it asks for {', '.join(names)}" if names else None


def is_without_checksums(view: memoryview) -> bool:
    """Whether a file begins as a pickle does: torch.save's format of before zip archives."""
    return bytes(view[:2]) == b"\x80\x02"


def log_that_code_is_run(path: str | os.PathLike[str]) -> None:
    """Before anything at `path` is read with weights_only=False."""
    _log.warning("loading path=%r with weights_only=False: code in it is run", str(path))


def unpickle(source: Any, where: str, *, weights_only: bool, part: str = "", mapped: bool = False) -> Any:
    """torch.load onto the CPU, without torch's advice to run the code of a file that holds some.

    Args:
        source: A path or an open file.
        where: The path, for the error.
        weights_only: As for `load_file`.
        part: For the error, which part of the checkpoint it is.
        mapped: Whether tensors stay in the file, which is a zip archive, and are read as they are used.

    Raises:
        CheckpointError: There is more in it than plain data, and nothing of that was run.
    """
    try:
        return torch.load(source, map_location="cpu", weights_only=weights_only, mmap=mapped)
    except Exception as error:
        if not weights_only or not (isinstance(error, pickle.UnpicklingError) or "weights_only" in str(error)):
            raise
        # torch's own error is left out of the traceback: its advice would be all that one remembers.
        raise CheckpointError(
            f"path={where!r} holds more than plain data{part}, or is damaged: {_without_advice(str(error))}. Nothing "
            "in it was run. A checkpoint can hold tensors and plain values; save state dicts instead of objects."
        ) from None


def _without_advice(text: str) -> str:
    found = re.search(r"GLOBAL (\S+)", text)  # so in torch 2.6 to 2.13
    if found is not None:
        return f"it asks for {found[1]}"
    lines = [line.strip() for line in text.splitlines() if "weights_only" not in line]
    rest = " ".join(line for line in lines if line).removeprefix("Weights only load failed.").strip(" .")
    return rest or "its format is one that only code could read"


def reason(error: BaseException, before: BaseException | None = None) -> str:
    """The operating system's word where there is one: torch's writer reports a failed write by its own, later error.

    Args:
        error: What was raised.
        before: What was being handled already, and is no reason for it.
    """
    for one in _chain(error, before):
        if isinstance(one, OSError):
            return str(one)
    if "inline_container" in str(error) and "unexpected pos" in str(error):  # so in torch 2.13, without errno
        return f"torch's writer could not write all of it, as when the disk is full ({error})"
    return str(error) or type(error).__name__


def _chain(error: BaseException, before: BaseException | None = None) -> Iterator[BaseException]:
    """The error and those that it came of, up to one that was there before."""
    seen: BaseException | None = error
    while seen is not None and seen is not before:
        yield seen
        seen = seen.__cause__ or seen.__context__


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
