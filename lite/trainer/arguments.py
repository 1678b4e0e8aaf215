"""The Trainer's arguments: defaults from the environment, names of older versions, and what goes together."""

from __future__ import annotations

import ast
import difflib
import functools
import inspect
import os
import warnings
from collections.abc import Callable, Mapping
from datetime import timedelta
from numbers import Integral
from typing import Any, TypeVar

from lite.errors import ConfigError, choose, shown
from lite.trainer.validation import ValidationSchedule

F = TypeVar("F", bound=Callable[..., Any])

_PREFIXES = ("LITE_TRAINER_", "PL_TRAINER_")
_REFUSED = {
    "tpu_cores": "accelerator='tpu' of another package",
    "ipus": "an accelerator of another package",
    "amp_level": "precision='16-mixed', which is torch's own",
    "auto_select_gpus": "devices=N with CUDA_VISIBLE_DEVICES",
    "checkpoint_callback": "enable_checkpointing=...",
    "weights_summary": "callbacks=[ModelSummary(max_depth=...)]",
    "progress_bar_refresh_rate": "callbacks=[TQDMProgressBar(refresh_rate=...)]",
}
# In some version None stood for the default.
_MAY_BE_NONE = {"accelerator", "strategy", "devices", "precision", "accumulate_grad_batches"}
_TRANSLATED = {"gpus", "num_processes", "amp_backend", "replace_sampler_ddp", "resume_from_checkpoint"}
_IGNORED = {"enable_autolog_hparams", "model_registry", "suggest_integrations"}
_OLD = sorted({*_REFUSED, *_TRANSLATED, *_IGNORED, "move_metrics_to_cpu"})


def settled(init: F) -> F:
    """Around `Trainer.__init__`: arguments by name, older ones translated, the environment's added."""
    names = [name for name in inspect.signature(init).parameters if name != "self"]

    @functools.wraps(init)
    def settled_init(self: Any, *args: Any, **kwargs: Any) -> None:
        if args:
            raise ConfigError(
                f"Trainer({args[0]!r}, ...): arguments have names here; write Trainer({names[0]}={args[0]!r}, ...)."
            )
        kwargs = translated(kwargs, names)
        found = from_environment([*names, *_OLD], os.environ, kwargs)
        init(self, **{**translated(found, names), **kwargs})

    return settled_init  # type: ignore[return-value]


def from_environment(names: list[str], environ: Mapping[str, str], given: Mapping[str, Any]) -> dict[str, Any]:
    """Values of LITE_TRAINER_<ARGUMENT> (or PL_TRAINER_<ARGUMENT>) for arguments that were not given.

    Example:
        >>> from_environment(["max_epochs", "precision"], {"PL_TRAINER_MAX_EPOCHS": "3"}, {})
        {'max_epochs': 3}
    """
    for variable in environ:
        prefix = next((prefix for prefix in _PREFIXES if variable.startswith(prefix)), None)
        if prefix is not None and (name := variable.removeprefix(prefix).lower()) not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"; did you mean {prefix}{near[0].upper()}?" if near else "."
            warnings.warn(
                f"{variable}={environ[variable]} is no argument of the Trainer, and changes nothing{hint}", stacklevel=4
            )
    found = {}
    for name in names:
        values = [environ[key] for prefix in _PREFIXES if environ.get(key := prefix + name.upper())]
        if name in given or not values:
            continue
        try:
            found[name] = ast.literal_eval(values[0])
        except (ValueError, SyntaxError):
            found[name] = values[0]
    return found


def translated(given: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """The arguments in their present form; those of older versions are translated with a warning, or refused.

    Raises:
        ConfigError: One is unknown, or has no present form.
    """
    result = {}
    for name, value in given.items():
        if name in names:
            if value is not None or name not in _MAY_BE_NONE:
                result[name] = value
        elif name in _IGNORED:
            if value not in (None, True):
                warnings.warn(f"Trainer({name}={value!r}) has no meaning here and is ignored.", stacklevel=4)
        elif name in _REFUSED:
            if value not in (None, False):
                raise ConfigError(f"Trainer({name}={value!r}) is not supported; use {_REFUSED[name]}.")
        elif name == "amp_backend":
            if value not in (None, "native"):
                raise ConfigError(f"Trainer({name}={value!r}) is not supported; use precision='16-mixed', torch's own.")
            if value is not None:
                _told(name, value, "precision='16-mixed' or 'bf16-mixed'; torch's own is the only one")
        elif name in ("gpus", "num_processes"):
            if value is not None:
                result.update(_devices_of(name, value, given))
        elif name == "replace_sampler_ddp":
            _told(name, value, f"use_distributed_sampler={value!r}")
            result["use_distributed_sampler"] = value
        elif name == "resume_from_checkpoint":
            if value is not None:
                raise ConfigError(f"Trainer({name}={value!r}): write trainer.fit(model, ckpt_path={value!r}).")
        elif name == "move_metrics_to_cpu":
            if value:
                warnings.warn(f"Trainer({name}={value!r}) is ignored: metrics are single numbers here.", stacklevel=4)
        else:
            near = difflib.get_close_matches(name, [*names, *_OLD], n=1, cutoff=0.5)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"Trainer has no argument {name!r}.{hint} It has {', '.join(names)}.")
    return result


def _devices_of(name: str, value: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """What `gpus` and `num_processes` of older versions are now; gpus=0 was the CPU."""
    accelerator = given.get("accelerator")
    if name == "gpus" and value in (0, "0", [], ()):
        _told(name, value, "accelerator='cpu'")
        return {} if accelerator is not None else {"accelerator": "cpu"}
    if name == "gpus" and accelerator == "cpu":
        raise ConfigError(f"Trainer(accelerator='cpu', gpus={value!r}) contradict each other; leave gpus out.")
    if name == "num_processes" and given.get("gpus"):
        _told(name, value, f"devices={given['gpus']!r}; gpus says how many processes there are")
        return {}
    kind = accelerator or ("cuda" if name == "gpus" else "cpu")
    _told(name, value, f"accelerator={kind!r}, devices={value!r}")
    return {"accelerator": kind, "devices": value}


def _told(name: str, value: Any, new: str) -> None:
    warnings.warn(f"Trainer({name}={value!r}) is deprecated; write Trainer({new}).", DeprecationWarning, stacklevel=5)


# ---- checks of single values


def whole(name: str, value: Any, least: int) -> int:
    """A whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ConfigError(f"{name}={value!r} must be a whole number of at least {least}.")
    return int(value)


def share(name: str, value: Any) -> int | float:
    """A number of batches, or a share of them from 0.0 to 1.0; None is all."""
    if value is None:
        return 1.0
    if isinstance(value, Integral) and not isinstance(value, bool):
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0:
        raise ConfigError(f"{name}={value!r} must be a whole number of batches, or a share from 0.0 to 1.0.")
    if isinstance(value, float) and value > 1.0:
        raise ConfigError(f"{name}={value!r} is a share above 1.0; a number of batches is a whole number.")
    return value


def seconds(name: str, value: str | timedelta | Mapping[str, int]) -> float:
    """A span of time: "DD:HH:MM:SS", a timedelta, or its arguments in a dict.

    Example:
        >>> seconds("max_time", "01:00:00:30")
        86430.0
    """
    if isinstance(value, Mapping):
        try:
            return seconds(name, timedelta(**value))
        except TypeError as error:
            raise ConfigError(f"{name}={dict(value)!r} is no timedelta: {error}.") from None
    if isinstance(value, timedelta):
        if value < timedelta(0):
            raise ConfigError(f"{name}={value!s} is a time before the beginning; give one of at least 0 seconds.")
        return value.total_seconds()
    if isinstance(value, str):
        parts = value.strip().split(":")
        if len(parts) == 4 and all(part.isdigit() for part in parts):
            days, hours, minutes, secs = map(int, parts)
            return timedelta(days=days, hours=hours, minutes=minutes, seconds=secs).total_seconds()
    raise ConfigError(f"{name}={value!r} must be 'DD:HH:MM:SS', a timedelta, or a dict such as {{'minutes': 30}}.")


def flags(**values: Any) -> None:
    """Refuse what is neither True nor False, nor None where the default is meant."""
    for name, value in values.items():
        if value is not None and not (isinstance(value, (bool, int)) and value in (0, 1)):
            raise ConfigError(f"{name}={value!r} must be True or False.")


def flag_or(name: str, value: Any, *words: str) -> Any:
    """True, False, None where the default is meant, or one of some words."""
    if value is None or isinstance(value, bool):
        return value
    return choose(name, value, words) if isinstance(value, str) else choose(name, value, ["True", "False", *words])


def folder(name: str, value: Any) -> str:
    """A path or URL as a string; None is the current directory."""
    if value is None:
        return os.getcwd()
    if not isinstance(value, (str, os.PathLike)):
        raise ConfigError(f"{name}={value!r} must be a path: a string or a pathlib.Path.")
    return str(os.fspath(value))


def clipping(value: Any, algorithm: Any) -> None:
    """Check gradient_clip_val and gradient_clip_algorithm."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0):
        raise ConfigError(f"gradient_clip_val={value!r} must be a number of at least 0; 0 and None clip nothing.")
    if algorithm is not None:
        choose("gradient_clip_algorithm", algorithm, ["norm", "value"])


def norm_type(value: Any) -> float | None:
    """The p of the norms that track_grad_norm asks for; None for none."""
    try:
        found = float(value)
    except (TypeError, ValueError):
        found = 0.0
    if isinstance(value, bool) or not (found > 0 or found == -1):
        raise ConfigError(f"track_grad_norm={value!r} must be a number above 0, 'inf', or -1 for none.")
    return None if found == -1 else found


def epochs_and_steps(
    max_epochs: int | None, min_epochs: int | None, max_steps: int, min_steps: int | None, *, timed: bool
) -> tuple[int, int, int, int]:
    """min_epochs, max_epochs, min_steps, max_steps as numbers; -1 is no limit."""
    if max_epochs is None:
        max_epochs = 1000 if max_steps == -1 and not timed else -1
    whole("max_epochs", max_epochs, -1)
    whole("max_steps", max_steps, -1)
    if min_epochs is None:
        min_epochs = 1 if min_steps is not None else 0
    return whole("min_epochs", min_epochs, 0), max_epochs, whole("min_steps", min_steps or 0, 0), max_steps


def validation_schedule(interval: Any, every_n_epochs: int | None) -> ValidationSchedule:
    """When validation is due, by val_check_interval and check_val_every_n_epoch."""
    if every_n_epochs is not None:
        whole("check_val_every_n_epoch", every_n_epochs, 1)
    if isinstance(interval, (str, timedelta, Mapping)):
        return ValidationSchedule(1.0, every_n_epochs, seconds("val_check_interval", interval))
    value = share("val_check_interval", interval)
    if not value:
        raise ConfigError(
            f"val_check_interval={interval!r} must be a number of batches (at least 1), a share above 0.0, or a time; "
            "limit_val_batches=0 switches validation off."
        )
    if every_n_epochs is None and isinstance(value, float):
        raise ConfigError(
            f"val_check_interval={value!r} with check_val_every_n_epoch=None must be a number of batches, or a time."
        )
    return ValidationSchedule(value, every_n_epochs)


def has_timer(callbacks: Any) -> bool:
    """Whether a Timer is among the callbacks."""
    several = callbacks if isinstance(callbacks, (list, tuple)) else [callbacks]
    return any(type(callback).__name__ == "Timer" for callback in several)


def beside_lite(**values: tuple[Any, ...]) -> None:
    """Refuse what a ready Lite object has otherwise, beside `lite=`; each value is followed by those that are fine."""
    for name, (value, *fine) in values.items():
        if value not in fine:
            raise ConfigError(
                f"Trainer(lite=..., {name}={shown(value)}): the Lite object has its own; write Lite({name}=...)."
            )


def barebones(**costs: Any) -> None:
    """Refuse what costs time beside barebones=True."""
    for name, value in costs.items():
        if value not in (None, False, 0):
            raise ConfigError(f"Trainer(barebones=True, {name}={value!r}) contradict each other; leave one out.")
