"""What is done with one training batch, put together once per epoch out of what this run really needs."""

from __future__ import annotations

import inspect
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from lite.errors import ConfigError, UsageError
from lite.gradients import put_back_gradients, waiting_gradients
from lite.trainer.hooks import accepted, overrides
from lite.trainer.manual import in_hands
from lite.trainer.module import LightningModule, detached

_NO_GRAPH = (
    "training_step returned a loss that needs no gradient, so there is nothing to train by; don't detach it or compute "
    "it under torch.no_grad(), and check that parameters are not all frozen."
)
Step = Callable[[Any, int], Any]
Signature = tuple[tuple[str, ...], int, bool]
_signatures: weakref.WeakKeyDictionary[Any, Signature] = weakref.WeakKeyDictionary()


def step_caller(method: Callable[..., Any]) -> Callable[..., Any]:
    """A training step as a function of (batch, batch_idx).

    Raises:
        ConfigError: It takes arguments that only older versions gave.
    """
    names, most, _ = signature_of(method)
    if "optimizer_idx" in names:
        raise ConfigError(
            "training_step(batch, batch_idx, optimizer_idx) is the form of older versions; set "
            "self.automatic_optimization = False in __init__, and for each optimizer of self.optimizers() call "
            "zero_grad(), self.manual_backward(loss) and step() in training_step(batch, batch_idx)."
        )
    if "hiddens" in names or names[:1] == ("dataloader_iter",):
        raise ConfigError(
            f"training_step({', '.join(names)}): only batch and batch_idx are given; split sequences in training_step, "
            "or let the loader give what you would draw from it."
        )
    if most == 0:
        raise ConfigError("training_step() takes no batch; write def training_step(self, batch, batch_idx).")
    return method if most > 1 else lambda batch, batch_idx: method(batch)


def signature_of(method: Callable[..., Any]) -> Signature:
    """Names of a method's parameters, how many it takes by position, whether it takes any name; looked at once."""
    function = getattr(method, "__func__", method)
    found = _signatures.get(function)
    if found is None:
        parameters = inspect.signature(method).parameters
        takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        found = (tuple(parameters), accepted(method)[1], takes_any)
        _signatures[function] = found
    return found


def compose_step(trainer: Any, window: Any, is_last: Callable[[int], bool]) -> Step:
    """The function of (batch, batch_idx) for this epoch; it returns what `training_step` returned."""
    if not trainer.module.automatic_optimization:
        return _manual_step(trainer)
    return _automatic_step(trainer, window, is_last)


# ---- automatic optimisation


def _automatic_step(trainer: Any, window: Any, is_last: Callable[[int], bool]) -> Step:
    """forward; drop old gradients; backward; and, when the window is complete, clip and step."""
    module, progress = trainer.module, trainer.fit_loop.progress
    compute = _compute(trainer, window, is_last)
    if not trainer.optimizers:
        return compute
    optimizer: Optimizer = trainer.optimizers[0]
    before_step = _before_step(trainer)
    # Called by name at each step: other things (schedulers) may put their own in the instance's place.
    if not _wants_closure(module, optimizer):
        if window is None and before_step is None and not _hooked(trainer):
            return _plain_step(trainer, optimizer)

        def step(batch: Any, batch_idx: int) -> Any:
            output = compute(batch, batch_idx)
            if window is not None and not window.ready:
                return output
            if before_step is not None:
                before_step(optimizer)
            optimizer.step()
            progress.updates += 1
            progress.stepped += 1
            return output

        return step

    def after() -> None:
        progress.updates += 1

    # It steps with a closure, as an override of optimizer_step and LBFGS want it.
    pending = [False]  # a closure that the override has called by itself

    def before(which: Optimizer) -> None:
        if before_step is not None and pending[0]:
            before_step(which)
        pending[0] = False

    handle = in_hands(optimizer, before=before, after=after, zero=lambda which: None, module=module)

    def closed_step(batch: Any, batch_idx: int) -> Any:
        if window is not None and not is_last(batch_idx):
            before_this = 0 if window.ready else window.count
            if before_this + 1 < window.steps:
                return compute(batch, batch_idx)
        outputs: list[Any] = []

        def closure() -> Any:
            output = compute(batch, batch_idx)
            outputs.append(output)
            pending[0] = True
            return pick_loss(output)

        updates = progress.updates
        module.optimizer_step(progress.epoch, batch_idx, handle, closure)
        progress.stepped += progress.updates > updates
        return outputs[-1] if outputs else None

    return closed_step


def _hooked(trainer: Any) -> bool:
    """Whether anybody looks on between forward and step."""
    hooks, module = trainer.hooks, trainer.module
    own = any(overrides(module, name, LightningModule) for name in ("backward", "optimizer_zero_grad"))
    return bool(own or hooks.on_before_zero_grad or hooks.on_before_backward or hooks.on_after_backward)


def _plain_step(trainer: Any, optimizer: Optimizer) -> Step:
    """The step where nobody looks on: a raw loop's. Old gradients go before the forward, which so needs less memory."""
    progress, backward = trainer.fit_loop.progress, trainer.lite.backward
    call, skip = _training_call(trainer), _skipper(trainer)

    def plain_step(batch: Any, batch_idx: int) -> Any:
        optimizer.zero_grad()
        output = call(batch, batch_idx)
        loss = output if output.__class__ is Tensor else pick_loss(output)
        if loss is None:
            skip()
        elif loss.requires_grad:
            backward(loss)
        else:
            raise UsageError(_NO_GRAPH)
        optimizer.step()
        progress.updates += 1
        progress.stepped += 1
        return output

    return plain_step


def _training_call(trainer: Any) -> Callable[[Any, int], Any]:
    call, old = step_caller(trainer.module.training_step), trainer.fit_loop.epoch_loop.old
    return call if old is None else old.around(call)


def _compute(trainer: Any, window: Any, is_last: Callable[[int], bool]) -> Step:
    """forward, loss, backward of one batch, in a window of accumulation where there is one."""
    module, hooks, metrics, lite = trainer.module, trainer.hooks, trainer.metrics, trainer.lite
    call = _training_call(trainer)
    own_backward = overrides(module, "backward", LightningModule)
    backward = module.backward if own_backward else lite.backward
    at = metrics.at
    zero_grad = _zero_grad(trainer)
    before_backward, after_backward = hooks.on_before_backward, hooks.on_after_backward
    in_before = metrics.place("train", "on_before_backward")
    in_after = metrics.place("train", "on_after_backward")
    skip = _skipper(trainer)
    weighs = getattr(window, "weigh", None)
    always, ragged = trainer.fit_loop.epoch_loop.sizes_vary

    def run_backward(loss: Tensor) -> None:
        if not loss.requires_grad:
            raise UsageError(_NO_GRAPH)
        if before_backward:
            at(in_before)
            for hook in before_backward:
                hook(loss)
        backward(loss)
        if after_backward:
            at(in_after)
            for hook in after_backward:
                hook()

    if window is None:

        def compute(batch: Any, batch_idx: int) -> Any:
            output = call(batch, batch_idx)
            loss = pick_loss(output)
            zero_grad(batch_idx)
            if loss is None:
                skip()
            else:
                run_backward(loss)
            return output

        return compute

    def compute_within(batch: Any, batch_idx: int) -> Any:
        first = window.ready or window.count == 0
        with window(last=is_last(batch_idx)):
            output = call(batch, batch_idx)
            loss = pick_loss(output)
            if first:
                zero_grad(batch_idx)
            if loss is None:
                if weighs is not None and (always or ragged(batch_idx)):
                    weighs(0.0)
                skip()
                return output
            if weighs is not None:
                weight = output.get("weight") if isinstance(output, Mapping) else None
                if weight is None and (always or ragged(batch_idx)):
                    weight = metrics.batch_size()
                if weight is not None:
                    weighs(weight)
                run_backward(loss)
            else:
                run_backward(loss / window.steps)
        return output

    return compute_within


def pick_loss(output: Any) -> Tensor | None:
    """The loss in what `training_step` returned.

    Raises:
        ConfigError: There is none.
    """
    if isinstance(output, Tensor):
        return output
    if output is None:
        return None
    if isinstance(output, Mapping):
        if "loss" not in output:
            raise ConfigError(
                f"training_step returned a dict with the keys {list(output)} and without 'loss'; return the loss, a "
                "dict with 'loss', or None to leave the batch out."
            )
        loss = output["loss"]
        if loss is None or isinstance(loss, Tensor):
            return loss
        output = loss
    raise ConfigError(
        f"training_step returned a {type(output).__name__} as its loss; return a tensor, a dict with 'loss', or None."
    )


def hook_outputs(output: Any) -> Any:
    """What `on_train_batch_end` gets: a dict with the loss as training_step returned it, without its graph."""
    return detached(output if isinstance(output, Mapping) or output is None else {"loss": output})


def _zero_grad(trainer: Any) -> Callable[[int], None]:
    if not trainer.optimizers:
        return lambda batch_idx: None
    module, hooks, metrics = trainer.module, trainer.hooks, trainer.metrics
    progress, optimizer = trainer.fit_loop.progress, trainer.optimizers[0]
    before, place = hooks.on_before_zero_grad, metrics.place("train", "on_before_zero_grad")
    own = overrides(module, "optimizer_zero_grad", LightningModule)
    if not before and not own:
        return lambda batch_idx: optimizer.zero_grad()

    def zero_grad(batch_idx: int) -> None:
        metrics.at(place)
        for hook in before:
            hook(optimizer)
        if own:
            module.optimizer_zero_grad(progress.epoch, batch_idx, optimizer)
        else:
            optimizer.zero_grad()

    return zero_grad


def _before_step(trainer: Any) -> Callable[[Optimizer], None] | None:
    """What comes between backward and step: hooks, norms, clipping; None where there is nothing."""
    module, hooks, metrics, lite = trainer.module, trainer.hooks, trainer.metrics, trainer.lite
    before, place = hooks.on_before_optimizer_step, metrics.place("train", "on_before_optimizer_step")
    own = overrides(module, "configure_gradient_clipping", LightningModule)
    value, algorithm = trainer.gradient_clip_val, trainer.gradient_clip_algorithm
    norm_type = trainer.track_grad_norm
    if not before and not own and not value and norm_type is None:
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
        if own:
            module.configure_gradient_clipping(optimizer, value, algorithm)
        elif value:
            module.clip_gradients(optimizer, value, algorithm)

    return before_step


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


def _wants_closure(module: Any, optimizer: Optimizer) -> bool:
    """Whether somebody looks at the closure: an override, LBFGS, or an optimizer that isn't torch's."""
    if overrides(module, "optimizer_step", LightningModule) or isinstance(optimizer, LBFGS):
        return True
    return not type(optimizer).__module__.startswith("torch.optim")


def _skipper(trainer: Any) -> Callable[[], None]:
    def skip() -> None:
        if trainer.world_size > 1:
            raise UsageError(
                "training_step returned None on this rank, and the others would wait for its gradients; on several "
                "processes return a loss that is multiplied by 0 instead."
            )
        warnings.warn("training_step returned None: the batch is left out.", stacklevel=5)

    return skip


class ReferenceWindow:
    """Lightning's arithmetic of accumulation: every loss divided by the number of micro-batches in a full window.

    Args:
        lite: The Lite object.
        module: The model.
        steps: Micro-batches per window.
        rescale: Whether a partial window becomes the mean over what it really held.
    """

    state_is_per_rank = True

    def __init__(self, lite: Any, module: nn.Module, steps: int, *, rescale: bool = False) -> None:
        self.steps, self.count, self.ready = steps, 0, False
        self._lite, self._module, self._rescale = lite, module, rescale

    @contextmanager
    def __call__(self, *, last: bool = False) -> Iterator[None]:
        if self.ready:
            self.count, self.ready = 0, False
        boundary = last or self.count + 1 == self.steps
        sync: AbstractContextManager[None] = self._lite.no_backward_sync(self._module, not boundary)
        with sync:
            yield
        self.count += 1
        if boundary:
            self._finish()

    def _finish(self) -> None:
        self.ready = True
        if self._rescale and self.count != self.steps:
            for parameter in self._module.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(self.steps / self.count)

    def flush(self) -> None:
        """End an open window."""
        if self.ready or not self.count:
            return
        for parameter in self._module.parameters():
            if parameter.grad is not None:
                parameter.grad.copy_(self._lite.all_reduce(parameter.grad, "mean"))
        self._finish()

    @property
    def is_open(self) -> bool:
        """Whether gradients wait for more batches."""
        return self.count > 0 and not self.ready

    def state_dict(self) -> dict[str, Any]:
        """The open window with its gradients so far; each rank has its own."""
        if not self.is_open:
            return {}
        return {"count": self.count, "gradients": waiting_gradients(self._module.parameters())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on within that window."""
        self.count, self.ready = state.get("count", 0), False
        if self.count:
            put_back_gradients(self._module.parameters(), state["gradients"])


# ---- manual optimisation


def _manual_step(trainer: Any) -> Step:
    """The module's own hand: it runs backward and steps; the optimizers that it has been given count."""
    module = trainer.module
    call = step_caller(module.training_step)
    progress = trainer.fit_loop.progress

    def step(batch: Any, batch_idx: int) -> Any:
        updates = progress.updates
        output = module.manual_step(call, batch, batch_idx)
        if progress.updates > updates:
            progress.stepped += 1
        return output

    return step


def manual_optimizers(trainer: Any) -> list[Any]:
    """The run's optimizers for `training_step`: their steps run the hooks and count."""
    hooks, metrics, progress = trainer.hooks, trainer.metrics, trainer.fit_loop.progress
    before_step, zero = hooks.on_before_optimizer_step, hooks.on_before_zero_grad
    norm_type = trainer.track_grad_norm
    places = {name: metrics.place("train", name) for name in ("on_before_optimizer_step", "on_before_zero_grad")}

    def run(name: str, methods: Any, optimizer: Optimizer) -> None:
        if not methods:
            return
        here = metrics.here
        metrics.at(places[name])
        for hook in methods:
            hook(optimizer)
        metrics.at(here)

    def before(optimizer: Optimizer) -> None:
        run("on_before_optimizer_step", before_step, optimizer)
        if norm_type is not None:
            log_norms(trainer.module, norm_type)

    def after() -> None:
        progress.updates += 1

    def zeroing(optimizer: Optimizer) -> None:
        run("on_before_zero_grad", zero, optimizer)

    parts = {"before": before, "after": after, "zero": zeroing, "module": trainer.module}
    return [in_hands(optimizer, **parts) for optimizer in trainer.optimizers]
