"""How much memory training will need on each rank, told before anything is built: no process, no step, no weights.

Sizes are exact where they follow from shapes: parameters, gradients, buffers and optimizer state. Activations are what
autograd keeps for backward, found by a forward on fake tensors. What a library takes besides (kernels' workspaces, the
allocator's fragments, temporaries within one operation) is not in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from lite.errors import ConfigError, choose, shown
from lite.memory.activations import kept_by_forward
from lite.memory.states import Size, State, shares, states_after_a_step
from lite.precision import PRECISION_ALIASES, PRECISIONS, Precision, make_precision
from lite.strategies import Strategy, strategy_factories
from lite.strategies.footprint import Footprint


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on the rank that needs most.

    Attributes:
        parameters: This rank's parameters.
        gradients: Their gradients; with DDP's `gradient_as_bucket_view` they are the communication buffers.
        optimizer: The optimizer's state after its first step.
        buffers: The model's buffers.
        communication: What is there for a while to exchange with other ranks: under DDP buffers of the gradients' size,
            under FSDP weights that are put together (those outside of blocks, and of the two largest blocks, or of all
            with "grad") and the largest block's gradients, under LocalSGDStrategy the parameters that are averaged.
        activations: What autograd keeps between forward and backward, for one batch of this rank; None without a batch.
            Neither checkpointed activations nor split ones are subtracted.
    """

    parameters: int
    gradients: int
    optimizer: int
    buffers: int
    communication: int
    activations: int | None = None

    @property
    def state(self) -> int:
        """What is there between two steps."""
        return self.parameters + self.gradients + self.optimizer + self.buffers

    @property
    def total(self) -> int:
        """All of it."""
        return self.state + self.communication + (self.activations or 0)


def memory_estimate(
    model: nn.Module,
    strategy: str | Strategy = "single",
    precision: str | int | Precision = "32-true",
    optimizer: Any = None,
    batch: Any = None,
    *,
    world_size: int = 1,
) -> MemoryEstimate:
    """Tell how many bytes each rank will hold while it trains `model`.

    Args:
        model: The raw model, before `setup`; it is not changed, and may lie on the meta device.
        strategy: As for `Lite`: a name, or a strategy with its options.
        precision: As for `Lite`.
        optimizer: An optimizer of the model, or a function of parameters that makes one (`torch.optim.AdamW`, say);
            None counts no state.
        batch: What forward takes on one rank: a tensor, a tuple of arguments or a dict of keyword arguments. None
            leaves activations out.
        world_size: Number of ranks.

    Raises:
        ConfigError: An argument is wrong, the strategy can't tell or would refuse the model on so many ranks, or the
            optimizer or the forward can't run without values.

    Example:
        >>> import torch
        >>> from lite import FSDPStrategy
        >>> linear = torch.nn.Linear(10, 10, bias=False)
        >>> estimate = memory_estimate(linear, FSDPStrategy(), optimizer=torch.optim.Adam, world_size=2)
        >>> estimate.parameters, estimate.gradients, estimate.optimizer  # two moments and a step count
        (200, 200, 404)
    """
    if not isinstance(model, nn.Module):
        remedy = "pass a model that is made of it" if isinstance(model, type) else "pass a torch.nn.Module"
        raise ConfigError(
            f"memory_estimate got {shown(model)} as the model; {remedy}. `with torch.device('meta'):` makes one "
            "without memory."
        )
    precision = _precision(precision)
    footprint = _footprint(strategy, model, world_size)
    named = {name: Size.of(p, precision) for name, p in model.named_parameters()}
    parts = {name: size.cut(footprint.part(name, size.shape)) for name, size in named.items()}
    states = states_after_a_step(model, named, optimizer) if optimizer is not None else []
    gradients = sum(size.bytes for size in parts.values() if size.trained)
    state = max(shares(states, footprint.state_ranks)) if footprint.state_ranks > 1 else _whole(states, parts)
    communication = gradients if footprint.gradient_copy else 0
    if footprint.blocks is not None:
        communication += _gathered(footprint, named, precision)
    if footprint.outer is not None:
        held = {one.name for one in states}
        copies = {name: replace(size, trained=True) for name, size in named.items() if name in held}
        state += sum(size.bytes for size in copies.values())
        state += _whole(states_after_a_step(model, copies, footprint.outer, only=held), copies)
    return MemoryEstimate(
        parameters=sum(size.bytes for size in parts.values()),
        gradients=gradients,
        optimizer=state,
        buffers=sum(Size.of(b, precision).bytes for b in model.buffers()),
        communication=communication,
        activations=None if batch is None else kept_by_forward(model, batch, precision, footprint.casts_weights),
    )


def _footprint(strategy: str | Strategy, model: nn.Module, world_size: int) -> Footprint:
    if isinstance(world_size, bool) or not isinstance(world_size, int) or world_size < 1:
        raise ConfigError(f"world_size={world_size!r} must be a whole number of at least 1.")
    if not isinstance(strategy, Strategy):
        makers = strategy_factories()
        strategy = makers[choose("strategy", strategy, list(makers))]()
    if not strategy.distributed and world_size > 1:
        raise ConfigError(
            f"strategy={strategy.name!r} with world_size={world_size}: it is one process; use 'ddp', say."
        )
    footprint = strategy.footprint(model, world_size)
    if footprint is None:
        raise ConfigError(
            f"strategy={strategy.name!r} does not tell what it holds in memory, so nothing can be estimated for it; "
            "estimate for 'ddp' or 'fsdp', or give its class a method `footprint`."
        )
    return footprint


def _precision(precision: str | int | Precision) -> Precision:
    if isinstance(precision, Precision):
        return precision
    name = PRECISION_ALIASES.get(str(precision).lower(), precision)
    return make_precision(choose("precision", name, PRECISIONS), "cpu")


def _whole(states: Iterable[State], parts: Mapping[str, Size]) -> int:
    """Bytes of state where what has a parameter's shape is cut as that is."""
    return sum(
        (size.cut(parts[one.name].shape) if size.shape == one.shape else size).bytes
        for one in states
        for size in one.kept
    )


def _gathered(footprint: Footprint, sizes: Mapping[str, Size], precision: Precision) -> int:
    """What FSDP puts together for a while: weights in the dtype that it computes in, gradients as they are reduced."""
    assert footprint.blocks is not None
    half = precision.compute_dtype
    whole = {name: size.cut(footprint.unsharded(name, size.shape)) for name, size in sizes.items()}
    weights = {name: size.shape.numel() * (half or size.dtype).itemsize for name, size in whole.items()}
    inside = {name for block in footprint.blocks for name in block}
    outside = tuple(name for name in sizes if name not in inside)
    of_blocks = sorted(sum(weights[name] for name in block) for block in footprint.blocks)
    reduced = max(sum(whole[n].bytes for n in block if whole[n].trained) for block in (*footprint.blocks, outside))
    return sum(weights[name] for name in outside) + sum(of_blocks[0 if footprint.keeps_whole else -2 :]) + reduced
