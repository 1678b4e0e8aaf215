"""What a precision does to a model, its inputs and outputs, the backward pass and the optimizer step.

`dtypes` are data, so that other parts can choose by them; nothing here knows of strategies. The base class is full
precision: every method is the plain torch operation.
"""

from __future__ import annotations

import copy
import dataclasses
import operator
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_flatten, tree_is_leaf, tree_unflatten

_LEAVES = (type(None), bool, int, float, str)


class Precision:
    """Full 32-bit precision, and the base of the others.

    Attributes:
        name: As the user writes it, e.g. "bf16-mixed".
        param_dtype: What floating-point parameters are converted to; None leaves them as they are.
        compute_dtype: What autocast computes in; None without autocast.
        output_dtype: What floating-point outputs of half precision are converted to; None leaves them as they are.
        changes_forward: Whether a forward needs anything around it at all.
        changes_step: Whether `step` is more than the optimizer's own step.
        divisible: Whether ranks can hold parts of the models that it converts.
    """

    name = "32-true"
    param_dtype: torch.dtype | None = None
    compute_dtype: torch.dtype | None = None
    output_dtype: torch.dtype | None = None
    changes_forward = False
    changes_step = False
    divisible = True

    def connect(self, device: torch.device) -> None:
        """This process computes on `device`; refuse one that the precision was not made for."""

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Convert the parameters and buffers, in place."""
        return module

    def release_module(self, module: nn.Module) -> None:
        """Give a module the layers back that `convert_module` has exchanged."""

    def convert_input(self, data: Any) -> Any:
        """Convert what goes into a forward."""
        return data

    def convert_output(self, data: Any) -> Any:
        """Convert what comes out of a forward."""
        return data

    def autocast(self) -> AbstractContextManager[Any]:
        """A fresh context in which a forward computes."""
        return nullcontext()

    def init_context(self, device: torch.device) -> AbstractContextManager[Any]:
        """A context in which new tensors and modules get this precision's dtype."""
        return default_dtype(self.param_dtype) if self.param_dtype is not None else nullcontext()

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Compute gradients."""
        loss.backward(*args, **kwargs)  # type: ignore[no-untyped-call]

    def begin_backward(self) -> Tensor | None:
        """What to multiply losses by whose backwards others than `backward` call, before they do; None is 1.

        Called on all ranks, those that have no loss included, before each such backward.
        """
        return None

    def add_optimizer(self, optimizer: Optimizer) -> None:
        """This optimizer is set up: its steps go through `step`."""

    def forget_optimizer(self, optimizer: Optimizer) -> None:
        """This optimizer is the user's own again."""

    def share_overflow(
        self, local: Callable[[list[nn.Parameter]], list[Tensor] | None], agree: Callable[[Tensor], None]
    ) -> None:
        """Gradients are sharded, so one rank alone may find an inf among its parts.

        Args:
            local: This rank's parts of the parameters' gradients, as views; None where they are whole.
            agree: Makes a 0-dim tensor every rank's maximum, in place.
        """

    def unscale(self, optimizer: Optimizer) -> None:
        """Bring the optimizer's gradients to their true size; nothing the second time before a step."""

    def accept(self, optimizer: Optimizer) -> None:
        """The optimizer's inf or NaN gradients were replaced by good ones: don't leave its next step out."""

    def step(
        self,
        optimizer: Optimizer,
        raw_step: Callable[..., Any],
        closure: Callable[[], Any] | None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Take one optimizer step by `raw_step`, with whatever else the user's optimizer takes."""
        return raw_step(*args, **kwargs) if closure is None else raw_step(closure, *args, **kwargs)

    def note_run(self, optimizer: Optimizer) -> None:
        """The optimizer's own step is about to run, from within `step`."""

    def step_was_skipped(self, optimizer: Optimizer) -> bool:
        """Whether the optimizer's last step was left out because of inf or NaN gradients."""
        return False

    def step_counts(self, optimizer: Optimizer) -> tuple[int, int | Tensor]:
        """How many steps the optimizer was asked for so far, and how many of them were left out."""
        return 0, 0

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold; empty without a loss scale."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state that `state_dict` returned."""


class Uncast(Precision):
    """A precision whose casts around a forward are somebody else's.

    Args:
        precision: The one that the user asked for.
    """

    def __init__(self, precision: Precision) -> None:
        self.name = precision.name


def is_packed(tensor: Tensor) -> bool:
    """Whether it is a frozen parameter whose values are kept in a form of its own, which collectives don't send."""
    return not tensor.requires_grad and is_traceable_wrapper_subclass(tensor) and not hasattr(tensor, "device_mesh")


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Within the block new tensors are of this dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def cast_floating(data: Any, dtype: torch.dtype, only: tuple[torch.dtype, ...] | None = None) -> Any:
    """Convert floating-point tensors in nested data; a single tensor takes the short way. Parameters are left alone.

    A container in which nothing has to be converted is returned itself, so that what a model writes into one (a cache,
    a list) is where the user looks for it.

    Args:
        data: A tensor or nested data.
        dtype: The wanted dtype.
        only: Convert these dtypes alone; None is every floating-point dtype.

    Example:
        >>> cache = {"keys": []}
        >>> cast_floating(cache, torch.float64) is cache
        True
    """
    if isinstance(data, Tensor):
        wanted = data.is_floating_point() if only is None else data.dtype in only
        return data.to(dtype) if wanted and not isinstance(data, nn.Parameter) else data
    if type(data) in _LEAVES:
        return data
    if dataclasses.is_dataclass(data) and not isinstance(data, (type, dict)):
        return _cast_dataclass(data, dtype, only)
    if tree_is_leaf(data):
        return data
    parts, spec = tree_flatten(data, is_leaf=lambda part: part is not data)
    cast = [cast_floating(part, dtype, only) for part in parts]
    return data if all(map(operator.is_, cast, parts)) else tree_unflatten(cast, spec)


def _cast_dataclass(data: Any, dtype: torch.dtype, only: tuple[torch.dtype, ...] | None) -> Any:
    twin = data
    for field in dataclasses.fields(data):
        value = getattr(data, field.name)
        cast = cast_floating(value, dtype, only)
        if cast is not value:
            twin = copy.copy(data) if twin is data else twin
            object.__setattr__(twin, field.name, cast)
    return twin
