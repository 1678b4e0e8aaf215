"""What it means to have state: the protocol, and how a dict of objects becomes plain values.

It knows no file and no process group.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import sys
import types
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Mapping
from enum import Enum
from pathlib import PurePath
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from lite.errors import CheckpointError, ConfigError

# What torch.compile puts before the names within a compiled module.
_COMPILED = "_orig_mod."
# For what can't be stored, by its class.
_HINTS = {"Generator": "; store its get_state()", "MaskedArray": "; store its data and its mask"}
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


@dataclasses.dataclass(frozen=True)
class LoadReport:
    """What a load with strict=False left as it was, or left aside.

    Attributes:
        missing: Names and model keys that the checkpoint doesn't have.
        unexpected: Model keys of the checkpoint that the model doesn't have.
    """

    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()

    def __str__(self) -> str:
        parts = {"missing": self.missing, "unexpected": self.unexpected}
        return "; ".join(f"{name}: {', '.join(keys)}" for name, keys in parts.items() if keys) or "everything fitted"


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
            module_state(value) if isinstance(value, nn.Module) else value.state_dict() if is_stateful(value) else value
        )
        if name in filter:
            if not isinstance(plain, Mapping):
                raise ConfigError(
                    f"filter[{name!r}] chooses among items, but state[{name!r}] is a {type(plain).__name__}; "
                    "leave it out."
                )
            plain = like(plain, {k: v for k, v in plain.items() if filter[name](k, v)})
        try:
            collected[name] = sanitise(plain, name)
        except RecursionError:
            raise CheckpointError(
                f"{name} holds itself somewhere within, or is nested too deeply; store what can be written down flat."
            ) from None
    return collected


def module_state(module: nn.Module) -> dict[str, Any]:
    """The module's state dict with the raw model's keys, compiled parts included, and its modules' versions."""
    state = module.state_dict()
    plain = OrderedDict((plain_key(key), value) for key, value in state.items())
    versions = getattr(state, "_metadata", None)
    if versions is not None:
        renamed = {f"{name}.".replace(_COMPILED, "")[:-1]: version for name, version in versions.items()}
        plain._metadata = OrderedDict(renamed)  # type: ignore[attr-defined]  # where torch keeps and looks for them
    return plain


def plain_key(key: str) -> str:
    """A key or name within a module, as the raw model has it.

    Example:
        >>> plain_key("body._orig_mod.0.weight")
        'body.0.weight'
    """
    return key.replace(_COMPILED, "")


def uncompiled(module: torch.nn.Module) -> torch.nn.Module:
    """The module that `torch.compile` made this one of; any other module itself."""
    original = getattr(module, "_orig_mod", None)
    return original if isinstance(original, torch.nn.Module) else module


def parameters_of(optimizer: Optimizer) -> list[nn.Parameter]:
    """The parameters of all groups of an optimizer, in the order in which its state numbers them."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def like(mapping: Mapping[Any, Any], items: dict[Any, Any]) -> dict[Any, Any]:
    """A mapping with new items of the kind that `mapping` is, where `torch.load(weights_only=True)` knows that kind.

    A state dict keeps the versions of its modules, by which they recognise states of older code.
    """
    if type(mapping) is Counter:
        return Counter(items)
    if type(mapping) is not OrderedDict:
        return items
    ordered = OrderedDict(items)
    versions = getattr(mapping, "_metadata", None)
    if versions is not None:
        plain = {str(name): {str(k): v for k, v in version.items()} for name, version in versions.items()}
        ordered._metadata = OrderedDict(plain)  # type: ignore[attr-defined]
    return ordered


def map_leaves(change: Callable[[Any], Any], content: Any) -> Any:
    """Nested dicts, lists and tuples with what `change` makes of each of their leaves; mappings stay `like` they are.

    Example:
        >>> map_leaves(str, {"a": [1, (2,)]})
        {'a': ['1', ('2',)]}
    """
    if isinstance(content, Mapping):
        return like(content, {key: map_leaves(change, item) for key, item in content.items()})
    if isinstance(content, (list, tuple)):
        items = [map_leaves(change, item) for item in content]
        return items if isinstance(content, list) else tuple(items)
    return change(content)


def sanitise(value: Any, where: str) -> Any:
    """Turn a value into types that `torch.load(weights_only=True)` reads, or refuse it by its key `where`.

    numpy's scalars become numbers and its arrays tensors; enums their values; paths strings; dates ISO strings and
    time differences seconds; dataclasses, namespaces and OmegaConf dicts; every mapping a dict, but for Counter and
    OrderedDict; deques lists; named tuples tuples.

    Raises:
        CheckpointError: It can't; the message has `where`.
    """
    if isinstance(value, torch.Tensor):
        return _plain_tensor(value, where)
    if value is None or isinstance(value, (torch.dtype, torch.device, torch.Size)):
        return value
    if isinstance(value, Enum):
        return sanitise(value.value, where)
    if isinstance(value, (np.bool_, np.integer, np.floating, np.complexfloating)):
        item = value.item()
        if not isinstance(item, np.generic):  # as it is of numpy's long doubles
            return item
    if type(value) in (bool, int, float, complex, str, bytes):
        return value
    builtins: tuple[Any, ...] = (int, float, complex, str, bytes)
    for builtin in builtins:
        if isinstance(value, builtin):
            return builtin(value)
    masked = isinstance(value, np.ma.MaskedArray)
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc" and not masked:
        return _from_numpy(value, where)
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    if isinstance(value, datetime.timedelta):
        return value.total_seconds()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: sanitise(getattr(value, f.name), f"{where}.{f.name}") for f in dataclasses.fields(value)}
    if isinstance(value, (argparse.Namespace, types.SimpleNamespace)):
        return sanitise(vars(value), where)
    omegaconf = sys.modules.get("omegaconf")  # nothing of it can be here unless someone has imported it
    if omegaconf is not None and omegaconf.OmegaConf.is_config(value):
        return sanitise(omegaconf.OmegaConf.to_container(value, resolve=True), where)
    if isinstance(value, Mapping):
        return like(value, {sanitise(k, f"{where}'s key {k!r}"): sanitise(v, f"{where}.{k}") for k, v in value.items()})
    if isinstance(value, tuple):
        return tuple(sanitise(v, f"{where}[{i}]") for i, v in enumerate(value))
    if isinstance(value, (list, deque, set, frozenset)):
        items = [sanitise(v, f"{where}[{i}]") for i, v in enumerate(value)]
        return set(items) if isinstance(value, (set, frozenset)) else items
    hint = _HINTS.get(type(value).__name__, "")
    if isinstance(value, DataLoader):
        hint = ": put what lite.setup_dataloaders returned for it into state"
    if isinstance(value, (nn.Module, Stateful)):
        hint = "; give it a name of its own in state"
    raise CheckpointError(
        f"{where} is a {type(value).__name__}, which a checkpoint that is read without running code can't hold; "
        f"store its plain values, or give it state_dict and load_state_dict{hint}."
    )


def _plain_tensor(value: torch.Tensor, where: str) -> torch.Tensor:
    if getattr(value, "is_elsewhere", False):
        return value
    if value.is_meta:
        raise CheckpointError(f"{where} is a tensor on the meta device, without values; materialise it before saving.")
    if type(value).__module__.split(".")[0] == "torch":
        return value
    # A subclass of the user's would need its class to be loaded.
    return value.detach().as_subclass(torch.Tensor)


def _from_numpy(value: np.ndarray[Any, Any], where: str) -> torch.Tensor:
    try:
        return torch.from_numpy(value.astype(value.dtype.newbyteorder("="), order="C", copy=True))
    except TypeError as error:
        raise CheckpointError(f"{where} is an array that torch has no type for: {error}") from error


def is_stateful(value: Any) -> bool:
    """Whether it keeps a state of its own: an object with both methods, not a class."""
    methods = (getattr(value, name, None) for name in ("state_dict", "load_state_dict"))
    return not isinstance(value, type) and all(map(callable, methods))
