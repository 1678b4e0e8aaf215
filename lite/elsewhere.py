"""States of models and optimizers whose layers lie on different ranks: put together, and taken apart again.

On the ranks that don't hold a layer its tensors are on the meta device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from lite import collectives
from lite.checkpoint.stored import resolve
from lite.sharded import Elsewhere, is_elsewhere
from lite.state import map_leaves, parameters_of


@dataclass(frozen=True)
class _Described:
    """Tells other ranks of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def fetch(content: Any, device: torch.device, *, to_all: bool = False) -> Any:
    """Nested data with the tensors that other ranks hold, on the CPU; on rank 0 alone, unless it is `to_all`.

    Collective: call on all ranks, with the same nesting.

    Args:
        content: Nested dicts, lists and tuples; a tensor that is elsewhere on some ranks is sent by the first of the
            others.
        device: What this rank communicates from.
        to_all: Whether every rank wants them.
    """
    leaves: list[Any] = []
    map_leaves(lambda leaf: leaves.append(leaf) if isinstance(leaf, Tensor) else None, content)
    missing = collectives.all_gather_objects([i for i, leaf in enumerate(leaves) if is_elsewhere(leaf)])
    absent = [set(numbers) for numbers in missing]
    rank = collectives.rank()
    for number in sorted(set().union(*absent)):
        owner = next(r for r, numbers in enumerate(absent) if number not in numbers)
        wanting = [r for r, numbers in enumerate(absent) if number in numbers and (to_all or r == 0)]
        if not wanting:
            continue
        leaf = leaves[number]
        if rank == owner:
            sent = leaf.detach().to(device).contiguous()
            for other in wanting:
                dist.send(collectives.as_bytes(sent), other)
        elif rank in wanting:
            got = torch.empty(leaf.shape, dtype=leaf.dtype, device=device)
            dist.recv(collectives.as_bytes(got), owner)
            leaves[number] = got.cpu()
    there = iter(leaves)
    return map_leaves(lambda leaf: next(there) if isinstance(leaf, Tensor) else leaf, content)


def names_of_divided(content: dict[str, Any]) -> list[str]:
    """The names of values of which some rank's tensors are elsewhere. Collective: call on all ranks.

    Args:
        content: Nested data by name.
    """
    found: list[str] = []
    for name, value in content.items():
        leaves: list[Any] = []
        map_leaves(leaves.append, value)
        if any(map(is_elsewhere, leaves)):
            found.append(name)
    return sorted(set().union(*collectives.all_gather_objects(found)))


# ---- hooks


def mark_in_state(module: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: Any) -> None:
    """A hook of `Module.state_dict`: what stands for other ranks' tensors says so."""
    if not prefix:
        for key, value in state_dict.items():
            if isinstance(value, Tensor) and value.is_meta:
                state_dict[key] = Elsewhere.like(value.shape, value.dtype)


def leave_aside(module: nn.Module, state_dict: dict[str, Any], prefix: str, *unused: Any) -> None:
    """A hook of `Module.load_state_dict`: of a whole state, the tensors of other ranks are not read."""
    for name, target in (*module._parameters.items(), *module._buffers.items()):
        key = f"{prefix}{name}"
        if target is None or key not in state_dict:
            continue
        value = state_dict[key]
        if target.is_meta:
            state_dict[key] = torch.empty(tuple(value.shape), dtype=value.dtype, device="meta")
        elif hasattr(value, "read_part"):
            state_dict[key] = value.read()


def complete_state(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """A hook of `Optimizer.state_dict`: say what other ranks have. Collective: call on all ranks."""
    own = state_dict["state"]
    described = tree_map(lambda x: _Described(tuple(x.shape), x.dtype) if isinstance(x, Tensor) else x, own)
    state: dict[Any, Any] = {}
    for other in reversed(collectives.all_gather_objects(described)):
        state.update(map_leaves(_standing_for, other))
    state.update(own)
    # The same order on all ranks: parameters by their number, then what is kept by other keys.
    ordered = sorted(state, key=lambda key: (not isinstance(key, int), key if isinstance(key, int) else str(key)))
    return {**state_dict, "state": {key: state[key] for key in ordered}}


def _standing_for(leaf: Any) -> Any:
    return Elsewhere.like(leaf.shape, leaf.dtype) if isinstance(leaf, _Described) else leaf


def keep_own(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """A hook of `Optimizer.load_state_dict`: of a whole state, that of this rank's parameters."""
    held = parameters_of(optimizer)
    numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
    if len(held) != len(numbers):
        return state_dict  # the optimizer itself says what doesn't fit
    foreign = {number for number, parameter in zip(numbers, held, strict=True) if parameter.is_meta}
    state = {key: resolve(value) for key, value in state_dict["state"].items() if key not in foreign}
    return {**state_dict, "state": state}
