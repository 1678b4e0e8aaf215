"""Nested data as a flat list of leaves in an order that is the same on all ranks, and back."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor

NUMBERS = (bool, int, float)


def is_value(leaf: Any) -> bool:
    """Whether a reduction or gathering takes it: a tensor or a number."""
    return isinstance(leaf, (Tensor, *NUMBERS))


def flatten(data: Any, *, split_lists: bool = True) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    """The leaves of nested data, dicts by their sorted keys, and what puts other leaves in their place.

    Example:
        >>> leaves, rebuild = flatten({"b": 1, "a": (2, 3)})
        >>> leaves
        [2, 3, 1]
        >>> rebuild([4, 5, 6])
        {'b': 6, 'a': (4, 5)}
    """
    if not _has_parts(data, split_lists):
        return [data], lambda leaves: leaves[0]
    is_dict = isinstance(data, dict)
    keys = _sorted(data) if is_dict else range(len(data))
    flat = [flatten(data[key], split_lists=split_lists) for key in keys]

    def rebuild(leaves: list[Any]) -> Any:
        rest = iter(leaves)
        parts = [make([next(rest) for _ in own]) for own, make in flat]
        if not is_dict:
            return data._make(parts) if hasattr(data, "_make") else type(data)(parts)
        new = dict(zip(keys, parts, strict=True))
        twin: Any = {} if type(data) is dict else copy.copy(data)
        for key in data:
            twin[key] = new[key]
        return twin

    return [leaf for own, _ in flat for leaf in own], rebuild


def describe(data: Any, *, split_lists: bool = True) -> str:
    """The form of nested data in words, without shapes and dtypes; equal for equal forms.

    Example:
        >>> describe({"b": [1.0], "a": "x"})
        "{'a': other, 'b': [value]}"
    """
    if not _has_parts(data, split_lists):
        return "value" if is_value(data) else "list" if isinstance(data, list) else "other"
    if isinstance(data, dict):
        parts = [f"{key!r}: {describe(data[key], split_lists=split_lists)}" for key in _sorted(data)]
        return f"{{{', '.join(parts)}}}"
    left, right = "()" if isinstance(data, tuple) else "[]"
    return f"{left}{', '.join(describe(part, split_lists=split_lists) for part in data)}{right}"


def _has_parts(data: Any, split_lists: bool) -> bool:
    return isinstance(data, (dict, tuple)) or (split_lists and isinstance(data, list))


def _sorted(data: dict[Any, Any]) -> list[Any]:
    return sorted(data, key=lambda key: (str(type(key)), str(key)))
