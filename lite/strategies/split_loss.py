"""Losses of logits that stay split over the classes: torch's `loss_parallel`, with gradients for all of them.

In torch 2.13 its nll_loss hands on the gradient of the whole cross-entropy, and its log_softmax nothing of its own, so
that an entropy, a divergence or a smoothed loss of that log_softmax gets wrong gradients without a word. Here each has
its own, for one sum over the ranks more. Relies on DTensor's table of handlers, which `loss_parallel` fills, and on the
first argument of nll_loss's backward, log_softmax's result, being used there for its exp alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lite.sharded import local

_within: list[Any] = []  # torch's one context, for each strategy of this process that is within it


@contextmanager
def loss_parallel() -> Iterator[None]:
    """torch's `loss_parallel`, from the first strategy that enters it until the last one leaves.

    torch 2.13 keeps one table for the whole process, and fails where it is taken away a second time: also by a block of
    the user's own.
    """
    from torch.distributed.tensor.parallel import loss_parallel as of_torch

    context = _within[0] if _within else of_torch()
    if not _within:
        context.__enter__()
        _separate()
    _within.append(context)
    try:
        yield
    finally:
        _within.pop()
        if not _within:
            with suppress(KeyError):
                context.__exit__(None, None, None)


def _separate() -> None:
    """Exchange the backward handlers of the two."""
    from torch.distributed.tensor import DTensor

    handlers: dict[Any, Any] = DTensor._op_dispatcher._custom_op_handlers
    aten = torch.ops.aten
    handlers[aten._log_softmax_backward_data.default] = _log_softmax_backward
    for backward in (aten.nll_loss_backward.default, aten.nll_loss2d_backward.default):
        handlers[backward] = partial(_without_log_softmax, handlers[backward])


def _without_log_softmax(handle: Callable[..., Any], op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    gradient, result, target, weight, reduction, ignore_index, total = args
    if weight is not None:
        gradient, target = _of_each_target(gradient, result, local(target), reduction, ignore_index, local(total))
        reduction = 0  # none
    nothing = _like(result, torch.full_like(local(result), -torch.inf))
    return handle(op, (gradient, nothing, target, weight, reduction, ignore_index, total), kwargs)


def _of_each_target(
    gradient: Any, result: Any, target: Tensor, reduction: int, ignore_index: int, total: Tensor
) -> tuple[Any, Tensor]:
    """The gradient of each target's own loss, and targets that are classes: torch 2.13 looks up the weight of ignored
    ones, too."""
    from torch.distributed.tensor import DTensor, Replicate

    counts = target != ignore_index
    each = local(gradient) / total if reduction == 1 else local(gradient)  # 1: mean, 2: sum
    each = torch.where(counts, each.expand(target.shape), 0)
    mesh = result.device_mesh
    return DTensor.from_local(each, mesh, [Replicate()] * mesh.ndim, run_check=False), target.where(counts, 0)


def _log_softmax_backward(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`gradient - softmax * sum(gradient over all classes)`."""
    from torch.distributed._functional_collectives import all_reduce
    from torch.distributed.tensor.parallel.loss import _find_all_reduce_mesh_dim

    gradient, result, dim, dtype = args
    mesh, placements = result.device_mesh, result.placements
    axis = _find_all_reduce_mesh_dim(placements, dim % result.ndim)
    own, logs = local(gradient.redistribute(mesh, placements)), local(result)
    total = all_reduce(own.sum(dim, keepdim=True), "sum", (mesh, axis))
    return _like(result, (own - logs.exp() * total).to(dtype))


def _like(result: Any, part: Tensor) -> Any:
    """A DTensor that is split as `result` is, of this rank's part."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        part, result.device_mesh, result.placements, run_check=False, shape=result.shape, stride=result.stride()
    )
