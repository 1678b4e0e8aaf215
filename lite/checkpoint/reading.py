"""Whatever lies at a path, a file or a directory: read, checked, or removed."""

from __future__ import annotations

import os
from typing import Any

from lite.checkpoint import manifest as about
from lite.checkpoint.file import code_in_file, damage_in_file, load_file
from lite.errors import CheckpointError
from lite.storage import locate


def read(
    path: str | os.PathLike[str], *, verify: bool = True, weights_only: bool = True, lazily: bool = False
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The state in a checkpoint, on the CPU, and its manifest; {} where it has none.

    With `lazily`, tensors are read when they are asked for: a file is mapped into memory, and a directory's are
    StoredTensors.

    Raises:
        CheckpointError: It is missing, damaged, or holds objects that only code could rebuild.
    """
    storage, target, _ = locate(path)
    if storage.kind(target) == "folder":
        from lite.checkpoint.directory_load import load_directory

        content = load_directory(path, verify=verify, weights_only=weights_only, lazily=lazily)
    else:
        content = load_file(path, verify=verify, weights_only=weights_only, mapped=lazily)
    manifest = content.pop(about.KEY, None)
    return content, {} if manifest is None else about.check_format(manifest, str(path))


def damage(path: str | os.PathLike[str]) -> str | None:
    """What is wrong with the bytes of a checkpoint, or None when it is whole.

    Of a directory the index alone is unpickled, which makes nothing but an index; of a file nothing is. What has no
    checksums can't be told to be whole: of a directory that torch.distributed.checkpoint wrote by itself, the files'
    lengths are all there is to look at.

    Raises:
        CheckpointError: There is nothing, or its index is damaged.
    """
    storage, target, _ = locate(path)
    kind = storage.kind(target)
    if kind is None:
        raise CheckpointError(f"path={str(path)!r} does not exist.")
    if kind == "file":
        return damage_in_file(storage, target)
    from lite.checkpoint import directory_format as names

    index = names.read_index(storage, target, verify=True)
    if index.save_id is None:
        return names.damage_in_lengths(storage, target, index)
    return names.damage_in_files(storage, target, index)


def code_in(path: str | os.PathLike[str]) -> str | None:
    """What in a whole checkpoint is more than plain data, so that loading it is refused; None where there is nothing.

    Nothing of it is run.
    """
    storage, target, _ = locate(path)
    if storage.kind(target) == "file":
        return code_in_file(storage, target)
    from lite.checkpoint.directory_load import code_in_directory

    return code_in_directory(storage, target)


def remove(path: str | os.PathLike[str]) -> None:
    """Remove a checkpoint, if it is there: a directory's index first, so that no reader finds a part of it.

    Other files in the directory stay, and the directory with them; so do those of a save that still runs. What a link
    points to stays, too.
    """
    storage, target, _ = locate(path)
    kind = storage.kind(target)
    if kind == "file" or storage.is_link(target):
        storage.remove(target)
    elif kind == "folder":
        from lite.checkpoint import directory_format as names

        storage.remove(storage.join(target, names.INDEX))
        names.sweep(storage, target, keep="")
        storage.remove_empty_folder(target)
