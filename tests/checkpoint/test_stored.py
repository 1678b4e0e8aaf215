"""Tensors that stay in a directory: any part of them, from any pieces."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorProperties, TensorStorageMetadata

from lite import CheckpointError, Lite
from lite.checkpoint.reading import read
from lite.checkpoint.stored import StoredTensor, resolve


def stored(whole: torch.Tensor, boxes: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> tuple[StoredTensor, list[int]]:
    asked: list[int] = []

    def chunk(number: int) -> Any:
        asked.append(number)
        return cut(whole, *boxes[number]).clone()

    chunks = [ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes in boxes]
    about = TensorStorageMetadata(TensorProperties(dtype=whole.dtype), whole.size(), chunks)
    return StoredTensor("w", about, chunk), asked


def cut(whole: torch.Tensor, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> torch.Tensor:
    for dim, (offset, size) in enumerate(zip(offsets, sizes, strict=True)):
        whole = whole.narrow(dim, offset, size)
    return whole


def test_every_part_is_put_together_from_what_overlaps_it() -> None:
    """All boxes of a 4 by 3 tensor that lies in four uneven pieces and an empty one; no other piece is read."""
    whole = torch.arange(12.0).reshape(4, 3)
    boxes = [((0, 0), (3, 2)), ((0, 2), (3, 1)), ((3, 0), (1, 2)), ((3, 2), (1, 1)), ((4, 0), (0, 3))]
    for top, left, height, width in itertools.product(range(4), range(3), range(5), range(4)):
        if top + height <= 4 and left + width <= 3:
            tensor, asked = stored(whole, boxes)
            part = tensor.read_part((top, left), (height, width))
            assert torch.equal(part, cut(whole, (top, left), (height, width)))
            assert part.untyped_storage().nbytes() == part.nbytes
            if (top, height) == (3, 1):
                assert set(asked) <= {2, 3}
    assert torch.equal(stored(whole, boxes)[0].read(), whole)
    scalar = torch.tensor(2.0)
    assert stored(scalar, [((), ())])[0].read() == 2.0


def test_a_missing_piece_is_told() -> None:
    """Not filled with whatever was in memory."""
    tensor, _ = stored(torch.ones(4, 1), [((0, 0), (2, 1))])
    with pytest.raises(CheckpointError, match="'w': parts of it are missing"):
        tensor.read()


def test_a_directory_read_lazily_is_the_same_state(tmp_path: Path) -> None:
    """Tensors, in nested lists too, and plain values."""
    lite = Lite(accelerator="cpu")
    state = {"a": [torch.arange(3), {"b": torch.ones(2, 2)}], "c": 4}
    for form in ("folder", "file.ckpt"):
        lite.save(tmp_path / form, state)
        content, _ = read(tmp_path / form, lazily=True)
        assert isinstance(content["a"][0], StoredTensor) == (form == "folder")
        content = resolve(content)
        assert torch.equal(content["a"][0], state["a"][0])  # type: ignore[index]
        assert torch.equal(content["a"][1]["b"], torch.ones(2, 2))
        assert content["c"] == 4
