"""What each rank has for itself in a checkpoint: random states, and objects whose state differs between ranks.

An object says so by an attribute `state_is_per_rank` that is true.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lite import collectives
from lite.errors import CheckpointError
from lite.seed import Moment, RandomState, mix, seed_everything

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


def pick(loaded: dict[str, Any], state: Mapping[str, Any]) -> None:
    """Put this rank's part in the place of all ranks' parts, in the entries that `state` asks for; changes `loaded`.

    Raises:
        CheckpointError: It was saved by another number of processes.
    """
    world, rank = collectives.world_size(), collectives.rank()
    for name in state:
        entry = loaded.get(name)
        if not isinstance(entry, dict) or _MARK not in entry:
            continue
        parts = entry[_MARK]
        if len(parts) != world:
            raise CheckpointError(
                f"the checkpoint's {name!r} was saved by {len(parts)} processes, each with a position of its own, and "
                f"this job has {world}: resume with as many, or leave {name!r} out of state to begin it anew. A loader "
                "that lite splits (a map-style dataset, or shard='stride') can be resumed with any number."
            )
        loaded[name] = parts[rank]


def restore_random_state(saved: list[Any]) -> Moment:
    """Go on from the saved random state: this rank's own, where as many processes saved it.

    With another number of processes, rank 0 goes on from rank 0's, which decides the order of later epochs; the others
    are seeded anew from it and their rank.

    Returns:
        The state that this rank now has, for whatever goes on from it later.
    """
    world, rank = collectives.world_size(), collectives.rank()
    if len(saved) == world or rank == 0:
        RandomState.from_state_dict(saved[rank if len(saved) == world else 0]).restore()
    else:
        seed_everything(mix(RandomState.from_state_dict(saved[0]).digest(), world, rank) & (2**32 - 1))
    return Moment(RandomState.capture(cuda=True))
