"""A module's own hand on its optimizers: what `training_step` may do where automatic optimisation is off."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lite.errors import ConfigError, UsageError
from lite.gradients import Accumulation
from lite.state import parameters_of

_MAKING: dict[type, type] = {}


class ManualOptimizer:
    """An optimizer of the run in the hands of `training_step`: its steps are counted, and run the hooks.

    It is an instance of the optimizer's class too, and has all its attributes; made by `LightningModule.optimizers()`.
    """

    _optimizer: Optimizer
    _before: Callable[[Optimizer], None]
    _after: Callable[[], None]
    _zero: Callable[[Optimizer], None]
    _module: Any

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer itself."""
        return self._optimizer

    def step(self, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        """Step, after `on_before_optimizer_step`, and count it."""
        optimizer = self._optimizer
        if closure is None:
            self._before(optimizer)
            result = optimizer.step(**kwargs)
        else:

            def closed() -> Any:
                loss = closure()
                self._before(optimizer)
                return loss

            result = optimizer.step(closed, **kwargs)
        self._after()
        return result

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients, after `on_before_zero_grad`."""
        self._zero(self._optimizer)
        self._optimizer.zero_grad(set_to_none)

    @contextmanager
    def toggle_model(self, sync_grad: bool = True) -> Iterator[None]:
        """Only this optimizer's parameters want gradients; `sync_grad=False`: they stay this rank's."""
        with self._module.toggled_optimizer(self), self._module.no_grad_sync(not sync_grad):
            yield

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_optimizer"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._optimizer, name, value)

    def __repr__(self) -> str:
        return repr(self._optimizer)


def in_hands(optimizer: Optimizer, **parts: Any) -> Any:
    """The optimizer for manual optimisation; `parts` are the attributes of `ManualOptimizer`."""
    raw = type(optimizer)
    if raw not in _MAKING:
        _MAKING[raw] = type(f"Manual{raw.__name__}", (ManualOptimizer, raw), {})
    made: Any = object.__new__(_MAKING[raw])
    made.__dict__.update({f"_{name}": part for name, part in parts.items()}, _optimizer=optimizer)
    return made


def raw_optimizer(optimizer: Any) -> Optimizer:
    """The optimizer itself."""
    return optimizer._optimizer if isinstance(optimizer, ManualOptimizer) else optimizer


def parameters_of_others(optimizer: Any, optimizers: Sequence[Any]) -> list[nn.Parameter]:
    """The parameters of these optimizers that are not `optimizer`'s too, each once."""
    mine = _parameters([optimizer])
    return [parameter for parameter in _parameters(optimizers) if parameter not in mine]


def _parameters(optimizers: Sequence[Any]) -> dict[nn.Parameter, None]:
    return {p: None for one in optimizers for p in parameters_of(raw_optimizer(one))}


def clip_by(lite: Any, module: Any, optimizer: Optimizer, value: float, algorithm: str | None) -> Tensor:
    """Clip the gradients of an optimizer's parameters by norm or value; returns their norm before."""
    if algorithm not in (None, "norm", "value"):
        raise ConfigError(f"gradient_clip_algorithm={algorithm!r} is not known; use 'norm' or 'value'.")
    amount = {"clip_val": float(value)} if algorithm == "value" else {"max_norm": float(value)}
    norm: Tensor = lite.clip_gradients(module, optimizer, nonfinite="ignore", **amount)
    return norm


class Optimisation:
    """The side of a LightningModule that has to do with its optimizers."""

    _trainer: Any
    _toggled: list[tuple[nn.Parameter, bool]] | None = None

    def configure_optimizers(self) -> Any:
        """The optimizers and schedulers.

        Returns:
            An optimizer; a list of them; two lists (optimizers, schedulers); a dict {"optimizer", "lr_scheduler",
            "monitor"}; a list of such dicts; or None. "lr_scheduler" is a scheduler or a dict {"scheduler", "interval":
            "epoch" or "step", "frequency", "monitor", "strict", "name", "reduce_on_plateau"}.
        """
        raise NotImplementedError

    def optimizers(self, use_pl_optimizer: bool = True) -> Any:
        """The run's optimizers, or the one; their steps count. `use_pl_optimizer=False` gives the raw ones."""
        found = self._require_trainer("optimizers()").optimizers_for_module(use_pl_optimizer)
        return found[0] if len(found) == 1 else found

    def lr_schedulers(self) -> Any:
        """The run's schedulers: one, a list, or None."""
        configs = self._require_trainer("lr_schedulers()").lr_scheduler_configs
        found = [config.scheduler for config in configs]
        return None if not found else found[0] if len(found) == 1 else found

    def manual_backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Compute gradients instead of `loss.backward()`, where automatic optimisation is off."""
        trainer = self._require_trainer("manual_backward")
        if self.automatic_optimization:  # type: ignore[attr-defined]
            raise UsageError(
                "manual_backward was called while automatic optimisation is on, so there would be two backwards; set "
                "self.automatic_optimization = False in __init__, or return the loss."
            )
        trainer.manual_backward(loss, *args, **kwargs)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Differentiate a loss; override it to do so in a way of your own."""
        if args and (args[0] is None or isinstance(args[0], Optimizer)):  # (loss, optimizer, optimizer_idx), as in 1.8
            args = args[2:]
        self._require_trainer("backward").lite.backward(loss, *args, **kwargs)

    # Overrides may have the form of 1.8, with optimizer_idx, and hand it on to these.
    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None, *older: Any, **named: Any
    ) -> None:
        """Step; override it to skip steps or to change the rate, and call `optimizer.step(closure=...)` in it.

        `global_step` counts the step when this is over.
        """
        unknown = set(named) - {"optimizer_idx", "on_tpu", "using_native_amp", "using_lbfgs"}
        if unknown:
            raise TypeError(f"optimizer_step() got unexpected arguments {sorted(unknown)}")
        if isinstance(optimizer_closure, int):
            optimizer_closure = older[0] if older else None
        optimizer.step(closure=optimizer_closure)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer, optimizer_idx: Any = None) -> None:
        """Drop the gradients before a window's first backward."""
        optimizer.zero_grad()

    def lr_scheduler_step(self, scheduler: Any, metric: Any, *older: Any) -> None:
        """Step a scheduler; `metric` is None where it monitors none."""
        metric = older[0] if older else metric
        scheduler.step() if metric is None else scheduler.step(metric)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the gradients; override it to do so in a way of your own."""
        self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def clip_gradients(
        self,
        optimizer: Any,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> Tensor | None:
        """Clip the gradients of an optimizer's parameters, by "norm" or "value"; returns their norm before."""
        trainer = self._require_trainer("clip_gradients")
        given, set_before = gradient_clip_val, trainer.gradient_clip_val
        if given is not None and set_before is not None and given != set_before:
            raise ConfigError(
                f"clip_gradients(gradient_clip_val={given!r}) contradicts Trainer(gradient_clip_val={set_before!r}); "
                "give one of them."
            )
        value = given if given is not None else set_before
        if value is None or not value > 0:
            return None
        algorithm = gradient_clip_algorithm or trainer.gradient_clip_algorithm
        return clip_by(trainer.lite, self, raw_optimizer(optimizer), value, algorithm)

    def accumulate(self, optimizer: Any, steps: int) -> Accumulation:
        """The window of an optimizer in manual optimisation, in which `steps` batches make one step.

        It is the same one until the epoch's end, where a partial one counts what it has, and a checkpoint keeps it. Its
        batches count alike; where they have different sizes, give each its own: `window(last=..., weight=len(batch))`.

        Example:
            window = self.accumulate(optimizer, steps=4)
            if not window.is_open:
                optimizer.zero_grad()
            with window(last=self.trainer.is_last_batch):
                self.manual_backward(self.loss(batch))
            if window.ready:
                self.clip_gradients(optimizer, 1.0)
                optimizer.step()
        """
        trainer = self._require_trainer("accumulate")
        found: Accumulation = trainer.fit_loop.epoch_loop.window_of(trainer, raw_optimizer(optimizer), steps)
        return found

    def toggle_optimizer(self, optimizer: Any, optimizer_idx: Any = None) -> None:
        """From now on only this optimizer's parameters want gradients, those that wanted them before."""
        self._freeze(parameters_of_others(optimizer, self._require_trainer("toggle_optimizer").optimizers))

    def untoggle_optimizer(self, optimizer: Any = None) -> None:
        """Give every parameter the `requires_grad` back that it had before `toggle_optimizer`."""
        for parameter, wanted in self._toggled or ():
            parameter.requires_grad = wanted
        object.__setattr__(self, "_toggled", None)

    @contextmanager
    def toggled_optimizer(self, optimizer: Any) -> Iterator[None]:
        """The block between `toggle_optimizer` and `untoggle_optimizer`."""
        self.toggle_optimizer(optimizer)
        try:
            yield
        finally:
            self.untoggle_optimizer(optimizer)

    @contextmanager
    def freezing(self, others: list[nn.Parameter]) -> Iterator[None]:
        """As `toggled_optimizer`, where `parameters_of_others` are known already."""
        self._freeze(others)
        try:
            yield
        finally:
            self.untoggle_optimizer()

    def _freeze(self, others: list[nn.Parameter]) -> None:
        if self._toggled is not None:
            raise UsageError("toggle_optimizer was called twice; call untoggle_optimizer in between.")
        object.__setattr__(self, "_toggled", [(parameter, parameter.requires_grad) for parameter in others])
        for parameter in others:
            parameter.requires_grad = False

    @contextmanager
    def no_grad_sync(self, enabled: bool = True) -> Iterator[None]:
        """Within the block forward and backward leave gradients on this rank: for micro-batches but the last."""
        with self._require_trainer("no_grad_sync").lite.no_backward_sync(self, enabled):
            yield

    def _require_trainer(self, call: str) -> Any:
        raise NotImplementedError
