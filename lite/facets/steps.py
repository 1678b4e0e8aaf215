"""What happens within one step of the user's loop: backward, accumulation, clipping."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lite import collectives, gradients
from lite.errors import ConfigError, UsageError
from lite.facets.base import Facet


class Steps(Facet):
    """The side of `Lite` that a training step calls."""

    _backward: Callable[..., None]
    _scale: Callable[[Tensor], Tensor] | None

    def backward(self, loss: Tensor, *args: Any, model: nn.Module | None = None, **kwargs: Any) -> None:
        """Compute gradients of `loss` instead of `loss.backward()`: scaled where the precision needs it, averaged over
        the ranks.

        The loss of a ragged last batch is weighed so that the averaged gradient is that of the undivided batch's mean.

        Args:
            loss: A tensor that comes from a set-up model's output.
            *args: As for `Tensor.backward`.
            model: The model that it is for, where a strategy has to know; unused otherwise.
            **kwargs: As for `Tensor.backward`.

        Raises:
            UsageError: The gradients would not be synchronised over the ranks.
        """
        self._backward(loss, *args, **kwargs)

    def autocast(self) -> AbstractContextManager[Any]:
        """A context that computes as a set-up model's forward does, for code outside it (a loss function, say)."""
        return self.precision.autocast()

    def no_backward_sync(self, model: nn.Module, enabled: bool = True) -> AbstractContextManager[None]:
        """A context for forward and backward of `model` that leaves its gradients unsynchronised, to save
        communication.

        Raises:
            UsageError: `model` is not set up.
        """
        if model not in self._modules:
            raise UsageError(
                f"no_backward_sync got a {type(model).__name__} that lite.setup has not prepared; pass its result."
            )
        return self.strategy.no_sync(self._modules[model], enabled)

    def accumulate(self, *models: nn.Module, steps: int) -> gradients.Accumulation:
        """Accumulate gradients over `steps` micro-batches before each optimizer step.

        Use it as `with window(last=...): forward; lite.backward(loss)`, then step when `window.ready`. Inside it
        `backward` divides the loss, so don't do it yourself.

        Args:
            *models: The set-up models that are trained.
            steps: Micro-batches per optimizer step.

        Returns:
            The counter that is called for each micro-batch; see `lite.gradients.Accumulation`.
        """
        for model in models:
            if model not in self._modules:
                raise UsageError(
                    f"accumulate got a {type(model).__name__} that lite.setup has not prepared; pass its result."
                )
        if not models:
            raise ConfigError("accumulate() got no model; pass the models that are trained.")

        @contextmanager
        def no_sync(enabled: bool) -> Iterator[None]:
            with ExitStack() as stack:
                for model in models:
                    stack.enter_context(self.no_backward_sync(model, enabled))
                yield

        return gradients.Accumulation(
            steps,
            lambda: (p for m in models for p in m.parameters()),
            no_sync,
            self._set_scale,
            lambda: self._weight.value == 0.0,
            self._device,
        )

    def clip_gradients(
        self,
        model: nn.Module | None = None,
        optimizer: Optimizer | None = None,
        *,
        max_norm: float | None = None,
        clip_val: float | None = None,
        norm_type: float = 2.0,
        error_if_nonfinite: bool | None = None,
        nonfinite: str | None = None,
    ) -> Tensor:
        """Clip gradients by total norm or by value, at their true size (unscaled where a loss scale is used).

        Args:
            model: Whose gradients are clipped where no optimizer is given.
            optimizer: Whose parameters are clipped. Needed with a loss scale.
            max_norm: Largest total norm; either this or `clip_val`.
            clip_val: Largest absolute value of an element.
            norm_type: The p of the p-norm; may be infinity.
            error_if_nonfinite: True stands for nonfinite="raise", False for "ignore", as in torch.
            nonfinite: What to do when the norm is inf or NaN: "raise" (the default), "skip" (drop all gradients, so
                that the step changes nothing, on all ranks alike), "zero" (step with zero gradients) or "ignore" (the
                default with a loss scale, which skips such steps itself). All but "ignore" wait for the device.

        Returns:
            The total norm before clipping, 0-dim, on the device.

        Raises:
            NonFiniteError: The norm is inf or NaN and the policy is "raise".
            ConfigError: An argument is wrong.
        """
        policy = gradients.check_clip_arguments(max_norm, clip_val, error_if_nonfinite, nonfinite)
        if optimizer is None and self.precision.changes_step:
            raise ConfigError(
                f"clip_gradients needs optimizer= with precision={self.precision.name!r}, to unscale its gradients."
            )
        if optimizer is not None:
            if not isinstance(optimizer, Optimizer):
                raise ConfigError(f"optimizer={optimizer!r} is no torch optimizer.")
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
        elif model is not None:
            parameters = list(model.parameters())
        else:
            raise ConfigError("clip_gradients() got neither a model nor an optimizer; pass both, or one of them.")
        return gradients.clip(
            parameters,
            optimizer,
            self.strategy,
            self.precision,
            max_norm=max_norm,
            clip_val=clip_val,
            norm_type=norm_type,
            nonfinite=policy,
        )

    def step_was_skipped(self, optimizer: Optimizer) -> bool:
        """Whether the optimizer's last step was left out because a loss scale made gradients inf or NaN."""
        return self.precision.step_was_skipped(optimizer)

    def _set_scale(self, scale: Callable[[Tensor], Tensor] | None) -> None:
        self._scale = scale


def compose_backward(lite: Steps) -> Callable[..., None]:
    """The backward of this job, with nothing in it that it doesn't need."""
    plain, check, weight = lite.precision.backward, lite.strategy.check_backward, lite._weight

    def backward(loss: Tensor, *args: Any, **kwargs: Any) -> None:
        if lite._scale is not None:
            loss = lite._scale(loss)
        plain(loss, *args, **kwargs)

    def checked_backward(loss: Tensor, *args: Any, **kwargs: Any) -> None:
        check(loss)
        if lite._scale is not None:
            loss = lite._scale(loss)
        weight.uses += 1
        if weight.value != 1.0:
            loss = loss * weight.use()
        try:
            plain(loss, *args, **kwargs)
        except RuntimeError as error:
            collectives.raise_explained(error)
            raise

    return checked_backward if lite.world_size > 1 else backward
