"""Hyperparameters: what a module or datamodule was made with, kept so that a checkpoint can make it again."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import inspect
import json
import math
import sys
import types
import warnings
from collections.abc import Iterable, Mapping, MutableMapping
from typing import TYPE_CHECKING, Any

from torch import nn

from lite.errors import CheckpointError, ConfigError
from lite.state import sanitise

if TYPE_CHECKING:
    of_the_class = classmethod
else:

    class of_the_class(classmethod):
        """A classmethod that makes an object, and so can't be called on one, where its result would be overlooked."""

        def __get__(self, instance: Any, owner: Any = None) -> Any:
            if instance is None:
                return super().__get__(instance, owner)
            name, kind = self.__func__.__name__, type(instance).__name__

            def refused(*args: Any, **kwargs: Any) -> None:
                raise TypeError(
                    f"{name} makes a new object and leaves this one as it is; call it on the class: "
                    f"new = {kind}.{name}(...)."
                )

            return refused


class AttributeDict(dict[str, Any]):
    """A dict whose items are attributes too.

    Example:
        >>> params = AttributeDict(lr=0.1)
        >>> params.lr, params["lr"]
        (0.1, 0.1)
    """

    def __getattr__(self, key: str) -> Any:
        try:
            return self[key]
        except KeyError:
            raise AttributeError(f"there is no hyperparameter {key!r}; there are {', '.join(self) or 'none'}") from None

    def __setattr__(self, key: str, value: Any) -> None:
        self[key] = value

    def __delattr__(self, key: str) -> None:
        del self[key]

    def __repr__(self) -> str:
        width = max((len(str(key)) for key in self), default=0) + 1
        return "\n".join(f"{f'{key}':<{width}} {value!r}" for key, value in self.items())

    def __reduce__(self) -> Any:
        return AttributeDict, (dict(self),)


class HyperparametersMixin:
    """Gives a class `save_hyperparameters`, `hparams` and `hparams_initial`."""

    _hparams: Any = None
    _hparams_initial: Any = None
    _hparams_name: str | None = None
    _log_hyperparams: bool = False

    def save_hyperparameters(
        self,
        *args: Any,
        ignore: str | Iterable[str] | None = None,
        frame: types.FrameType | None = None,
        logger: bool = True,
    ) -> None:
        """Keep the arguments of `__init__` in `hparams`; call it there.

        Args:
            *args: Names of the arguments to keep, or one object (a dict, Namespace, dataclass or OmegaConf) that holds
                them; none for all arguments, those of the subclasses that called this `__init__` included.
            ignore: Names that are left out.
            frame: The frame whose arguments are meant, where it is not the caller's.
            logger: Whether loggers get them when a run starts.

        Raises:
            ConfigError: A name is no argument, or `ignore` is neither a name nor several.
        """
        if isinstance(ignore, str):
            ignore = [ignore]
        left_out = set(ignore or ())
        if not all(isinstance(name, str) for name in left_out):
            raise ConfigError(f"save_hyperparameters: ignore={ignore!r} must be a name or several names.")
        caller = frame or sys._getframe(1)
        given = _init_arguments(self, caller)
        objects = [arg for arg in args if not isinstance(arg, str)]
        if len(objects) == 1 and len(args) == 1:
            held = objects[0]
            name = next((n for n, value in given.items() if value is held), "kwargs")
            kept = _as_params(held, left_out)
        elif objects:
            raise ConfigError("save_hyperparameters takes names, or one object that holds the values; not both.")
        else:
            unknown = [name for name in args if name not in given]
            if unknown:
                raise ConfigError(
                    f"save_hyperparameters({unknown[0]!r}): __init__ has no such argument; it has "
                    f"{', '.join(given) or 'none'}."
                )
            name = "kwargs"
            kept = AttributeDict({n: v for n, v in given.items() if n not in left_out and (not args or n in args)})
        modules = [n for n, v in kept.items() if isinstance(v, nn.Module)]
        if modules:
            warnings.warn(
                f"save_hyperparameters keeps {modules[0]!r}, which is a module: its weights are in the state_dict "
                f"already. Leave it out with save_hyperparameters(ignore={modules!r}).",
                stacklevel=2,
            )
        if self._hparams is None or not isinstance(self._hparams, MutableMapping):
            self._hparams = kept
        elif isinstance(kept, AttributeDict):
            for ignored in left_out:  # which a base class's call may have collected
                self._hparams.pop(ignored, None)
            self._hparams.update(kept)
        else:
            self._hparams = kept
        self._hparams_name = name
        self._hparams_initial = _copied(self._hparams)
        self._log_hyperparams = logger

    @property
    def hparams(self) -> Any:
        """The hyperparameters, by item and by attribute; changes stay."""
        if self._hparams is None:
            self._hparams = AttributeDict()
        return self._hparams

    @property
    def hparams_initial(self) -> Any:
        """A copy of the hyperparameters as they were saved."""
        return AttributeDict() if self._hparams_initial is None else _copied(self._hparams_initial)


def storable(params: Mapping[str, Any], owner: str) -> dict[str, Any]:
    """The hyperparameters that a checkpoint can hold; others are left out with a warning that names them."""
    omegaconf = sys.modules.get("omegaconf")
    if omegaconf is not None and omegaconf.OmegaConf.is_config(params):
        params = omegaconf.OmegaConf.to_container(params, resolve=True)
    kept = {}
    for name, value in params.items():
        try:
            kept[str(name)] = sanitise(value, f"{owner}.hparams.{name}")
        except CheckpointError as error:
            warnings.warn(
                f"the hyperparameter {name!r} is not in the checkpoint, so load_from_checkpoint must be given it: "
                f"{error}",
                stacklevel=4,
            )
    return kept


def as_yaml(params: Mapping[str, Any]) -> str:
    """The hyperparameters as YAML, one a line; objects as their text.

    Example:
        >>> print(as_yaml({"lr": 1e-5, "sizes": (4, 8), "net": {"act": None}, "on": "yes"}), end="")
        lr: 1.0e-05
        sizes: [4, 8]
        net: {act: null}
        "on": "yes"
    """
    return "".join(f"{_yaml_key(key)}: {_yaml(value)}\n" for key, value in params.items()) or "{}\n"


def _yaml(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_yaml_key(key)}: {_yaml(one)}" for key, one in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_yaml, value)) + "]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int):
        return str(int(value))
    if isinstance(value, float):
        if not math.isfinite(value):
            return ".nan" if math.isnan(value) else f"{'-' if value < 0 else ''}.inf"
        mantissa, mark, exponent = repr(float(value)).partition("e")
        return mantissa + (".0" if mark and "." not in mantissa else "") + mark + exponent
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):  # of numpy or torch
        return _yaml(value.item())
    return json.dumps(str(value), ensure_ascii=False)


def _yaml_key(key: Any) -> str:
    text = str(key)
    words = ("yes", "no", "on", "off", "true", "false", "null", "y", "n")  # which YAML takes for something else
    return text if text.isidentifier() and text.lower() not in words else json.dumps(text, ensure_ascii=False)


def _copied(params: Any) -> Any:
    try:
        return copy.deepcopy(params)
    except Exception:  # whatever a user's object does when it is copied
        return copy.copy(params)


def _as_params(held: Any, left_out: set[str]) -> Any:
    """The hyperparameters in an object of the user's."""
    omegaconf = sys.modules.get("omegaconf")
    if omegaconf is not None and omegaconf.OmegaConf.is_config(held):
        return held
    if isinstance(held, (argparse.Namespace, types.SimpleNamespace)):
        items = vars(held)
    elif dataclasses.is_dataclass(held) and not isinstance(held, type):
        items = {field.name: getattr(held, field.name) for field in dataclasses.fields(held)}
    elif isinstance(held, Mapping):
        items = dict(held)
    else:
        raise ConfigError(
            f"save_hyperparameters got a {type(held).__name__}; pass a dict, a Namespace, a dataclass, an OmegaConf, "
            "or names of arguments."
        )
    return AttributeDict({name: value for name, value in items.items() if name not in left_out})


def _init_arguments(owner: Any, frame: types.FrameType | None) -> dict[str, Any]:
    """The arguments of the `__init__` calls of `owner` that are under way, those of subclasses before the bases'."""
    if dataclasses.is_dataclass(owner):
        return {f.name: getattr(owner, f.name) for f in dataclasses.fields(owner) if f.init and hasattr(owner, f.name)}
    found: dict[str, Any] = {}
    while frame is not None:
        arguments = inspect.getargvalues(frame)
        code = frame.f_code
        of_owner = bool(arguments.args) and arguments.locals.get(arguments.args[0]) is owner
        if not of_owner or code.co_name != "__init__":
            if found or not of_owner:
                break
            frame = frame.f_back  # a method that __init__ calls
            continue
        kinds = arguments.args[1:]
        only = code.co_varnames[code.co_argcount : code.co_argcount + code.co_kwonlyargcount]
        values = {name: arguments.locals[name] for name in (*kinds, *only) if name in arguments.locals}
        if arguments.keywords:
            values.update(arguments.locals[arguments.keywords])
        found.update(values)  # the subclass's word counts: it comes later
        frame = frame.f_back
    return found
