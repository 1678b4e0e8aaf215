"""Which models have other values than their own for a while (`ema.swap()`), so that nobody takes one for the other.

What loads, brings ranks together or gives models back asks here, before it changes anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from torch import Tensor, nn

from lite.errors import UsageError


class _Swap(NamedTuple):
    modules: set[nn.Module]
    tensors: set[int]
    put_back: Callable[[], None]


_open: list[_Swap] = []  # in the order in which they were entered


@contextmanager
def swapped(model: nn.Module, tensors: Iterable[Tensor], put_back: Callable[[], None]) -> Iterator[None]:
    """A block in which the model's tensors have other values, until its end or until `put_back` is called."""
    swap = _Swap(set(model.modules()), set(map(id, tensors)), put_back)
    _open.append(swap)
    try:
        yield
    finally:
        _open[:] = [one for one in _open if one is not swap]


def is_swapped(tensor: Tensor) -> bool:
    """Whether the tensor has other values than its own."""
    return any(id(tensor) in swap.tensors for swap in _open)


def refuse_swapped(call: str, tensors: Iterable[Tensor]) -> None:
    """Refuse what would train on with averages for weights.

    Raises:
        UsageError: One of the tensors has other values than its own.
    """
    if _open and any(map(is_swapped, tensors)):
        raise UsageError(f"{call} within ema.swap() would go on from the averages; {_REMEDY}")


def refuse_swapped_models(call: str, things: Iterable[object]) -> None:
    """Refuse what would be undone as the model's own weights come back.

    Raises:
        UsageError: One of the things is a model that has other values than its own, or shares modules with one.
    """
    for thing in things:
        if next(_swaps_of(thing), None) is not None:
            raise UsageError(
                f"{call} of a {type(thing).__name__} within ema.swap(), whose averages stand in the place of its "
                f"weights: these would come back over whatever was done; {_REMEDY}"
            )


def put_back(models: Iterable[nn.Module]) -> None:
    """Give models their own values back, before the end of the block."""
    for swap in reversed([swap for model in models for swap in _swaps_of(model)]):
        swap.put_back()


def _swaps_of(thing: object) -> Iterator[_Swap]:
    if _open and isinstance(thing, nn.Module):
        modules = set(thing.modules())
        yield from (swap for swap in _open if not modules.isdisjoint(swap.modules))


_REMEDY = "leave the block first, on all ranks."
