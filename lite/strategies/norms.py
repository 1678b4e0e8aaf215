"""Norms whose weights fully_shard casts to 16 bits, on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.instancenorm import _InstanceNorm


def give_norms_their_dtype(module: nn.Module, device: torch.device) -> list[Callable[[], None]]:
    """Let norms on the CPU get inputs of their weights' dtype, where that is a 16-bit one; returns what undoes it.

    The CPU's kernels of LayerNorm, GroupNorm and InstanceNorm take no others, and autocast doesn't convert them as it
    does on GPUs (torch 2.13).
    """
    if device.type != "cpu":
        return []
    kinds = (nn.LayerNorm, nn.GroupNorm, _InstanceNorm)
    norms = [part for part in module.modules() if isinstance(part, kinds) and part.weight is not None]
    return [part.register_forward_pre_hook(_as_weights).remove for part in norms]


def _as_weights(part: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
    dtype = part.weight.dtype
    if dtype in (torch.bfloat16, torch.float16) and inputs and inputs[0].dtype is not dtype:
        return inputs[0].to(dtype), *inputs[1:]
    return None
