"""Tensors of which each rank holds a part (torch's DTensor): asked about, cut from whole ones, and put together again;
and tensors that another rank holds.

Nothing of DTensor is imported before there is one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from lite.errors import UsageError
from lite.state import map_leaves, parameters_of


def is_sharded(value: Any) -> bool:
    """Whether it is a DTensor, one that every rank holds whole included."""
    return isinstance(value, Tensor) and hasattr(value, "device_mesh")


def is_emptied(parameter: Tensor) -> bool:
    """Whether DeepSpeed takes its gradient from it in backward (see lite.strategies.deepspeed_gradients)."""
    return hasattr(parameter, "_hp_mapping") or hasattr(parameter, "ds_id")


def whole_shape(parameter: Tensor) -> tuple[int, ...]:
    """The shape of a parameter with all ranks' parts; DeepSpeed's stage 3 leaves an empty tensor in its place."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


class Elsewhere(Tensor):
    """Stands in a state for a tensor that another rank holds, as a tensor on the meta device of its shape and dtype."""

    is_elsewhere = True

    def __deepcopy__(self, memo: dict[int, Any]) -> Elsewhere:
        copied = memo[id(self)] = Elsewhere.like(self.shape, self.dtype)
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise UsageError(
            f"this state lacks a tensor of shape {tuple(self.shape)} that another rank of the pipeline holds, and "
            "can't be pickled (torch.save) without it; store it whole by lite.save or lite.export on all ranks, or "
            "call lite.teardown() before."
        )

    @classmethod
    def like(cls, shape: Any, dtype: torch.dtype) -> Elsewhere:
        """One of that shape and dtype."""
        return torch.empty(shape, dtype=dtype, device="meta").as_subclass(cls)


def is_elsewhere(value: Any) -> bool:
    """Whether it stands for a tensor of another rank."""
    return getattr(value, "is_elsewhere", False)


def whole(value: Tensor) -> Tensor:
    """The tensor with all ranks' parts. Collective over the ranks that have a part; plain tensors are returned."""
    if not is_sharded(value):
        return value
    with torch.no_grad():
        full: Tensor = value.full_tensor()  # type: ignore[attr-defined]
    return full


def local(value: Tensor) -> Tensor:
    """This rank's part, which shares its memory with the DTensor; plain tensors are returned."""
    if not is_sharded(value):
        return value
    with torch.no_grad():
        part: Tensor = value.to_local()  # type: ignore[attr-defined]
    return part


def cut(value: Any, model: Tensor) -> Tensor:
    """A tensor that is sharded as `model` is, with the values of `value`. Without communication.

    Args:
        value: A whole tensor that every rank has, or one that is read from a checkpoint when it is asked for.
        model: A DTensor of the same shape.
    """
    from torch.distributed.tensor import DTensor, distribute_tensor

    mesh, placements = model.device_mesh, model.placements  # type: ignore[attr-defined]
    device = local(model).device
    read = getattr(value, "read_part", None)
    if read is not None:
        part = read(*_box(model)).to(device)
        return DTensor.from_local(part, mesh, placements, run_check=False, shape=model.shape, stride=model.stride())
    with torch.no_grad():
        parts = distribute_tensor(value.detach(), mesh, placements, src_data_rank=None)
        # A copy of the part alone: a view would keep all of the whole tensor.
        part = parts.to_local().to(device, copy=True)
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=model.shape, stride=model.stride())


def _box(model: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Offsets and sizes of this rank's part in the whole tensor."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    sizes, offsets = compute_local_shape_and_global_offset(model.shape, model.device_mesh, model.placements)  # type: ignore[attr-defined]
    return tuple(offsets), tuple(sizes)


def gather(content: Any, *, keep: bool) -> Any:
    """Nested data with every DTensor put together, on the CPU. Collective: the same nesting on all ranks.

    One tensor at a time is whole on the ranks that don't keep any.

    Args:
        content: Nested dicts, lists and tuples.
        keep: Whether this rank wants the result; others get the nesting with None where a DTensor was.
    """

    def together(leaf: Any) -> Any:
        if not is_sharded(leaf):
            return leaf
        full = whole(leaf)
        return full.cpu() if keep else None

    return map_leaves(together, content)


def whole_tensors(data: Any) -> Any:
    """Nested data with every DTensor put together. Collective over the ranks that have parts."""
    return tree_map(lambda leaf: whole(leaf) if is_sharded(leaf) else leaf, data)


def holds_parts(target: Any) -> bool:
    """Whether it is a module or an optimizer of which a tensor is sharded, or another rank's."""
    if isinstance(target, nn.Module):
        return any(is_sharded(t) or t.is_meta for t in (*target.parameters(), *target.buffers()))
    if isinstance(target, Optimizer):
        return any(is_sharded(p) or p.is_meta for p in parameters_of(target))
    return False
