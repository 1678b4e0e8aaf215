"""What is written down and who is told: loggers and callbacks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from numbers import Real
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

from torch import Tensor

from lite import collectives
from lite.errors import ConfigError, UsageError, shown
from lite.facets.base import Facet
from lite.loggers import Logger
from lite.sharded import whole

_NO_CALLBACKS = (str, bytes, bool, int, float, dict, set, frozenset, FunctionType, MethodType, BuiltinFunctionType)


class Records(Facet):
    """The side of `Lite` that logs and calls back."""

    _loggers: tuple[Logger, ...]
    _writers: list[Logger]  # what is closed at the end, on rank 0

    @property
    def loggers(self) -> tuple[Logger, ...]:
        """The loggers that `log` writes to."""
        return self._loggers

    @property
    def logger(self) -> Logger:
        """The first logger.

        Raises:
            UsageError: There is none.
        """
        if not self._loggers:
            raise UsageError("this Lite has no logger; pass one: Lite(loggers=lite.loggers.CSVLogger('logs')).")
        return self._loggers[0]

    def use_loggers(self, loggers: Any) -> None:
        """Let `log` write to these loggers from now on, in place of those before. No collective: rank 0 writes.

        Args:
            loggers: One or several, as `Lite(loggers=...)` takes them; None or an empty list for none.

        Raises:
            ConfigError: One is no Logger, or could not write.

        Example:
            >>> import lite
            >>> run = lite.Lite(accelerator="cpu")
            >>> run.use_loggers([])
            >>> run.loggers
            ()
        """
        found, before = check_loggers(loggers), self._loggers
        if self.is_global_zero:
            new = [logger for logger in found if logger not in before]
            for logger in new:
                logger.check()
            for logger in before:
                logger.flush()
            if self._connected:  # else they are taken with the others as it connects
                self._writers += [logger for logger in new if logger not in self._writers]
        self._loggers = found

    def log(self, name: str, value: Any, step: int | None = None) -> None:
        """Write one number to every logger, on rank 0."""
        self.log_dict({name: value}, step)

    def log_dict(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Write numbers to every logger, on rank 0. Values stay on the device until a logger writes them out.

        A number of split logits (a DTensor) is put together, so call it on all ranks then.

        Raises:
            ConfigError: A name is no string, `step` is no number, or a value is neither a number nor a tensor with one
                element.
        """
        if not isinstance(metrics, Mapping):
            raise ConfigError(f"log_dict got metrics={shown(metrics)}; pass a dict of names and numbers.")
        if step is not None and (isinstance(step, bool) or not isinstance(step, Real)):
            raise ConfigError(f"log got step={shown(step)}; pass the number of the step, e.g. step=100.")
        for name, value in metrics.items():
            if not isinstance(name, str):
                raise ConfigError(f"log: the name {shown(name)} is no string; the name comes first: log('loss', 0.5).")
            if isinstance(value, Tensor) and value.numel() != 1:
                raise ConfigError(
                    f"log: {name!r} has the shape {tuple(value.shape)}; log a number or a one-element tensor."
                )
            if not isinstance(value, (Tensor, bool, int, float)) and not hasattr(value, "__float__"):
                raise ConfigError(f"log: {name!r} is a {type(value).__name__}; log a number or a one-element tensor.")
        metrics = {name: whole(value) for name, value in metrics.items()}
        if self.is_global_zero and self._loggers:
            # A clone: the loop may go on adding to its tensor before the value is written out.
            values = {k: v.detach().clone() if isinstance(v, Tensor) else v for k, v in metrics.items()}
            for logger in self._loggers:
                logger.log_metrics(values if logger.takes_tensors else _numbers(values), step)

    def log_hyperparameters(self, params: Mapping[str, Any]) -> None:
        """Hand the run's settings to every logger, on rank 0.

        Raises:
            ConfigError: `params` is no dict.
        """
        if not isinstance(params, Mapping):
            raise ConfigError(
                f"log_hyperparameters got params={shown(params)}; pass a dict, which vars(args) makes of a namespace."
            )
        if self.is_global_zero:
            for logger in self._loggers:
                logger.log_hyperparams(params)

    def _check_loggers(self) -> None:
        """Refuse loggers that rank 0, which writes, could not write with: on all ranks. Collective where they run."""
        problem: Exception | None = None
        if self.is_global_zero:
            try:
                for logger in self._loggers:
                    logger.check()
            except Exception as error:  # of anybody's logger
                problem = error
        # Loggers may be given to rank 0 alone, so all take part.
        told = collectives.broadcast(None if problem is None else str(problem)) if self._connected else None
        if problem is not None:
            raise problem
        if told is not None:
            raise ConfigError(told)

    def call(self, hook: str, *args: Any, **kwargs: Any) -> None:
        """Call the method `hook` of every callback that has it, in their order."""
        for method in self._methods(hook):
            method(*args, **kwargs)

    def _methods(self, hook: str) -> list[Callable[..., Any]]:
        found = [getattr(callback, hook, None) for callback in self._callbacks]
        for callback, method in zip(self._callbacks, found, strict=True):
            if method is not None and not callable(method):
                raise ConfigError(f"call({hook!r}): {type(callback).__name__}.{hook} is not callable.")
        return [method for method in found if method is not None]


def _numbers(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value.item() if isinstance(value, Tensor) else value for name, value in values.items()}


def check_callbacks(callbacks: Any) -> tuple[Any, ...]:
    """The callbacks, as `Lite` takes them.

    Raises:
        ConfigError: One can have no hooks: it is a class, a function or a plain value.
    """
    found = tuple(callbacks) if isinstance(callbacks, (list, tuple)) else () if callbacks is None else (callbacks,)
    for callback in found:
        if isinstance(callback, type):
            name = callback.__name__
            raise ConfigError(f"callbacks={shown(callbacks)}: {name} is a class; pass an object of it: {name}(...).")
        if type(callback) in _NO_CALLBACKS:
            raise ConfigError(
                f"callbacks={shown(callbacks)}: {shown(callback)} has no hooks; pass an object with methods such as "
                "on_after_setup(lite, model), or a list of them."
            )
    return found


def check_loggers(loggers: Any) -> tuple[Logger, ...]:
    """The loggers, as `Lite` takes them.

    Raises:
        ConfigError: One is no Logger.
    """
    found = tuple(loggers) if isinstance(loggers, (list, tuple)) else () if loggers is None else (loggers,)
    for logger in found:
        if not isinstance(logger, Logger):
            raise ConfigError(
                f"loggers={shown(loggers)}: {shown(logger)} is no Logger; pass lite.loggers.CSVLogger('logs'), say."
            )
    return found
