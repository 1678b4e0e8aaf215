"""Which hooks there are, and the table of those that somebody overrides: one tuple of bound methods per name, per run.

A loop runs a hook by `for hook in hooks.on_train_start: hook()`, so a hook that nobody overrides costs nothing.
"""

from __future__ import annotations

import difflib
import inspect
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from lite.errors import ConfigError
from lite.trainer.old import GONE_FROM_CALLBACKS

Method = Callable[..., Any]

_STAGES = ("train", "validation", "test", "predict")
# The number of arguments after (trainer, module), which the module's hook of the same name gets alone.
SHARED: dict[str, int] = {
    "setup": 1,
    "teardown": 1,
    "on_fit_start": 0,
    "on_fit_end": 0,
    **{f"on_{stage}_{moment}": 0 for stage in _STAGES for moment in ("start", "end", "epoch_start", "epoch_end")},
    "on_train_batch_start": 2,
    "on_train_batch_end": 3,
    **{f"on_{stage}_batch_start": 3 for stage in _STAGES[1:]},
    **{f"on_{stage}_batch_end": 4 for stage in _STAGES[1:]},
    "on_before_zero_grad": 1,
    "on_before_backward": 1,
    "on_after_backward": 0,
    "on_before_optimizer_step": 1,
}
CALLBACKS_ALONE: dict[str, int] = {"on_sanity_check_start": 0, "on_sanity_check_end": 0, "on_exception": 1}
MODULE_ALONE: dict[str, int] = {
    "on_validation_model_zero_grad": 0,
    **{f"on_{stage}_model_{mode}": 0 for stage in _STAGES[1:] for mode in ("eval", "train")},
}
# How hooks begin, and people write them.
_BEGINNINGS = tuple(f"on_{s}_" for s in (*_STAGES, "training", "val", "testing", "fit", "sanity", "before", "after"))
# Called where they are needed, and in no table.
CALLED_BY_NAME = {
    "on_save_checkpoint",
    "on_load_checkpoint",
    "on_before_batch_transfer",
    "on_after_batch_transfer",
    "on_gpu",
}


class Hooks:
    """The overriding bound methods of one run, by hook.

    Args:
        trainer: What callbacks get first.
        module: The user's module.
        callbacks: The run's callbacks, in their order.
        bases: The base classes whose own methods do nothing: of callbacks, of modules.
        wrap: What is put around each method (a profiler's), or None.

    Attributes:
        done: How many hooks have been run that are not part of every step: the same on all ranks.

    Raises:
        ConfigError: A method's name begins with `on_` and is nearly a hook's.
    """

    def __init__(
        self,
        trainer: Any,
        module: Any,
        callbacks: Sequence[Any],
        bases: tuple[type, type],
        wrap: Callable[[str, Any, Method], Method] | None = None,
    ) -> None:
        callback_base, module_base = bases
        for callback in callbacks:
            check_names(callback, {**SHARED, **CALLBACKS_ALONE})
        check_names(module, {**SHARED, **MODULE_ALONE})
        wrap = wrap or (lambda name, owner, method: method)
        self.done = 0
        self.monitors: tuple[Method, ...] = ()
        self._owners: dict[str, list[str]] = {}
        for name, count in {**SHARED, **CALLBACKS_ALONE, **MODULE_ALONE}.items():
            early: list[Method] = []
            late: list[Method] = []
            owners = self._owners[name] = []
            for callback in callbacks if name not in MODULE_ALONE else ():
                if overrides(callback, name, callback_base):
                    method = fitted(getattr(callback, name), count + 2)
                    bound = wrap(name, callback, partial(method, trainer, module))
                    # What reads metrics does so when everybody has logged them.
                    waits = name == "on_train_epoch_end" and getattr(callback, "reads_metrics", False)
                    (late if waits else early).append(bound)
                    if not waits:
                        key = callback.state_key
                        owners.append(f"{key}#{len(owners)}" if key in owners else key)
            if name not in CALLBACKS_ALONE and overrides(module, name, module_base):
                early.append(wrap(name, module, fitted(getattr(module, name), count)))
                owners.append("module")
            setattr(self, name, tuple(early))
            if late:
                self.monitors = tuple(late)

    def __getattr__(self, name: str) -> tuple[Method, ...]:
        raise AttributeError(f"there is no hook {name!r}")

    def call(self, name: str, *args: Any) -> None:
        """Run a hook that is not part of every step."""
        for method in getattr(self, name):
            method(*args)
        self.done += 1

    def call_rest(self, name: str, begun: list[str]) -> None:
        """Run a hook's methods but those of `begun`, where each is noted as it begins: so a save within is whole.

        Args:
            name: The hook, one without arguments.
            begun: Whose methods have run, callbacks by `state_key`; changed.
        """
        before = set(begun)
        for owner, method in zip(self._owners[name], getattr(self, name), strict=True):
            if owner not in before:
                begun.append(owner)
                method()
        self.done += 1


def overrides(owner: Any, name: str, base: type) -> bool:
    """Whether `owner` has a method `name` of its own instead of its base class's; None in an instance: it has not."""
    if name in getattr(owner, "__dict__", {}):
        return owner.__dict__[name] is not None
    found = getattr(type(owner), name, None)
    return found is not None and found is not getattr(base, name, None)


def accepted(method: Method) -> tuple[int, int]:
    """The least and the largest number of positional arguments that a method takes."""
    least = most = 0
    for parameter in inspect.signature(method).parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL:
            most = 99
        elif parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            most += 1
            least += parameter.default is parameter.empty
    return least, most


def fitted(method: Method, count: int) -> Method:
    """The method, to be called with `count` arguments: those of older versions take an index more, or one less."""
    least, most = accepted(method)
    if most < count:
        return lambda *args: method(*args[:most])
    if least > count:
        return lambda *args: method(*args, *([0] * (least - count)))
    return method


def indexed(method: Method, index: int | None = 0, **more: Any) -> Method:
    """An override, to be called in the present form: one of an older version has `optimizer_idx`, or some of `more`.

    Example:
        >>> indexed(lambda optimizer, optimizer_idx, closure: (optimizer_idx, closure))("sgd", "closure")
        (0, 'closure')
    """
    names = list(inspect.signature(method).parameters)
    named = {name: value for name, value in more.items() if name in names}
    if "optimizer_idx" not in names:
        return partial(method, **named) if named else method
    place = names.index("optimizer_idx")

    def call(*args: Any) -> Any:
        if place < len(args):
            return method(*args[:place], index, *args[place:], **named)
        return method(*args, **named, optimizer_idx=index)

    return call


def check_names(owner: Any, known: Iterable[str]) -> None:
    """Refuse an `on_...` method whose name is nearly a hook's, and tell of one that only begins like hooks.

    Raises:
        ConfigError: There is one; the message has the hook's name.
    """
    names = set(known) | CALLED_BY_NAME
    gone = set(GONE_FROM_CALLBACKS)
    for cls in type(owner).__mro__:
        if cls.__module__.startswith("torch.") or cls.__module__.startswith("lite."):
            continue
        for name, value in vars(cls).items():
            if not name.startswith("on_") or name in names or name in gone or not inspect.isfunction(value):
                continue
            near = difflib.get_close_matches(name, names, n=1, cutoff=0.85)
            if near:
                raise ConfigError(
                    f"{cls.__name__}.{name} is no hook, so nobody would call it; did you mean {near[0]!r}? Rename it, "
                    "or give it a name that doesn't begin with 'on_'."
                )
            if name.startswith(_BEGINNINGS):
                near = difflib.get_close_matches(name, names, n=1, cutoff=0.0)
                warnings.warn(
                    f"{cls.__name__}.{name} begins like a hook and is none, so only you call it; the nearest is "
                    f"{near[0]!r}.",
                    stacklevel=6,
                )
