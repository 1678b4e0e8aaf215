"""Weights as safetensors files with the names and the index that Hugging Face's libraries read (extra: safetensors).

Source: https://huggingface.co/docs/safetensors, https://huggingface.co/docs/transformers/big_models
"""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from torch import Tensor

from lite.checkpoint.file import reason
from lite.errors import CheckpointError, ConfigError, MissingExtraError
from lite.storage import Storage, locate

INDEX = "model.safetensors.index.json"
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_OURS = re.compile(r"^model(-\d{5}-of-\d{5})?\.safetensors$")


def export_safetensors(
    weights: Mapping[str, Any], path: str | os.PathLike[str], *, max_shard_size: int | str = "5GB"
) -> list[str]:
    """Write tensors to a directory, or to one file that ends in ".safetensors".

    A new directory appears whole. In one that exists, all new files are whole before the first takes its place, and the
    old ones that are not needed any more go last: a reader finds the old model or the new one. Only where both have as
    many shards, and so the same names, there is a moment without an index, in which it finds none. Tensors that share
    their memory are written once, under the name that comes first; a shard's metadata says which name stands for which.

    Returns:
        The names of the files.

    Raises:
        MissingExtraError: safetensors is not installed.
        CheckpointError: A file can't be written.
        ConfigError: `max_shard_size` is no size, or `path` is a URL.
    """
    try:
        from safetensors.torch import save_file
    except ImportError as error:
        raise MissingExtraError("export needs safetensors; install it with: pip install lite[safetensors]") from error
    limit = parse_size(max_shard_size)
    storage, target, is_folder = locate(path)
    if type(storage) is not Storage:
        raise ConfigError(f"path={str(path)!r} is a URL; export to a local path and copy it.")
    tensors, aliases = _unshared(weights)
    try:
        if not is_folder:
            with storage.replace(target) as beside:
                save_file(tensors, beside, metadata={"format": "pt", **aliases})
            return [os.path.basename(target)]
        shards = _shards(tensors, limit)
        if storage.kind(target) is None:
            return _new_folder(storage, target, shards, aliases, save_file)
        return _into_folder(storage, target, shards, aliases, save_file)
    except Exception as error:
        raise CheckpointError(f"path={str(path)!r} could not be written: {reason(error)}") from error


def parse_size(size: int | str) -> int:
    """Bytes of "500MB" or "5GB", or of a number.

    Raises:
        ConfigError: It is neither.

    Example:
        >>> parse_size("2MB")
        2000000
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(size))
    if isinstance(size, bool) or match is None or match[2].upper() not in _UNITS or float(match[1]) <= 0:
        raise ConfigError(f"max_shard_size={size!r} is no size; give a number of bytes, or '500MB', '5GB'.")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def _unshared(weights: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Dense tensors of their own, and for each name that is only another name, the one that it stands for."""
    seen: dict[Any, str] = {}
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    for name, value in weights.items():
        if not isinstance(value, Tensor):
            continue
        tensor = value.detach()
        place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and place in seen:
            aliases[name] = seen[place]
            continue
        seen[place] = name
        whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
        tensors[name] = tensor.cpu() if whole else tensor.cpu().clone().contiguous()
    return tensors, aliases


def _shards(tensors: dict[str, Tensor], limit: int) -> dict[str, dict[str, Tensor]]:
    """File names and their tensors, filled in order."""
    parts: list[dict[str, Tensor]] = [{}]
    used = 0
    for name, tensor in tensors.items():
        if parts[-1] and used + tensor.nbytes > limit:
            parts.append({})
            used = 0
        parts[-1][name] = tensor
        used += tensor.nbytes
    if len(parts) == 1:
        return {"model.safetensors": parts[0]}
    return {f"model-{i:05d}-of-{len(parts):05d}.safetensors": part for i, part in enumerate(parts, 1)}


def _index(shards: dict[str, dict[str, Tensor]]) -> bytes:
    size = sum(tensor.nbytes for part in shards.values() for tensor in part.values())
    where = {name: file for file, part in shards.items() for name in part}
    return json.dumps({"metadata": {"total_size": size}, "weight_map": where}, indent=2).encode()


def _save(save_file: Any, part: dict[str, Tensor], path: str, aliases: dict[str, str]) -> None:
    mine = {name: kept for name, kept in aliases.items() if kept in part}
    save_file(part, path, metadata={"format": "pt", **mine})


def _new_folder(
    storage: Storage, target: str, shards: dict[str, Any], aliases: dict[str, str], save_file: Any
) -> list[str]:
    parent, own = storage.split(target)
    beside = storage.join(parent, f".{own}.{uuid.uuid4().hex}.tmp")
    storage.make_folder(beside)
    try:
        for name, part in shards.items():
            _save(save_file, part, storage.join(beside, name), aliases)
            storage.flush(storage.join(beside, name))
        if len(shards) > 1:
            with storage.create(storage.join(beside, INDEX)) as file:
                file.write(_index(shards))
        storage.sync(beside)
        storage.rename(beside, target)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    return storage.names(target)


def _into_folder(
    storage: Storage, target: str, shards: dict[str, Any], aliases: dict[str, str], save_file: Any
) -> list[str]:
    names = [*shards, INDEX] if len(shards) > 1 else list(shards)
    there = storage.names(target)
    with ExitStack() as stack:
        # Nothing gets its name before all is on the disk. They get them in reverse order: the index last.
        beside = {name: stack.enter_context(storage.replace(storage.join(target, name))) for name in reversed(names)}
        for file, part in shards.items():
            _save(save_file, part, beside[file], aliases)
        if INDEX in beside:
            with open(beside[INDEX], "wb") as index:
                index.write(_index(shards))
        for path in beside.values():
            storage.flush(path)
        if INDEX in beside and any(name in there for name in shards):
            storage.remove(storage.join(target, INDEX))  # as many shards as before: it would tell of both
    old = [name for name in there if name not in names and (name == INDEX or _OURS.match(name))]
    for name in sorted(old, key=lambda name: name != INDEX):
        storage.remove(storage.join(target, name))
    return names
