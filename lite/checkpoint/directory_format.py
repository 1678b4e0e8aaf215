"""The files of a sharded checkpoint and what of them may be believed: names, manifest, and the index without code.

Every save has an id. Its data files, plain values, manifest and lock have the id in their names, so that two saves
never share a file. `.metadata`, torch.distributed.checkpoint's index, is what a reader starts from: it names the save,
and replacing it by a rename is the moment at which the new checkpoint takes the old one's place.
"""

from __future__ import annotations

import io
import json
import pickle
import re
import uuid
import zlib
from dataclasses import dataclass, field
from typing import Any

import torch

from lite.errors import CheckpointError
from lite.storage import Storage

INDEX = ".metadata"
FORMAT = 2
_ID = re.compile(r"lite-[0-9a-f]{32}")
_FOREIGN_DATA = re.compile(r"^__\d+_\d+\.distcp$")
_DCP = "torch.distributed.checkpoint"
_CLASSES = {
    (f"{_DCP}.metadata", "Metadata"),
    (f"{_DCP}.metadata", "MetadataIndex"),
    (f"{_DCP}.metadata", "TensorStorageMetadata"),
    (f"{_DCP}.metadata", "BytesStorageMetadata"),
    (f"{_DCP}.metadata", "ChunkStorageMetadata"),
    (f"{_DCP}.metadata", "TensorProperties"),
    (f"{_DCP}.metadata", "StorageMeta"),
    (f"{_DCP}.metadata", "_MEM_FORMAT_ENCODING"),
    (f"{_DCP}.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
    ("pathlib", "PurePosixPath"),
    ("pathlib._local", "PosixPath"),
    ("pathlib._local", "WindowsPath"),
}


def new_id() -> str:
    """A name that no other save has."""
    return f"lite-{uuid.uuid4().hex}"


def data_name(save_id: str, rank: int) -> str:
    """The data file of one rank."""
    return f"__{save_id}_{rank}_0.distcp"


def plain_name(save_id: str) -> str:
    """The file of everything that is no tensor."""
    return f"{save_id}.pt"


def manifest_name(save_id: str) -> str:
    return f"{save_id}.json"


def lock_name(save_id: str) -> str:
    return f"{save_id}.lock"


@dataclass
class Index:
    """What `.metadata` says: the tensors, where their parts lie, and which save of lite it was, if any."""

    metadata: Any
    save_id: str | None
    manifest: dict[str, Any] = field(default_factory=dict)


def read_index(storage: Storage, folder: str, *, verify: bool) -> Index:
    """Read `.metadata` and the manifest of its save, without running code from either.

    Raises:
        CheckpointError: One is missing, damaged, or holds what no index needs.
    """
    where = storage.join(folder, INDEX)
    if storage.kind(where) != "file":
        raise CheckpointError(f"path={folder!r} holds no whole checkpoint: it has no {INDEX}.")
    data = storage.read(where)
    try:
        metadata = _Unpickler(io.BytesIO(data)).load()
        meta = metadata.storage_meta
        save_id = meta.save_id if meta is not None else None
        files = {info.relative_path for info in metadata.storage_data.values()}
        names = list(metadata.state_dict_metadata)
    except CheckpointError as error:
        raise CheckpointError(f"path={where!r} {error}") from None
    except Exception as error:
        raise CheckpointError(f"path={where!r} is damaged or is no index of a checkpoint: {error}") from error
    if not all(isinstance(name, str) for name in (*files, *names)) or any(set(f) & set("/\\:") for f in files):
        raise CheckpointError(f"path={where!r} is damaged: it names a file outside of its folder.")
    if not isinstance(save_id, str) or not _ID.fullmatch(save_id):
        if any(_ID.search(name) for name in files):
            raise CheckpointError(f"path={where!r} is damaged: it has lost the name of its save.")
        return Index(metadata, None)
    index = Index(metadata, save_id, _read_manifest(storage, storage.join(folder, manifest_name(save_id))))
    mine = index.manifest["index"]
    if verify and (mine["bytes"], mine["crc32"]) != (len(data), zlib.crc32(data)):
        raise CheckpointError(f"path={where!r} is damaged: it has another checksum than when it was written.")
    if not files <= set(index.manifest["files"]):
        raise CheckpointError(f"path={where!r} is damaged: it names files that its manifest doesn't have.")
    return index


def damage_in_files(storage: Storage, folder: str, index: Index) -> str | None:
    """The first file of the manifest that isn't what was written, or None."""
    for name, written in index.manifest.get("files", {}).items():
        path = storage.join(folder, name)
        if storage.kind(path) != "file":
            return f"{path!r} is missing"
        with storage.view(path) as view:
            if len(view) != written["bytes"]:
                return f"{path!r} is truncated: it has {len(view)} bytes of {written['bytes']}"
            if zlib.crc32(view) != written["crc32"]:
                return f"{path!r} has another checksum than when it was written"
    return None


def damage_in_lengths(storage: Storage, folder: str, index: Index) -> str | None:
    """The first data file that ends before the index says, or None; for directories without a manifest."""
    ends: dict[str, int] = {}
    for part in index.metadata.storage_data.values():
        ends[part.relative_path] = max(ends.get(part.relative_path, 0), part.offset + part.length)
    for name, end in ends.items():
        path = storage.join(folder, name)
        if storage.kind(path) != "file":
            return f"{path!r} is missing"
        with storage.open(path) as file:
            size = file.seek(0, io.SEEK_END)
        if size < end:
            return f"{path!r} is truncated: it has {size} bytes of at least {end}"
    return None


def sweep(storage: Storage, folder: str, keep: str) -> None:
    """Remove what other saves than `keep` have left, torch's own files included, but for those that still run.

    Call it after `keep` is committed.
    """
    names = storage.names(folder)
    ids = {match[0] for name in names if (match := _ID.search(name))} - {keep}
    running = {
        save_id
        for save_id in ids
        if lock_name(save_id) in names and not storage.is_abandoned(storage.join(folder, lock_name(save_id)))
    }
    for name in names:
        match = _ID.search(name)
        if (match and match[0] in ids - running) or _FOREIGN_DATA.match(name):
            storage.remove(storage.join(folder, name))


def remove_save(storage: Storage, folder: str, save_id: str) -> None:
    """Remove all files of one save that came to nothing."""
    for name in storage.names(folder):
        if save_id in name:
            storage.remove(storage.join(folder, name))


def dump_manifest(manifest: dict[str, Any]) -> bytes:
    """The manifest as JSON, with its own checksum in it."""
    return json.dumps({**manifest, "crc32": _crc32(manifest)}, indent=1).encode()


def _crc32(manifest: dict[str, Any]) -> int:
    own = {key: value for key, value in manifest.items() if key != "crc32"}
    return zlib.crc32(json.dumps(own, sort_keys=True).encode())


def _read_manifest(storage: Storage, path: str) -> dict[str, Any]:
    if storage.kind(path) != "file":
        raise CheckpointError(f"path={path!r}, the checkpoint's manifest, is missing.")
    try:
        manifest = json.loads(storage.read(path))
        known = isinstance(manifest["format"], int) and isinstance(manifest["files"], dict)
        known = known and {"bytes", "crc32"} <= set(manifest["index"])
        known = known and all({"bytes", "crc32"} <= set(f) for f in manifest["files"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"path={path!r} is damaged: {error}") from error
    if not known:
        raise CheckpointError(f"path={path!r} is damaged.")
    if manifest["format"] > FORMAT:
        raise CheckpointError(
            f"path={path!r} has format {manifest['format']}, written by lite {manifest.get('lite')}; this version "
            f"reads up to format {FORMAT}. Update lite."
        )
    if manifest.get("crc32") != _crc32(manifest):
        raise CheckpointError(f"path={path!r} is damaged: it has another checksum than when it was written.")
    return dict(manifest)


class _Unpickler(pickle.Unpickler):
    """Makes nothing but the dataclasses of an index and the sizes, dtypes and paths in them."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) in _CLASSES:
            return super().find_class(module, name)
        raise CheckpointError(f"holds {module}.{name}, which no index of tensors needs; it was not read.")
