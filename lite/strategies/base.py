"""What a strategy decides: how ranks come together, what stands around a model, and how gradients are kept in step.

A strategy joins the processes that a launcher or a scheduler started; it starts none. The base class is one process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lite import collectives
from lite.environments.base import Environment
from lite.errors import ConfigError, UsageError
from lite.precision.base import Precision
from lite.state import parameters_of
from lite.strategies.running_order import PipelinePlan

if TYPE_CHECKING:
    from lite.strategies.footprint import Footprint


class Engine:
    """What stands between the user's model and its forward, made by `Strategy.wrap` for one model.

    Attributes:
        syncs_buffers: Whether each forward starts with rank 0's buffers, so that they may differ between forwards.
        through_call: Whether only a call of the model itself, with its hooks, is a whole forward, so that
            `model.forward(...)` is one of its other methods.
        body: What else the model's class has while it is set up, by name.
    """

    syncs_buffers: bool = False
    through_call: bool = False
    body: Mapping[str, Any] = MappingProxyType({})

    def forward(self, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the whole forward by `run(*args, **kwargs)`, with what the strategy needs around it."""
        raise NotImplementedError

    def method(self, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a method other than forward, and prepare for a backward through what it returns."""
        raise NotImplementedError

    def no_sync(self) -> AbstractContextManager[None]:
        """A context in which forward and backward leave gradients unsynchronised."""
        raise NotImplementedError

    def sync_buffers(self) -> None:
        """Take rank 0's buffers now, where `syncs_buffers`. Collective."""

    def close(self) -> None:
        """Take every hook off the model again."""


class Strategy:
    """One process on one device; base of the others. A third party subclasses it and passes an instance as `strategy=`.

    Attributes:
        name: As users write it.
        distributed: Whether it can run on several processes.
        divides_models: Whether ranks hold parts of a model where there are several; `shards` knows of this job.
        shards: Whether ranks hold parts of parameters and gradients, once it is connected.
        has_gradients: Whether a parameter's `grad` is its gradient after backward, or this rank's part of it, once it
            is connected.
        distributes_layers: Whether a model's layers lie on different ranks, once it is connected.
        refuses_after_failure: Whether it refuses by itself to go on after a backward that has begun and failed.
        start_method: How `Lite.launch` starts processes for it: "spawn", "fork" or "forkserver".
    """

    name: ClassVar[str] = "single"
    distributed: ClassVar[bool] = False
    divides_models: bool = False
    shards: bool = False
    has_gradients: bool = True
    distributes_layers: bool = False
    refuses_after_failure: bool = False
    start_method: str = "spawn"

    def check_world_size(self, world_size: int) -> None:
        """Refuse a number of processes that doesn't fit the strategy's arguments, before any of them starts."""

    def check_precision(self, precision: Precision) -> None:
        """Refuse a precision that the strategy can't train in, before any process starts."""

    def connect(self, environment: Environment, device: torch.device) -> Any:
        """Join the job's processes. Collective: called on all ranks.

        Returns:
            The store that the ranks share, or None with one process.
        """
        return None

    @property
    def moves_modules(self) -> bool:
        """Whether `wrap` brings a model to the device itself, part by part."""
        return False

    def check_module(self, module: nn.Module) -> None:
        """Refuse a model that `wrap` can't prepare, while it is still as the user made it."""

    def forward_precision(self, precision: Precision) -> Precision:
        """What goes around the forwards of the models that are wrapped from now on, where `wrap` does some of it."""
        return precision

    def wrap(self, module: nn.Module, device: torch.device) -> Engine | None:
        """Prepare a model that is already on its device, or return None where nothing has to stand around it."""
        return None

    def explain(self, module: nn.Module) -> str:
        """What `wrap` does with the module and why, in a few words."""
        return "the module itself: one process needs nothing around it"

    def footprint(self, module: nn.Module, world_size: int) -> Footprint | None:
        """How a raw model would lie in the memory of so many ranks; None where that is not known."""
        return None

    def plan_pipeline(self, module: nn.Module, plan: PipelinePlan) -> None:
        """Take over how `lite.setup_pipeline` wants a model to be split; `wrap` does it.

        Raises:
            ConfigError: The strategy gives each rank the whole model.
        """
        if self._on_several_ranks:
            raise ConfigError(
                f"lite.setup_pipeline puts a model's layers on different ranks, which strategy={self.name!r} does not; "
                "use Lite(strategy='pipeline'), or lite.setup."
            )

    def drop_pipeline(self, module: nn.Module) -> None:
        """Forget that plan: the model was refused."""

    def data_shards(self, world_size: int, rank: int) -> tuple[int, int]:
        """How many parts a loader's batches are split into, and which is this rank's."""
        return world_size, rank

    def data_parts(self, world_size: int) -> list[int]:
        """Which part each rank gets; ranks that compute one model together have the same one."""
        return [self.data_shards(world_size, rank)[1] for rank in range(world_size)]

    def prepare_backward(self, loss: Tensor, *, partial: bool = False) -> Tensor:
        """Refuse a loss whose gradients would not be synchronised; called before each backward with several ranks.

        Args:
            loss: What backward is called on.
            partial: Whether gradients of some inputs alone are asked for.

        Returns:
            The loss to differentiate.
        """
        return loss

    def finish_backward(self) -> None:
        """Refuse gradients that a backward, which has just ended, has left unsynchronised."""

    def abandon_backward(self) -> None:
        """A backward has failed: leave nothing of it that the next forward or backward would go on with."""

    def explain_backward_error(self, error: RuntimeError) -> str | None:
        """What to do about torch's error in a backward, where the strategy knows."""
        return None

    def check_new_optimizer(self, optimizer: Optimizer) -> None:
        """Refuse an optimizer that can't train what `wrap` makes, while everything is as the user made it."""

    def check_optimizer(self, optimizer: Optimizer) -> None:
        """Refuse an optimizer with parameters whose gradients would not be synchronised."""

    def successor(self, parameter: Tensor) -> nn.Parameter | None:
        """What has taken the place of a parameter of a raw model in the wrapped one."""
        return None

    def holds_elsewhere(self, parameter: Tensor) -> bool:
        """Whether a parameter on the meta device is one that another rank holds."""
        return False

    def adopt_optimizer(self, optimizer: Optimizer) -> None:
        """Let an optimizer of raw parameters hold those that have taken their place."""

    def data_group(self) -> Any:
        """The process group of the ranks that have different data; None is all."""
        return None

    def local_gradients(self, parameters: Iterable[nn.Parameter]) -> list[Tensor] | None:
        """This rank's parts of sharded gradients, as views; None where every rank has whole ones."""
        return None

    def divide_optimizer(self, optimizer: Optimizer) -> Callable[[], None] | None:
        """Change how an optimizer steps, in place, beneath the precision; return what takes that back, or None."""
        return None

    def follow_optimizer(self, optimizer: Optimizer) -> Callable[[], None] | None:
        """Do something after every step that is asked for, skipped ones too; return what takes that back, or None."""
        return None

    def join(
        self, engines: Sequence[Engine | None], optimizers: Sequence[Optimizer], **options: Any
    ) -> AbstractContextManager[None]:
        """A context in which ranks may run out of batches at different steps; see `Lite.join`.

        Raises:
            UsageError: There are several ranks, and a strategy that doesn't override this has nothing for it.
        """
        if not self._on_several_ranks:
            return nullcontext()
        raise UsageError(
            f"lite.join is for DDP, and strategy={self.name!r} has nothing that answers for a rank without batches: "
            "the others would wait for it. Use strategy='ddp', or give all ranks equally many batches, as loaders from "
            "lite.setup_dataloaders do."
        )

    @property
    def _on_several_ranks(self) -> bool:
        return self.distributed and collectives.world_size() > 1

    @property
    def trains_apart(self) -> bool:
        """Whether each rank steps by itself, until the strategy brings them together."""
        return False

    @property
    def in_sync(self) -> bool:
        """Whether the ranks' weights are the same now; where they train apart, so from a sync to the next step."""
        return True

    def is_in_sync(self, module: nn.Module) -> bool:
        """The same of one model, where several go at their own paces."""
        return True

    def end_period(self) -> None:
        """Bring ranks together that train apart for some steps, before the last of them. Collective: on all ranks."""

    def saving(self) -> AbstractContextManager[None]:
        """A context in which models and optimizers hold what goes into a checkpoint. Collective: on all ranks."""
        return nullcontext()

    def own_state(self, state: Mapping[str, Any], content: Mapping[str, Any]) -> Any:
        """What this rank has to keep besides what all ranks share; None for nothing.

        Args:
            state: Models, optimizers and other objects by name.
            content: What the checkpoint has for each name.
        """
        return None

    def loading(self, states: list[Any], state: Mapping[str, Any], loaded: Mapping[str, Any]) -> Callable[[], None]:
        """Look at what is about to be loaded, and change nothing.

        Args:
            states: What `own_state` was on each rank of a strategy of this name; empty where there is none.
            state: As for `own_state`.
            loaded: What the checkpoint has for each name.

        Returns:
            What is called when the objects are loaded, and nothing else has been.
        """
        return lambda: None

    def norms_agree(self) -> bool:
        """Whether all ranks judge their gradients' norm alike, or each may judge for itself."""
        return False

    def no_sync(self, engine: Engine | None, enabled: bool) -> AbstractContextManager[None]:
        """A context in which gradients stay local, where there is anything to keep local."""
        return engine.no_sync() if engine is not None and enabled else nullcontext()

    def grad_norm(self, parameters: list[nn.Parameter], norm_type: float) -> Tensor:
        """Total norm of the gradients, 0-dim, over all parameters as if they were one vector."""
        grads = [p.grad for p in parameters if p.grad is not None]
        return nn.utils.get_total_norm(grads, norm_type)

    def clip_norm(self, parameters: list[nn.Parameter], max_norm: float, total_norm: Tensor) -> None:
        """Scale gradients so that their norm is at most `max_norm`."""
        nn.utils.clip_grads_with_norm_(parameters, max_norm, total_norm)

    def clip_value(self, parameters: Iterable[nn.Parameter], clip_value: float) -> None:
        """Clamp each gradient element to [-clip_value, clip_value]."""
        parameters = [p for p in parameters if p.grad is not None]
        if parameters:  # torch 2.13 fails where there are none
            nn.utils.clip_grad_value_(parameters, clip_value)

    def multiply_gradients(self, parameters: Iterable[nn.Parameter], factor: Tensor | float) -> None:
        """Scale gradients in place."""
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(factor.to(parameter.grad.dtype) if isinstance(factor, Tensor) else factor)

    def replace_gradients(self, parameters: Iterable[nn.Parameter], *, by_zeros: bool) -> None:
        """Put zeros in the place of gradients, or nothing, so that the next step leaves the parameters alone."""
        for parameter in parameters:
            zeros = by_zeros and parameter.grad is not None
            parameter.grad = torch.zeros_like(parameter.grad) if zeros else None  # type: ignore[arg-type]

    def partition(self, model: nn.Module) -> Any:
        """What reads and writes this rank's parts of parameters that are no tensors of their own; None for none."""
        return None

    def close(self) -> None:
        """Leave the job: destroy what `connect` made."""


class SingleStrategy(Strategy):
    """One process on one device."""

    def footprint(self, module: nn.Module, world_size: int) -> Footprint | None:
        from lite.strategies.footprint import Footprint

        return Footprint()


def refuse_sync_batch_norm(module: nn.Module, device: torch.device) -> None:
    """Refuse SyncBatchNorm where torch can't compute it.

    Raises:
        ConfigError: The model has one, and the device is no GPU.
    """
    for name, part in module.named_modules():
        if isinstance(part, nn.SyncBatchNorm) and device.type != "cuda":
            raise ConfigError(
                f"{name or type(module).__name__!r} is a SyncBatchNorm, which computes on GPUs alone; leave "
                f"convert_sync_batchnorm out on {device.type!r}: BatchNorm takes its mean over a rank's samples then."
            )


def refuse_foreign(optimizer: Optimizer, is_known: Callable[[Tensor], bool]) -> None:
    """Refuse an optimizer that holds parameters of no model that is set up.

    Raises:
        UsageError: It does.
    """
    held = parameters_of(optimizer)
    foreign = [p for p in held if not is_known(p)]
    if foreign:
        raise UsageError(
            f"{type(optimizer).__name__} holds {len(foreign)} of {len(held)} parameters (the first of shape "
            f"{tuple(foreign[0].shape)}) that came into being after lite.setup or belong to no model that is set "
            "up, so their gradients would stay different on each rank; put them into the model before lite.setup, "
            "or call lite.teardown() and set up again."
        )
