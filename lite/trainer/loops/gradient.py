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

NO_GRAPH = (
    "training_step returned a loss that needs no gradient, so there is nothing to train by; don't detach it or compute "
    "it under torch.no_grad(), and check that parameters are not all frozen."
)


def run_backward(trainer: Any, optimizer: Optimizer | None, index: int = 0) -> Callable[[Tensor], None]:
    """Backward with the hooks around it, as this run needs it."""
    module, hooks, metrics = trainer.module, trainer.hooks, trainer.metrics
    backward = trainer.lite.backward
    if overrides(module, "backward", LightningModule):
        backward = indexed(module.backward, index, optimizer=optimizer)
    before, after, at = hooks.on_before_backward, hooks.on_after_backward, metrics.at
    in_before = metrics.place("train", "on_before_backward")
    in_after = metrics.place("train", "on_after_backward")

    def run(loss: Tensor) -> None:
        if not loss.requires_grad:
            raise UsageError(NO_GRAPH)
        if before:
            at(in_before)
            for hook in before:
                hook(loss)
        backward(loss)
        if after:
            at(in_after)
            for hook in after:
                hook()

    return run


def drop_gradients(trainer: Any, optimizer: Optimizer, index: int = 0) -> Callable[[int], None]:
    """Dropping an optimizer's gradients, with hooks and the module's own way where there are any."""
    module, hooks, metrics = trainer.module, trainer.hooks, trainer.metrics
    progress = trainer.fit_loop.progress
    before, place = hooks.on_before_zero_grad, metrics.place("train", "on_before_zero_grad")
    own = overrides(module, "optimizer_zero_grad", LightningModule)
    if not before and not own:
        return lambda batch_idx: optimizer.zero_grad()
    own_way = indexed(module.optimizer_zero_grad, index)

    def zero_grad(batch_idx: int) -> None:
        metrics.at(place)
        for hook in before:
            hook(optimizer)
        if own:
            own_way(progress.epoch, batch_idx, optimizer)
        else:
            optimizer.zero_grad()

    return zero_grad


def before_step_hooks(trainer: Any, clip: Callable[[Optimizer], Any] | None) -> Callable[[Optimizer], None] | None:
    """What comes between backward and step: hooks, norms, clipping; None where there is nothing."""
    module, hooks, metrics, lite = trainer.module, trainer.hooks, trainer.metrics, trainer.lite
    before, place = hooks.on_before_optimizer_step, metrics.place("train", "on_before_optimizer_step")
    norm_type = tracked_norm(trainer)
    if not before and clip is None and norm_type is None:
        return None
    unscale = getattr(lite.precision, "unscale", None) if lite.precision.changes_step else None

    def before_step(optimizer: Optimizer) -> None:
        if unscale is not None:
            unscale(optimizer)
        if before:
            metrics.at(place)
            for hook in before:
                hook(optimizer)
        if norm_type is not None:
            metrics.at(place)
            log_norms(module, norm_type)
        if clip is not None:
            clip(optimizer)

    return before_step


def clipping(trainer: Any) -> Callable[[Optimizer], None] | None:
    """The Trainer's clipping, or the module's own; None where there is none."""
    module, value, algorithm = trainer.module, trainer.gradient_clip_val, trainer.gradient_clip_algorithm
    if overrides(module, "configure_gradient_clipping", LightningModule):
        own = indexed(module.configure_gradient_clipping)
        return lambda optimizer: own(optimizer, value, algorithm)
    return (lambda optimizer: module.clip_gradients(optimizer, value, algorithm)) if value else None


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
