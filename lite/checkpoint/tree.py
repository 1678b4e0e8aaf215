"""Nested plain values taken apart into tensors, each with a name, and all the rest; and put together again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lite.state import like

Path = tuple[Any, ...]


def split(content: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Path]]:
    """Take the dense tensors out of nested dicts, lists and tuples.

    Returns:
        The nesting with None where a tensor was; the tensors by names such as "model.body.0.weight"; and where each
        one was, as keys and indices.

    Example:
        >>> rest, tensors, places = split({"model": {"w": torch.ones(1)}, "epoch": 3})
        >>> rest, list(tensors), places
        ({'model': {'w': None}, 'epoch': 3}, ['model.w'], {'model.w': ('model', 'w')})
    """
    tensors: dict[str, Tensor] = {}
    places: dict[str, Path] = {}

    def take(value: Any, place: Path) -> Any:
        if isinstance(value, Tensor) and _is_dense(value):
            name = _free(".".join(map(str, place)), tensors)
            tensors[name], places[name] = value, place
            return None
        if isinstance(value, Mapping):
            return like(value, {key: take(item, (*place, key)) for key, item in value.items()})
        if isinstance(value, (list, tuple)):
            items = [take(item, (*place, index)) for index, item in enumerate(value)]
            return items if isinstance(value, list) else tuple(items)
        return value

    return take(content, ()), tensors, places


def _is_dense(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and not tensor.is_quantized and not tensor.is_nested


def join(rest: Any, tensors: Mapping[str, Tensor], places: Mapping[str, Path]) -> Any:
    """Put the tensors back where `split` took them from.

    Example:
        >>> join({"model": {"w": None}}, {"model.w": torch.ones(1)}, {"model.w": ("model", "w")})
        {'model': {'w': tensor([1.])}}
    """
    names = {tuple(place): name for name, place in places.items()}

    def put(value: Any, place: Path) -> Any:
        if place in names:
            return tensors[names[place]]
        if isinstance(value, dict):
            return like(value, {key: put(item, (*place, key)) for key, item in value.items()})
        if isinstance(value, (list, tuple)):
            items = [put(item, (*place, index)) for index, item in enumerate(value)]
            return items if isinstance(value, list) else tuple(items)
        return value

    return put(rest, ())


def walk(content: Any) -> dict[str, Any]:
    """Every leaf by its dotted name, for people to read; a list or tuple of nothing but plain values is one leaf.

    Example:
        >>> walk({"a": {"b": 1, "c": ((2, 3), 4), "d": (5, 6)}, "a.b": 7})
        {'a.b': 1, 'a.c.0': (2, 3), 'a.c.1': 4, 'a.d': (5, 6), 'a.b#2': 7}
    """
    leaves: dict[str, Any] = {}

    def take(value: Any, place: str) -> None:
        if isinstance(value, Mapping) and value:
            items = list(value.items())
        elif isinstance(value, (list, tuple)) and any(isinstance(v, (Tensor, Mapping, list, tuple)) for v in value):
            items = list(enumerate(value))
        else:
            leaves[_free(place, leaves)] = value
            return
        for key, item in items:
            take(item, f"{place}.{key}" if place else str(key))

    take(content, "")
    return leaves


def _free(wanted: str, taken: Mapping[str, Any]) -> str:
    """A name that isn't taken: of {"a.b": ...} beside {"a": {"b": ...}}, the second one has a number."""
    name, number = wanted, 2
    while name in taken:
        name, number = f"{wanted}#{number}", number + 1
    return name
