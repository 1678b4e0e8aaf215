"""What happens within one step of the user's loop: backward, accumulation, clipping."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lite import collectives, gradients
from lite.errors import ConfigError, UsageError, shown
from lite.facets.base import Facet
from lite.precision.base import Precision
from lite.state import parameters_of, uncompiled
from lite.wrapping.optimizer import move_optimizer_state, wrap_optimizer

if TYPE_CHECKING:
    from lite.ema import EMA

_UNKNOWN: Any = object()


class Steps(Facet):
    """The side of `Lite` that a training step calls."""

    _scale: gradients.Scale | None
    _joins = False  # whether a block of `join` is open

    def backward(
        self, loss: Tensor, *args: Any, model: nn.Module | None = None, weight: float | None = None, **kwargs: Any
    ) -> None:
        """Compute gradients of `loss` instead of `loss.backward()`: scaled where the precision needs it, averaged over
        the ranks.

        The loss of a ragged last batch is weighed so that the averaged gradient is that of the undivided batch's mean.

        Args:
            loss: A tensor that comes from a set-up model's output.
            *args: As for `Tensor.backward`.
            model: The set-up model that it is for, where a strategy has to know; unused otherwise.
            weight: What the loss is multiplied by, in the place of what a ragged batch weighs: for losses that are no
                mean over the batch's samples. `lite.world_size` makes the gradient of a sum over them that of the sum
                over all ranks' samples.
            **kwargs: As for `Tensor.backward`. With several ranks `inputs` is refused while they synchronise.

        Raises:
            UsageError: The gradients would not be synchronised over the ranks, `model` is not set up, or a window of
                `accumulate` has a weight already.
        """
        if not isinstance(loss, Tensor):
            raise ConfigError(f"backward got loss={loss!r:.80}, which is no tensor; pass the loss tensor itself.")
        if model is not None:
            self._set_up("backward", model)
        if weight is not None:
            gradients.check_weight("backward", weight)
            if self._scale is not None and self._scale.weighted:
                raise UsageError(f"backward(weight={weight!r}): the open window of accumulate has a weight; give one.")
            with self._weight.instead(weight) as factor:
                self._backward(loss * factor, *args, **kwargs)
            return
        self._backward(loss, *args, **kwargs)

    def _backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """What `compose_backward` replaces once the processes run."""
        self._require_connected("backward")

    def autocast(self) -> AbstractContextManager[Any]:
        """A context that computes as a set-up model's forward does, for code outside it (a loss function, say)."""
        return self.precision.autocast()

    def no_backward_sync(self, model: nn.Module, enabled: bool = True) -> AbstractContextManager[None]:
        """A context for forward and backward of `model` that leaves its gradients unsynchronised, to save
        communication.

        Raises:
            UsageError: `model` is not set up.
        """
        model = self._set_up("no_backward_sync", model)
        return self.strategy.no_sync(self._modules[model], enabled)

    def join(
        self,
        *models: nn.Module,
        divide_by_initial_world_size: bool = True,
        throw_on_early_termination: bool = False,
    ) -> AbstractContextManager[None]:
        """A context for a loop whose ranks may run out of batches at different steps, under DDP; with one process it
        does nothing.

        Collective: call on all ranks. A rank that has left the loop waits at the block's end and answers the others'
        gradient averaging with zeros: the forward and then the backward of each model, in the order in which they are
        given here. So each forward under gradients is followed by its own `backward` before the next one, and with
        several models each is called once per batch, in that order; anything else is refused. At the very end all ranks
        have the model and the optimizers' state of the last one that trained (schedulers and loss scales are each
        rank's own). Loaders from `setup_dataloaders` don't need it: they give every rank the same number of batches,
        also of an uneven dataset. It is for streams of your own, whose lengths nobody knows. Within the block only
        forward, backward and optimizer steps may communicate: no `all_reduce`, `save` or `check_sync`, which the others
        would not answer.

        The n-th backward of each rank must synchronise on all of them or on none, whoever has an n-th one. So a window
        of `accumulate` takes no `last=` in the block, and no `weight=`, for which all ranks are asked: windows complete
        by their count alone. One that isn't full as a rank runs out is not stepped on: what that rank has in it is
        dropped at the block's end, also where the others fill theirs, and the next micro-batch begins a new window.
        `no_backward_sync` must follow the same count on all ranks.

        Args:
            *models: The set-up models that are trained in the block, each on every batch.
            divide_by_initial_world_size: Gradients are divided by the number of all ranks; False divides by the number
                of those that still train.
            throw_on_early_termination: Raise RuntimeError on all ranks as soon as one runs out.

        Raises:
            UsageError: A model is not set up, or the strategy has nothing of the kind for several ranks, as all but DDP
                (local SGD, ZeRO-1, and what other packages add and doesn't override `Strategy.join`); within the block,
                a forward that the ranks without batches would not answer.

        Source: https://docs.pytorch.org/docs/stable/distributed.algorithms.join.html
        """
        if not models:
            raise ConfigError("join() got no model; pass the models that are trained.")
        models = tuple(self._set_up("join", model) for model in models)
        trained = {id(p) for model in models for p in model.parameters()}
        optimizers = [o for o in self._prepared.optimizers if any(id(p) in trained for p in parameters_of(o))]
        inner = self.strategy.join(
            [self._modules[model] for model in models],
            optimizers,
            divide_by_initial_world_size=divide_by_initial_world_size,
            throw_on_early_termination=throw_on_early_termination,
        )
        return self._within_join(inner, set(models))

    @contextmanager
    def _within_join(self, inner: AbstractContextManager[None], models: set[nn.Module]) -> Iterator[None]:
        """`inner`, in which windows go by their count alone; those that have not come to it begin anew after it."""
        self._joins = True
        try:
            with inner:
                yield
        finally:
            self._joins = False
            for window, held, _ in self._windows:
                if not held.isdisjoint(models):
                    window.drop()

    def accumulate(
        self, *models: nn.Module, steps: int, optimizer: Optimizer | None = None, rescale: bool = True
    ) -> gradients.Accumulation:
        """Accumulate gradients over `steps` micro-batches before each optimizer step.

        Use it as `with window(last=...): forward; lite.backward(loss)`, then step when `window.ready`. Inside it
        `backward` divides the loss, so don't do it yourself. One window at a time: models that are trained together
        share one. Within `lite.join` it is `with window():`, without `last` and `weight`; see there.

        Args:
            *models: The set-up models that are trained.
            steps: Micro-batches per optimizer step.
            optimizer: Whose parameters the window is for, where each optimizer of a model has a window of its own; a
                loss within it should reach no others.
            rescale: Whether a partial window without weights becomes the mean over what it holds; False leaves every
                loss divided by `steps`, as PyTorch Lightning's Trainer does.

        Returns:
            The counter that is called for each micro-batch; see `lite.gradients.Accumulation`.
        """
        models = tuple(self._set_up("accumulate", model) for model in models)
        if not models:
            raise ConfigError("accumulate() got no model; pass the models that are trained.")

        @contextmanager
        def no_sync(enabled: bool) -> Iterator[None]:
            with ExitStack() as stack:
                for model in models:
                    stack.enter_context(self.no_backward_sync(model, enabled))
                yield

        window = gradients.Accumulation(
            steps,
            lambda: _parameters(models, optimizer),
            no_sync,
            self._scaled,
            self._weight,
            self._device,
            self.strategy,
            rescale=rescale,
            joins=lambda: self._joins,
        )
        held = set(models)
        others = [
            (w, m, o)
            for w, m, o in self._windows
            if not (m & held) or (o is not None and o is not optimizer is not None)
        ]
        self._windows = [(window, held, optimizer), *others]
        return window

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
            NonFiniteError: The norm is inf or NaN, here or on another rank, and the policy is "raise".
            ConfigError: An argument is wrong.
            UsageError: The model is not set up.
        """
        policy = gradients.check_clip_arguments(max_norm, clip_val, norm_type, error_if_nonfinite, nonfinite)
        if optimizer is None and self.precision.changes_step:
            raise ConfigError(
                f"clip_gradients needs optimizer= with precision={self.precision.name!r}, to unscale its gradients."
            )
        if isinstance(model, Optimizer):
            raise ConfigError(
                f"clip_gradients got the optimizer, {type(model).__name__}, as the model; the model comes first: "
                "lite.clip_gradients(model, optimizer, ...), or name it: lite.clip_gradients(optimizer=optimizer, ...)."
            )
        if model is not None:
            model = self._set_up("clip_gradients", model)
        if optimizer is not None:
            if not isinstance(optimizer, Optimizer):
                raise ConfigError(f"clip_gradients got optimizer={shown(optimizer)}, which is no torch optimizer.")
            if self._prepared.clipped.get(optimizer, _UNKNOWN) is not model:
                self._check_clipped(model, optimizer)
            parameters = parameters_of(optimizer)
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

    def _check_clipped(self, model: nn.Module | None, optimizer: Optimizer) -> None:
        """Refuse an optimizer that trains nothing that is set up, or nothing of the model."""
        name = type(optimizer).__name__
        if not any(optimizer is one for one in self._prepared.optimizers):
            raise UsageError(
                f"clip_gradients got a {name} that lite.setup has not prepared; pass the optimizer that it returned."
            )
        held = {id(p) for p in parameters_of(optimizer)}
        if model is not None and held.isdisjoint(map(id, model.parameters())):
            raise UsageError(
                f"clip_gradients got a {type(model).__name__} and a {name} that holds none of its parameters, which "
                "are the ones that are clipped; pass the model's own optimizer."
            )
        self._prepared.clipped[optimizer] = model

    def step_was_skipped(self, optimizer: Optimizer) -> bool:
        """Whether the optimizer's last step was left out because a loss scale made gradients inf or NaN."""
        return self.precision.step_was_skipped(optimizer)

    def ema(self, model: nn.Module, *, decay: float = 0.999, buffers: bool = False) -> EMA:
        """Keep an exponential moving average of the model's weights: `update()` after each optimizer step.

        `with ema.swap():` puts it into the model's place for evaluation, or to save it as the model. It has
        `state_dict` and `load_state_dict`, so it goes into what you give to `save` and `load`, and a resumed average is
        exact.

        Args:
            model: A set-up model, on any strategy; of sharded parameters each rank averages its shard, and of
                a pipeline's model its own layers.
            decay: How much of the average stays at each update.
            buffers: Whether floating-point buffers (BatchNorm's statistics) are averaged as well; if not, the model's
                present ones are used within `swap`.

        Raises:
            ConfigError: `decay` is not from 0 to below 1.
            UsageError: The model is not set up, or the ranks train apart (LocalSGDStrategy) and have stepped since they
                came together, here as in `update`.

        Example:
            >>> import lite, torch
            >>> run = lite.Lite(accelerator="cpu")
            >>> weight = torch.nn.init.ones_((model := run.setup(torch.nn.Linear(1, 1, bias=False))).weight)
            >>> ema = run.ema(model, decay=0.75)
            >>> weight.data.fill_(5.0), ema.update()
            (tensor([[5.]]), None)
            >>> with ema.swap():
            ...     print(weight.item())
            2.0
            >>> weight.item()
            5.0
        """
        from lite.ema import EMA

        model = self._set_up("ema", model)
        mine = {id(p) for p in model.parameters()}
        known, precision = weakref.ref(self._prepared), self.precision  # an average must not keep this Lite alive

        def skipped() -> bool:
            held = known().optimizers if known() is not None else []  # type: ignore[union-attr]
            theirs = [o for o in held if any(id(p) in mine for p in parameters_of(o))]
            return bool(theirs) and all(map(precision.step_was_skipped, theirs))

        strategy = self.strategy
        # Where ranks train apart, what one of them has left out is not left out by the sync after it.
        told = skipped if precision.changes_step and not strategy.trains_apart else _never
        return EMA(
            model,
            decay=decay,
            buffers=buffers,
            skipped=told,
            in_sync=lambda: strategy.is_in_sync(model),
            partition=strategy.partition(model),
        )

    @contextmanager
    def _scaled(self, scale: gradients.Scale) -> Iterator[None]:
        """An open accumulation window, which `backward` asks what to do with the loss."""
        if self._scale is not None:
            raise UsageError(
                "lite.accumulate: a window is open already, and backward would not know which one a loss is for; use "
                "one window for all models, lite.accumulate(first, second, steps=...), or close the first one before."
            )
        self._scale = scale
        try:
            yield
        finally:
            self._scale = None

    def _set_up(self, call: str, model: Any) -> nn.Module:
        """The model that was set up, of which `model` may be what `torch.compile` made since."""
        if not isinstance(model, nn.Module):
            raise ConfigError(
                f"{call} got {shown(model)} as the model; pass a torch.nn.Module that lite.setup returned."
            )
        raw: nn.Module = model if model in self._modules else uncompiled(model)
        if raw not in self._modules:
            raise UsageError(
                f"{call} got a {type(model).__name__} that lite.setup has not prepared; pass the model that it "
                "returned, not a part or a copy of it."
            )
        return raw

    def _prepare_optimizer(self, optimizer: Optimizer) -> None:
        """Route the optimizer's step, with what this number of ranks needs."""
        self.strategy.adopt_optimizer(optimizer)
        if self.world_size > 1:
            strategy = self.strategy
            strategy.check_optimizer(optimizer)
            this = weakref.ref(self)  # an optimizer may outlive this object

            def before(optimizer: Optimizer) -> None:
                lite = this()
                if lite is not None:
                    lite._check_window(optimizer)

            wrap_optimizer(
                optimizer,
                self.precision,
                check=strategy.check_optimizer,
                mean_loss=self._mean_loss,
                divide=strategy.divide_optimizer,
                follow=strategy.follow_optimizer,
                before=before,
            )
        else:
            wrap_optimizer(optimizer, self.precision, follow=self.strategy.follow_optimizer)
        move_optimizer_state(optimizer, self.precision)

    def _check_window(self, optimizer: Optimizer) -> None:
        """Refuse a step with gradients that an open window has kept on this rank."""
        for window, models, owner in self._windows:
            if owner is not None and owner is not optimizer:
                continue
            if not window.is_open or all(getattr(self._modules.get(m), "gradients_agree", True) for m in models):
                continue
            held = {id(p) for p in parameters_of(optimizer)}
            if any(id(p) in held for model in models for p in model.parameters()):
                raise UsageError(
                    f"{type(optimizer).__name__}.step() came after {window.count} of {window.steps} micro-batches of "
                    "an accumulation window, whose gradients are each rank's own until the last one; step when "
                    "window.ready, and end a window early by window(last=True)."
                )

    def _mean_loss(self, loss: Any) -> Any:
        """What one process would have seen: the mean of the ranks' losses, each counted by its samples."""
        return loss if loss is None else collectives.all_reduce(loss * self._weight.counted, "mean")


def _never() -> bool:
    return False


def _parameters(models: tuple[nn.Module, ...], optimizer: Optimizer | None) -> Iterable[nn.Parameter]:
    if optimizer is not None:
        return parameters_of(optimizer)
    return (p for model in models for p in model.parameters())


def _plain_backward(precision: Precision) -> Callable[..., None]:
    """The precision's backward, or torch's own where it adds nothing."""
    return Tensor.backward if type(precision).backward is Precision.backward else precision.backward


def one_call_backward(lite: Steps) -> Callable[..., None]:
    """`lite.backward` of one process, done in a single call where nothing but a loss is passed: it is paid per step."""
    plain, general = _plain_backward(lite.precision), lite.backward
    if plain is Tensor.backward:
        plain = torch.autograd.backward  # to which that one hands on a plain tensor

    @functools.wraps(Steps.backward)
    def backward(loss: Tensor, *args: Any, **kwargs: Any) -> None:
        if args or kwargs or loss.__class__ is not Tensor or lite._scale is not None:
            return general(loss, *args, **kwargs)
        try:
            plain(loss)
        except RuntimeError:
            gradients.check_loss(loss, args, kwargs)
            raise

    return backward


def compose_backward(lite: Steps) -> Callable[..., None]:
    """The backward of this job, with nothing in it that it doesn't need."""
    lite.precision.connect(lite.device)
    if lite.strategy.shards:
        lite.precision.share_overflow(lite.strategy.local_gradients, collectives.largest)
    plain, strategy, weight = _plain_backward(lite.precision), lite.strategy, lite._weight

    def backward(loss: Tensor, *args: Any, **kwargs: Any) -> None:
        scale = lite._scale
        if scale is not None:
            loss = scale.apply(loss)
        try:
            plain(loss, *args, **kwargs)
        except BaseException as error:
            if isinstance(error, RuntimeError):
                gradients.check_loss(loss, args, kwargs)  # refused before it began
            if scale is not None:
                scale.failed = not strategy.refuses_after_failure
            raise

    def checked_backward(loss: Tensor, *args: Any, **kwargs: Any) -> None:
        # Tensor.backward(gradient, retain_graph, create_graph, inputs)
        if (args or kwargs) and (kwargs.get("create_graph") or (len(args) > 2 and args[2])):
            raise UsageError(
                "lite.backward(create_graph=True) can't be averaged over several ranks: the averaging changes "
                "gradients in place. Take those that a loss is made of by torch.autograd.grad(create_graph=True)."
            )
        scale = lite._scale
        if scale is not None:
            loss = scale.apply(loss)
        loss = strategy.prepare_backward(loss, partial=len(args) > 3 or kwargs.get("inputs") is not None)
        weight.uses += 1
        if weight.value != 1.0:
            factor = weight.use()
            if scale is None or not scale.weighted:
                loss = loss * factor
        try:
            plain(loss, *args, **kwargs)
            strategy.finish_backward()
        except BaseException as error:
            strategy.abandon_backward()
            if scale is not None:
                scale.failed = not strategy.refuses_after_failure
            if not isinstance(error, RuntimeError):
                raise
            gradients.check_loss(loss, args, kwargs)
            collectives.raise_explained(error)
            advice = strategy.explain_backward_error(error)
            if advice is None:
                raise
            raise UsageError(advice) from error

    return checked_backward if lite.world_size > 1 else backward
