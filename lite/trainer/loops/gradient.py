"""What stands between a loss and an optimizer's step: dropping old gradients, backward, norms, clipping; with hooks."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from lite.errors import ConfigError, UsageError
from lite.trainer.hooks import indexed, overrides
from lite.trainer.module import LightningModule
from lite.trainer.optimization.declared import Declared
from lite.trainer.optimization.manual import clip_by

NO_GRAPH = (
    "training_step returned a loss that needs no gradient, so there is nothing to train by; don't detach it or compute "
    "it under torch.no_grad(), and check that parameters are not all frozen."
)


def hooked(trainer: Any, name: str) -> Callable[..., None] | None:
    """A hook of the training step as one function, within which `self.log` is the hook's; None where nobody has it."""
    methods, metrics = getattr(trainer.hooks, name), trainer.metrics
    if not methods:
        return None
    place, at = metrics.place("train", name), metrics.at

    def run(*args: Any) -> None:
        here = metrics.here
        at(place)
        for method in methods:
            method(*args)
        at(here)

    return run


def run_backward(trainer: Any, backward: Callable[..., None]) -> Callable[..., None]:
    """That backward with the hooks around it."""
    before, after = hooked(trainer, "on_before_backward"), hooked(trainer, "on_after_backward")
    if before is None and after is None:
        return backward

    def run(loss: Tensor, *args: Any, **kwargs: Any) -> None:
        if before is not None:
            before(loss)
        backward(loss, *args, **kwargs)
        if after is not None:
            after()

    return run


def drop_gradients(trainer: Any, optimizer: Optimizer, index: int = 0) -> Callable[[int], None]:
    """Dropping an optimizer's gradients, with hooks and the module's own way where there are any."""
    module, progress = trainer.module, trainer.fit_loop.progress
    before, own = hooked(trainer, "on_before_zero_grad"), None
    if overrides(module, "optimizer_zero_grad", LightningModule):
        own = indexed(module.optimizer_zero_grad, index)
    if before is None and own is None:
        return lambda batch_idx: optimizer.zero_grad()

    def zero_grad(batch_idx: int) -> None:
        if before is not None:
            before(optimizer)
        if own is not None:
            own(progress.epoch, batch_idx, optimizer)
        else:
            optimizer.zero_grad()

    return zero_grad


def before_step_hooks(trainer: Any, clip: Callable[[Optimizer], Any] | None) -> Callable[[Optimizer], None] | None:
    """What comes between backward and step: true sizes, hooks, norms, clipping; None where there is nothing."""
    module, metrics, precision = trainer.module, trainer.metrics, trainer.lite.precision
    before, norm_type = hooked(trainer, "on_before_optimizer_step"), tracked_norm(trainer)
    if before is None and clip is None and norm_type is None:
        return None
    unscale = getattr(precision, "unscale", None) if precision.changes_step else None
    place = metrics.place("train", "on_before_optimizer_step")

    def before_step(optimizer: Optimizer) -> None:
        if unscale is not None:
            unscale(optimizer)
        if before is not None:
            before(optimizer)
        if norm_type is not None:
            here = metrics.here
            metrics.at(place)
            log_norms(module, norm_type)
            metrics.at(here)
        if clip is not None:
            clip(optimizer)

    return before_step


def clipping(trainer: Any, index: int = 0, declared: Declared | None = None) -> Callable[[Optimizer], Any] | None:
    """The clipping of the optimizer at that position: what is declared of it, else the Trainer's, by the module's own
    way where it has one; None where there is none."""
    module, value, algorithm = trainer.module, trainer.gradient_clip_val, trainer.gradient_clip_algorithm
    if declared is not None:
        value = declared.gradient_clip_val if declared.gradient_clip_val is not None else value
        algorithm = declared.gradient_clip_algorithm or algorithm
    if overrides(module, "configure_gradient_clipping", LightningModule):
        own = indexed(module.configure_gradient_clipping, index)
        return lambda optimizer: own(optimizer, value, algorithm)
    if not value:
        return None
    if declared is not None:  # whose value may be another than the Trainer's
        return lambda optimizer: clip_by(trainer.lite, module, optimizer, value, algorithm)
    return lambda optimizer: module.clip_gradients(optimizer, value, algorithm)


def old_settings(optimizer: Optimizer) -> dict[str, Any]:
    """What an override of optimizer_step in an older version's form is told besides."""
    return {"on_tpu": False, "using_native_amp": False, "using_lbfgs": isinstance(optimizer, LBFGS)}


def tracked_norm(trainer: Any) -> float | None:
    """The p of the norms to log; None for none.

    Raises:
        ConfigError: The strategy leaves no gradients to measure where they are read.
    """
    norm_type: float | None = trainer.track_grad_norm
    if norm_type is not None and not trainer.lite.strategy.has_gradients:
        raise ConfigError(
            f"track_grad_norm={norm_type:g} under strategy={trainer.lite.strategy.name!r}, whose gradients leave the "
            "parameters in backward; leave it out, log what self.lite.clip_gradients(...) returns (the total norm), or "
            "use strategy='ddp' or 'fsdp'."
        )
    return norm_type


def log_norms(module: Any, norm_type: float) -> None:
    """Log the gradients' norms by parameter and in total; they stay on the device."""
    norms = {
        f"grad_{norm_type}_norm/{name}": p.grad.detach().norm(norm_type)
        for name, p in module.named_parameters()
        if p.grad is not None
    }
    if norms:
        total = torch.stack(list(norms.values())).norm(norm_type)
        module.log_dict({**norms, f"grad_{norm_type}_norm_total": total}, on_step=True, on_epoch=False)


def skipper(trainer: Any) -> Callable[[], None]:
    """What happens where `training_step` returned no loss."""

    def skip() -> None:
        if trainer.world_size > 1:
            raise UsageError(
                "training_step returned None on this rank, and the others would wait for its gradients; on several "
                "processes return a loss that is multiplied by 0 instead."
            )
        warnings.warn("training_step returned None: the batch is left out.", stacklevel=5)

    return skip
