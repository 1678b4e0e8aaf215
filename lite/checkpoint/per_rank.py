"""What each rank has for itself in a checkpoint: random states, objects whose state differs between ranks, buffers.

An object says so by an attribute `state_is_per_rank` that is true. A model's buffers do when they differ: the running
statistics of a BatchNorm come from the rank's own last batch until the next forward takes over rank 0's, and an
evaluation in between sees them.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from lite import collectives
from lite.errors import CheckpointError
from lite.seed import Moment, RandomState, mix, seed_everything
from lite.state import plain_key

_MARK = "__per_rank__"


def gather(content: dict[str, Any], state: Mapping[str, Any], *, rng: bool) -> list[Any]:
    """Put every rank's part into `content`, in the place of this rank's; return every rank's random state.

    Collective: call on all ranks.

    Args:
        content: What was collected from `state`; changed in place.
        state: The user's objects.
        rng: Whether random states are wanted; the list is empty otherwise.
    """
    names = [name for name in content if getattr(state[name], "state_is_per_rank", False)]
    if not names and not rng:
        return []
    mine = RandomState.capture(cuda=True).state_dict() if rng else None
    everyone = collectives.all_gather_objects((mine, [content[name] for name in names]))
    for i, name in enumerate(names):
        content[name] = {_MARK: [states[i] for _, states in everyone]}
    return [random_state for random_state, _ in everyone] if rng else []


def counterpart(saved: Sequence[int], now: Sequence[int], rank: int) -> int | None:
    """The rank of a checkpoint whose place this rank takes, so that it goes on from what that one had for itself.

    Args:
        saved: Which part of the data each rank had (`Strategy.data_shards`); those that share a model share a part.
        now: Which it has in this job.
        rank: This rank.

    Returns:
        The rank, or None where the data were divided into another number of parts.

    Example:
        >>> counterpart([0, 1], [0, 0, 1, 1], 2), counterpart([0, 0], [0, 1], 1)
        (1, None)
    """
    if list(saved) == list(now):
        return rank
    return saved.index(now[rank]) if set(saved) == set(now) else None


def pick(loaded: dict[str, Any], state: Mapping[str, Any], source: int | None) -> None:
    """Put this rank's part in the place of all ranks' parts, in the entries that `state` asks for; changes `loaded`.

    Args:
        loaded: The entries of a checkpoint.
        state: The user's objects.
        source: The rank whose part it is (`counterpart`).

    Raises:
        CheckpointError: There is none: the data were divided into another number of parts.
    """
    for name in state:
        entry = loaded.get(name)
        if not isinstance(entry, dict) or _MARK not in entry:
            continue
        parts = entry[_MARK]
        if source is None:
            raise CheckpointError(
                f"the checkpoint's {name!r} was saved by {len(parts)} processes, each with a position of its own, and "
                f"this job has {collectives.world_size()}, or divides its data otherwise: resume as it was saved, or "
                f"leave {name!r} out of state to begin it anew. A loader that lite splits (a map-style dataset, or "
                "shard='stride') can be resumed with any number."
            )
        loaded[name] = parts[source]


def parts_of_ranks(entry: Any) -> list[Any]:
    """Every rank's part of an entry of a loaded checkpoint whose object's state differed between ranks."""
    parts: list[Any] = entry[_MARK]
    return parts


def gather_buffers(content: dict[str, Any], state: Mapping[str, Any]) -> dict[str, dict[str, list[Tensor]]]:
    """Every rank's values of those buffers in `content` that differ between ranks, by names in `state` and keys.

    Collective: call on all ranks. In `content` they are rank 0's afterwards.
    """
    mine = {
        (name, key): buffer
        for name, module in state.items()
        if isinstance(module, nn.Module) and name in content
        for key, buffer in _buffers(module).items()
        if key in content[name]
    }
    sums = collectives.all_gather_objects({place: _checksum(buffer) for place, buffer in mine.items()})
    common = [place for place in sums[0] if all(place in other for other in sums)]
    differing = [place for place in common if len({other[place] for other in sums}) > 1]
    if not differing:
        return {}
    everyone = collectives.all_gather_objects([mine[place].contiguous() for place in differing])
    found: dict[str, dict[str, list[Tensor]]] = {}
    for i, (name, key) in enumerate(differing):
        values = [buffers[i] for buffers in everyone]
        found.setdefault(name, {})[key] = values
        content[name][key] = values[0]
    return found


def restore_buffers(
    saved: Mapping[str, Mapping[str, list[Tensor]]], state: Mapping[str, Any], source: int | None
) -> None:
    """Give the buffers of the rank `source` (`counterpart`) to the models in `state`, which have rank 0's already."""
    if source is None:
        return
    for name, entries in saved.items():
        module = state.get(name)
        buffers = _buffers(module) if isinstance(module, nn.Module) else {}
        for key, values in entries.items():
            if key in buffers:
                buffers[key].copy_(values[source])


def _buffers(module: nn.Module) -> dict[str, Tensor]:
    """The module's plain, dense buffers by the keys of its state dict."""
    return {
        plain_key(key): buffer
        for key, buffer in module.named_buffers(remove_duplicate=False)
        if buffer.layout == torch.strided and not buffer.is_quantized and not hasattr(buffer, "__tensor_flatten__")
        if not buffer.is_meta  # another rank's
    }


_checksums: Any = WeakTensorKeyDictionary()


def _checksum(buffer: Tensor) -> tuple[Any, ...]:
    """What equal buffers have in common; computed once for each version of a buffer, as large ones seldom change."""
    version, found = _checksums.get(buffer, (None, None))
    if version != buffer._version:
        values: Any = collectives.as_bytes(buffer.detach().cpu().contiguous()).numpy()
        found = (tuple(buffer.shape), str(buffer.dtype), zlib.crc32(values))
        _checksums[buffer] = (buffer._version, found)
    return found  # type: ignore[no-any-return]


def restore_random_state(saved: list[Any], source: int | None, part: int) -> Moment:
    """Go on from the saved random state of the rank `source`.

    Where there is none, since the data were divided into another number of parts, the ranks of the first part go on
    from rank 0's, which decides the order of later epochs; the others are seeded anew from it and their part.

    Args:
        saved: The states of all ranks.
        source: The rank whose state it is (`counterpart`).
        part: Which part of the data this rank gets (`Strategy.data_shards`), its rank under most strategies.

    Returns:
        The state that this rank now has, for whatever goes on from it later.
    """
    if source is not None or part == 0:
        RandomState.from_state_dict(saved[source or 0]).restore()
    else:
        world = collectives.world_size()
        seed_everything(mix(RandomState.from_state_dict(saved[0]).digest(), world, part) & (2**32 - 1))
    return Moment(RandomState.capture(cuda=True))
