"""Where something may be logged, and what is kept of it there: the newest step's value, the epoch's, or both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lite.errors import ConfigError, UsageError
from lite.trainer.logging.entries import Entry, Options

LOADER_SUFFIX = "/dataloader_idx_"

_STEP_HOOKS = {
    "training_step",
    "on_train_batch_start",
    "on_train_batch_end",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
}
_BATCH_HOOKS = {f"on_{s}_batch_{m}" for s in ("validation", "test") for m in ("start", "end")}
_BATCH_HOOKS |= {"validation_step", "test_step"}
_EPOCH_HOOKS = {
    "on_train_start",
    *(f"on_{s}_epoch_{m}" for s in ("train", "validation", "test") for m in ("start", "end")),
    "on_validation_start",
    "on_test_start",
}


class Place:
    """Where something may be logged: a hook, and in evaluation the loader that it runs for."""

    __slots__ = ("entries", "hook", "loader", "stage")

    def __init__(self, stage: str, hook: str, loader: int | None) -> None:
        self.stage, self.hook, self.loader = stage, hook, loader
        self.entries: dict[str, Entry] = {}


NOWHERE = Place("", "", None)


def kept_of(place: Place, name: Any, value: Any, options: Options) -> tuple[bool, bool]:
    """Whether a step's value is kept there, and whether an epoch's is.

    Raises:
        ConfigError: The name, the value's kind or the options are wrong.
        UsageError: Nothing can be logged there.
    """
    if not isinstance(name, str):
        raise ConfigError(f"log: the name {name!r} must be a string.")
    if LOADER_SUFFIX in name:
        raise ConfigError(f"log({name!r}): {LOADER_SUFFIX!r} is what the name gets with several loaders; leave it out.")
    if isinstance(value, Mapping):
        raise ConfigError(f"log({name!r}) got a dict; use log_dict, or log each of its values.")
    hook = place.hook
    if hook in _STEP_HOOKS:
        step, epoch = True, False
    elif hook in _BATCH_HOOKS or hook in _EPOCH_HOOKS:
        step, epoch = False, True
    else:
        where = hook or "this moment"
        raise UsageError(
            f"log({name!r}) was called in {where}, where nothing can be logged; log in training_step, "
            "validation_step, test_step, or in the hooks of train, validation and test batches and epochs."
        )
    on_step = step if options.on_step is None else options.on_step
    on_epoch = epoch if options.on_epoch is None else options.on_epoch
    if on_step and hook in _EPOCH_HOOKS:
        raise ConfigError(f"log({name!r}, on_step=True) in {hook}: there is no step there; leave on_step out.")
    if not on_step and not on_epoch:
        raise ConfigError(f"log({name!r}, on_step=False, on_epoch=False) keeps nothing; set one of them to True.")
    return on_step, on_epoch
