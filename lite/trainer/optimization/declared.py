"""Several optimizers in automatic optimisation, declared by `configure_optimizers`: what is said of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.optim import LBFGS, Optimizer

from lite.errors import ConfigError, choose

KEYS = {"step", "every_n_batches", "gradient_clip_val", "gradient_clip_algorithm", "accumulate_grad_batches"}


@dataclass(frozen=True)
class Declared:
    """One optimizer with a step function of its own.

    Args:
        optimizer: It; while its step function runs, no other optimizer's parameters want gradients.
        step: The module's method of (batch, batch_idx) that returns its loss, by name.
        every_n_batches: It runs in every so-manieth batch of the run.
        gradient_clip_val: As the Trainer's argument; None takes that.
        gradient_clip_algorithm: As the Trainer's argument; None takes that.
        accumulate_grad_batches: Its batches per step; None takes the Trainer's.
    """

    optimizer: Optimizer
    step: str
    every_n_batches: int = 1
    gradient_clip_val: float | None = None
    gradient_clip_algorithm: str | None = None
    accumulate_grad_batches: int | None = None


def read_declared(returned: Any, module: Any) -> list[Declared]:
    """The declarations in what `configure_optimizers` returned; [] where it declares none.

    Raises:
        ConfigError: One has no step function while others have, or its settings are wrong.
    """
    given = [returned] if isinstance(returned, Mapping) else returned
    if not isinstance(given, Sequence) or not all(isinstance(one, Mapping) for one in given):
        return []
    if not any(KEYS & one.keys() for one in given):
        return []
    for one in given:
        if "step" not in one:
            raise ConfigError(
                f"configure_optimizers declared {sorted(KEYS & one.keys()) or sorted(one)} without a 'step'; give each "
                "optimizer its own: {'optimizer': ..., 'step': self.critic_step, ...}."
            )
    return [_read(one, module) for one in given]


def _read(one: Mapping[str, Any], module: Any) -> Declared:
    settings = {key: one[key] for key in KEYS if key in one}
    settings["step"] = _method_name(settings["step"], module)
    for key in ("every_n_batches", "accumulate_grad_batches"):
        value = settings.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ConfigError(f"configure_optimizers: {key}={value!r} must be a whole number of at least 1.")
    value = settings.get("gradient_clip_val")
    if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0):
        raise ConfigError(f"configure_optimizers: gradient_clip_val={value!r} must be a number.")
    if settings.get("gradient_clip_algorithm") is not None:
        choose("gradient_clip_algorithm", settings["gradient_clip_algorithm"], ["norm", "value"])
    if isinstance(one.get("optimizer"), LBFGS):
        raise ConfigError(
            "configure_optimizers declared a 'step' for LBFGS, which evaluates its loss several times per step; use it "
            "alone, with training_step, or set self.automatic_optimization = False."
        )
    return Declared(one["optimizer"], **settings)


def _method_name(step: Any, module: Any) -> str:
    """The method's name: Lite puts its own way around the module's methods, so a bound one would go past it."""
    name = step if isinstance(step, str) else getattr(step, "__name__", None)
    method: Callable[..., Any] | None = getattr(module, name, None) if isinstance(name, str) else None
    if name is None or not callable(method) or not (isinstance(step, str) or getattr(step, "__self__", None) is module):
        raise ConfigError(
            f"configure_optimizers: 'step': {step!r:.80} must be a method of {type(module).__name__}, such as "
            "self.critic_step."
        )
    return str(name)
