"""Comparing what ranks are about to send: with a plain gloo or NCCL call a mismatch ends the process or hangs it."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lite.errors import UsageError

_MAX_NDIM = 8
_NO_ROW = [0] * (2 + _MAX_NDIM)
_DTYPES = tuple(sorted((d for d in vars(torch).values() if isinstance(d, torch.dtype)), key=str))


def compare(
    nesting: str, values: list[Tensor], *, same: bool, group: Any = None, refusal: str | None = None
) -> list[list[tuple[int, ...]]]:
    """Make sure that all ranks pass the same nesting, dtypes and shapes; where not, every rank raises alike.

    Args:
        nesting: The form of what the user passed, in words.
        values: Its tensors, as they will be sent.
        same: Whether shapes must be equal; otherwise first dimensions may differ.
        group: A process group; None is all ranks.
        refusal: Why this rank can't take part.

    Returns:
        Of each value, every rank's shape.

    Raises:
        UsageError: They differ, or a rank can't take part.
    """
    for value in values:
        if value.ndim > _MAX_NDIM and refusal is None:
            refusal = f"a tensor of shape {tuple(value.shape)} has more than {_MAX_NDIM} dimensions; flatten it first."
    rows = [] if refusal else [[_DTYPES.index(v.dtype), v.ndim, *v.shape, *[0] * (_MAX_NDIM - v.ndim)] for v in values]
    # One exchange for the usual single tensor; a nesting tells its own form first, as tables must be of one size.
    head = [zlib.crc32(nesting.encode()), len(rows), int(refusal is not None)]
    first = _exchange([*head, *(rows[0] if rows else _NO_ROW)], group)
    if len({tuple(line[:2]) for line in first}) > 1 or any(line[2] for line in first):
        said: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(said, (nesting, refusal), group=group)
        refusals = [text for _, text in said if text]
        if refusals:
            raise UsageError(refusals[0])
        found = ", ".join(f"rank {i} has {text}" for i, (text, _) in enumerate(said))
        raise UsageError(f"all ranks must pass the same nesting and keys, but {found}.")
    if len(rows) < 2:
        tables = [[line[3:]] for line in first]
    else:
        lines = _exchange([number for row in rows for number in row], group)
        width = len(_NO_ROW)
        tables = [[line[i * width : (i + 1) * width] for i in range(len(rows))] for line in lines]
    return [_shapes([table[i] for table in tables], same) for i in range(len(rows))]


def _shapes(rows: list[list[int]], same: bool) -> list[tuple[int, ...]]:
    shapes = [tuple(r[2 : 2 + r[1]]) for r in rows]
    start: Callable[[tuple[int, ...]], tuple[int, ...]] = (lambda s: s) if same else (lambda s: (len(s), *s[1:]))
    if len({(r[0], start(s)) for r, s in zip(rows, shapes, strict=True)}) > 1:
        found = ", ".join(
            f"rank {i} has {_DTYPES[r[0]]} {list(s)}" for i, (r, s) in enumerate(zip(rows, shapes, strict=True))
        )
        wanted = "the same shape and dtype" if same else "the same dtype and, after the first dimension, the same shape"
        raise UsageError(f"a tensor must have {wanted} on all ranks, but {found}; pad or convert it before the call.")
    return shapes


def _exchange(numbers: list[int], group: Any) -> list[list[int]]:
    """Every rank's numbers, equally many."""
    mine = torch.tensor(numbers, dtype=torch.int64, device=control_device(group))
    rows = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(rows, mine, group=group)
    return [row.tolist() for row in rows]


def control_device(group: Any) -> torch.device:
    """Where small control tensors must lie for this group's backend."""
    if dist.get_backend(group) == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
