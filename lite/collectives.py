"""Communication between ranks, as functions over nested data; each is a local no-op when there is only one process.

They use torch.distributed's default process group, which a strategy has made. Nestings, shapes and dtypes are compared
before data is sent.
"""

from __future__ import annotations

import functools
import io
import pickle
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_map

from lite.agreement import compare, control_device
from lite.errors import ConfigError, UsageError
from lite.first_rank import refuse_alone
from lite.nesting import NUMBERS, describe, flatten, is_value

REDUCE_OPS = ("mean", "sum", "min", "max", "product")
_IRREDUCIBLE = {
    getattr(torch, name)
    for name in dir(torch)
    if name.startswith("float8") or name in ("int16", "uint16", "uint32", "uint64")
}


F = TypeVar("F", bound=Callable[..., Any])
_cpu_groups: dict[Any, Callable[[], Any]] = {}  # and, weakly, the default group beside which each was made
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


def are_compared() -> bool:
    """Whether process groups compare each collective over the ranks, by `name_mismatches` or torch's own variable."""
    return bool(dist.get_debug_level() == dist.DebugLevel.DETAIL)  # type: ignore[attr-defined]


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
        refuse_alone("barrier")
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
        UsageError: (on all ranks) the object doesn't pickle.
    """
    size = world_size(group)
    if not isinstance(src, int) or not 0 <= src < size:
        raise ConfigError(f"src={src!r} is not a rank; there are {size} ranks, 0 to {size - 1}.")
    if size == 1:
        return obj
    refuse_alone("broadcast")
    payload: list[Any] = [_pickled(obj) if rank(group) == src else None]
    dist.broadcast_object_list(payload, src=src, group=group, device=control_device(group))
    return _unpickled(payload[0], f"broadcast: rank {src}'s object", device)


@explained
def all_reduce(data: Any, op: str = "mean", *, group: Any = None) -> Any:
    """Reduce every tensor and number in `data` over the ranks. Collective: call on all ranks.

    Args:
        data: A tensor, a number, or a nested dict, list or tuple of them; keys and shapes must be equal on all ranks,
            the order of keys need not.
        op: "mean", "sum", "min", "max" or "product". The mean of whole numbers is a floating-point number.
        group: A process group; None is all ranks.

    Returns:
        The same nesting with new tensors and numbers; `data` is left as it was. Other leaves are returned unchanged.

    Raises:
        ConfigError: `op` is unknown.
        UsageError: Nestings, shapes or dtypes differ between ranks, or torch can't reduce a tensor's dtype.
    """
    op = {"avg": "mean", "average": "mean", "prod": "product"}.get(op, op) if isinstance(op, str) else op
    if op not in REDUCE_OPS:
        raise ConfigError(f"op={op!r} is not a reduction; choose one of {', '.join(map(repr, REDUCE_OPS))}.")
    leaves, rebuild = flatten(data)
    values = [_reducible(leaf, op) if is_value(leaf) else None for leaf in leaves]
    if world_size(group) > 1:
        refuse_alone("all_reduce")
        device = control_device(group)
        values = [v.to(device) if v is not None and device.type != "cpu" else v for v in values]
        refusal = next((text for v in values if v is not None and (text := _irreducible(v, op))), None)
        present = [v for v in values if v is not None]
        compare(describe(data), present, same=True, group=group, refusal=refusal)
        for value in values:
            if value is not None:
                torch_op = {"mean": "SUM", "sum": "SUM", "min": "MIN", "max": "MAX", "product": "PRODUCT"}[op]
                dist.all_reduce(value, op=getattr(dist.ReduceOp, torch_op), group=group)
                if op == "mean":
                    value.div_(world_size(group))
    results = [
        leaf if value is None else value if isinstance(leaf, Tensor) else value.item()
        for leaf, value in zip(leaves, values, strict=True)
    ]
    return rebuild(results)


def _reducible(leaf: Any, op: str) -> Tensor:
    """A new tensor that can hold the reduction."""
    if not isinstance(leaf, Tensor):
        leaf = torch.tensor(leaf, dtype=torch.float64 if isinstance(leaf, float) else torch.int64)
    value: Tensor = leaf.detach().clone(memory_format=torch.contiguous_format)
    if op == "mean" and not (value.is_floating_point() or value.is_complex()):
        return value.to(torch.get_default_dtype() if value.dtype != torch.int64 else torch.float64)
    if value.dtype == torch.bool:
        return value.to(torch.int64)
    return value


def _irreducible(value: Tensor, op: str) -> str | None:
    if value.is_complex() and op in ("min", "max"):
        return f"complex numbers have no {op}imum; reduce their absolute values."
    if value.dtype not in _IRREDUCIBLE:
        return None
    wider = "torch.float32" if value.is_floating_point() else "torch.int64"
    return f"a tensor of dtype {value.dtype} can't be reduced between ranks; convert it first, e.g. by .to({wider})."


@explained
def all_gather(data: Any, *, cat: bool = False, sync_grads: bool = False, group: Any = None) -> Any:
    """Collect every tensor and number in `data` from all ranks. Collective: call on all ranks.

    Args:
        data: A tensor, a number, or a nested dict, list or tuple of them. First dimensions may differ between ranks;
            keys may not, but for their order.
        cat: Concatenate along the first dimension, in rank order, instead of adding a rank dimension.
        sync_grads: Let gradients flow back to each rank's own part.
        group: A process group; None is all ranks.

    Returns:
        For each leaf of shape (n, ...): with `cat` a tensor of shape (sum of n, ...); otherwise a tensor of shape
        (world size, n, ...), also with one process, or a list of one tensor per rank where first dimensions differ.
        `out[r]` is rank r's value in both cases. Leaves that are neither tensors nor numbers are returned unchanged.

    Raises:
        UsageError: Nestings, dtypes, or dimensions other than the first, differ between ranks.
    """
    device = control_device(group) if world_size(group) > 1 else None
    leaves, rebuild = flatten(data)
    values = [torch.tensor(leaf, device=device) if isinstance(leaf, NUMBERS) else leaf for leaf in leaves]
    gathered = iter(_gather_all(describe(data), [v for v in values if isinstance(v, Tensor)], sync_grads, group))
    return rebuild([_joined(next(gathered), cat) if isinstance(v, Tensor) else v for v in values])


def _joined(parts: list[Tensor], cat: bool) -> Any:
    if cat:
        return torch.cat([p.reshape(1) if p.ndim == 0 else p for p in parts])
    return torch.stack(parts) if len({p.shape for p in parts}) == 1 else parts


def _gather_all(
    nesting: str, values: list[Tensor], sync_grads: bool, group: Any, *, refusal: str | None = None
) -> list[list[Tensor]]:
    """Of each tensor every rank's, in rank order; first dimensions may differ."""
    if world_size(group) == 1:
        if refusal:
            raise UsageError(refusal)
        return [[value if sync_grads else value.detach()] for value in values]
    refuse_alone("all_gather")
    shapes = compare(nesting, values, same=False, group=group, refusal=refusal)
    return [_gather_one(value, column, sync_grads, group) for value, column in zip(values, shapes, strict=True)]


def _gather_one(value: Tensor, shapes: list[tuple[int, ...]], sync_grads: bool, group: Any) -> list[Tensor]:
    longest = max((s[0] for s in shapes if s), default=0)
    if value.ndim and value.shape[0] < longest:
        filler = value.new_zeros((longest - value.shape[0], *value.shape[1:]))
        value = torch.cat([value, filler])
    parts = list(_Gather.apply(value, group)) if sync_grads else _gather_equal(value.detach(), group)  # type: ignore[no-untyped-call]
    return [p[: s[0]] if s else p for p, s in zip(parts, shapes, strict=True)]


def _gather_equal(value: Tensor, group: Any) -> list[Tensor]:
    # As bytes: backends don't send every dtype, and a gathering doesn't compute.
    value = value.resolve_conj().resolve_neg().contiguous()
    parts = [torch.empty_like(value, memory_format=torch.contiguous_format) for _ in range(world_size(group))]
    dist.all_gather([as_bytes(p) for p in parts], as_bytes(value), group=group)
    return parts


def as_bytes(value: Tensor) -> Tensor:
    """The memory of a contiguous tensor, flat."""
    # Not by view(-1): a tensor of one element is contiguous with any stride, and keeps it.
    return value.as_strided((value.numel(),), (1,)).view(torch.uint8)


def take_from_rank_0(tensor: Tensor) -> None:
    """Give a tensor rank 0's values, in place. Collective: call on all ranks."""
    sent = tensor.detach().contiguous()
    dist.broadcast(as_bytes(sent), src=0)
    if sent.data_ptr() != tensor.data_ptr():
        tensor.detach().copy_(sent)


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
def gather_for_metrics(
    data: Any,
    num_real: int | None = None,
    *,
    device: torch.device | None = None,
    group: Any = None,
    refusal: str | None = None,
) -> Any:
    """Collect predictions and targets from all ranks, each sample once, in the order of the dataset's stream.

    Collective: call on all ranks, once for each batch.

    Args:
        data: A tensor of shape (n, ...), a list of n objects (one for each sample: strings, dicts of boxes, ...), or a
            nested dict or tuple of them, of this rank's batch. A list of tensors is n objects too.
        num_real: How many of the n samples are real; None is all. A rank that had no sample left got one to stay in
            step with the others, and passes 0.
        device: Where tensors in lists are put; None leaves them on the CPU.
        group: A process group; None is all ranks.
        refusal: Why this rank can't take part; it is raised on all ranks.

    Returns:
        The same nesting; tensors of shape (sum of real n, ...), lists concatenated. A 0-dim tensor becomes one value
        per rank that had real samples. Another leaf becomes a list with one entry for each such rank.

    Raises:
        UsageError: Nestings, dtypes or shapes differ between ranks, an object doesn't pickle, or one can't take part.
    """
    leaves, rebuild = flatten(data, split_lists=False)
    tensors = [_real(leaf, num_real) for leaf in leaves if isinstance(leaf, Tensor)]
    gathered = iter(_gather_all(describe(data, split_lists=False), tensors, False, group, refusal=refusal))
    results = [
        torch.cat(next(gathered)) if isinstance(leaf, Tensor) else _gather_objects(leaf, num_real, device, group)
        for leaf in leaves
    ]
    return rebuild(results)


def _real(value: Tensor, num_real: int | None) -> Tensor:
    value = value.reshape(1) if value.ndim == 0 else value
    return value[:num_real] if num_real is not None else value


def _gather_objects(leaf: Any, num_real: int | None, device: torch.device | None, group: Any) -> list[Any]:
    items = leaf if isinstance(leaf, list) else [leaf]
    items = items if num_real is None else items[:num_real]
    if world_size(group) == 1:
        return items
    parts = all_gather_objects(items, name="gather_for_metrics: rank {}'s list", device=device, group=group)
    return [item for part in parts for item in part]


@explained
def all_gather_objects(
    obj: Any,
    *,
    name: str = "all_gather_objects: rank {}'s object",
    device: torch.device | None = None,
    group: Any = None,
) -> list[Any]:
    """Every rank's object, in rank order. Collective: call on all ranks.

    Args:
        obj: Anything that pickles.
        name: What the object of rank {} is called in an error.
        device: Where received tensors are put; None leaves them on the CPU.
        group: A process group; None is all ranks.

    Raises:
        UsageError: (on all ranks) an object doesn't pickle.
    """
    if world_size(group) == 1:
        return [obj]
    refuse_alone("all_gather_objects")
    payloads: list[Any] = [None] * world_size(group)
    dist.all_gather_object(payloads, _pickled(obj), group=group)
    return [_unpickled(payload, name.format(rank), device) for rank, payload in enumerate(payloads)]


def any_rank(flag: bool, *, group: Any = None) -> bool:
    """Whether `flag` is true on at least one rank. Collective: call on all ranks."""
    return bool(all_reduce(int(flag), "max", group=group)) if world_size(group) > 1 else flag


def new_cpu_group() -> Any:
    """A gloo group of all ranks, for what runs beside training. Collective: call on all ranks."""
    group = dist.new_group(backend="gloo")
    _cpu_groups[group] = weakref.ref(dist.group.WORLD)
    return group


def destroy_cpu_groups(*groups: Any) -> None:
    """Give back groups that `new_cpu_group` made, those given or all: before the default group is destroyed."""
    for group in groups or tuple(_cpu_groups):
        default = _cpu_groups.pop(group, lambda: None)()
        if default is not None and default is dist.group.WORLD:  # else it has taken the others along
            dist.destroy_process_group(group)


@explained
def smallest(number: int) -> int:
    """The smallest of all ranks' numbers, in one small all_reduce. Collective: call on all ranks."""
    if world_size() == 1:
        return number
    refuse_alone("a number that all ranks agree on")
    value = torch.tensor(number, device=control_device(None))
    dist.all_reduce(value, op=dist.ReduceOp.MIN)
    return int(value.item())


@explained
def largest(value: Tensor) -> None:
    """Make a tensor the elementwise maximum over the ranks, in place, without waiting for it."""
    if world_size() > 1:
        dist.all_reduce(value, op=dist.ReduceOp.MAX)


@explained
def gather_numbers(number: Tensor) -> list[int]:
    """Every rank's int64 scalar, in one small all_gather. Collective: call on all ranks."""
    if world_size() == 1:
        return [int(number.item())]
    refuse_alone("a comparison of all ranks")
    number = number.to(control_device(None)).reshape(1)
    return [int(part) for part in torch.cat(_gather_equal(number, None)).tolist()]


def _pickled(obj: Any) -> bytes | str:
    """The object as bytes, or why it can't be sent, so that the ranks that wait for it are told."""
    try:
        file = io.BytesIO()
        _Pickler(file).dump(tree_map(lambda x: x.detach().cpu() if isinstance(x, Tensor) else x, obj))
        return file.getvalue()
    except Exception as error:  # pickling runs the user's own code
        return f"{type(error).__name__}: {error}"


class _Pickler(pickle.Pickler):
    """Also takes tensors of those dtypes (uint16, float8) that can be pickled but not unpickled with torch 2.13."""

    def reducer_override(self, obj: Any) -> Any:
        if type(obj) is Tensor and obj.dtype in _IRREDUCIBLE and obj.layout == torch.strided:
            return _from_bytes, (as_bytes(obj.contiguous()), obj.dtype, tuple(obj.shape))
        return NotImplemented


def _from_bytes(data: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    return data.view(dtype).view(shape)


def _unpickled(payload: bytes | str, what: str, device: torch.device | None) -> Any:
    if isinstance(payload, str):
        raise UsageError(f"{what} does not pickle, so it can't be sent ({payload}); pass plain values and tensors.")
    obj = pickle.loads(payload)
    if device is None or device.type == "cpu":
        return obj
    return tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, obj)
