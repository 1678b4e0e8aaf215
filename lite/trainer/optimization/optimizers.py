"""What `configure_optimizers` may return, made into optimizers and schedulers with their settings."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR, ReduceLROnPlateau

from lite.errors import ConfigError, choose
from lite.trainer.optimization.declared import KEYS

_FORMS = (
    "return an optimizer, a list of optimizers, two lists (optimizers, schedulers), a dict {'optimizer': ..., "
    "'lr_scheduler': ...}, a list of such dicts, or None"
)


@dataclass
class SchedulerConfig:
    """One learning-rate scheduler and when it steps.

    Args:
        scheduler: The scheduler.
        name: For LearningRateMonitor.
        interval: "epoch", or "step": per optimizer step.
        frequency: Every so many epochs or optimizer steps.
        reduce_on_plateau: Whether its step takes a metric.
        monitor: Which metric that is.
        strict: Whether a missing metric is an error, or a warning.

    Attributes:
        optimizer: Whose rate it changes: the scheduler's word, or else the one beside it or the only one; None where
            nobody knows.
    """

    scheduler: Any
    name: str | None = None
    interval: str = "epoch"
    frequency: int = 1
    reduce_on_plateau: bool = False
    monitor: str | None = None
    strict: bool = True
    optimizer: Any = field(default=None, init=False)


_KEYS = [one.name for one in fields(SchedulerConfig) if one.init]
_BESIDE = {"optimizer", "lr_scheduler", "monitor", *KEYS}


def as_plain(returned: Any) -> Any:
    """What `configure_optimizers` returned, with the items of a generator."""
    if not isinstance(returned, (Optimizer, Mapping, list, tuple, str)) and isinstance(returned, Iterable):
        return list(returned)
    return returned


def read_optimizers(returned: Any) -> tuple[list[Optimizer], list[SchedulerConfig]]:
    """The optimizers and schedulers in what `configure_optimizers` returned.

    Raises:
        ConfigError: It is of no form that is known, or a scheduler's settings are wrong.
    """
    if returned is None:
        warnings.warn(
            "configure_optimizers returned None: the module is trained without an optimizer, so its weights stay as "
            "they are.",
            stacklevel=4,
        )
        return [], []
    schedulers: list[SchedulerConfig] = []
    if isinstance(returned, Optimizer):
        optimizers = [returned]
    elif isinstance(returned, Mapping):
        optimizers, schedulers = _read_dicts([returned])
    elif isinstance(returned, (list, tuple)):
        optimizers, schedulers = _read_sequence(returned)
    else:
        raise ConfigError(f"configure_optimizers returned a {type(returned).__name__}; {_FORMS}.")
    for scheduler in schedulers:
        paced = getattr(scheduler.scheduler, "optimizer", None)
        if paced is not None and not any(paced is optimizer for optimizer in optimizers):
            raise ConfigError(
                f"configure_optimizers returned a {type(scheduler.scheduler).__name__} whose optimizer it did not "
                "return; return that optimizer too."
            )
        only = optimizers[0] if len(optimizers) == 1 else scheduler.optimizer
        scheduler.optimizer = only if paced is None else paced
    return optimizers, schedulers


def _read_sequence(returned: Sequence[Any]) -> tuple[list[Optimizer], list[SchedulerConfig]]:
    if len(returned) == 2 and all(isinstance(side, (list, tuple)) for side in returned):
        given, paced = returned
        if not all(isinstance(optimizer, Optimizer) for optimizer in given):
            raise ConfigError(f"configure_optimizers returned {_kinds(given)} as its optimizers; {_FORMS}.")
        return list(given), [_read_scheduler(one, None) for one in paced]
    if returned and all(isinstance(one, Optimizer) for one in returned):
        return list(returned), []
    if returned and all(isinstance(one, Mapping) for one in returned):
        return _read_dicts(returned)
    raise ConfigError(f"configure_optimizers returned {_kinds(returned)}; {_FORMS}.")


def _kinds(returned: Any) -> str:
    """What it is made of: objects by their class, as their own texts have several lines."""
    if isinstance(returned, Mapping):
        return "{" + ", ".join(f"{key!r}: {_kinds(value)}" for key, value in returned.items()) + "}"
    if isinstance(returned, (list, tuple)):
        parts = ", ".join(map(_kinds, returned))
        return f"[{parts}]" if isinstance(returned, list) else f"({parts})"
    return repr(returned) if isinstance(returned, (str, int, float)) else type(returned).__name__


def _refuse_misspelt(unknown: Iterable[str], known: Iterable[str]) -> None:
    for key in unknown:
        near = get_close_matches(str(key), list(known), n=1, cutoff=0.75)
        if near:
            raise ConfigError(f"configure_optimizers returned a dict with the key {key!r}; did you mean {near[0]!r}?")


def _read_dicts(given: Sequence[Mapping[str, Any]]) -> tuple[list[Optimizer], list[SchedulerConfig]]:
    optimizers, schedulers = [], []
    for one in given:
        if not isinstance(one.get("optimizer"), Optimizer):
            raise ConfigError(f"configure_optimizers returned {_kinds(one)} without an 'optimizer'; {_FORMS}.")
        if "frequency" in one:
            raise ConfigError(
                "configure_optimizers returned a 'frequency' beside an optimizer, which switched between optimizers "
                "in older versions; give each a step function of its own, {'optimizer': ..., 'step': self.critic_step, "
                "'every_n_batches': 1}, or set self.automatic_optimization = False and step them in training_step."
            )
        unknown = set(one) - _BESIDE
        if unknown:
            _refuse_misspelt(unknown, _BESIDE)
            warnings.warn(f"configure_optimizers: {sorted(unknown)} in the dict means nothing there.", stacklevel=6)
        optimizers.append(one["optimizer"])
        if one.get("lr_scheduler") is not None:
            schedulers.append(_read_scheduler(one["lr_scheduler"], one.get("monitor")))
            schedulers[-1].optimizer = one["optimizer"]
    return optimizers, schedulers


def _read_scheduler(given: Any, monitor: str | None) -> SchedulerConfig:
    settings = dict(given) if isinstance(given, Mapping) else {"scheduler": given}
    if "scheduler" not in settings:
        raise ConfigError(
            f"configure_optimizers returned the scheduler settings {_kinds(settings)} without 'scheduler'."
        )
    unknown = [key for key in settings if key not in _KEYS]
    if unknown:
        _refuse_misspelt(unknown, _KEYS)
        warnings.warn(
            f"configure_optimizers: {unknown!r} means nothing beside a scheduler; what does is {_KEYS}.", stacklevel=7
        )
    config = SchedulerConfig(**{key: value for key, value in settings.items() if key in _KEYS})
    config.monitor = config.monitor or monitor
    config.interval = choose("the scheduler's interval", config.interval, ["epoch", "step"])
    frequency = config.frequency
    if isinstance(frequency, bool) or not isinstance(frequency, int) or frequency < 1:
        raise ConfigError(f"the scheduler's frequency={frequency!r} must be a whole number of at least 1.")
    scheduler = config.scheduler
    if not hasattr(scheduler, "step") or isinstance(scheduler, type):
        raise ConfigError(f"configure_optimizers returned {scheduler!r:.80} as a scheduler, which has no step().")
    if isinstance(scheduler, ReduceLROnPlateau):
        config.reduce_on_plateau = True
    if config.reduce_on_plateau and config.monitor is None:
        raise ConfigError(
            f"{type(scheduler).__name__} needs a metric: return {{'optimizer': optimizer, 'lr_scheduler': scheduler, "
            "'monitor': 'val_loss'}."
        )
    if isinstance(scheduler, OneCycleLR) and config.interval == "epoch":
        warnings.warn(
            "OneCycleLR counts optimizer steps, but it is configured to step per epoch; return it with "
            "'interval': 'step' where that is what total_steps means.",
            stacklevel=7,
        )
    return config


def as_lr_schedulers(configs: Sequence[SchedulerConfig]) -> list[LRScheduler]:
    """Those that are torch's, which `Lite.setup` takes; others step as they are."""
    return [config.scheduler for config in configs if isinstance(config.scheduler, LRScheduler)]
