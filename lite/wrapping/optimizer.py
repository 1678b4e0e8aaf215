"""What `Lite.setup` hands back for an optimizer and a scheduler: the user's own object, stepping through the precision.

Where the precision leaves the step alone, both keep their own class and step; with several ranks hooks watch over it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor
from torch.optim import LBFGS, Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from lite.disguise import disguise
from lite.errors import ConfigError
from lite.precision.base import Precision


class _Original(NamedTuple):
    """What an object was before."""

    raw: type | None
    step: Callable[..., Any] | None  # of the instance: a scheduler that was built before has put its counter there
    undo: tuple[Callable[[], None], ...]
    below: Callable[[], None] | None = None
    above: Callable[[], None] | None = None


_wrapped: weakref.WeakKeyDictionary[Any, _Original] = weakref.WeakKeyDictionary()


def check_optimizer(optimizer: Optimizer, precision: Precision) -> None:
    """Refuse an optimizer whose step the precision can't take.

    Raises:
        ConfigError: The optimizer calls its closure several times, which a loss scale does not allow.
    """
    if precision.changes_step and isinstance(optimizer, LBFGS):
        raise ConfigError(
            f"LBFGS evaluates its closure several times per step, which precision={precision.name!r} can't scale; use "
            "'bf16-mixed' or '32-true'."
        )


def wrap_optimizer(
    optimizer: Optimizer,
    precision: Precision,
    *,
    check: Callable[[Optimizer], None] | None = None,
    mean_loss: Callable[[Any], Any] | None = None,
    divide: Callable[[Optimizer], Callable[[], None] | None] | None = None,
    follow: Callable[[Optimizer], Callable[[], None] | None] | None = None,
    before: Callable[[Optimizer], None] | None = None,
) -> None:
    """Prepare an optimizer, in place; nothing is done where its step stays its own.

    Args:
        optimizer: The user's.
        precision: What its step goes through.
        check: Called, with several ranks, when the optimizer is found to hold other parameters than at first.
        mean_loss: With several ranks, the mean over them of what a closure returned. An optimizer that calls its
            closure several times decides by it, and all ranks must decide alike.
        divide: With several ranks, what the strategy does beneath the precision; it returns what takes that back.
        follow: The same above it.
        before: Called before each step, or when a step's closure has run; what it raises is raised there.
    """
    below = divide(optimizer) if divide is not None else None
    undo: list[Callable[[], None]] = []
    if check is not None:
        undo.append(optimizer.register_step_pre_hook(_watch_parameters(optimizer, check)).remove)
    if before is not None:
        undo.append(optimizer.register_step_pre_hook(_asking(before)).remove)
    if mean_loss is not None and not precision.changes_step and _decides_by_loss(optimizer):
        undo.append(optimizer.register_step_pre_hook(_with_mean_loss(mean_loss)).remove)
    raw = patched = None
    if precision.changes_step:
        raw, patched = type(optimizer), optimizer.__dict__.pop("step", None)
        precision.add_optimizer(optimizer)
        undo.append(_forgetting(optimizer, precision))
        disguise(optimizer, {"step": _scaled_step(patched or raw.step.__get__(optimizer), precision)})
    original = _Original(raw, patched, tuple(undo), below)
    _wrapped[optimizer] = original  # already, so that all of it can be taken back where `follow` refuses
    if follow is not None:
        _wrapped[optimizer] = original._replace(above=follow(optimizer))


def _scaled_step(raw_step: Callable[..., Any], precision: Precision) -> Callable[..., Any]:
    inside = False

    def step(self: Optimizer, closure: Callable[[], Any] | None = None, *args: Any, **kwargs: Any) -> Any:
        nonlocal inside
        if inside:
            precision.note_run(self)
            return raw_step(*(() if closure is None else (closure,)), *args, **kwargs)
        inside = True
        self._opt_called = True  # type: ignore[attr-defined]  # schedulers ask whether step was called at all
        try:
            return precision.step(self, raw_step, closure, *args, **kwargs)
        finally:
            inside = False

    step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]  # schedulers need no counter of their own around it
    step.hooked = True  # type: ignore[attr-defined]  # neither does torch's profiler: the raw step has it
    return step


def _watch_parameters(optimizer: Optimizer, check: Callable[[Optimizer], None]) -> Callable[..., None]:
    """Call `check` when parameters came in after setup (add_param_group)."""
    before = [len(group["params"]) for group in optimizer.param_groups]

    def watch(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        nonlocal before
        now = [len(group["params"]) for group in optimizer.param_groups]
        if now != before:
            check(optimizer)
            before = now

    return watch


def _decides_by_loss(optimizer: Optimizer) -> bool:
    """Of torch's own optimizers LBFGS alone does; of others it is unknown."""
    return isinstance(optimizer, LBFGS) or not type(optimizer).__module__.startswith("torch.optim.")


def _asking(before: Callable[[Optimizer], None]) -> Callable[..., Any]:
    """Asks before a step; where it has a closure, which may end a window of accumulation, when that has run."""

    def ask(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        def asked(loss: Any) -> Any:
            before(optimizer)
            return loss

        replaced = _replace_closure(asked, args, kwargs)
        if replaced is None:
            before(optimizer)
        return replaced

    return ask


def _with_mean_loss(mean_loss: Callable[[Any], Any]) -> Callable[..., Any]:
    return lambda optimizer, args, kwargs: _replace_closure(mean_loss, args, kwargs)


def _replace_closure(then: Callable[[Any], Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A step's arguments with a closure that returns `then` of what the given one returns; None without one."""
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    if not callable(closure):
        return None

    def replaced() -> Any:
        return then(closure())

    if "closure" in kwargs:
        return args, {**kwargs, "closure": replaced}
    return (args[0], replaced, *args[2:]), kwargs


def _forgetting(optimizer: Optimizer, precision: Precision) -> Callable[[], None]:
    reference = weakref.ref(optimizer)

    def forget() -> None:
        if (it := reference()) is not None:
            precision.forget_optimizer(it)

    return forget


def unwrap_optimizer(optimizer: Optimizer) -> None:
    """Give the optimizer its own class and step back."""
    original = _wrapped.pop(optimizer, None)
    if original is None:
        return
    if original.above is not None:
        original.above()
    for undo in original.undo:
        undo()
    if original.raw is not None:
        optimizer.__class__ = original.raw
        if original.step is not None:
            optimizer.__dict__["step"] = original.step
    if original.below is not None:
        original.below()


def wrap_scheduler(scheduler: LRScheduler, precision: Precision) -> None:
    """Let the scheduler stand still when every step of its optimizer since its own last one was skipped, in place.

    So a scheduler that steps per batch follows the optimizer (see PyTorch's AMP notes), and one that steps per epoch
    doesn't lose an epoch for one bad batch. ReduceLROnPlateau follows a metric, not steps.
    """
    if not precision.changes_step or isinstance(scheduler, ReduceLROnPlateau):
        return
    raw = type(scheduler)
    before: tuple[int, int | Tensor] = (0, 0)

    def step(self: LRScheduler, *args: Any, **kwargs: Any) -> None:
        nonlocal before
        (steps, skipped), last = precision.step_counts(self.optimizer), before
        before = (steps, skipped)
        if steps == last[0] or bool(skipped - last[1] < steps - last[0]):
            raw.step(self, *args, **kwargs)

    disguise(scheduler, {"step": step})
    _wrapped[scheduler] = _Original(raw, None, ())


def unwrap_scheduler(scheduler: LRScheduler) -> None:
    """Give the scheduler its own class back."""
    original = _wrapped.pop(scheduler, None)
    if original is not None and original.raw is not None:
        scheduler.__class__ = original.raw


def move_optimizer_state(optimizer: Optimizer, precision: Precision) -> None:
    """Bring state that the optimizer already has to where its parameters are now, and to the dtype they got."""
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if not isinstance(value, Tensor) or value.ndim == 0:
                continue
            if value.device != parameter.device:
                value = value.to(parameter.device)
            if precision.param_dtype is not None and value.is_floating_point() and value.shape == parameter.shape:
                value = value.to(precision.param_dtype)
            state[key] = value
