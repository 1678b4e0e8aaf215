"""How a strategy lays a model out in memory, told from names and shapes before anything is built."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

Part = Callable[[str, torch.Size], torch.Size]


def _all(name: str, shape: torch.Size) -> torch.Size:
    return shape


@dataclass(frozen=True)
class Footprint:
    """What one rank holds of a model: the rank that holds most.

    Attributes:
        part: For a parameter's name and shape, the shape of the rank's part of it.
        unsharded: The same when it has been put together for computing.
        gradient_copy: Whether gradients are also held in communication buffers of their size.
        state_ranks: Over how many ranks an optimizer's state is divided, whole parameters each (ZeRO-1).
        blocks: The names of the parameters that are put together by themselves, each block in its turn; those of no
            block are whole from forward to backward. None where nothing is put together.
        keeps_whole: Whether blocks, once put together, stay so from forward to backward.
        casts_weights: Whether a mixed precision computes with converted weights, instead of under autocast.
        outer: Makes a second optimizer, of copies of what the first one trains; or None.
    """

    part: Part = _all
    unsharded: Part = _all
    gradient_copy: bool = False
    state_ranks: int = 1
    blocks: tuple[tuple[str, ...], ...] | None = None
    keeps_whole: bool = False
    casts_weights: bool = False
    outer: Any = None


def parts(num_shards: int = 1, split: Mapping[str, int] | None = None, num_splits: int = 1) -> Part:
    """The largest parts, as DTensor and fully_shard cut them: equal chunks, of which the last may be smaller.

    Args:
        num_shards: Ranks over which the first dimension is sharded.
        split: Parameters that are split before, by name, and the dimension.
        num_splits: Over how many ranks.

    Example:
        >>> parts(4, {"head.weight": 1}, 2)("head.weight", torch.Size([10, 7]))
        torch.Size([3, 4])
    """

    def part(name: str, shape: torch.Size) -> torch.Size:
        sizes = list(shape)
        for dim, number in (((split or {}).get(name), num_splits), (0, num_shards)):
            if dim is not None and sizes:
                sizes[dim] = math.ceil(sizes[dim] / number)
        return torch.Size(sizes)

    return part
