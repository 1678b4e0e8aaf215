"""What an optimizer keeps, found by a step of a copy of it on parameters without values."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from lite.errors import ConfigError
from lite.precision import Precision
from lite.state import parameters_of


@dataclass(frozen=True)
class Size:
    """A tensor as training will hold it."""

    shape: torch.Size
    dtype: torch.dtype
    trained: bool = False

    @classmethod
    def of(cls, tensor: Tensor, precision: Precision | None = None) -> Size:
        """Of a tensor that the precision has converted."""
        dtype = tensor.dtype
        if precision is not None and precision.param_dtype is not None and tensor.is_floating_point():
            dtype = precision.param_dtype
        return cls(tensor.shape, dtype, tensor.requires_grad)

    @property
    def bytes(self) -> int:
        """In memory."""
        return self.shape.numel() * self.dtype.itemsize

    def cut(self, shape: torch.Size) -> Size:
        """Of a part of the tensor."""
        return replace(self, shape=shape)


@dataclass(frozen=True)
class State:
    """What the optimizer keeps for one parameter of a group."""

    name: str
    group: int
    shape: torch.Size
    kept: tuple[Size, ...]

    @property
    def bytes(self) -> int:
        """In memory."""
        return sum(size.bytes for size in self.kept)


def states_after_a_step(
    model: nn.Module, sizes: Mapping[str, Size], optimizer: Any, *, only: Collection[str] | None = None
) -> list[State]:
    """What the optimizer will keep for each of the model's parameters.

    Args:
        model: The raw model.
        sizes: Its parameters as training will hold them, by name.
        optimizer: An optimizer of them, which is not changed, or a function that makes one.
        only: Names of the parameters that it holds; None is all.

    Raises:
        ConfigError: It is something else, or can't step without values.
    """
    named = {id(p): _Ghost(name, sizes[name]) for name, p in model.named_parameters() if only is None or name in only}
    try:
        return _step(optimizer, named, "meta")
    except ConfigError:
        raise
    except Exception:  # it looks at values: ones will do, for one parameter at a time
        try:
            alone = [_step(optimizer, {key: ghost}, "cpu") for key, ghost in named.items()]
        except Exception as error:
            name = type(optimizer).__name__ if isinstance(optimizer, Optimizer) else repr(optimizer)
            raise ConfigError(
                f"the state of {name} can't be told, since it does not step on a single parameter of ones "
                f"({type(error).__name__}: {error}); leave optimizer out and add its state yourself."
            ) from error
        return [state for states in alone for state in states]


def shares(states: list[State], world_size: int) -> list[int]:
    """Bytes of state per rank, as torch's ZeroRedundancyOptimizer divides: the largest first, to whoever has least."""
    numels, state_bytes = [0] * world_size, [0] * world_size
    for group in sorted({one.group for one in states}):
        for one in sorted((s for s in states if s.group == group), key=lambda s: s.shape.numel(), reverse=True):
            rank = numels.index(min(numels))
            numels[rank] += one.shape.numel()
            state_bytes[rank] += one.bytes
    return state_bytes


@dataclass(frozen=True)
class _Ghost:
    """Makes a parameter like one of the model's."""

    name: str
    size: Size

    def make(self, device: str) -> nn.Parameter:
        ones = torch.ones(self.size.shape, dtype=self.size.dtype, device=device)
        parameter = nn.Parameter(ones, requires_grad=self.size.trained)
        parameter.grad = torch.ones_like(ones) if self.size.trained else None
        return parameter


def _step(optimizer: Any, named: Mapping[int, _Ghost], device: str) -> list[State]:
    ghosts = {key: ghost.make(device) for key, ghost in named.items()}
    names = {id(ghosts[key]): ghost.name for key, ghost in named.items()}
    twin = _twin(optimizer, ghosts, whole=device == "meta")
    twin.step()
    return [
        State(
            names[id(p)],
            number,
            p.shape,
            tuple(Size.of(t) for t in tree_leaves(twin.state.get(p, {})) if isinstance(t, Tensor)),
        )
        for number, group in enumerate(twin.param_groups)
        for p in group["params"]
    ]


def _twin(optimizer: Any, ghosts: Mapping[int, nn.Parameter], *, whole: bool) -> Optimizer:
    if not isinstance(optimizer, Optimizer):
        if not callable(optimizer):
            raise ConfigError(f"optimizer={optimizer!r} must be an optimizer, or a function that makes one.")
        made = optimizer(list(ghosts.values()))
        if not isinstance(made, Optimizer):
            raise ConfigError(f"optimizer={optimizer!r} made {made!r}; it must return a torch optimizer.")
        return made
    held = parameters_of(optimizer)
    if whole and any(id(p) not in ghosts for p in held):
        raise ConfigError(f"{type(optimizer).__name__} holds parameters that are not of this model.")
    twin: Optimizer = object.__new__(type(optimizer))
    twin.__dict__.update(optimizer.__dict__)
    twin.__dict__.pop("step", None)  # a scheduler's, which steps the original
    twin.state = defaultdict(dict)
    # A fused or a captured step needs a device; what is kept is the same.
    plain = {"fused": False, "foreach": False, "capturable": False}
    twin.param_groups = [
        {
            **group,
            **{key: value for key, value in plain.items() if key in group},
            "params": [ghosts[id(p)] for p in group["params"] if id(p) in ghosts],
        }
        for group in optimizer.param_groups
    ]
    return twin
