"""What a forward leaves in memory for backward, found by running it on tensors without values."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from lite.errors import ConfigError
from lite.precision import Precision


def kept_by_forward(model: nn.Module, batch: Any, precision: Precision, casts_weights: bool = False) -> int:
    """Bytes in storages that autograd and the outputs hold after a forward, which are no parameter's or buffer's.

    Args:
        model: The raw model.
        batch: What its forward takes: a tensor, a tuple of arguments or a dict of keyword arguments.
        precision: What it computes in.
        casts_weights: Whether a mixed precision computes with converted weights, instead of under autocast.

    Raises:
        ConfigError: The forward does not run on such tensors.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    def fake(value: Any, dtype: torch.dtype | None) -> Any:
        if not isinstance(value, Tensor):
            return value
        dtype = dtype if dtype is not None and value.is_floating_point() else value.dtype
        with mode:
            return torch.empty_strided(value.shape, value.stride(), dtype=dtype, device=device)

    half = precision.compute_dtype
    dtype = half if casts_weights and half is not None else precision.param_dtype
    device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
    args, kwargs = ((), batch) if isinstance(batch, dict) else (batch if isinstance(batch, tuple) else (batch,), {})
    kept: dict[int, Tensor] = {}  # tensors, so that no storage's id is given to another one
    mode = FakeTensorMode()

    def keep(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    parameters = {name: fake(t.detach(), dtype).requires_grad_(t.requires_grad) for name, t in model.named_parameters()}
    buffers = {name: fake(b, precision.param_dtype) for name, b in model.named_buffers()}
    weights = {**parameters, **buffers}
    inputs, named_inputs = tree_map(lambda value: fake(value, dtype), (args, kwargs))
    own = {t.untyped_storage()._cdata for t in weights.values()}
    try:
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(devices=[]))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(keep, _back))
            stack.enter_context(_without_log())
            stack.enter_context(mode)
            if half is not None and not casts_weights:
                stack.enter_context(torch.autocast(device.type, dtype=half))
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


@contextmanager
def _without_log() -> Iterator[None]:
    """Within it torch does not log what fails on tensors without values: the error says it, and the log a page more."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    level = log.level
    log.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        log.setLevel(level)


def _back(tensor: Tensor) -> Tensor:
    return tensor
