"""Reading a request for devices: a number, "auto", -1, or a list of indices; it asks no device."""

from __future__ import annotations

import re
from typing import Any

from lite.errors import ConfigError


def read_request(value: Any) -> Any:
    """A request as data: "2" is 2, "0,1" and "1," are lists, "AUTO" is "auto"; anything else stays as it is.

    Example:
        >>> read_request("0, 1"), read_request("-1"), read_request("many")
        ([0, 1], -1, 'many')
    """
    if not isinstance(value, str):
        return value
    parts = [part.strip() for part in value.strip().strip("[]").split(",")]
    filled = [part for part in parts if part]
    if not filled or not all(re.fullmatch("-?[0-9]+", part) for part in filled):
        return "auto" if value.strip().lower() == "auto" else value
    return int(value) if len(parts) == 1 and parts[0] == value.strip() else [int(part) for part in filled]


def parse_indices(request: Any, available: int, noun: str, shown: str) -> tuple[int, ...]:
    """Turn a device request into indices: "auto" is the first device, -1 all, a number so many, a list those.

    Args:
        request: As `read_request` returns it.
        available: How many devices there are.
        noun: What one is called.
        shown: The request as the user wrote it.

    Raises:
        ConfigError: The request is malformed, repeats a device or asks for one that isn't there.

    Example:
        >>> parse_indices([0, 1], 4, "CUDA device", "devices='0,1'")
        (0, 1)
    """
    there = f"this machine has {available} {noun}{'' if available == 1 else 's'}"
    if isinstance(request, str) and request == "auto":
        return (0,)
    if isinstance(request, int) and not isinstance(request, bool):
        if request == -1:
            return tuple(range(available))
        if request < 1:
            raise ConfigError(f"{shown} must be at least 1 (or -1 for all); {there}.")
        if request > available:
            raise ConfigError(f"{shown} asks for more than there are: {there}.")
        return tuple(range(request))
    if (
        isinstance(request, (list, tuple))
        and request
        and all(isinstance(i, int) and not isinstance(i, bool) for i in request)
    ):
        if len(set(request)) != len(request):
            raise ConfigError(f"{shown} names a device twice; name each once.")
        if not all(0 <= i < available for i in request):
            raise ConfigError(f"{shown} names a device that isn't there: {there}, numbered from 0.")
        return tuple(request)
    raise ConfigError(f"{shown} is not understood; use a number, 'auto', -1 (all) or a list such as [0, 1]; {there}.")
