"""Writing sharded checkpoints: torch.distributed.checkpoint's directories, replaced whole.

Every rank writes its part of the tensors; rank 0 writes all that is no tensor into one small file, the manifest, and
the index. `torch.distributed.checkpoint.load` reads the tensors where lite is not installed.
"""

from __future__ import annotations

import os
import pickle
import zlib
from collections.abc import Collection, Mapping
from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

# Private in torch, and checked with 2.13: torch's own reader wants `_StorageInfo` in an index, its planner hands on
# `_StoragePrefix`, and `_save_state_dict` has the `no_dist` that `dcp.save` lacks in torch 2.6.
from torch.distributed.checkpoint.filesystem import _StorageInfo, _StoragePrefix
from torch.distributed.checkpoint.metadata import StorageMeta
from torch.distributed.checkpoint.state_dict_saver import _save_state_dict
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from lite import collectives
from lite.checkpoint import directory_format as names
from lite.checkpoint import manifest as about
from lite.checkpoint import tree
from lite.checkpoint.checksum import ChecksummedWriter
from lite.checkpoint.file import reason
from lite.errors import CheckpointError
from lite.sharded import is_elsewhere
from lite.storage import Storage, locate

_MANIFEST_ENTRIES = ("lite", "torch", "world_size", "time")


def save_directory(
    path: str | os.PathLike[str],
    content: Mapping[str, Any],
    *,
    replicated: Collection[str] = (),
    group: Any = None,
) -> None:
    """Write `content` so that the directory holds either what it held before or all of the new content.

    Collective: call on all ranks, with the same names. Sharded tensors are every rank's. All else is rank 0's, but that
    the ranks share the work of writing the tensors of `replicated`.

    Args:
        path: The directory; it is made.
        content: Plain values and tensors, with the manifest.
        replicated: Names in `content` whose plain tensors are equal on all ranks that have them.
        group: The process group to agree over; None is all ranks.

    Raises:
        CheckpointError: (on all ranks) A rank couldn't write.
    """
    storage, folder, _ = locate(path)
    state = {name: value for name, value in content.items() if name != about.KEY}
    rest, tensors, places = tree.split(state)
    plain = {about.KEY: content[about.KEY], "rest": rest, "places": places}
    writer = _Writer(storage, folder, plain)
    alone = collectives.world_size(group) == 1
    try:
        _save_state_dict({}, writer, group, no_dist=alone, planner=_SavePlanner(tensors, places, replicated))
    except CheckpointException as error:  # derives from BaseException
        writer.discard()
        reasons = "; ".join(f"rank {rank}: {reason(e[0])}" for rank, e in sorted(error.failures.items()))
        raise CheckpointError(
            f"path={str(path)!r} could not be written by {reasons}; what it held before is unharmed."
        ) from next(iter(error.failures.values()))[0]
    except BaseException:
        writer.discard()
        raise
    finally:
        writer.close()


class _SavePlanner(DefaultSavePlanner):
    """Plans named tensors that `tree.split` found; replicated ones are spread over the ranks by torch."""

    def __init__(
        self, tensors: dict[str, Tensor], places: Mapping[str, tree.Path], replicated: Collection[str]
    ) -> None:
        super().__init__(flatten_state_dict=True)
        tensors = {name: tensor for name, tensor in tensors.items() if not is_elsewhere(tensor)}
        self._tensors = tensors
        self._from_any_rank = {
            name: tensor
            for name, tensor in tensors.items()
            if places[name][0] in replicated or hasattr(tensor, "__tensor_flatten__")
        }
        # torch's own readers take whole numbers for positions in a list.
        self._places = {
            name: tuple(str(key) if not isinstance(key, str) else key for key in place)
            for name, place in places.items()
        }

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        self.state_dict = dict(self._tensors if is_coordinator else self._from_any_rank)
        self.mappings = dict(self._places)
        self.is_coordinator = is_coordinator


class _Results(list[WriteResult]):
    """A rank's results and what its file must be, for the coordinator."""

    files: dict[str, dict[str, int]]


class _Writer(StorageWriter):
    """Writes new files beside those of the checkpoint that is there, and puts a new index in place at the very end."""

    def __init__(self, storage: Storage, folder: str, plain: dict[str, Any]) -> None:
        self._storage, self._folder, self._plain = storage, folder, plain
        self._id = names.new_id()
        self._rank = 0
        self._is_coordinator = False
        self._lock = ExitStack()
        self._committed = False

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        self._is_coordinator = is_coordinator
        self._rank = kwargs.get("rank") or 0

    def storage_meta(self) -> Any:
        return StorageMeta(checkpoint_id=None, save_id=self._id)

    def prepare_local_plan(self, plan: Any) -> Any:
        if self._storage.kind(self._folder) == "file":
            raise FileExistsError(f"{self._folder!r} is a file; give the name of a directory")
        self._storage.make_folder(self._folder)
        return plan

    def prepare_global_plan(self, plans: list[Any]) -> list[Any]:
        path = self._storage.join(self._folder, names.lock_name(self._id))
        self._lock.enter_context(self._storage.lock(path))
        return [replace(plan, storage_data=_StoragePrefix(self._id)) for plan in plans]

    def write_data(self, plan: Any, planner: Any) -> Future[list[WriteResult]]:
        self._id = plan.storage_data.prefix
        name = names.data_name(self._id, self._rank)
        results = _Results()
        with self._storage.create(self._storage.join(self._folder, name)) as file, ChecksummedWriter(file) as checked:
            out: Any = checked
            for item in plan.items:
                tensor = planner.resolve_data(item).detach().cpu()
                if tensor.untyped_storage().nbytes() != tensor.nbytes:
                    tensor = tensor.clone()
                start = out.tell()
                torch.save(tensor, out)
                length = out.tell() - start
                results.append(WriteResult(item.index, length, _StorageInfo(name, start, length)))
            results.files = {name: {"bytes": out.num_bytes, "crc32": out.crc32}}
        self._storage.sync(self._folder)
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Any, results: list[list[WriteResult]]) -> None:
        if hasattr(filesystem, "CURRENT_DCP_VERSION"):  # not before torch 2.8
            metadata.version = filesystem.CURRENT_DCP_VERSION
        metadata.storage_data = {r.index: r.storage_data for part in results for r in part}
        metadata.storage_meta = self.storage_meta()
        files: dict[str, Any] = {}
        for part in results:
            files.update(part.files)  # type: ignore[attr-defined]
        self._check_are_here(files)
        name = names.plain_name(self._id)
        with self._storage.create(self._path(name)) as file, ChecksummedWriter(file) as checked:
            out: Any = checked
            torch.save(self._plain, out)
            files[name] = {"bytes": out.num_bytes, "crc32": out.crc32}
        index = pickle.dumps(metadata)
        manifest = {
            "format": names.FORMAT,
            "save": self._id,
            **{key: self._plain[about.KEY].get(key) for key in _MANIFEST_ENTRIES},
            "index": {"bytes": len(index), "crc32": zlib.crc32(index)},
            "files": files,
        }
        self._write(names.manifest_name(self._id), names.dump_manifest(manifest))
        beside = f"{names.INDEX}.{self._id}.tmp"
        self._write(beside, index)
        self._storage.sync(self._folder)
        self._committed = True  # from here on nothing may be taken back
        self._storage.rename(self._path(beside), self._path(names.INDEX))
        with suppress(OSError):
            self._storage.remove(self._path(names.lock_name(self._id)))
            names.sweep(self._storage, self._folder, self._id)

    def _check_are_here(self, files: Mapping[str, Mapping[str, int]]) -> None:
        """Every rank's file must be in the folder that gets the index."""
        for name, entry in files.items():
            if self._storage.size(self._path(name)) != entry["bytes"]:
                raise FileNotFoundError(
                    f"the file {name!r} that another rank has written is not in {self._folder!r} here, so its machine "
                    "sees another folder by that name; save to one that all machines share"
                )

    def discard(self) -> None:
        """Remove what this rank has written for nothing."""
        with suppress(Exception):
            if not self._committed and self._is_coordinator:
                names.remove_save(self._storage, self._folder, self._id)
            elif not self._committed:
                self._storage.remove(self._path(names.data_name(self._id, self._rank)))
            if not self._committed:
                self._storage.remove_empty_folder(self._folder)

    def close(self) -> None:
        self._lock.close()

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True

    def _write(self, name: str, data: bytes) -> None:
        with self._storage.create(self._path(name)) as file:
            file.write(data)

    def _path(self, name: str) -> str:
        return self._storage.join(self._folder, name)
