"""Plain values of a running script take over what a checkpoint holds: in place where they can, and as what they were.

A checkpoint holds plain types alone (`lite.state.sanitise`): a deque comes back as a list, numpy's numbers as Python's.
What is there now says what it was; and whoever holds the same list or tensor under another name sees the new values.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import sys
import types
from collections import deque
from collections.abc import Callable, Mapping
from enum import Enum
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lite.errors import CheckpointError


def renew(present: Any, loaded: Any, where: str) -> Any:
    """Return what shall stand in the place of `present`: itself with new content, or `loaded` as its type.

    Tensors and arrays of the stored shape and dtype, lists, dicts, deques, sets and dataclasses are changed in place.
    Where the types have nothing to do with each other, `loaded` is returned as it is.

    Raises:
        CheckpointError: A parameter has another shape than the stored one; the message has `where`.
    """
    if isinstance(present, Tensor):
        return _renew_tensor(present, loaded, where)
    if isinstance(present, np.ndarray) and isinstance(loaded, Tensor):
        array = loaded.cpu().numpy()
        if array.shape != present.shape or not present.flags.writeable:
            return array.astype(present.dtype)
        present[...] = array
        return present
    make = _maker(present)
    if make is not None:
        try:
            return make(loaded)
        except (TypeError, ValueError):  # an enum that has no such member any more, say
            return loaded
    if isinstance(present, (list, deque)) and isinstance(loaded, list):
        items = _renew_items(present, loaded, where)
        present.clear()
        present.extend(items)
        return present
    if isinstance(present, set) and isinstance(loaded, set):
        present.clear()
        present.update(loaded)
        return present
    if isinstance(present, tuple) and isinstance(loaded, tuple):
        items = _renew_items(present, loaded, where)
        named: Any = type(present)
        return named(*items) if hasattr(named, "_fields") and len(items) == len(named._fields) else tuple(items)
    if isinstance(present, (argparse.Namespace, types.SimpleNamespace)) and isinstance(loaded, Mapping):
        renew(vars(present), loaded, where)
        return present
    if isinstance(present, dict) and isinstance(loaded, Mapping):
        entries = {k: renew(present[k], v, f"{where}.{k}") if k in present else v for k, v in loaded.items()}
        present.clear()
        present.update(entries)
        return present
    if dataclasses.is_dataclass(present) and isinstance(loaded, Mapping):
        return _renew_dataclass(present, loaded, where)
    return loaded


def _renew_tensor(present: Tensor, loaded: Any, where: str) -> Any:
    fits = isinstance(loaded, Tensor) and loaded.shape == present.shape
    if isinstance(present, nn.Parameter) and not fits:
        found = f"shape {tuple(loaded.shape)}" if isinstance(loaded, Tensor) else f"a {type(loaded).__name__}"
        raise CheckpointError(
            f"{where} is a Parameter of shape {tuple(present.shape)}, but the checkpoint has {found} for it."
        )
    if not fits or hasattr(present, "__tensor_flatten__") or loaded.dtype != present.dtype:
        return loaded
    with torch.no_grad():
        try:
            present.copy_(loaded)
        except RuntimeError:  # it can't be written to: an expanded view, say
            return loaded
    return present


def _renew_items(present: Any, loaded: Any, where: str) -> list[Any]:
    if len(present) != len(loaded):
        return list(loaded)
    return [renew(old, new, f"{where}[{i}]") for i, (old, new) in enumerate(zip(present, loaded, strict=True))]


def _renew_dataclass(present: Any, loaded: Mapping[str, Any], where: str) -> Any:
    fields = {field.name: field for field in dataclasses.fields(present)}
    if not fields.keys() <= loaded.keys():
        return loaded
    values = {name: renew(getattr(present, name, None), loaded[name], f"{where}.{name}") for name in fields}
    if present.__dataclass_params__.frozen:
        renewed = dataclasses.replace(present, **{name: v for name, v in values.items() if fields[name].init})
        for name in fields:
            object.__setattr__(renewed, name, values[name])  # those, too, that the constructor doesn't take
        return renewed
    for name, value in values.items():
        setattr(present, name, value)
    return present


def _maker(present: Any) -> Callable[[Any], Any] | None:
    """What makes a value of the kind of `present`, which is changed as a whole, out of its plain form."""
    kind: Any = type(present)
    if isinstance(present, (np.generic, Enum, PurePath)):
        return kind  # type: ignore[no-any-return]
    if isinstance(present, (datetime.date, datetime.time)):
        return kind.fromisoformat  # type: ignore[no-any-return]
    if isinstance(present, datetime.timedelta):
        return lambda seconds: datetime.timedelta(seconds=seconds)
    if isinstance(present, (int, float, complex, str, bytes)) and kind.__module__ != "builtins":
        return kind  # type: ignore[no-any-return]
    if isinstance(present, frozenset):
        return frozenset
    omegaconf = sys.modules.get("omegaconf")  # nothing of it can be here unless someone has imported it
    if omegaconf is not None and omegaconf.OmegaConf.is_config(present):
        return omegaconf.OmegaConf.create  # type: ignore[no-any-return]
    return None
