"""A stored state goes back into objects: all of it is looked at before anything is changed.

It knows no file and no process group.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, MutableMapping
from typing import Any

from torch import nn

from lite.errors import CheckpointError
from lite.fitting import check_fit
from lite.renewal import renew
from lite.state import LoadReport, is_stateful, plain_key


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
    given = [name for name in state if name in loaded]
    objects = [name for name in given if isinstance(state[name], nn.Module) or is_stateful(state[name])]
    for name in objects:
        check_fit(state[name], loaded[name], name, strict=strict)
    done: list[str] = []
    unexpected: list[str] = []
    for name in given:
        if name not in objects:
            state[name] = renew(state[name], loaded[name], name)
        else:
            report = _take_over(state[name], loaded[name], name, strict=strict, done=done)
            missing.extend(report.missing)
            unexpected.extend(report.unexpected)
        done.append(name)
    rest = {name: value for name, value in loaded.items() if name not in state}
    return rest, LoadReport(tuple(missing), tuple(unexpected))


def restore_object(target: Any, loaded: Any, name: str, *, strict: bool) -> LoadReport:
    """Load one object's stored state; errors say which object and, of a model, which keys.

    Raises:
        CheckpointError: It doesn't fit.
    """
    check_fit(target, loaded, name, strict=strict)
    return _take_over(target, loaded, name, strict=strict, done=[])


def _take_over(target: Any, loaded: Any, name: str, *, strict: bool, done: list[str]) -> LoadReport:
    try:
        if isinstance(target, nn.Module):
            return _load_module(target, loaded, name, strict=strict)
        target.load_state_dict(loaded)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        mixed = f" Already loaded are {', '.join(map(repr, done))}: don't go on with this mixture." if done else ""
        said = str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
        raise CheckpointError(
            f"the checkpoint's {name!r} does not fit {type(target).__name__}: {said}{mixed}"
        ) from error
    return LoadReport()


def _load_module(module: nn.Module, loaded: Mapping[str, Any], name: str, *, strict: bool) -> LoadReport:
    """Load a state dict with raw keys; the report's keys begin with `name`."""
    keys = {plain_key(key): key for key in module.state_dict()}
    # A new dict: modules may change the one that they are given.
    state = OrderedDict((keys.get(key, key), value) for key, value in loaded.items())
    versions = getattr(loaded, "_metadata", None)
    if versions is not None:
        names = {plain_key(f"{name}.")[:-1]: name for name, _ in module.named_modules()}
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
