"""What it means to have state: the protocol, and how a dict of objects becomes plain values and takes them back.

It knows no file and no process group.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import sys
import types
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Mapping, MutableMapping
from enum import Enum
from pathlib import PurePath
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import nn

from lite.errors import CheckpointError, ConfigError
from lite.renewal import renew

# What torch.compile puts before the names within a compiled module.
_COMPILED = "_orig_mod."
# What torch's optimizers keep of a parameter's own shape, and Adafactor of its rows and columns.
_MOMENTS = {"acc_delta", "ax", "exp_avg", "exp_avg_sq", "exp_inf", "grad_avg", "max_exp_avg_sq", "momentum_buffer"}
_MOMENTS |= {"prev", "square_avg", "step_size", "sum", "variance", "row_var", "col_var"}
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
            module_state(value) if isinstance(value, nn.Module) else value.state_dict() if _stateful(value) else value
        )
        if name in filter:
            if not isinstance(plain, Mapping):
                raise ConfigError(
                    f"filter[{name!r}] chooses among items, but state[{name!r}] is a {type(plain).__name__}; "
                    "leave it out."
                )
            plain = like(plain, {k: v for k, v in plain.items() if filter[name](k, v)})
        collected[name] = sanitise(plain, name)
    return collected


def restore(
    state: MutableMapping[str, Any], loaded: Mapping[str, Any], *, strict: bool = True
) -> tuple[dict[str, Any], LoadReport]:
    """Give a loaded dict back to the objects of `state`; plain values are renewed, in place where they can be.

    Args:
        state: As it was for `collect`.
        loaded: What `collect` returned, out of a file.
        strict: Whether names and model keys that are missing or unexpected are errors.

    Returns:
        The entries of `loaded` that `state` doesn't ask for, and what didn't fit.

    Raises:
        CheckpointError: A name is missing, or what is stored doesn't fit an object.
    """
    missing = [name for name in state if name not in loaded]
    if missing and strict:
        raise CheckpointError(
            f"the checkpoint has no {', '.join(map(repr, missing))}; it has {', '.join(map(repr, loaded))}. Leave the "
            "name out of state, or pass strict=False."
        )
    unexpected: list[str] = []
    for name, target in state.items():
        if name not in loaded:
            continue
        if isinstance(target, nn.Module) or _stateful(target):
            report = restore_object(target, loaded[name], name, strict=strict)
            missing.extend(report.missing)
            unexpected.extend(report.unexpected)
        else:
            state[name] = renew(target, loaded[name], name)
    rest = {name: value for name, value in loaded.items() if name not in state}
    return rest, LoadReport(tuple(missing), tuple(unexpected))


def restore_object(target: Any, loaded: Any, name: str, *, strict: bool) -> LoadReport:
    """Load one object's stored state; errors say which object and, of a model, which keys.

    Raises:
        CheckpointError: It doesn't fit.
    """
    try:
        if isinstance(target, nn.Module):
            return load_module(target, loaded, name, strict=strict)
        if isinstance(target, torch.optim.Optimizer):
            _check_optimizer_shapes(target, loaded, name)
        target.load_state_dict(loaded)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"the checkpoint's {name!r} does not fit {type(target).__name__}: {type(error).__name__}: {error}"
        ) from error
    return LoadReport()


def _check_optimizer_shapes(optimizer: torch.optim.Optimizer, loaded: Mapping[str, Any], name: str) -> None:
    """Refuse moments of another shape than their parameters, which torch takes and fails at in the next step."""
    saved, groups = loaded["param_groups"], optimizer.param_groups
    counts = [[len(group["params"]) for group in side] for side in (saved, groups)]
    if counts[0] != counts[1] or not _is_torchs(optimizer):
        return  # of other counts torch's own error tells
    numbers = (number for group in saved for number in group["params"])
    parameters = (parameter for group in groups for parameter in group["params"])
    for position, (number, parameter) in enumerate(zip(numbers, parameters, strict=True)):
        shape = tuple(parameter.shape)
        others = {"row_var": (*shape[:-1], 1), "col_var": (*shape[:-2], 1, *shape[-1:])}
        for entry, value in loaded["state"].get(number, {}).items():
            if entry not in _MOMENTS or not isinstance(value, torch.Tensor) or value.ndim == 0:
                continue
            if tuple(value.shape) != others.get(entry, shape):
                raise CheckpointError(
                    f"the checkpoint's {name!r} does not fit {type(optimizer).__name__}: its {entry} for parameter "
                    f"{position} (counted from 0, over all groups) has shape {list(value.shape)}, but the parameter "
                    f"here has {list(shape)}. Give the optimizer the same parameters in the same order as when it was "
                    f"saved, or leave {name!r} out of state."
                )


def _is_torchs(optimizer: torch.optim.Optimizer) -> bool:
    """Whether torch's own code takes its steps: others may keep moments in shapes of their own."""
    kinds = [kind.__module__ for kind in type(optimizer).__mro__ if "step" in vars(kind)]
    return next(kind for kind in kinds if not kind.startswith("lite.")).startswith("torch.optim")


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


def load_module(module: nn.Module, loaded: Mapping[str, Any], name: str, *, strict: bool) -> LoadReport:
    """Load a state dict with raw keys; the report's keys begin with `name`."""
    if not isinstance(loaded, Mapping):
        raise CheckpointError(
            f"the checkpoint's {name!r} is a {type(loaded).__name__} and no state dict of {type(module).__name__}."
        )
    keys = {plain_key(key): key for key in module.state_dict()}
    # A new dict: modules may change the one that they are given.
    state = OrderedDict((keys.get(key, key), value) for key, value in loaded.items())
    versions = getattr(loaded, "_metadata", None)
    if versions is not None:
        names = {f"{name}.".replace(_COMPILED, "")[:-1]: name for name, _ in module.named_modules()}
        state._metadata = OrderedDict(  # type: ignore[attr-defined]
            (names.get(name, name), version) for name, version in versions.items()
        )
    result = module.load_state_dict(state, strict=strict)
    if result is None:  # the module has a load_state_dict of its own
        return LoadReport()
    missing, unexpected = (
        tuple(f"{name}.{plain_key(key)}" for key in side) for side in (result.missing_keys, result.unexpected_keys)
    )
    return LoadReport(missing, unexpected)


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
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
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
    hint = {"Generator": "; store its get_state()"}.get(type(value).__name__, "")
    if isinstance(value, (nn.Module, Stateful)):
        hint = "; give it a name of its own in state"
    raise CheckpointError(
        f"{where} is a {type(value).__name__}, which a checkpoint that is read without running code can't hold; "
        f"store its plain values, or give it state_dict and load_state_dict{hint}."
    )


def _plain_tensor(value: torch.Tensor, where: str) -> torch.Tensor:
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


def _stateful(value: Any) -> bool:
    return isinstance(value, Stateful) and not isinstance(value, type)
