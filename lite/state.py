"""What it means to have state: the protocol, and how a dict of objects becomes plain values and takes them back.

It knows no file and no process group.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, MutableMapping
from enum import Enum
from pathlib import PurePath
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import nn

from lite.errors import CheckpointError, ConfigError

Filter = Mapping[str, Callable[[str, Any], bool]]


@runtime_checkable
class Stateful(Protocol):
    """Anything with `state_dict` and `load_state_dict`: modules, optimizers, schedulers, and the user's own objects."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state as a dict of plain values and tensors."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any:
        """Take over a state that `state_dict` returned."""
        ...


def collect(state: Mapping[str, Any], filter: Filter | None = None) -> dict[str, Any]:
    """Turn objects into what a file can hold and `torch.load(weights_only=True)` reads.

    Args:
        state: Names and modules, optimizers, Stateful objects or plain values.
        filter: For a name of `state`, a function of (key, value) that says which items of it are kept.

    Raises:
        ConfigError: `state` is not a dict with string keys, or `filter` names something that isn't in it.
        CheckpointError: A value can't be stored as plain data; the message names its key.
    """
    if not isinstance(state, Mapping) or not all(isinstance(key, str) for key in state):
        raise ConfigError(f"state={type(state).__name__} must be a dict with string keys, e.g. {{'model': model}}.")
    filter = filter or {}
    for name, keep in filter.items():
        if name not in state:
            raise ConfigError(
                f"filter has the key {name!r}, which state doesn't have; it has {', '.join(map(repr, state))}."
            )
        if not callable(keep):
            raise ConfigError(f"filter[{name!r}]={keep!r} must be a function of (key, value) that returns a bool.")
    collected = {}
    for name, value in state.items():
        plain = (
            module_state(value) if isinstance(value, nn.Module) else value.state_dict() if _stateful(value) else value
        )
        if name in filter:
            plain = {k: v for k, v in plain.items() if filter[name](k, v)}
        collected[name] = sanitise(plain, name)
    return collected


def restore(state: MutableMapping[str, Any], loaded: Mapping[str, Any], *, strict: bool = True) -> dict[str, Any]:
    """Give a loaded dict back to the objects of `state`; plain values are replaced in `state` itself.

    Args:
        state: As it was for `collect`.
        loaded: What `collect` returned, out of a file.
        strict: Whether names and model keys that are missing are errors.

    Returns:
        The entries of `loaded` that `state` doesn't ask for.

    Raises:
        CheckpointError: A name is missing, or a model's keys or shapes don't fit.
    """
    missing = [name for name in state if name not in loaded]
    if missing and strict:
        raise CheckpointError(
            f"the checkpoint has no {', '.join(map(repr, missing))}; it has {', '.join(map(repr, loaded))}. Leave "
            "the name "
            "out of state, or pass strict=False."
        )
    for name, target in state.items():
        if name not in loaded:
            continue
        if isinstance(target, nn.Module):
            load_module(target, loaded[name], name, strict=strict)
        elif _stateful(target):
            target.load_state_dict(loaded[name])
        else:
            state[name] = loaded[name]
    return {name: value for name, value in loaded.items() if name not in state}


def module_state(module: nn.Module) -> dict[str, Any]:
    """The module's state dict with the raw model's keys, compiled parts included."""
    return {key.replace("_orig_mod.", ""): value for key, value in module.state_dict().items()}


def load_module(module: nn.Module, loaded: Mapping[str, Any], name: str, *, strict: bool) -> None:
    """Load a state dict with raw keys; errors name the keys."""
    keys = {key.replace("_orig_mod.", ""): key for key in module.state_dict()}
    try:
        module.load_state_dict({keys.get(key, key): value for key, value in loaded.items()}, strict=strict)
    except RuntimeError as error:
        raise CheckpointError(f"the checkpoint's {name!r} does not fit {type(module).__name__}: {error}") from error


def sanitise(value: Any, where: str) -> Any:
    """Turn a value into types that `torch.load(weights_only=True)` reads, or refuse it by its key `where`."""
    if value is None or isinstance(value, (torch.Tensor, torch.dtype, torch.device, torch.Size)):
        return value
    if isinstance(value, Enum):
        return sanitise(value.value, where)
    if isinstance(value, (np.bool_, np.integer, np.floating, np.complexfloating)):
        return value.item()
    if type(value) in (bool, int, float, complex, str, bytes):
        return value
    if isinstance(value, (bool, int, float, str)):
        return next(t for t in (bool, int, float, str) if isinstance(value, t))(value)
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        return torch.from_numpy(value.copy())
    if isinstance(value, PurePath):
        return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: sanitise(getattr(value, f.name), f"{where}.{f.name}") for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {sanitise(k, where): sanitise(v, f"{where}.{k}") for k, v in value.items()}
    if isinstance(value, tuple):
        return tuple(sanitise(v, f"{where}[{i}]") for i, v in enumerate(value))
    if isinstance(value, (list, set, frozenset)):
        items = [sanitise(v, f"{where}[{i}]") for i, v in enumerate(value)]
        return set(items) if isinstance(value, (set, frozenset)) else items
    raise CheckpointError(
        f"{where} is a {type(value).__name__}, which a checkpoint that is read without running code can't hold; "
        "store its plain "
        "values, or give it state_dict and load_state_dict."
    )


def _stateful(value: Any) -> bool:
    return isinstance(value, Stateful) and not isinstance(value, type)
