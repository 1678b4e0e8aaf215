"""Reading sharded checkpoints, lite's and torch.distributed.checkpoint's own: without running code unless asked to.

Only lite's own have checksums.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

# Private in torch, and checked with 2.13: a part of a file as a file of its own, as torch's own reader reads it.
from torch.distributed.checkpoint.utils import _create_file_view

from lite.checkpoint import directory_format as names
from lite.checkpoint import manifest as about
from lite.checkpoint import tree
from lite.checkpoint.file import log_that_code_is_run, unpickle
from lite.checkpoint.stored import StoredTensor
from lite.errors import CheckpointError
from lite.storage import Storage, locate


def load_directory(
    path: str | os.PathLike[str], *, verify: bool = True, weights_only: bool = True, lazily: bool = False
) -> dict[str, Any]:
    """Read a sharded checkpoint, lite's or torch.distributed.checkpoint's own, whole and onto the CPU.

    Args:
        path: The directory.
        verify: Whether every file's checksum is compared first; only lite's own have them.
        weights_only: False runs whatever code the checkpoint's parts bring, though not its index; it is logged.
        lazily: Whether tensors stay where they are, as a StoredTensor each, until they are asked for.

    Raises:
        CheckpointError: It is missing, damaged, or holds objects that only code could rebuild.
    """
    storage, folder, _ = locate(path)
    if not weights_only:
        log_that_code_is_run(path)
    where = storage.join(folder, names.INDEX)
    while True:
        before = storage.read(where) if storage.kind(where) == "file" else b""
        try:
            return _load(storage, folder, verify, weights_only, lazily)
        except CheckpointError:
            # Another process may have put a new checkpoint there meanwhile, and removed the old one's files.
            if not before or storage.read(where) == before:
                raise


def code_in_directory(storage: Storage, folder: str) -> str | None:
    """What in a directory is more than plain data, so that loading it is refused; None where there is nothing.

    One tensor at a time is read.
    """
    index = names.read_index(storage, folder, verify=False)
    try:
        if index.save_id is not None:
            where = storage.join(folder, names.plain_name(index.save_id))
            with storage.open(where) as file:
                unpickle(file, where, weights_only=True)
        for key, info in index.metadata.storage_data.items():
            with storage.open(storage.join(folder, info.relative_path)) as file:
                _read_piece(file, storage, folder, index, key, weights_only=True)
    except CheckpointError as error:
        return str(error)
    return None


def _load(storage: Storage, folder: str, verify: bool, weights_only: bool, lazily: bool) -> dict[str, Any]:
    index = names.read_index(storage, folder, verify=verify)
    damage = names.damage_in_files(storage, folder, index) if verify else None
    if damage:
        raise CheckpointError(f"{damage}. Nothing was read from the checkpoint {folder!r}.")
    read = stored_tensors if lazily else read_tensors
    tensors = read(storage, folder, index, weights_only=weights_only)
    if index.save_id is None:
        try:
            return _unflatten(tensors, index.metadata.planner_data or {})
        except (AttributeError, TypeError) as error:
            raise CheckpointError(f"path={folder!r} is damaged: its index has no places for its names") from error
    plain_path = storage.join(folder, names.plain_name(index.save_id))
    try:
        with storage.open(plain_path) as file:
            plain = unpickle(file, plain_path, weights_only=weights_only)
        content = tree.join(plain["rest"], tensors, plain["places"])
        return {**content, about.KEY: plain[about.KEY]}
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"path={plain_path!r} is damaged: {error}") from error


def read_tensors(storage: Storage, folder: str, index: names.Index, *, weights_only: bool = True) -> dict[str, Any]:
    """Every entry of the index, by the name it has there: tensors whole and on the CPU.

    torch.distributed.checkpoint's own directories have plain values there, too.

    Raises:
        CheckpointError: An entry is damaged, or holds objects that only code could rebuild.
    """
    tensors: dict[str, Any] = {}
    with ExitStack() as stack:
        files: dict[str, Any] = {}

        def part(key: MetadataIndex) -> Any:
            name = index.metadata.storage_data[key].relative_path
            if name not in files:
                files[name] = stack.enter_context(storage.open(storage.join(folder, name)))
            return _read_piece(files[name], storage, folder, index, key, weights_only)

        for name, stored in index.metadata.state_dict_metadata.items():
            try:
                tensors[name] = _assemble(name, stored, part)
            except CheckpointError:
                raise
            except Exception as error:
                raise CheckpointError(f"path={folder!r} is damaged at {name!r}: {error}") from error
    return tensors


def stored_tensors(storage: Storage, folder: str, index: names.Index, *, weights_only: bool = True) -> dict[str, Any]:
    """Every tensor of the checkpoint by its name there, to be read when it is asked for."""

    def part(key: MetadataIndex) -> Any:
        name = index.metadata.storage_data[key].relative_path
        with storage.open(storage.join(folder, name)) as file:
            return _read_piece(file, storage, folder, index, key, weights_only)

    def stored(name: str, about: Any) -> Any:
        if isinstance(about, BytesStorageMetadata):
            return part(MetadataIndex(name))
        return StoredTensor(name, about, lambda number: part(MetadataIndex(name, about.chunks[number].offsets, number)))

    return {name: stored(name, about) for name, about in index.metadata.state_dict_metadata.items()}


def _read_piece(
    file: Any, storage: Storage, folder: str, index: names.Index, key: MetadataIndex, weights_only: bool
) -> Any:
    info = index.metadata.storage_data[key]
    view: Any = _create_file_view(file, info.offset, info.length)
    where = storage.join(folder, info.relative_path)
    return unpickle(view, where, weights_only=weights_only, part=f" for {key.fqn!r}")


def _assemble(name: str, stored: Any, part: Callable[[Any], Any]) -> Any:
    if isinstance(stored, BytesStorageMetadata):
        return part(MetadataIndex(name))
    whole: Tensor | None = None
    for number, chunk in enumerate(stored.chunks):
        piece = part(MetadataIndex(name, chunk.offsets, number))
        if not isinstance(piece, Tensor) or piece.shape != chunk.sizes:
            raise ValueError("a part has another shape than the index says")
        if chunk.sizes == stored.size:
            return piece
        if whole is None:
            whole = torch.empty(stored.size, dtype=stored.properties.dtype)
        target = whole
        for dim, (offset, size) in enumerate(zip(chunk.offsets, chunk.sizes, strict=True)):
            target = target.narrow(dim, offset, size)
        target.copy_(piece)
    if whole is None:
        raise ValueError("it has no parts")
    return whole


def _unflatten(tensors: dict[str, Any], places: Mapping[str, Any]) -> dict[str, Any]:
    """The nesting of a directory that torch's own save wrote; lists become dicts of their indices."""
    nested: dict[str, Any] = {}
    for name, tensor in tensors.items():
        *path, last = places.get(name) or (name,)
        inner = nested
        for key in path:
            inner = inner.setdefault(key, {})
        inner[last] = tensor
    return nested
