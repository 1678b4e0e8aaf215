"""Marks on the autograd graph that tell which set-up models a loss comes from, and in which state their forwards ran.

Forward tags the graph nodes of its outputs; before a backward the loss's graph is walked from the loss to the first
tags, a few nodes for a usual loss. What lies behind a tag was found when it was set, and is kept on it. Nodes carry the
tag (`Node.metadata`), so nothing keeps a graph alive.
"""

from __future__ import annotations

import dataclasses
import types
from collections import deque
from collections.abc import ItemsView, Iterable, Iterator, Mapping, ValuesView
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lite.errors import UsageError

_KEY = "lite"
_DEPTH = 20
_OBJECT_DEPTH = 5
_LONG = 64
_PLAIN = (type(None), bool, int, float, str, bytes)
_OPAQUE = (type, torch.nn.Module, types.ModuleType, types.FunctionType, types.MethodType)


@dataclass(frozen=True, eq=False)
class Mark:
    """What the tensors of one output come from.

    Attributes:
        states: Of every model on the way, the own one included: what was agreed when it ran.
        leaves: Parameters on the way that were reached through no model.
    """

    states: frozenset[Any]
    leaves: tuple[Tensor, ...]


def check_has_graph(loss: Tensor) -> None:
    """Refuse a loss of which no backward can come.

    Raises:
        UsageError: It needs no gradient.
    """
    if not loss.requires_grad:
        raise UsageError(
            "lite.backward got a loss that needs no gradient; was the forward run under torch.no_grad(), or the "
            "loss detached?"
        )


def has_tensors(data: Any, depth: int = 4) -> bool:
    """Whether there is a tensor in nested data, a few levels deep."""
    if isinstance(data, Tensor):
        return True
    if depth == 0:
        return False
    if isinstance(data, Mapping):
        return any(has_tensors(item, depth - 1) for item in data.values())
    return isinstance(data, (list, tuple)) and any(has_tensors(item, depth - 1) for item in data)


def tensors_with_grad(data: Any) -> Iterator[Tensor]:
    """The computed tensors in nested `data` that a backward could pass; parameters are none.

    Objects are looked into by their attributes, and these again, a few levels deep; nothing is looked at twice, and
    long lists that begin and end with plain values are not gone through.
    """
    if isinstance(data, Tensor):
        if data.grad_fn is not None:
            yield data
        return
    seen: set[int] = set()
    pending: list[tuple[Any, int]] = [(data, _DEPTH)]
    while pending:
        thing, depth = pending.pop()
        if isinstance(thing, Tensor):
            if thing.grad_fn is not None:
                yield thing
            continue
        if type(thing) in _PLAIN or depth <= 0 or isinstance(thing, _OPAQUE) or id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, (list, tuple, set, frozenset, deque, ValuesView)):
            parts: Iterable[Any] = thing
            if isinstance(thing, (list, tuple)) and thing and type(thing[0]) in _PLAIN and type(thing[-1]) in _PLAIN:
                parts = [part for part in thing if type(part) not in _PLAIN] if len(thing) <= _LONG else ()
            depth -= 1
        elif isinstance(thing, (Mapping, ItemsView)):
            parts = [value for _, value in thing] if isinstance(thing, ItemsView) else thing.values()
            depth -= 1
        else:
            parts = _attributes(thing)
            depth -= _OBJECT_DEPTH
        pending.extend([(part, depth) for part in parts if type(part) not in _PLAIN])


def _attributes(thing: Any) -> Iterable[Any]:
    if dataclasses.is_dataclass(thing):
        return [getattr(thing, field.name, None) for field in dataclasses.fields(thing)]
    slots = [name for kind in type(thing).__mro__ for name in _names(kind.__dict__.get("__slots__", ()))]
    return [*getattr(thing, "__dict__", {}).values(), *[getattr(thing, name, None) for name in slots]]


def _names(slots: Any) -> tuple[str, ...]:
    return (slots,) if isinstance(slots, str) else tuple(slots)


def origins(tensors: Iterable[Tensor]) -> tuple[list[Mark], list[Tensor]]:
    """Where `tensors` come from: the nearest marks in their graph, and the leaves that are reached past none."""
    pending: list[Any] = [t.grad_fn for t in tensors]
    marks: list[Mark] = []
    leaves: list[Tensor] = []
    seen: set[Any] = set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        mark = node.metadata.get(_KEY)
        if mark is not None:
            marks.append(mark)
            continue
        parents = node.next_functions
        if parents:
            pending.extend([parent for parent, _ in parents])
        else:
            leaf = getattr(node, "variable", None)  # of AccumulateGrad nodes
            if leaf is not None:
                leaves.append(leaf)
    return marks, leaves


def tag(outputs: Any, mark: Mark, before: list[Mark]) -> None:
    """Attach `mark` to the graph nodes of all tensors in `outputs`.

    Args:
        outputs: What a model returned.
        mark: Where they come from.
        before: The marks of its inputs; one that was handed through keeps its own.
    """
    for tensor in tensors_with_grad(outputs):
        assert tensor.grad_fn is not None
        metadata: Any = tensor.grad_fn.metadata  # a property, though torch's stubs have it as a method
        if not any(metadata.get(_KEY) is other for other in before):
            metadata[_KEY] = mark
