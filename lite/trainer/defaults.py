"""The callbacks and loggers that a Trainer has: those that it was given, and those that it has by itself."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable
from functools import wraps
from importlib.metadata import entry_points
from typing import Any, SupportsIndex

from lite.errors import ConfigError
from lite.loggers import Logger
from lite.trainer.arguments import seconds
from lite.trainer.callbacks.accumulation import GradientAccumulationScheduler
from lite.trainer.callbacks.base import Checkpoint
from lite.trainer.callbacks.early_stopping import EarlyStopping
from lite.trainer.callbacks.model_checkpoint import ModelCheckpoint
from lite.trainer.callbacks.model_summary import ModelSummary
from lite.trainer.callbacks.progress_bar import ProgressBar, TQDMProgressBar
from lite.trainer.callbacks.timer import Timer
from lite.trainer.loggers import CSVLogger, DummyLogger, TensorBoardLogger


def assemble_callbacks(
    given: Any,
    *,
    checkpointing: bool | None,
    progress_bar: bool | None,
    summary: bool | None,
    max_time: Any,
    accumulate: dict[int, int] | None,
    every: int,
    fast_dev_run: bool,
    barebones: bool,
) -> list[Any]:
    """The user's callbacks and the Trainer's own.

    Raises:
        ConfigError: A callback was passed that an argument switches off.
    """
    callbacks = list(given) if isinstance(given, (list, tuple)) else [] if given is None else [given]
    if fast_dev_run:
        callbacks = [c for c in callbacks if not isinstance(c, (Checkpoint, EarlyStopping))]
    kinds: list[tuple[str, bool | None, type, Callable[[], Any]]] = [
        ("enable_progress_bar", progress_bar, ProgressBar, TQDMProgressBar),
        ("enable_model_summary", summary, ModelSummary, ModelSummary),
        ("enable_checkpointing", checkpointing, Checkpoint, ModelCheckpoint),
    ]
    if max_time is not None and not any(isinstance(c, Timer) for c in callbacks):
        seconds("max_time", max_time)
        callbacks.append(Timer(max_time))
    accumulates = accumulate is not None or every > 1
    if accumulates and any(isinstance(c, GradientAccumulationScheduler) for c in callbacks):
        raise ConfigError(
            f"accumulate_grad_batches={accumulate or every!r} contradicts the GradientAccumulationScheduler among the "
            "callbacks; leave one out."
        )
    if accumulate is not None:
        callbacks.append(GradientAccumulationScheduler(accumulate, argument="accumulate_grad_batches="))
    for argument, wanted, kind, make in kinds:
        found = [c for c in callbacks if isinstance(c, kind)]
        if wanted is False:
            if found:
                reason = "barebones=True" if barebones else f"{argument}=False"
                raise ConfigError(f"Trainer({reason}) contradicts the {type(found[0]).__name__} among the callbacks.")
            continue
        if kind is ProgressBar and len(found) > 1:
            raise ConfigError(f"two progress bars were passed: {[type(c).__name__ for c in found]}; pass one.")
        if not found:
            callbacks.append(make())
    for point in entry_points(group="lite.callbacks"):
        made = point.load()()
        callbacks.extend(made if isinstance(made, (list, tuple)) else [made])
    return callbacks


class LoggerList(list[Logger]):
    """A Trainer's loggers. Whatever changes the list is put to use: a run without any doesn't look whether there are.

    Args:
        loggers: Those that there are.
        use: Told of all of them when they are to change; it refuses what is none.
    """

    def __init__(self, loggers: Iterable[Logger], use: Callable[[list[Logger]], None]) -> None:
        super().__init__(loggers)
        self.use = use

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[type, tuple[list[Logger]]]:
        return list, (list(self),)  # a copy is nobody's


def _telling(name: str) -> Callable[..., Any]:
    """A list's method of that name that changes nothing before those who use the loggers have taken the change."""

    @wraps(getattr(list, name))
    def method(loggers: LoggerList, *args: Any, **kwargs: Any) -> Any:
        changed = list(loggers)
        result = getattr(changed, name)(*args, **kwargs)
        loggers.use(changed)
        list.__setitem__(loggers, slice(None), changed)
        return loggers if name == "__iadd__" else result

    return method


_CHANGING = ("append", "clear", "extend", "insert", "pop", "remove", "reverse", "sort")
for _name in (*_CHANGING, "__delitem__", "__iadd__", "__setitem__"):
    setattr(LoggerList, _name, _telling(_name))


def assemble_loggers(given: Any, root: str, *, fast_dev_run: bool) -> list[Logger]:
    """The loggers that the argument asks for; with `fast_dev_run` as many that write nothing."""
    if given is False:
        return []
    wanted = list(given) if isinstance(given, (list, tuple)) else [given]
    if fast_dev_run:
        return [DummyLogger() for _ in wanted]
    if given is None or given is True:
        return [(TensorBoardLogger if importlib.util.find_spec("tensorboard") is not None else CSVLogger)(root)]
    return wanted
