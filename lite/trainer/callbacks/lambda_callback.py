"""`LambdaCallback`: a callback out of functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lite.errors import choose
from lite.trainer.callbacks.base import Callback
from lite.trainer.hooks import CALLBACKS_ALONE, SHARED

_NAMES = [*SHARED, *CALLBACKS_ALONE, "on_save_checkpoint", "on_load_checkpoint"]


class LambdaCallback(Callback):
    """Runs functions as hooks.

    Args:
        **hooks: A function for each hook that is wanted, with the hook's arguments.

    Raises:
        ConfigError: A name is no hook.

    Example:
        >>> callback = LambdaCallback(on_train_start=lambda trainer, module: print("off we go"))
        >>> callback.on_train_start(None, None)
        off we go
    """

    def __init__(self, **hooks: Callable[..., Any] | None) -> None:
        for name, function in hooks.items():
            choose("LambdaCallback's hook", name, _NAMES)
            if function is not None:
                self.__dict__[name] = function
