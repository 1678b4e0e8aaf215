"""`Lite`: the object that a raw training loop talks to. It keeps what the plan decided and hands every call on."""

from __future__ import annotations

import atexit
import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

from torch import nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from lite import collectives
from lite.accelerators import Accelerator, probe_devices
from lite.data import (
    BatchWeight,
    Shard,
    describe_dataloader,
    move_to_device,
    release_dataloader,
    setup_dataloader,
)
from lite.environments import Environment, detect_environment
from lite.errors import ConfigError, UsageError
from lite.facets.checkpoints import Checkpoints
from lite.facets.ranks import BetweenRanks
from lite.facets.records import Records
from lite.facets.steps import Steps, compose_backward
from lite.first_rank import FirstRank
from lite.loggers import Logger
from lite.plan import AUTO, FULL_PRECISION, ONE_NODE, Plan, given, resolve
from lite.precision.base import Precision
from lite.seed import seed_everything
from lite.strategies.base import Engine, Strategy
from lite.wrapping.module import unwrap_module, wrap_module
from lite.wrapping.optimizer import (
    unwrap_optimizer,
    unwrap_scheduler,
    wrap_scheduler,
)

T = TypeVar("T")

_set_up: weakref.WeakSet[Any] = weakref.WeakSet()


class Lite(BetweenRanks, Steps, Checkpoints, Records):
    """Takes a raw PyTorch loop to any device, number of processes and precision.

    Under torchrun, srun or mpirun creating it joins the job (collective: create it on all ranks). Without one of them
    and with several devices, `launch` (or a subclass's `run`) starts the processes.

    Args:
        accelerator: "auto", "cpu", "cuda", "gpu", "mps" or an Accelerator.
        strategy: "auto", "single", "ddp", "ddp_find_unused_parameters_true", "ddp_spawn", "ddp_fork", "ddp_notebook", a
            name that an installed package registered (entry-point group `lite.strategies`), or a Strategy.
        devices: How many devices or which: a number, "auto" (what torchrun started, else one), -1 (all), "0,1" or [0,
            1].
        num_nodes: Number of machines.
        precision: "32-true", "64-true", "16-mixed", "bf16-mixed", "16-true", "bf16-true"; 64, 32, 16 and "bf16" stand
            for the first, second, third and fourth of "64-true", "32-true", "16-mixed", "bf16-mixed".
        plugins: A Precision or an Environment of your own, or a list of them.
        callbacks: Objects whose methods `call` runs.
        loggers: One or several Loggers that `log` writes to.

    The first five fall back to LITE_ACCELERATOR, LITE_STRATEGY, LITE_DEVICES, LITE_NUM_NODES and LITE_PRECISION: an
    argument outranks the environment, which outranks the default.

    Raises:
        ConfigError: A setting is wrong, unavailable, or contradicts another one or the job.

    Example:
        >>> lite = Lite(accelerator="cpu")
        >>> model, optimizer = lite.setup(model := torch.nn.Linear(2, 1), torch.optim.SGD(model.parameters(), lr=0.1))
        >>> lite.backward(model(torch.ones(4, 2)).mean())
        >>> optimizer.step()
    """

    def __init__(
        self,
        accelerator: str | Accelerator = AUTO,
        strategy: str | Strategy = AUTO,
        devices: int | str | Sequence[int] = AUTO,
        num_nodes: int = ONE_NODE,
        precision: str | int = FULL_PRECISION,
        plugins: Precision | Environment | Sequence[Precision | Environment] | None = None,
        callbacks: Any = None,
        loggers: Logger | Sequence[Logger] | None = None,
    ) -> None:
        arguments = given(
            {
                "accelerator": accelerator,
                "strategy": strategy,
                "devices": devices,
                "num_nodes": num_nodes,
                "precision": precision,
            }
        )
        needs_bf16 = "bf16" in str(arguments.get("precision", os.environ.get("LITE_PRECISION", "")))
        self._plan: Plan = resolve(arguments, os.environ, probe_devices(bf16=needs_bf16), plugins)
        self._callbacks: tuple[Any, ...] = _as_tuple(callbacks)
        self._loggers: tuple[Logger, ...] = _as_tuple(loggers)
        for logger in self._loggers:
            if not isinstance(logger, Logger):
                raise ConfigError(f"loggers={loggers!r}: {logger!r} is no Logger; pass a lite.loggers.CSVLogger, say.")
        self._connected = False
        self._modules: dict[nn.Module, Engine | None] = {}
        self._optimizers: list[Optimizer] = []
        self._schedulers: list[LRScheduler] = []
        self._loaders: list[DataLoader[Any]] = []
        self._facts: list[str] = []
        self._weight = BatchWeight()
        self._scale = None
        if self._plan.started:
            self._connect()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Let a subclass's `run` start the processes when it is called before they run."""
        super().__init_subclass__(**kwargs)
        if "run" in cls.__dict__:
            cls.run = _launching(cls.__dict__["run"])  # type: ignore[attr-defined]

    # ---- starting

    def launch(self, fn: Callable[..., T] | None = None, *args: Any, **kwargs: Any) -> T | None:
        """Run `fn(lite, *args, **kwargs)` on every device.

        Where the processes run already (torchrun, srun, mpirun, or a single device) `fn` is called here. Otherwise they
        are started; `fn` must then be importable from them, and a script needs `if __name__ == "__main__":` around this
        call. Without `fn`, the whole script is run again by each process, as torchrun would, and this process exits
        when they end.

        Args:
            fn: A function that takes the Lite object first.
            *args: Further arguments; they must pickle.
            **kwargs: The same.

        Returns:
            What `fn` returned on rank 0; None without `fn`.

        Raises:
            ConfigError: `fn` is no function, or can't be imported by another process.
            LaunchError: A process failed; the message has its traceback.
        """
        if fn is not None and not callable(fn):
            raise ConfigError(f"fn={fn!r} is not callable; write lite.launch(train), not lite.launch(train()).")
        if self._connected:
            return fn(self, *args, **kwargs) if fn is not None else None
        if fn is None:
            return self._plan.launcher.launch_script()
        value: T = self._plan.launcher.launch(_run_in_process, self, fn, args, kwargs)
        return value

    def _connect(self) -> None:
        """Become one of the job's processes."""
        plan = self._plan
        local = plan.environment.local_rank()
        self._device = plan.accelerator.device(plan.devices[local])
        plan.accelerator.activate(self._device)
        self._store = plan.strategy.connect(plan.environment, self._device)
        self._first_rank = FirstRank(self._store, self.global_rank) if self._store is not None else None
        self._connected = True
        self._backward = compose_backward(self)  # type: ignore[method-assign]
        atexit.register(plan.strategy.close)
        for callback in self._callbacks:
            if hasattr(callback, "on_launch"):
                callback.on_launch(self)

    # ---- setting up

    def setup(
        self,
        model: nn.Module,
        *optimizers: Optimizer | LRScheduler,
        schedulers: LRScheduler | Sequence[LRScheduler] | None = None,
        move_to_device: bool = True,
    ) -> Any:
        """Prepare a model and what trains it, in place: what comes back are the same objects.

        Collective: call on all ranks, in the same order.

        Args:
            model: The raw model. Its weights become rank 0's on every rank.
            *optimizers: Its optimizers, and schedulers if you like.
            schedulers: Schedulers of these optimizers; they stand still when a loss scale makes the optimizer skip a
                step.
            move_to_device: False leaves the model where it is; it must be on `lite.device` then, or placed by itself.

        Returns:
            `model` alone, or a tuple `(model, *optimizers, *schedulers)`.

        Raises:
            UsageError: Something is set up already, or the processes don't run yet.
            ConfigError: Something is of a wrong type, or an optimizer holds parameters of another model.
        """
        self._require_connected("setup")
        late = _as_tuple(schedulers)
        trained = [o for o in optimizers if isinstance(o, Optimizer)]
        paced = [s for s in (*optimizers, *late) if isinstance(s, LRScheduler)]
        self._check_objects(model, (*optimizers, *late))
        self._check_parameters(model, trained)
        self.setup_module(model, move_to_device=move_to_device)
        if trained:
            self.setup_optimizers(*trained)
        for scheduler in paced:
            wrap_scheduler(scheduler, self.precision)
            self._schedulers.append(scheduler)
            _set_up.add(scheduler)
        self.call("on_after_setup", self, model)
        return (model, *optimizers, *late) if optimizers or late else model

    def setup_module(self, model: nn.Module, *, move_to_device: bool = True) -> nn.Module:
        """Prepare a model without optimizers; see `setup`. Collective: call on all ranks."""
        self._require_connected("setup_module")
        self._check_objects(model, ())
        tensors = [*model.parameters(), *model.buffers()]
        if any(is_lazy(t) for t in tensors):
            raise ConfigError(
                f"{type(model).__name__} has lazy parameters without a shape; run one forward with a real batch "
                "before setup."
            )
        if any(t.is_meta for t in tensors):
            raise ConfigError(
                f"{type(model).__name__} has parameters on the meta device, without values; materialise them first, "
                "e.g. with "
                "model.to_empty(device=lite.device) and its reset_parameters()."
            )
        self.precision.convert_module(model)
        if move_to_device:
            model.to(self._device)
        engine = self.strategy.wrap(model, self._device)
        wrap_module(model, engine=engine, precision=self.precision, device=self._device)
        self._modules[model] = engine
        _set_up.add(model)
        self._facts.append(f"{type(model).__name__}: {self.strategy.explain(model)}; precision {self.precision.name}")
        return model

    def setup_optimizers(self, *optimizers: Optimizer) -> Any:
        """Prepare optimizers of models that are set up already; returns the same one, or a tuple.

        Raises:
            ConfigError: None is given, or one is no optimizer.
            UsageError: One is set up already, or holds parameters of no set-up model.
        """
        self._require_connected("setup_optimizers")
        if not optimizers:
            raise ConfigError("setup_optimizers() got no optimizer; pass at least one.")
        self._check_objects(None, optimizers)
        self._check_parameters(None, optimizers)
        for optimizer in optimizers:
            self._prepare_optimizer(optimizer)
            self._optimizers.append(optimizer)
            _set_up.add(optimizer)
            for callback in self._callbacks:
                if hasattr(callback, "on_after_optimizer_step"):
                    optimizer.register_step_post_hook(_after_step(callback, self.strategy))
        return optimizers if len(optimizers) > 1 else optimizers[0]

    def setup_dataloaders(
        self,
        *loaders: DataLoader[Any],
        use_distributed_sampler: bool | str = True,
        move_to_device: bool = True,
        shard: str | None = None,
    ) -> Any:
        """Split loaders over the ranks and move their batches to the device.

        Collective: call on all ranks. Every rank gets the same number of batches: the r-th slice of each global batch,
            which is
        what one process with `batch_size * world_size` would draw from the user's own sampler. A last global batch that
        doesn't fill up is split as evenly as it goes, and `backward` weighs the loss accordingly. `gather_for_metrics`
        counts each sample once.

        Args:
            *loaders: DataLoaders; each one's options, sampler, batch sampler and subclass are kept.
            use_distributed_sampler: False gives every rank the whole loader; "interleaved" gives torch's
                DistributedSampler order.
            move_to_device: False leaves batches on the CPU.
            shard: How IterableDatasets are split: None (not at all: the dataset does it itself, or every rank reads
                everything), or "stride" (each global batch of the one stream is split over the ranks).

        Returns:
            The new loader, or a tuple of them.

        Raises:
            ConfigError: None is given, or one is no DataLoader.
            UsageError: One is set up already, or the processes don't run yet.
        """
        self._require_connected("setup_dataloaders")
        if not loaders:
            raise ConfigError("setup_dataloaders() got no loader; pass at least one DataLoader.")
        if shard not in (None, "stride"):
            raise ConfigError(f"shard={shard!r} is not known; use None or 'stride'.")
        parts, index = self.strategy.data_shards(self.world_size, self.global_rank)
        ready = tuple(
            setup_dataloader(
                loader,
                shard=Shard(index, parts),
                device=self._device if move_to_device else None,
                weight=self._weight,
                use_distributed_sampler=use_distributed_sampler,
                iterable_shard=shard,
                sync=collectives.broadcast,
            )
            for loader in loaders
        )
        self._loaders.extend(loaders)
        self._facts.extend(describe_dataloader(loader, parts, bool(use_distributed_sampler)) for loader in ready)
        return ready if len(ready) > 1 else ready[0]

    def teardown(self) -> None:
        """Give the user's own models, optimizers and schedulers back, without a hook or patch; flush the loggers."""
        for module, engine in self._modules.items():
            unwrap_module(module)
            if engine is not None:
                engine.close()
            _set_up.discard(module)
        for optimizer in self._optimizers:
            unwrap_optimizer(optimizer)
            _set_up.discard(optimizer)
        for scheduler in self._schedulers:
            unwrap_scheduler(scheduler)
            _set_up.discard(scheduler)
        for loader in self._loaders:
            release_dataloader(loader)
        self._modules.clear()
        self._loaders.clear()
        self._optimizers.clear()
        self._schedulers.clear()
        self._facts.clear()
        for logger in self._loggers:
            logger.flush()

    def to_device(self, data: T) -> T:
        """Move a module, in place, or nested data to this rank's device; what is there already stays as it is."""
        self._require_connected("to_device")
        return data.to(self._device) if isinstance(data, nn.Module) else move_to_device(data, self._device)

    @staticmethod
    def seed_everything(seed: int, workers: bool = True) -> int:
        """Seed Python, numpy and torch alike on all ranks; see `lite.seed.seed_everything`.

        Args:
            seed: A whole number from 0 to 2**32 - 1.
            workers: Accepted for LightningLite's users. Loader workers of different ranks always draw different
                numbers.
        """
        return seed_everything(seed)

    @contextmanager
    def init_module(self) -> Iterator[None]:
        """Create modules on the device and in the precision's dtype at once."""
        self._require_connected("init_module")
        with self._device, self.precision.init_context(self._device):
            yield

    def init_tensor(self) -> AbstractContextManager[None]:
        """Create tensors on the device and in the precision's dtype."""
        return self.init_module()

    # ---- checks and pieces

    def _check_objects(self, model: nn.Module | None, others: Sequence[Any]) -> None:
        if model is not None and not isinstance(model, nn.Module):
            raise ConfigError(f"setup got {model!r} as the model; pass a torch.nn.Module first.")
        for other in others:
            if not isinstance(other, (Optimizer, LRScheduler)):
                hint = "; loaders go to lite.setup_dataloaders" if isinstance(other, DataLoader) else ""
                hint = "; set each model up by its own call" if isinstance(other, nn.Module) else hint
                raise ConfigError(f"setup got a {type(other).__name__} among the optimizers and schedulers{hint}.")
        for thing in (model, *others):
            if thing is not None and thing in _set_up:
                raise UsageError(
                    f"this {type(thing).__name__} is set up already; keep the result of the first call, or call "
                    "lite.teardown() first."
                )

    def _check_parameters(self, model: nn.Module | None, optimizers: Sequence[Optimizer]) -> None:
        """Every optimizer must train set-up parameters: others would go their own way on each rank."""
        modules = [*self._modules, *([model] if model is not None else [])]
        known = {id(p) for module in modules for p in module.parameters()}
        for optimizer in optimizers:
            held = [p for group in optimizer.param_groups for p in group["params"]]
            foreign = [p for p in held if id(p) not in known]
            if foreign:
                shape = tuple(foreign[0].shape)
                raise ConfigError(
                    f"{type(optimizer).__name__} holds {len(foreign)} of {len(held)} parameters (the first of shape "
                    f"{shape}) that "
                    "belong to no model that is set up; create it from model.parameters() of the model that you pass "
                    "to "
                    "lite.setup, after the last change of the model."
                )

    def __getstate__(self) -> dict[str, Any]:
        if self._connected:
            raise UsageError(
                "a Lite object that has joined its processes can't be pickled; create one in each process."
            )
        return self.__dict__


def _run_in_process(lite: Lite, fn: Callable[..., T], args: tuple[Any, ...], kwargs: dict[str, Any]) -> T:
    """What a started process does: join as itself, then run."""
    lite._plan = lite._plan.joined(detect_environment(os.environ))
    lite._connect()
    return fn(lite, *args, **kwargs)


def _call_run(lite: Any, *args: Any, **kwargs: Any) -> Any:
    return lite.run(*args, **kwargs)


def _launching(run: Callable[..., Any]) -> Callable[..., Any]:
    import functools

    @functools.wraps(run)
    def launched(self: Lite, *args: Any, **kwargs: Any) -> Any:
        if self._connected:
            return run(self, *args, **kwargs)
        return self.launch(_call_run, *args, **kwargs)

    return launched


def _after_step(callback: Any, strategy: Strategy) -> Callable[..., None]:
    def after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        callback.on_after_optimizer_step(strategy, optimizer)

    return after_step


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return () if value is None else tuple(value) if isinstance(value, (list, tuple)) else (value,)
