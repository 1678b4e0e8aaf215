"""Norms and clipping of gradients of which each rank holds a part, also where a model's lie on several meshes.

torch 2.13: `clip_grad_norm_` refuses plain gradients beside DTensors, and DTensors of several meshes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lite.sharded import is_sharded, local, whole


def settle(parameters: Iterable[nn.Parameter]) -> None:
    """Add up gradients of which each rank holds a summand. Collective over the ranks that do.

    Sequence parallelism leaves those of the layers that it splits so.
    """
    for parameter in parameters:
        grad: Any = parameter.grad
        if is_sharded(grad) and any(placement.is_partial() for placement in grad.placements):
            with torch.no_grad():
                parameter.grad = grad.redistribute(placements=parameter.placements)  # type: ignore[attr-defined]


def local_gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """This rank's parts of the gradients, as views; `settle` them before."""
    return [local(p.grad) for p in parameters if p.grad is not None]


def total_norm(parameters: list[nn.Parameter], norm_type: float) -> Tensor:
    """The norm of all gradients as one vector, 0-dim and equal on all ranks. Collective.

    Gradients are grouped by how they are sharded, since torch takes the norm of one kind at a time.
    """
    settle(parameters)
    groups: dict[Any, list[Tensor]] = {}
    for parameter in parameters:
        grad: Any = parameter.grad
        if grad is not None:
            kind = (grad.device_mesh, tuple(grad.placements)) if is_sharded(grad) else None
            groups.setdefault(kind, []).append(grad)
    norms = [_norm(grads, norm_type) for grads in groups.values()]
    if len(norms) == 1:
        return norms[0]
    if not norms:
        return torch.zeros(())
    first = norms[0].device
    total: Tensor = torch.linalg.vector_norm(torch.stack([norm.to(first) for norm in norms]), norm_type)
    return total


def _norm(grads: list[Tensor], norm_type: float) -> Tensor:
    """Of gradients that are sharded alike. Collective over the ranks that have a part."""
    if norm_type == float("inf") and is_sharded(grads[0]):
        # torch 2.13 takes no largest element of an empty part, which a rank has of a tensor with few rows.
        padded = [nn.functional.pad(local(grad).abs().flatten(), (0, 1)) for grad in grads]
        largest = torch.stack([part.amax().to(torch.float64) for part in padded]).amax()
        mesh: Any = grads[0].device_mesh  # type: ignore[attr-defined]
        for dim in range(mesh.ndim):
            dist.all_reduce(largest, dist.ReduceOp.MAX, group=mesh.get_group(dim))
        return largest.to(grads[0].dtype)
    return whole(nn.utils.get_total_norm(grads, norm_type))


def clip_norm(parameters: list[nn.Parameter], max_norm: float, norm: Tensor) -> None:
    """Scale each rank's parts by what brings the total norm down to `max_norm`, as torch does it."""
    factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    with torch.no_grad():
        for grads in _by_kind(local_gradients(parameters)):
            torch._foreach_mul_(grads, factor.to(grads[0].device))


def clip_value(parameters: Iterable[nn.Parameter], limit: float) -> None:
    """Clamp each element to [-limit, limit]."""
    parameters = list(parameters)
    settle(parameters)
    with torch.no_grad():
        for grads in _by_kind(local_gradients(parameters)):
            torch._foreach_clamp_min_(grads, -limit)
            torch._foreach_clamp_max_(grads, limit)


def _by_kind(grads: list[Tensor]) -> Iterable[list[Tensor]]:
    groups: dict[Any, list[Tensor]] = {}
    for grad in grads:
        groups.setdefault((grad.device, grad.dtype), []).append(grad)
    return groups.values()
