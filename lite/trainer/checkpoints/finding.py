"""Which checkpoint a word such as "auto" stands for: the newest whole one of some folders, which may be URLs."""

from __future__ import annotations

import re
import warnings

from lite import collectives
from lite.checkpoint.reading import damage
from lite.errors import CheckpointError
from lite.storage import joined, locate

_SUFFIX = ".ckpt"
_HPC = re.compile(r"^hpc_ckpt_(\d+)\.ckpt$")
_VERSION = re.compile(r"^(.*[/\\])?(version_\d+)[/\\]checkpoints$")


def newest_checkpoint(folders: list[str], *, named: str = "") -> str | None:
    """The newest whole checkpoint in these folders; rank 0 looks. Collective: call on all ranks.

    Args:
        folders: Where to look.
        named: What its name begins with.
    """
    found: str | None = None
    if collectives.rank() == 0:
        there: list[tuple[float, str]] = []
        for folder in dict.fromkeys(folders):
            storage, target, _ = locate(folder)
            for name in storage.names(target):
                if name.endswith(_SUFFIX) and name.startswith(named) and not name.startswith("."):
                    there.append((storage.modified(storage.join(target, name)), joined(folder, name)))
        for _, path in sorted(there, reverse=True):
            problem = _problem(path)
            if problem is None:
                found = path
                break
            warnings.warn(f"{path} is damaged and was passed over: {problem}", stacklevel=4)
    result: str | None = collectives.broadcast(found)
    return result


def sibling_versions(folder: str) -> list[str]:
    """The folders of checkpoints of all of a logger's runs, of which `folder` is one: .../version_N/checkpoints.

    One that has checkpoints itself stands alone: a version that was chosen is not to go on from another.
    """
    match = _VERSION.match(folder)
    if match is None or _has_checkpoint(folder):
        return [folder]
    parent = match[1] or "."
    if not parent.endswith("://"):
        parent = parent.rstrip("/\\") or parent
    storage, target, _ = locate(parent)
    names = [name for name in storage.names(target) if re.fullmatch(r"version_\d+", name)]
    return [folder, *(joined(joined(parent, name), "checkpoints") for name in names)]


def next_hpc_checkpoint(folder: str) -> str:
    """The first path hpc_ckpt_N.ckpt above those that are there."""
    storage, target, _ = locate(folder)
    numbers = [int(match[1]) for name in storage.names(target) if (match := _HPC.match(name))]
    return joined(folder, f"hpc_ckpt_{max(numbers, default=0) + 1}{_SUFFIX}")


def _has_checkpoint(folder: str) -> bool:
    storage, target, _ = locate(folder)
    return any(name.endswith(_SUFFIX) for name in storage.names(target))


def _problem(path: str) -> str | None:
    try:
        return damage(path)
    except CheckpointError as error:  # a link to what is gone, or a directory without an index
        return str(error)
