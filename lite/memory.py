"""How much memory training will need on each rank, told before anything is built: no process, no step, no weights.

Sizes are exact where they follow from shapes: parameters, gradients, buffers, optimizer state and DDP's communication
buffers. Activations are what autograd keeps for backward, found by a forward on fake tensors. What a library takes
besides (kernels' workspaces, the allocator's fragments, temporaries within one operation) is not in it.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves, tree_map

from lite.errors import ConfigError, choose
from lite.precision import PRECISION_ALIASES, PRECISIONS, Precision, make_precision
from lite.strategies import DDPStrategy, Strategy

KINDS = ("single", "ddp", "ddp+zero1", "fsdp", "fsdp-grad", "fsdp-hybrid")


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on the rank that needs most.

    Attributes:
        parameters: This rank's parameters.
        gradients: Their gradients, and for DDP none of its buffers.
        optimizer: The optimizer's state after its first step.
        buffers: The model's buffers.
        communication: DDP's buckets, which are of the gradients' size unless gradients are views into them; under FSDP
            the gathered parameters: of the two largest blocks, or of all with "fsdp-grad".
        activations: What autograd keeps between forward and backward, for one batch of this rank; None without a batch.
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
    shard_size: int | None = None,
) -> MemoryEstimate:
    """Tell how many bytes each rank will hold while it trains `model`.

    Args:
        model: The raw model, before `setup`; it is not changed, and may lie on the meta device.
        strategy: "single", "ddp", "ddp+zero1", "fsdp", "fsdp-grad" (parameters stay gathered between forward and
            backward), "fsdp-hybrid" (shards within `shard_size` ranks, replicas among them), or a DDPStrategy.
        precision: As for `Lite`.
        optimizer: An optimizer of the model, or a function of parameters that makes one (`torch.optim.AdamW`, say);
            None counts no state.
        batch: What forward takes on one rank: a tensor, a tuple of arguments or a dict of keyword arguments. None
            leaves activations out.
        world_size: Number of ranks.
        shard_size: With "fsdp-hybrid", ranks that hold one copy of the model together.

    Raises:
        ConfigError: An argument is wrong, or the optimizer or the forward can't run without values.

    Example:
        >>> estimate = memory_estimate(torch.nn.Linear(10, 10, bias=False), optimizer=torch.optim.Adam)
        >>> estimate.parameters, estimate.gradients, estimate.optimizer  # two moments and a step count
        (400, 400, 804)
    """
    kind, views = _kind(strategy)
    precision = _precision(precision)
    shards = _shards(kind, world_size, shard_size)
    named = {name: _Size.of(p, precision) for name, p in model.named_parameters()}
    trained = {name: size for name, size in named.items() if size.trained}
    states = _states(model, named, optimizer) if optimizer is not None else []
    gradients = sum(size.part(shards) for size in trained.values())
    if kind == "ddp+zero1":
        state = max(_shares(states, world_size))
    else:
        state = sum(size.part(shards) if size.shape == one.shape else size.bytes for one in states for size in one.kept)
    if kind.startswith("fsdp"):
        communication = _gathered(model, named, precision, whole=kind == "fsdp-grad") if shards > 1 else 0
    else:
        communication = gradients if kind.startswith("ddp") and world_size > 1 and not views else 0
    return MemoryEstimate(
        parameters=sum(size.part(shards) for size in named.values()),
        gradients=gradients,
        optimizer=state,
        buffers=sum(_Size.of(b, precision).bytes for b in model.buffers()),
        communication=communication,
        activations=None if batch is None else _activations(model, batch, precision),
    )


@dataclass(frozen=True)
class _Size:
    """A tensor as training will hold it."""

    shape: torch.Size
    itemsize: int
    trained: bool = False

    @classmethod
    def of(cls, tensor: Tensor, precision: Precision | None = None) -> _Size:
        dtype = tensor.dtype
        if precision is not None and precision.param_dtype is not None and tensor.is_floating_point():
            dtype = precision.param_dtype
        return cls(tensor.shape, dtype.itemsize, tensor.requires_grad)

    @property
    def bytes(self) -> int:
        return self.shape.numel() * self.itemsize

    def part(self, shards: int) -> int:
        """Bytes of the largest shard: fully_shard splits the first dimension into equal chunks."""
        if shards == 1 or not self.shape:
            return self.bytes
        return math.ceil(self.shape[0] / shards) * self.shape[1:].numel() * self.itemsize


@dataclass(frozen=True)
class _State:
    """What the optimizer keeps for one parameter of a group."""

    group: int
    shape: torch.Size
    kept: tuple[_Size, ...]

    @property
    def bytes(self) -> int:
        return sum(size.bytes for size in self.kept)


def _kind(strategy: str | Strategy) -> tuple[str, bool]:
    if isinstance(strategy, DDPStrategy) and strategy.name == "ddp":
        return "ddp+zero1" if strategy.divides_optimizers else "ddp", strategy.gradients_are_views
    if isinstance(strategy, Strategy):
        if strategy.name not in KINDS:
            raise ConfigError(
                f"strategy={strategy!r}: its memory is not known; choose one of {', '.join(map(repr, KINDS))}."
            )
        return strategy.name, False
    return choose("strategy", strategy, KINDS), False


def _precision(precision: str | int | Precision) -> Precision:
    if isinstance(precision, Precision):
        return precision
    name = PRECISION_ALIASES.get(str(precision).lower(), precision)
    return make_precision(choose("precision", name, PRECISIONS), "cpu")


def _shards(kind: str, world_size: int, shard_size: int | None) -> int:
    if isinstance(world_size, bool) or not isinstance(world_size, int) or world_size < 1:
        raise ConfigError(f"world_size={world_size!r} must be a whole number of at least 1.")
    if kind == "single" and world_size > 1:
        raise ConfigError(f"strategy='single' with world_size={world_size}: it is one process; use 'ddp', say.")
    if kind != "fsdp-hybrid":
        if shard_size is not None:
            raise ConfigError(f"shard_size={shard_size!r} is for strategy='fsdp-hybrid' alone; leave it out.")
        return world_size if kind.startswith("fsdp") else 1
    if not isinstance(shard_size, int) or shard_size < 1 or world_size % shard_size:
        raise ConfigError(
            f"strategy='fsdp-hybrid' with shard_size={shard_size!r}: give the number of ranks that hold one copy of "
            f"the model together; it must divide world_size={world_size}."
        )
    return shard_size


def _states(model: nn.Module, sizes: Mapping[str, _Size], optimizer: Any) -> list[_State]:
    """What the optimizer keeps after a step, found by a step of a copy without values."""
    named = {id(p): _Ghost(sizes[name], p) for name, p in model.named_parameters()}
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


@dataclass(frozen=True)
class _Ghost:
    """Makes a parameter like one of the model's."""

    size: _Size
    original: nn.Parameter

    def make(self, device: str) -> nn.Parameter:
        dtype = self.original.dtype
        if dtype.itemsize != self.size.itemsize:  # by the precision
            dtype = {8: torch.float64, 4: torch.float32, 2: torch.bfloat16}[self.size.itemsize]
        ones = torch.ones(self.size.shape, dtype=dtype, device=device)
        parameter = nn.Parameter(ones, requires_grad=self.size.trained)
        parameter.grad = torch.ones_like(ones) if self.size.trained else None
        return parameter


def _step(optimizer: Any, named: Mapping[int, _Ghost], device: str) -> list[_State]:
    twin = _twin(optimizer, {key: ghost.make(device) for key, ghost in named.items()}, whole=device == "meta")
    twin.step()
    return [
        _State(number, p.shape, tuple(_Size.of(t) for t in tree_leaves(twin.state.get(p, {})) if isinstance(t, Tensor)))
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
    held = [p for group in optimizer.param_groups for p in group["params"]]
    if whole and any(id(p) not in ghosts for p in held):
        raise ConfigError(f"{type(optimizer).__name__} holds parameters that are not of this model.")
    twin: Optimizer = object.__new__(type(optimizer))
    twin.__dict__.update(optimizer.__dict__)
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


def _shares(states: list[_State], world_size: int) -> list[int]:
    """Bytes of state per rank, as torch's ZeroRedundancyOptimizer divides: the largest first, to whoever has least."""
    numels, state_bytes = [0] * world_size, [0] * world_size
    for group in sorted({one.group for one in states}):
        for one in sorted((s for s in states if s.group == group), key=lambda s: s.shape.numel(), reverse=True):
            rank = numels.index(min(numels))
            numels[rank] += one.shape.numel()
            state_bytes[rank] += one.bytes
    return state_bytes


def _gathered(model: nn.Module, sizes: Mapping[str, _Size], precision: Precision, *, whole: bool) -> int:
    """Full parameters that FSDP holds for a while, in the dtype that it computes in."""

    def compute_bytes(names: Iterable[str]) -> int:
        half = precision.compute_dtype
        return sum(
            sizes[n].shape.numel() * (half.itemsize if half is not None else sizes[n].itemsize)
            for n in names
            if n in sizes
        )

    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    blocks = [
        [f"{name}.{i}.{n}" for n, _ in block.named_parameters()] for name, m in lists for i, block in enumerate(m)
    ]
    if whole or not blocks:
        return compute_bytes(sizes)
    return sum(sorted(map(compute_bytes, blocks))[-2:])


def _activations(model: nn.Module, batch: Any, precision: Precision) -> int:
    """Bytes in storages that autograd and the outputs hold after a forward, which are no parameter's or buffer's."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    def fake(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        dtype = (
            precision.param_dtype if precision.param_dtype is not None and value.is_floating_point() else value.dtype
        )
        with mode:
            return torch.empty_strided(value.shape, value.stride(), dtype=dtype, device=device)

    device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
    args, kwargs = ((), batch) if isinstance(batch, dict) else (batch if isinstance(batch, tuple) else (batch,), {})
    kept: dict[int, Tensor] = {}  # tensors, so that no storage's id is given to another one
    mode = FakeTensorMode()

    def keep(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    weights = {name: fake(t.detach()).requires_grad_(t.requires_grad) for name, t in model.named_parameters()}
    weights |= {name: fake(b) for name, b in model.named_buffers()}
    inputs, named_inputs = tree_map(fake, args), tree_map(fake, kwargs)
    own = {t.untyped_storage()._cdata for t in weights.values()}
    try:
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(devices=[]))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(keep, _back))
            stack.enter_context(mode)
            if precision.compute_dtype is not None:
                stack.enter_context(torch.autocast(device.type, dtype=precision.compute_dtype))
            outputs = torch.func.functional_call(model, weights, inputs, named_inputs, tie_weights=True)
    except Exception as error:
        raise ConfigError(
            f"the activations of {type(model).__name__} can't be told, since its forward does not run on this batch "
            f"without values ({type(error).__name__}: {error}); leave batch out."
        ) from error
    for value in tree_leaves((inputs, named_inputs, outputs)):
        if isinstance(value, Tensor):
            keep(value)
    return sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in own)


def _back(tensor: Tensor) -> Tensor:
    return tensor
