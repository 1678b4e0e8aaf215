"""Communication between ranks, as functions over nested data; each is a local no-op when there is only one process.

They use torch.distributed's default process group, which a strategy has made. Shapes and dtypes are compared before
data is
sent: with a plain gloo or NCCL call a mismatch ends the process or hangs it.
"""

from __future__ import annotations

import functools
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from lite.errors import ConfigError, UsageError

REDUCE_OPS = ("mean", "sum", "min", "max", "product")
_MAX_NDIM = 8
_FOREVER = timedelta(days=365)
_DTYPES = tuple(sorted((d for d in vars(torch).values() if isinstance(d, torch.dtype)), key=str))

F = TypeVar("F", bound=Callable[..., Any])
_explainer: Callable[[RuntimeError], Exception | None] | None = None


def set_explainer(explainer: Callable[[RuntimeError], Exception | None] | None) -> None:
    """Let `explainer` turn an error of a failed communication into the one that the user should see, or None."""
    global _explainer
    _explainer = explainer


def raise_explained(error: RuntimeError) -> None:
    """Raise what the explainer makes of `error`, from it; return where it has nothing to say."""
    better = _explainer(error) if _explainer is not None else None
    if better is not None:
        raise better from error


def explained(call: F) -> F:
    """Let errors of `call`, which communicates, pass through the explainer."""

    @functools.wraps(call)
    def explaining(*args: Any, **kwargs: Any) -> Any:
        try:
            return call(*args, **kwargs)
        except RuntimeError as error:
            raise_explained(error)
            raise

    return explaining  # type: ignore[return-value]


def name_mismatches() -> None:
    """Let process groups that are made from now on compare each collective over the ranks before they run it.

    Source: https://pytorch.org/docs/stable/distributed.html#torch-distributed-debug, level DETAIL
    """
    dist.set_debug_level(dist.DebugLevel.DETAIL)  # type: ignore[attr-defined]


def world_size(group: Any = None) -> int:
    """Number of ranks in `group`, 1 without a process group."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def rank(group: Any = None) -> int:
    """This process's rank in `group`, 0 without a process group."""
    return dist.get_rank(group) if dist.is_available() and dist.is_initialized() else 0


@explained
def barrier(group: Any = None) -> None:
    """Wait until every rank is here. Collective: call on all ranks."""
    if world_size(group) > 1:
        dist.barrier(group=group)


@explained
def broadcast(obj: Any, src: int = 0, *, device: torch.device | None = None, group: Any = None) -> Any:
    """Return rank `src`'s `obj` on every rank. Collective: call on all ranks.

    Args:
        obj: A tensor, or anything that pickles. Other ranks' values are not looked at; they may be None.
        src: The rank whose value is taken.
        device: Where received tensors are put; None leaves them on the CPU.
        group: A process group; None is all ranks.

    Raises:
        ConfigError: There is no rank `src`.
    """
    size = world_size(group)
    if not isinstance(src, int) or not 0 <= src < size:
        raise ConfigError(f"src={src!r} is not a rank; there are {size} ranks, 0 to {size - 1}.")
    if size == 1:
        return obj
    if rank(group) == src:
        obj = tree_map(lambda x: x.detach().cpu() if isinstance(x, Tensor) else x, obj)
    payload = [obj if rank(group) == src else None]
    dist.broadcast_object_list(payload, src=src, group=group, device=_object_device(group))
    if device is None or device.type == "cpu":
        return payload[0]
    return tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, payload[0])


@explained
def all_reduce(data: Any, op: str = "mean", *, group: Any = None) -> Any:
    """Reduce every tensor and number in `data` over the ranks. Collective: call on all ranks.

    Args:
        data: A tensor, a number, or a nested dict, list or tuple of them; shapes must be equal on all ranks.
        op: "mean", "sum", "min", "max" or "product". The mean of whole numbers is a floating-point number.
        group: A process group; None is all ranks.

    Returns:
        The same nesting with new tensors and numbers; `data` is left as it was. Other leaves are returned unchanged.

    Raises:
        ConfigError: `op` is unknown.
        UsageError: Shapes or dtypes differ between ranks.
    """
    op = {"avg": "mean", "average": "mean", "prod": "product"}.get(op, op) if isinstance(op, str) else op
    if op not in REDUCE_OPS:
        raise ConfigError(f"op={op!r} is not a reduction; choose one of {', '.join(map(repr, REDUCE_OPS))}.")
    return tree_map(lambda leaf: _reduce_leaf(leaf, op, group), data)


def _reduce_leaf(leaf: Any, op: str, group: Any) -> Any:
    if isinstance(leaf, (bool, int, float)):
        number = torch.tensor(leaf, dtype=torch.float64 if isinstance(leaf, float) else torch.int64)
        if group is None and world_size() > 1:
            number = number.to(_object_device(group))
        return _reduce_leaf(number, op, group).item()
    if not isinstance(leaf, Tensor):
        return leaf
    value = leaf.detach().clone(memory_format=torch.contiguous_format)
    if op == "mean" and not (value.is_floating_point() or value.is_complex()):
        value = value.to(torch.get_default_dtype() if value.dtype != torch.int64 else torch.float64)
    elif value.dtype == torch.bool:
        value = value.to(torch.int64)
    size = world_size(group)
    if size == 1:
        return value
    _exchange_shapes(value, group, same=True)
    torch_op = {"mean": "SUM", "sum": "SUM", "min": "MIN", "max": "MAX", "product": "PRODUCT"}[op]
    dist.all_reduce(value, op=getattr(dist.ReduceOp, torch_op), group=group)
    return value.div_(size) if op == "mean" else value


@explained
def all_gather(data: Any, *, cat: bool = False, sync_grads: bool = False, group: Any = None) -> Any:
    """Collect every tensor and number in `data` from all ranks. Collective: call on all ranks.

    Args:
        data: A tensor, a number, or a nested dict, list or tuple of them. First dimensions may differ between ranks.
        cat: Concatenate along the first dimension, in rank order, instead of adding a rank dimension.
        sync_grads: Let gradients flow back to each rank's own part.
        group: A process group; None is all ranks.

    Returns:
        For each leaf of shape (n, ...): with `cat` a tensor of shape (sum of n, ...); otherwise a tensor of shape
        (world size, n, ...), also with one process, or a list of one tensor per rank where first dimensions differ.
        `out[r]` is rank r's value in both cases. Leaves that are neither tensors nor numbers are returned unchanged.

    Raises:
        UsageError: Dtypes, or dimensions other than the first, differ between ranks.
    """
    return tree_map(lambda leaf: _gather_leaf(leaf, cat, sync_grads, group), data)


def _gather_leaf(leaf: Any, cat: bool, sync_grads: bool, group: Any) -> Any:
    if isinstance(leaf, (bool, int, float)):
        leaf = torch.tensor(leaf, device=_object_device(group) if world_size(group) > 1 else None)
    if not isinstance(leaf, Tensor):
        return leaf
    parts = _gather_tensors(leaf, sync_grads, group)
    if cat:
        return torch.cat([p.reshape(1) if p.ndim == 0 else p for p in parts])
    return torch.stack(parts) if len({p.shape for p in parts}) == 1 else parts


def _gather_tensors(value: Tensor, sync_grads: bool, group: Any) -> list[Tensor]:
    """Every rank's tensor, in rank order; first dimensions may differ."""
    if world_size(group) == 1:
        return [value if sync_grads else value.detach()]
    shapes = _exchange_shapes(value, group, same=False)
    longest = max((s[0] for s in shapes if s), default=0)
    if value.ndim and value.shape[0] < longest:
        filler = value.new_zeros((longest - value.shape[0], *value.shape[1:]))
        value = torch.cat([value, filler])
    value = value.contiguous()
    parts = list(_Gather.apply(value, group)) if sync_grads else _gather_equal(value.detach(), group)  # type: ignore[no-untyped-call]
    return [p[: s[0]] if s else p for p, s in zip(parts, shapes, strict=True)]


def _gather_equal(value: Tensor, group: Any) -> list[Tensor]:
    parts = [torch.empty_like(value) for _ in range(world_size(group))]
    dist.all_gather(parts, value, group=group)
    return parts


class _Gather(torch.autograd.Function):
    """Every rank's tensor; backward sums the gradients that all ranks have for this rank's."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, group: Any) -> tuple[Tensor, ...]:
        ctx.group = group
        return tuple(_gather_equal(value, group))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = torch.stack(grads)
        dist.all_reduce(total, group=ctx.group)
        return total[rank(ctx.group)], None


@explained
def gather_for_metrics(data: Any, num_real: int | None = None, *, group: Any = None) -> Any:
    """Collect predictions and targets from all ranks, each sample once, in the order of the dataset's stream.

    Collective: call on all ranks, once for each batch.

    Args:
        data: A tensor of shape (n, ...), a list of n objects, or a nested dict or tuple of them, of this rank's batch.
        num_real: How many of the n samples are real; None is all. A rank that had no sample left got one to stay in
            step with the others, and passes 0.
        group: A process group; None is all ranks.

    Returns:
        The same nesting; tensors of shape (sum of real n, ...), lists concatenated. A 0-dim tensor becomes one value
        per rank that had real samples.
    """
    if isinstance(data, Tensor):
        value = data.reshape(1) if data.ndim == 0 else data
        if num_real is not None and num_real < value.shape[0]:
            value = value[:num_real]
        return torch.cat(_gather_tensors(value, False, group))
    if isinstance(data, dict):
        return {k: gather_for_metrics(v, num_real, group=group) for k, v in data.items()}
    if isinstance(data, tuple):
        parts = [gather_for_metrics(v, num_real, group=group) for v in data]
        return type(data)(*parts) if hasattr(data, "_fields") else tuple(parts)
    if isinstance(data, list) and any(isinstance(leaf, Tensor) for leaf in tree_leaves(data)):
        return [gather_for_metrics(v, num_real, group=group) for v in data]
    items = data if isinstance(data, list) else [data]
    items = items if num_real is None else items[:num_real]
    if world_size(group) == 1:
        return items
    gathered: list[Any] = [None] * world_size(group)
    dist.all_gather_object(gathered, items, group=group)
    return [item for part in gathered for item in part]


@explained
def all_gather_objects(obj: Any, *, group: Any = None) -> list[Any]:
    """Every rank's object, which must pickle, in rank order. Collective: call on all ranks."""
    if world_size(group) == 1:
        return [obj]
    gathered: list[Any] = [None] * world_size(group)
    dist.all_gather_object(gathered, obj, group=group)
    return gathered


def any_rank(flag: bool, *, group: Any = None) -> bool:
    """Whether `flag` is true on at least one rank. Collective: call on all ranks."""
    return bool(all_reduce(int(flag), "max", group=group)) if world_size(group) > 1 else flag


def new_cpu_group() -> Any:
    """A gloo group of all ranks, for what runs beside training. Collective: call on all ranks."""
    return dist.new_group(backend="gloo")


@explained
def smallest(number: int) -> int:
    """The smallest of all ranks' numbers, in one small all_reduce. Collective: call on all ranks."""
    if world_size() == 1:
        return number
    value = torch.tensor(number, device=_object_device(None))
    dist.all_reduce(value, op=dist.ReduceOp.MIN)
    return int(value.item())


@explained
def gather_numbers(number: Tensor) -> list[int]:
    """Every rank's int64 scalar, in one small all_gather. Collective: call on all ranks."""
    if world_size() == 1:
        return [int(number.item())]
    number = number.to(_object_device(None)).reshape(1)
    return [int(part) for part in torch.cat(_gather_equal(number, None)).tolist()]


class FirstRank:
    """Lets one rank of each `scope` run a block before the others, through the process group's store."""

    def __init__(self, store: Any) -> None:
        self._store = store

    @contextmanager
    def run(self, first: bool, scope: str, name: str) -> Iterator[None]:
        """Enter the block: at once when `first`, otherwise after the first rank has left it without an error.

        Raises:
            UsageError: (on the ranks that wait) the first rank's block raised; they don't run it.
        """
        # A new key for each block: the store outlives this object and is shared with others.
        key = f"lite/first/{broadcast(uuid.uuid4().hex)}/{scope}"
        if first:
            try:
                yield
            except BaseException as error:
                self._store.set(key, f"{type(error).__name__}: {error}")
                raise
            self._store.set(key, "")
            return
        self._store.wait([key], _FOREVER)
        problem = self._store.get(key).decode()
        if problem:
            raise UsageError(
                f"{name} failed inside rank_zero_first, so this rank didn't enter the block. It said: {problem}"
            )
        yield


def _exchange_shapes(value: Tensor, group: Any, *, same: bool) -> list[tuple[int, ...]]:
    """Every rank's shape; raises on all ranks where dtypes, or shapes beyond the first dimension, differ."""
    if value.ndim > _MAX_NDIM:
        raise ConfigError(
            f"a tensor of shape {tuple(value.shape)} has more than {_MAX_NDIM} dimensions; flatten it first."
        )
    row = [_DTYPES.index(value.dtype), value.ndim, *value.shape, *[0] * (_MAX_NDIM - value.ndim)]
    mine = torch.tensor(row, dtype=torch.int64, device=value.device)
    rows = [torch.empty_like(mine) for _ in range(world_size(group))]
    dist.all_gather(rows, mine, group=group)
    table = [r.tolist() for r in rows]
    shapes = [tuple(r[2 : 2 + r[1]]) for r in table]
    start: Callable[[tuple[int, ...]], tuple[int, ...]] = (lambda s: s) if same else (lambda s: (len(s), *s[1:]))
    if len({(r[0], start(s)) for r, s in zip(table, shapes, strict=True)}) > 1:
        found = ", ".join(
            f"rank {i} has {_DTYPES[r[0]]} {list(s)}" for i, (r, s) in enumerate(zip(table, shapes, strict=True))
        )
        wanted = "the same shape and dtype" if same else "the same dtype and, after the first dimension, the same shape"
        raise UsageError(f"a tensor must have {wanted} on all ranks, but {found}; pad or convert it before the call.")
    return shapes


def _object_device(group: Any) -> torch.device:
    """Where small control tensors must lie for this group's backend."""
    if dist.get_backend(group) == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
