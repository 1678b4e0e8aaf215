"""The exceptions that `lite` raises, and how an invalid choice is reported; it knows nothing of where they are raised.

LiteError
├── ConfigError          (ValueError)    wrong input, found before any process starts
├── UsageError           (RuntimeError)  a call on the wrong object or at the wrong moment
├── LaunchError          (RuntimeError)  a process that `lite` started has failed
├── PeerError            (RuntimeError)  another rank has failed, ended or hangs, so this one can't go on
├── DesyncError          (RuntimeError)  ranks that must hold the same values don't
├── NonFiniteError       (RuntimeError)  a gradient norm, a loss or a guarded tensor is inf or NaN
├── CheckpointError      (RuntimeError)  a checkpoint can't be written or read
└── MissingExtraError    (ImportError)   an optional package is not installed
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class LiteError(Exception):
    """Base of every error that `lite` raises itself."""


class ConfigError(LiteError, ValueError):
    """An argument or environment variable is wrong; nothing has been started yet."""


class UsageError(LiteError, RuntimeError):
    """A call came at the wrong moment, or for an object that it can't serve."""


class LaunchError(LiteError, RuntimeError):
    """A started process failed; the message holds the traceback of the process that failed first."""


class PeerError(LiteError, RuntimeError):
    """Another rank has failed, ended or hangs; the message says which one, with its traceback where it left one."""


class DesyncError(LiteError, RuntimeError):
    """Parameters, buffers or optimizer state differ between ranks; the message names the first tensor and the ranks."""


class NonFiniteError(LiteError, RuntimeError):
    """A gradient norm is inf or NaN and the policy is to raise, or a tensor under a NaN guard is."""


class CheckpointError(LiteError, RuntimeError):
    """A checkpoint can't be written or read as asked."""


class MissingExtraError(LiteError, ImportError):
    """A feature needs an optional package that is not installed."""


def choose(name: str, value: object, choices: Iterable[str]) -> str:
    """Return the choice that `value` names, ignoring case.

    Args:
        name: The argument or environment variable, as the user knows it.
        value: What the user gave.
        choices: The valid names.

    Raises:
        ConfigError: `value` is none of them; the message lists them and suggests the nearest.

    Example:
        >>> choose("precision", "BF16-mixed", ["32-true", "bf16-mixed"])
        'bf16-mixed'
    """
    names = list(choices)
    if isinstance(value, str):
        lowered = {n.lower(): n for n in names}
        if value.lower() in lowered:
            return lowered[value.lower()]
        near = difflib.get_close_matches(value.lower(), lowered, n=1, cutoff=0.5)
        hint = f" Did you mean {lowered[near[0]]!r}?" if near else ""
    else:
        hint = ""
    raise ConfigError(f"{name}={value!r} is not known; choose one of {', '.join(map(repr, names))}.{hint}")


def check_flag(name: str, value: object, hint: str = "") -> None:
    """Refuse what is neither True nor False.

    Args:
        name: The argument, as the user knows it.
        value: What the user gave.
        hint: What to do instead.

    Raises:
        ConfigError: It is something else.
    """
    if not isinstance(value, bool):
        raise ConfigError(f"{name}={value!r} must be True or False{hint and '; '}{hint}.")


def shown(value: object) -> str:
    """A value as the user wrote it, for an error; its class alone where that would be long.

    Example:
        >>> shown(3), shown("a"), shown([0] * 100), shown(int)
        ('3', "'a'", 'a list', 'the class int')
    """
    if isinstance(value, type):
        return f"the class {value.__name__}"
    text = repr(value)
    kind = type(value).__name__
    return text if len(text) <= 60 and "\n" not in text else f"{'an' if kind[0] in 'AEIOUaeiou' else 'a'} {kind}"


def some(names: Sequence[str]) -> str:
    """The first few names."""
    return f"{', '.join(names[:8])}{', ...' if len(names) > 8 else ''}"
