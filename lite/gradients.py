"""What happens to gradients between backward and step: clipping with a policy for bad norms, and accumulation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lite import collectives
from lite.data.shares import BatchWeight
from lite.errors import ConfigError, NonFiniteError, UsageError
from lite.precision.base import Precision
from lite.sharded import is_emptied, is_sharded
from lite.strategies.base import Strategy

NONFINITE = ("raise", "skip", "zero", "ignore")
_MIXED = "accumulate: some micro-batches of one window have a weight and others not; give all or none."


def clip(
    parameters: list[nn.Parameter],
    optimizer: Optimizer | None,
    strategy: Strategy,
    precision: Precision,
    *,
    max_norm: float | None,
    clip_val: float | None,
    norm_type: float,
    nonfinite: str | None,
) -> Tensor:
    """Unscale, measure, apply the policy, clip. See `Lite.clip_gradients`, which checks the arguments."""
    if optimizer is not None:
        precision.unscale(optimizer)
    total_norm = strategy.grad_norm(parameters, norm_type)
    if nonfinite is None:
        nonfinite = "ignore" if precision.changes_step else "raise"
    if nonfinite != "ignore" and _bad_on_any_rank(total_norm, strategy):
        if nonfinite == "raise":
            raise NonFiniteError(_describe(total_norm))
        strategy.replace_gradients(parameters, by_zeros=nonfinite == "zero")
        if nonfinite == "zero" and optimizer is not None:
            precision.accept(optimizer)
        return total_norm
    if max_norm is not None:
        strategy.clip_norm(parameters, max_norm, total_norm)
    else:
        assert clip_val is not None
        strategy.clip_value(parameters, clip_val)
    return total_norm


def _bad_on_any_rank(total_norm: Tensor, strategy: Strategy) -> bool:
    """One decision for all ranks; they are asked only where gradients, and so norms, may differ between them."""
    bad = not bool(torch.isfinite(total_norm))
    return bad if strategy.norms_agree() else collectives.any_rank(bad)


def _describe(total_norm: Tensor) -> str:
    remedy = "pass nonfinite='skip' (leave this step out) or 'zero' (step with zero gradients)."
    value = total_norm.item()
    if math.isfinite(value):
        return f"the gradient norm is {value} on this rank, but inf or NaN on another one; look there, or {remedy}"
    return f"the gradient norm is {value}; find the cause with torch.autograd.set_detect_anomaly(True), or {remedy}"


def check_clip_arguments(
    max_norm: Any, clip_val: Any, norm_type: Any, error_if_nonfinite: bool | None, nonfinite: str | None
) -> str | None:
    """Check the user's arguments and return the policy; None means the default."""
    if (max_norm is None) == (clip_val is None):
        raise ConfigError(f"max_norm={max_norm!r}, clip_val={clip_val!r}: give exactly one of them.")
    name, value = ("max_norm", max_norm) if max_norm is not None else ("clip_val", clip_val)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        raise ConfigError(f"{name}={value!r} must be a number above 0.")
    if isinstance(norm_type, bool) or not isinstance(norm_type, (int, float)) or not norm_type > 0:
        raise ConfigError(f"norm_type={norm_type!r} must be a number above 0: the p of the p-norm, or float('inf').")
    if nonfinite is not None and nonfinite not in NONFINITE:
        raise ConfigError(f"nonfinite={nonfinite!r} is not known; choose one of {', '.join(map(repr, NONFINITE))}.")
    if error_if_nonfinite is None:
        return nonfinite
    if nonfinite is not None:
        raise ConfigError(
            f"error_if_nonfinite={error_if_nonfinite!r} and nonfinite={nonfinite!r} say the same thing; give one."
        )
    return "raise" if error_if_nonfinite else "ignore"


class Scale:
    """What an open window does to a loss, whether by the user's own weights, and whether its backward has failed."""

    __slots__ = ("apply", "failed", "weighted")

    def __init__(self, apply: Callable[[Tensor], Tensor], *, weighted: bool) -> None:
        self.apply = apply
        self.weighted = weighted
        self.failed = False


class Accumulation:
    """Adds up the gradients of several micro-batches before a step, synchronising the ranks only at the last one.

    Made by `Lite.accumulate`. The counter is here, in the user's hands: `ready` says that a window is complete.

    Attributes:
        count: Micro-batches in the current window so far.
        ready: Whether the window is complete: step now.
        total_count: Micro-batches in all windows so far.
    """

    state_is_per_rank = True

    def __init__(
        self,
        steps: int,
        parameters: Callable[[], Iterable[nn.Parameter]],
        no_sync: Callable[[bool], AbstractContextManager[None]],
        scaled: Callable[[Scale], AbstractContextManager[None]],
        batch: BatchWeight,
        device: torch.device,
        strategy: Strategy,
        *,
        rescale: bool = True,
        joins: Callable[[], bool] = lambda: False,
    ) -> None:
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ConfigError(
                f"steps={steps!r} must be a whole number of at least 1: the micro-batches per optimizer step."
            )
        self.steps = steps
        self.count = 0
        self.ready = False
        self.total_count = 0
        self._parameters = parameters
        self._no_sync = no_sync
        self._scaled = scaled
        self._batch = batch
        self._device = device
        self._strategy = strategy
        self._rescale = rescale
        self._joins = joins
        self._weighted: bool | None = None
        self._total: Tensor | float = 0.0
        self._unit: float | None = None
        self._scale: Scale | None = None  # of the micro-batch whose block is running, and its weight
        self._weight: Tensor | float | None = None
        self._spoilt = False

    @property
    def is_open(self) -> bool:
        """Whether the current window has micro-batches, but not all: gradients are waiting for the rest."""
        return self.count > 0 and not self.ready

    @property
    def weighted(self) -> bool:
        """Whether the open window's micro-batches have weights."""
        return self.is_open and bool(self._weighted)

    @contextmanager
    def __call__(self, *, last: bool | None = None, weight: float | Tensor | None = None) -> Iterator[None]:
        """Run forward and backward of one micro-batch in this context.

        Without weights the gradients become the mean over the window's micro-batches. With weights (tokens or samples
        of this micro-batch on this rank, whose loss is a mean over them) they become exactly those of the mean over all
        tokens of the window on all ranks; they take the place of what a ragged batch weighs, and a batch that only
        keeps this rank in step counts nothing.

        Args:
            last: This is the last micro-batch there is; the window ends here, partial or not, and counts what it has.
                Of an epoch: `last=loader.batches_done == len(loader)`, which holds after a resume in mid-epoch too.
                None, the default, leaves it to the count. Within `lite.join`, where each rank's last one comes at
                another step, it must be left out.
            weight: Number of tokens or samples behind this micro-batch's mean loss. All or none of a window have one.

        Raises:
            UsageError: Some micro-batches of the window have a weight and others not, or another window is open; or
                `last` or `weight` is given within `lite.join`; or a backward of the window has failed, and it was not
                dropped.
        """
        if last is not None and not isinstance(last, bool):
            raise ConfigError(f"window(last={last!r}) must be True or False: whether this is the last micro-batch.")
        if last is not None and self._joins():
            raise UsageError(
                f"window(last={last!r}) within lite.join: each rank's last micro-batch comes at another step, where it "
                "would wait for others that don't synchronise there; leave last out. Windows complete by their count "
                "alone then, and what a rank has in one that is not full as it runs out is dropped, not stepped on."
            )
        if weight is not None:
            check_weight("window", weight)
            self._refuse_weight(weight)
        if self._spoilt and self.is_open:
            raise UsageError(
                f"a backward failed after {self.count} of {self.steps} micro-batches of this window, and left their "
                "gradients incomplete; before you go on, call window.drop(), which forgets them and the window, on all "
                "ranks."
            )
        if self.ready:
            self.count, self.ready, self._weighted, self._total = 0, False, None, 0.0
        boundary = last or self.count + 1 == self.steps
        self._weight = None
        self._scale = Scale(lambda loss: loss / self.steps, weighted=False)
        if weight is not None:
            self.weigh(weight)
        elif self._weighted:
            self._scale.apply = _refuse_unweighted
        try:
            with self._scaled(self._scale), self._no_sync(not boundary):
                yield
        finally:
            self._spoilt = self._scale.failed
            self._scale = None
        if self._weighted is None:
            self._weighted = self._weight is not None
        elif self._weighted != (self._weight is not None):
            raise UsageError(_MIXED)
        self.count += 1
        self.total_count += 1
        if self._weight is not None:
            self._total = self._total + self._weight
        if boundary:
            self._finish()
            self.ready = True

    def weigh(self, weight: float | Tensor) -> None:
        """Give the open micro-batch its weight, where only the forward tells it: call it before `lite.backward`.

        Raises:
            UsageError: No micro-batch is open, or the window's others have no weights.
        """
        if self._scale is None:
            raise UsageError("weigh was called outside of the accumulation's `with` block; call it before backward.")
        if self._weighted is False:
            raise UsageError(_MIXED)
        check_weight("weigh", weight)
        self._refuse_weight(weight)
        value = self._weight = 0.0 if self._batch.num_real == 0 else weight
        unit = self._unit = self._unit or _unit(value)
        self._scale.apply, self._scale.weighted = (lambda loss: loss * (value / unit)), True

    def _refuse_weight(self, weight: float | Tensor) -> None:
        if self._joins():
            raise UsageError(
                f"weight={weight!r} of a window within lite.join: all ranks are asked for theirs, and those that are "
                "done don't answer; leave weight out, or give lite.backward(loss, weight=...) one."
            )

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss as `lite.backward` would scale it in the open micro-batch, for a backward that may go past it.

        From then on `lite.backward` takes the micro-batch's loss as it is. Call it once, after `weigh`.

        Raises:
            UsageError: No micro-batch is open.
        """
        if self._scale is None:
            raise UsageError("scaled was called outside of the accumulation's `with` block; call it before backward.")
        loss = self._scale.apply(loss)
        self._scale.apply = _as_it_is
        if self._scale.weighted:
            self._batch.settle()
        return loss

    def flush(self) -> None:
        """End an open window whose last micro-batch was not known to be the last; its gradients become the ranks' mean.

        Collective: call on all ranks.

        Raises:
            UsageError: The parameters are sharded: their gradients are only put together by the last backward.
        """
        if self.ready or not self.count:
            return
        parameters = {id(p): p for p in self._parameters()}.values()
        if any(map(is_sharded, parameters)):
            raise UsageError(
                f"the loader ended after {self.count} of {self.steps} micro-batches of an accumulation window, and "
                "sharded models must know the last one before its backward; give the loader a length, or let the "
                "window's steps divide its batches."
            )
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.copy_(collectives.all_reduce(parameter.grad, "mean"))
        self._finish()
        self.ready = True

    def drop(self) -> None:
        """Forget an open window and its gradients; the next micro-batch begins a new one."""
        if self.is_open:
            self._strategy.replace_gradients(self._parameters(), by_zeros=False)
            self.count, self._weighted, self._total, self._spoilt = 0, None, 0.0, False

    def state_dict(self) -> dict[str, Any]:
        """The open window with its gradients so far, for a checkpoint in the middle of it; each rank has its own."""
        if not self.is_open:
            return {}
        return {
            "count": self.count,
            "weighted": self._weighted,
            "total": float(self._total),
            "unit": self._unit,
            "gradients": waiting_gradients(self._parameters()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on within that window."""
        self.count, self.ready, self._spoilt = state.get("count", 0), False, False
        if self.count:
            self._weighted, self._total, self._unit = state["weighted"], state["total"], state["unit"]
            put_back_gradients(self._parameters(), state["gradients"])

    def _finish(self) -> None:
        """Turn the sum of the window into the mean over what it really held."""
        if self._weighted:
            total = torch.as_tensor(self._total, dtype=torch.float64 if self._device.type != "mps" else torch.float32)
            # The ranks' gradients were averaged; dividing by the mean weight gives the sum over the sum of weights.
            mean_weight = collectives.all_reduce(total.to(self._device), "mean")
            # A window without any token has no gradient.
            self._multiply(torch.where(mean_weight > 0, (self._unit or 1.0) / mean_weight, 0.0))
        elif self._rescale and self.count != self.steps:
            self._multiply(self.steps / self.count)

    def _multiply(self, factor: Tensor | float) -> None:
        self._strategy.multiply_gradients({id(p): p for p in self._parameters()}.values(), factor)


def _as_it_is(loss: Tensor) -> Tensor:
    return loss


def _refuse_unweighted(loss: Tensor) -> Tensor:
    raise UsageError(_MIXED)


def waiting_gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor | None]:
    """A copy of what this rank's parameters have gathered, on the CPU.

    Raises:
        UsageError: The parameters are sharded: what waits is not theirs until it is synchronised.
    """
    copies: list[Tensor | None] = []
    for parameter in parameters:
        if is_sharded(parameter) or is_emptied(parameter):
            raise UsageError("the gradients of an open accumulation window can't be saved from a sharded model.")
        copies.append(None if parameter.grad is None else parameter.grad.detach().to("cpu", copy=True))
    return copies


def put_back_gradients(parameters: Iterable[nn.Parameter], gradients: list[Tensor | None]) -> None:
    """Give parameters the gradients that `waiting_gradients` returned."""
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = None if gradient is None else gradient.to(parameter.device, copy=True)


def check_loss(loss: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Tell why a backward has failed, where the loss is no single number and no `gradient` says what it stands for.

    Raises:
        UsageError: It is so.
    """
    if loss.numel() != 1 and not args and kwargs.get("gradient") is None:
        raise UsageError(
            f"backward got a loss of shape {tuple(loss.shape)}, which is no single number; reduce it, as by "
            "loss.mean(), or pass gradient=."
        )


def check_weight(call: str, weight: Any) -> None:
    """Refuse a weight that is no number of tokens or samples. Tensors' values are not looked at.

    Raises:
        ConfigError: It is negative, not finite, or no number.
    """
    if not is_weight(weight):
        raise ConfigError(f"{call}(weight={weight!r}) must be a number of at least 0, of tokens or samples.")


def is_weight(weight: Any) -> bool:
    """Whether it is a number of tokens or samples, as far as that can be told without looking at a tensor's value."""
    if isinstance(weight, Tensor):
        return weight.numel() == 1
    is_number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
    return is_number and math.isfinite(weight) and weight >= 0


def _unit(weight: float | Tensor) -> float:
    """What weights are measured in: a power of 2 near the largest, alike on all ranks. Collective.

    A loss times thousands of tokens would leave the range of 16 bits.
    """
    largest = float(collectives.all_reduce(float(weight), "max"))
    return 2.0 ** math.ceil(math.log2(largest)) if largest > 0 else 1.0
