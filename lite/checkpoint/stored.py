"""Tensors that stay in a checkpoint's directory until somebody asks for them, or for a part of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lite.errors import CheckpointError
from lite.state import map_leaves

Box = tuple[tuple[int, ...], tuple[int, ...]]


class StoredTensor:
    """One tensor of a sharded checkpoint.

    Args:
        name: Its name there.
        stored: What the index says about it.
        read_chunk: Reads one stored piece, by its number.

    Attributes:
        shape: Of the whole tensor.
        dtype: Its dtype.
    """

    def __init__(self, name: str, stored: Any, read_chunk: Callable[[int], Any]) -> None:
        self._name = name
        self._chunks = [(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in stored.chunks]
        self._read_chunk = read_chunk
        self.shape: torch.Size = stored.size
        self.dtype: torch.dtype = stored.properties.dtype

    def read(self) -> Tensor:
        """The whole tensor, on the CPU."""
        return self.read_part((0,) * len(self.shape), tuple(self.shape))

    def read_part(self, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> Tensor:
        """The box of `sizes` at `offsets`, on the CPU; besides it one stored piece at a time is in memory."""
        part: Tensor | None = None
        missing = torch.Size(sizes).numel()
        for number, chunk in enumerate(self._chunks):
            common = _overlap((offsets, sizes), chunk)
            if common is None:
                continue
            piece = self._read_chunk(number)
            if not isinstance(piece, Tensor) or tuple(piece.shape) != chunk[1]:
                raise CheckpointError(f"the checkpoint is damaged at {self._name!r}: a part has another shape.")
            source = _narrow(piece, common, chunk[0])
            if common == (offsets, sizes):
                return source.clone() if source.numel() != piece.numel() else piece
            if part is None:
                part = torch.empty(sizes, dtype=self.dtype)
            _narrow(part, common, offsets).copy_(source)
            missing -= source.numel()
        if part is None:
            part = torch.empty(sizes, dtype=self.dtype)
        if missing > 0:
            raise CheckpointError(f"the checkpoint is damaged at {self._name!r}: parts of it are missing.")
        return part


def _overlap(first: Box, second: Box) -> Box | None:
    """What two boxes have in common; None where that is nothing."""
    starts = tuple(map(max, first[0], second[0]))
    ends = [min(a + n, b + m) for a, n, b, m in zip(*first, *second, strict=True)]
    sizes = tuple(end - start for start, end in zip(starts, ends, strict=True))
    return (starts, sizes) if all(size > 0 for size in sizes) else None


def _narrow(tensor: Tensor, box: Box, origin: tuple[int, ...]) -> Tensor:
    for dim, (start, size, zero) in enumerate(zip(*box, origin, strict=True)):
        tensor = tensor.narrow(dim, start - zero, size)
    return tensor


def resolve(value: Any) -> Any:
    """Nested data with every stored tensor read whole, and with tensors that a file backs copied into memory."""

    def here(leaf: Any) -> Any:
        if isinstance(leaf, StoredTensor):
            return leaf.read()
        return leaf.clone() if isinstance(leaf, Tensor) else leaf

    return map_leaves(here, value)
