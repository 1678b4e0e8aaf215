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
        if isinstance(value, Tensor) and value.layout == torch.strided and not value.is_quantized:
            name = wanted = ".".join(map(str, place))
            number = 2
            while name in tensors:  # {"a.b": ...} beside {"a": {"b": ...}}
                name, number = f"{wanted}#{number}", number + 1
            tensors[name], places[name] = value, place
            return None
        if isinstance(value, Mapping):
            return like(value, {key: take(item, (*place, key)) for key, item in value.items()})
        if isinstance(value, (list, tuple)):
            items = [take(item, (*place, index)) for index, item in enumerate(value)]
            return items if isinstance(value, list) else tuple(items)
        return value

    return take(content, ()), tensors, places


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


def walk(content: Any, place: str = "") -> dict[str, Any]:
    """Every leaf by its dotted name, for people to read."""
    if isinstance(content, Mapping) and content:
        items = list(content.items())
    elif isinstance(content, (list, tuple)) and any(isinstance(v, (Tensor, Mapping, list)) for v in content):
        items = list(enumerate(content))
    else:
        return {place: content}
    leaves: dict[str, Any] = {}
    for key, value in items:
        leaves.update(walk(value, f"{place}.{key}" if place else str(key)))
    return leaves
