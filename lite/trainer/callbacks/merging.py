"""The callbacks of a run: the Trainer's and the module's, checked, in the order in which they are called."""

from __future__ import annotations

from typing import Any

from lite.errors import ConfigError
from lite.trainer.callbacks.base import Callback, Checkpoint
from lite.trainer.hooks import overrides

# What is called by name; hooks are looked for.
_OF_CALLBACKS = ("state_key", "state_dict", "load_state_dict", "on_save_checkpoint", "on_load_checkpoint")


def merge_callbacks(callbacks: list[Any], module: Any) -> list[Any]:
    """The Trainer's callbacks with those of `configure_callbacks`, which replace those of their type.

    Raises:
        ConfigError: Two would be stored under the same name.
    """
    own = module.configure_callbacks()
    own = [own] if isinstance(own, Callback) else list(own or ())
    kinds = {type(callback) for callback in own}
    kept = [c for c in callbacks if not any(issubclass(kind, type(c)) for kind in kinds)]
    return in_order([*kept, *own])


def check_callback(callback: Any) -> None:
    """Refuse what lacks something that a run asks of callbacks; one of another package's may have it all.

    Raises:
        ConfigError: It is a class, or no callback.
    """
    if isinstance(callback, type):
        raise ConfigError(f"callbacks has the class {callback.__name__}; pass an instance, {callback.__name__}(...).")
    missing = [name for name in _OF_CALLBACKS if not hasattr(callback, name)]
    if missing:
        raise ConfigError(
            f"callbacks has {callback!r:.80}, which is no callback: it has no {missing[0]}; derive the class "
            f"{type(callback).__name__} from lite.trainer.Callback, which has all that it doesn't override."
        )


def in_order(callbacks: list[Any]) -> list[Any]:
    """Those that tune first, those that save last, the others as they were.

    Raises:
        ConfigError: One is no callback, or two would be stored under the same name.
    """

    def rank(callback: Any) -> int:
        return 0 if getattr(callback, "tunes", False) else 2 if isinstance(callback, Checkpoint) else 1

    for callback in callbacks:
        check_callback(callback)
    ordered = sorted(callbacks, key=rank)
    seen: dict[str, Any] = {}
    for callback in ordered:
        if not overrides(callback, "state_dict", Callback):
            continue
        other = seen.setdefault(callback.state_key, callback)
        if other is not callback:
            raise ConfigError(
                f"two callbacks {type(callback).__name__} have the same state_key {callback.state_key!r}, so a "
                "checkpoint could keep one of them only; give them different settings, or override state_key."
            )
    return ordered
