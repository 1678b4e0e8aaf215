"""What `Lite.setup` hands back for an optimizer and a scheduler: the user's own object, whose step goes through
precision.

Where the precision leaves the step alone, both stay exactly as they are.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.optim import LBFGS, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lite.disguise import disguise
from lite.errors import ConfigError
from lite.precision.base import Precision

_wrapped: weakref.WeakKeyDictionary[Any, tuple[type, Any]] = weakref.WeakKeyDictionary()


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


def wrap_optimizer(optimizer: Optimizer, precision: Precision) -> None:
    """Route `optimizer.step` through `precision`, in place; nothing is done where it stays the optimizer's own."""
    if not precision.changes_step:
        return
    raw = type(optimizer)
    patched = optimizer.__dict__.pop("step", None)  # a scheduler that was built before has put its counter there
    raw_step: Callable[..., Any] = patched or raw.step.__get__(optimizer)
    inside = False

    def step(self: Optimizer, closure: Callable[[], Any] | None = None) -> Any:
        nonlocal inside
        if inside:
            precision.note_run(self)
            return raw_step()
        inside = True
        self._opt_called = True  # type: ignore[attr-defined]  # schedulers ask whether step was called at all
        try:
            return precision.step(self, raw_step, closure)
        finally:
            inside = False

    step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]  # schedulers need no counter of their own around it
    step.hooked = True  # type: ignore[attr-defined]  # neither does torch's profiler: the raw step has it
    disguise(optimizer, {"step": step})
    _wrapped[optimizer] = (raw, patched)


def unwrap_optimizer(optimizer: Optimizer) -> None:
    """Give the optimizer its own class and step back."""
    raw, patched = _wrapped.pop(optimizer, (None, None))
    if raw is not None:
        optimizer.__class__ = raw
        if patched is not None:
            optimizer.__dict__["step"] = patched


def wrap_scheduler(scheduler: LRScheduler, precision: Precision) -> None:
    """Let the scheduler stand still when its optimizer's step was skipped, in place; see PyTorch's AMP notes."""
    if not precision.changes_step:
        return
    raw = type(scheduler)

    def step(self: LRScheduler, *args: Any, **kwargs: Any) -> None:
        if not precision.step_was_skipped(self.optimizer):
            raw.step(self, *args, **kwargs)

    disguise(scheduler, {"step": step})
    _wrapped[scheduler] = (raw, None)


def unwrap_scheduler(scheduler: LRScheduler) -> None:
    """Give the scheduler its own class back."""
    raw, _ = _wrapped.pop(scheduler, (None, None))
    if raw is not None:
        scheduler.__class__ = raw


def move_optimizer_state(optimizer: Optimizer) -> None:
    """Bring state that the optimizer already has to where its parameters are now."""
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, Tensor) and value.ndim > 0 and value.device != parameter.device:
                state[key] = value.to(parameter.device)
