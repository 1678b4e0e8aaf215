"""Norms whose weights fully_shard casts to 16 bits, on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.instancenorm import _InstanceNorm

_KINDS = (nn.LayerNorm, nn.GroupNorm, _InstanceNorm)
_HALF = (torch.bfloat16, torch.float16)


def give_norms_their_dtype(module: nn.Module, device: torch.device) -> list[Callable[[], None]]:
    """Let inputs and weights of norms on the CPU go together where the weights are 16-bit; returns what undoes it.

    The CPU's kernels of LayerNorm, GroupNorm and InstanceNorm take float32 with float32 weights alone, and autocast
    doesn't convert them as it does on GPUs (torch 2.13). torch's own classes get their inputs in the weights' dtype.
    A subclass with a forward of its own, which may compute in float32 (CLIP's, say), gets its weights in float32.
    """
    if device.type != "cpu":
        return []
    undo: list[Callable[[], None]] = []
    for part in module.modules():
        if not isinstance(part, _KINDS) or part.weight is None:
            continue
        if type(part).forward in [kind.forward for kind in _KINDS]:
            undo.append(part.register_forward_pre_hook(_as_weights, with_kwargs=True).remove)
        else:
            weights = _Float32Weights()
            undo.append(part.register_forward_pre_hook(weights.lend).remove)
            # Before fully_shard's own hook, which takes the weights of a layer that is sharded by itself.
            taking_back = part.register_forward_hook(weights.take_back, prepend=True, always_call=True)
            undo.append(taking_back.remove)
    return undo


def _as_weights(part: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
    dtype = part.weight.dtype
    if dtype not in _HALF:
        return None
    if args:
        return (args[0].to(dtype), *args[1:]), kwargs
    return args, {key: value.to(dtype) for key, value in kwargs.items()}


class _Float32Weights:
    """One norm's weights in float32 while it runs."""

    def __init__(self) -> None:
        self._own: dict[str, Any] = {}

    def lend(self, part: nn.Module, *unused: Any) -> None:
        self._own = {name: p for name, p in part._parameters.items() if isinstance(p, Tensor) and p.dtype in _HALF}
        parameters: dict[str, Any] = part._parameters
        parameters.update({name: p.float() for name, p in self._own.items()})

    def take_back(self, part: nn.Module, *unused: Any) -> None:
        part._parameters.update(self._own)
        self._own = {}
