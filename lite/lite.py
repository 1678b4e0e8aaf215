"""`Lite`: the object that a raw training loop talks to. It keeps what the plan decided and hands every call on."""

from __future__ import annotations

import atexit
import os
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from lite import collectives, gradients
from lite.accelerators import Accelerator, probe_devices
from lite.checkpoint.file import load_file, save_file
from lite.data import (
    BatchWeight,
    Shard,
    describe_dataloader,
    move_to_device,
    release_dataloader,
    setup_dataloader,
)
from lite.environments import Environment, detect_environment
from lite.errors import CheckpointError, ConfigError, UsageError
from lite.loggers import Logger
from lite.plan import AUTO, FULL_PRECISION, ONE_NODE, Plan, given, resolve
from lite.precision.base import Precision
from lite.seed import seed_everything
from lite.state import Filter, collect, restore
from lite.strategies.base import Engine, Strategy
from lite.wrapping.module import unwrap_module, wrap_module
from lite.wrapping.optimizer import (
    move_optimizer_state,
    unwrap_optimizer,
    unwrap_scheduler,
    wrap_optimizer,
    wrap_scheduler,
)

T = TypeVar("T")

_set_up: weakref.WeakSet[Any] = weakref.WeakSet()


class Lite:
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
        self._scale: Callable[[Tensor], Tensor] | None = None
        if self._plan.started:
            self._connect()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Let a subclass's `run` start the processes when it is called before they run."""
        super().__init_subclass__(**kwargs)
        if "run" in cls.__dict__:
            cls.run = _launching(cls.__dict__["run"])  # type: ignore[attr-defined]

    # ---- who and where
    # -------------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """This rank's device."""
        self._require_connected("device")
        return self._device

    @property
    def global_rank(self) -> int:
        """This process's number among all, from 0."""
        return self._plan.environment.global_rank()

    @property
    def local_rank(self) -> int:
        """This process's number on its machine, from 0."""
        return self._plan.environment.local_rank()

    @property
    def node_rank(self) -> int:
        """This machine's number, from 0."""
        return self._plan.environment.node_rank()

    @property
    def world_size(self) -> int:
        """Number of processes on all machines."""
        return self._plan.world_size

    @property
    def is_global_zero(self) -> bool:
        """Whether this is rank 0."""
        return self.global_rank == 0

    @property
    def strategy(self) -> Strategy:
        """The strategy in use."""
        return self._plan.strategy

    @property
    def precision(self) -> Precision:
        """The precision in use."""
        return self._plan.precision

    @property
    def accelerator(self) -> Accelerator:
        """The kind of device in use."""
        return self._plan.accelerator

    @property
    def loggers(self) -> tuple[Logger, ...]:
        """The loggers that `log` writes to."""
        return self._loggers

    @property
    def logger(self) -> Logger:
        """The first logger.

        Raises:
            UsageError: There is none.
        """
        if not self._loggers:
            raise UsageError("this Lite has no logger; pass one: Lite(loggers=lite.loggers.CSVLogger('logs')).")
        return self._loggers[0]

    def explain(self) -> str:
        """Every setting with where it came from, and, once they are set up, what was done to models and loaders."""
        width = max(len(s.name) for s in self._plan.settings)
        lines = []
        for setting in self._plan.settings:
            source = f"from {setting.source}" if setting.source.startswith("LITE_") else setting.source
            lines.append(f"{setting.name:<{width}}  {setting.outcome}  ({source}: {setting.value!r})")
        launcher = type(self._plan.launcher).__name__
        lines.append(
            f"{'processes':<{width}}  " + ("running" if self._plan.started else f"to be started by {launcher}")
        )
        return "\n".join([*lines, *self._facts])

    # ---- starting
    # ------------------------------------------------------------------------------------------------------

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
        self._first_rank = collectives.FirstRank(self._store) if self._store is not None else None
        self._connected = True
        self._backward = _compose_backward(self)
        atexit.register(plan.strategy.close)
        for callback in self._callbacks:
            if hasattr(callback, "on_launch"):
                callback.on_launch(self)

    def _require_connected(self, call: str) -> None:
        if not self._connected:
            count = len(self._plan.devices)
            raise UsageError(
                f"{call} needs the {count} processes that this Lite asks for, and they don't run yet; put the loop "
                "into a "
                f"function and call lite.launch(fn), or start the script with torchrun --nproc-per-node={count}."
            )

    # ---- setting up
    # ----------------------------------------------------------------------------------------------------

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
            move_optimizer_state(optimizer)
            wrap_optimizer(optimizer, self.precision)
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

    # ---- the step
    # ------------------------------------------------------------------------------------------------------

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
            from contextlib import ExitStack

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

    def to_device(self, data: T) -> T:
        """Move a module, in place, or nested data to this rank's device; what is there already stays as it is."""
        self._require_connected("to_device")
        return data.to(self._device) if isinstance(data, nn.Module) else move_to_device(data, self._device)

    # ---- between ranks
    # -------------------------------------------------------------------------------------------------

    def print(self, *args: Any, **kwargs: Any) -> None:
        """`print` on rank 0 alone."""
        if self.is_global_zero:
            print(*args, **kwargs)

    def barrier(self) -> None:
        """Wait until all ranks are here. Collective: call on all ranks."""
        self._require_connected("barrier")
        collectives.barrier()

    def broadcast(self, obj: T, src: int = 0) -> T:
        """Rank `src`'s object on every rank. Collective: call on all ranks. See `lite.collectives.broadcast`."""
        self._require_connected("broadcast")
        return collectives.broadcast(obj, src, device=self._device)  # type: ignore[no-any-return]

    def all_gather(self, data: Any, *, cat: bool = False, sync_grads: bool = False) -> Any:
        """Every rank's tensors, as `lite.collectives.all_gather` gives them. Collective: call on all ranks."""
        self._require_connected("all_gather")
        return collectives.all_gather(self._for_group(data), cat=cat, sync_grads=sync_grads)

    def all_reduce(self, data: Any, op: str = "mean") -> Any:
        """The reduction of tensors and numbers by `lite.collectives.all_reduce`. Collective: call on all ranks."""
        self._require_connected("all_reduce")
        self._check_filler()
        return collectives.all_reduce(self._for_group(data), op)

    def gather_for_metrics(self, data: Any) -> Any:
        """Predictions and targets of the current batch from all ranks, every sample once, in the stream's order.

        Collective: call on all ranks, for each batch of a set-up loader.

        Args:
            data: Tensors of shape (n, ...), lists of n objects, or a nested dict or tuple of them, for the rank's n
                samples.

        Returns:
            The same nesting with all ranks' samples along the first dimension.
        """
        self._require_connected("gather_for_metrics")
        self._weight.filler_pending = False
        return collectives.gather_for_metrics(self._for_group(data), self._weight.num_real)

    @contextmanager
    def rank_zero_first(self, local: bool = False) -> Iterator[None]:
        """Rank 0 runs the block first, the others after it, or not at all when it failed. Collective: enter on all
        ranks.

        Args:
            local: The first rank of each machine goes first, instead of rank 0 of the job.
        """
        self._require_connected("rank_zero_first")
        if self._first_rank is None or self.world_size == 1:
            yield
            return
        first = self.local_rank == 0 if local else self.global_rank == 0
        scope = f"node{self.node_rank}" if local else "job"
        with self._first_rank.run(first, scope, f"rank 0{' of this machine' if local else ''}"):
            yield

    # ---- the rest of a script
    # ------------------------------------------------------------------------------------------

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

    def save(self, path: str | os.PathLike[str], state: Mapping[str, Any], filter: Filter | None = None) -> None:
        """Write a checkpoint to one file, whole or not at all. Collective: call on all ranks; rank 0 writes.

        Args:
            path: The file; folders are made. `torch.load(path, weights_only=True)` reads it without `lite`.
            state: Names and modules, optimizers, schedulers, Stateful objects or plain values.
            filter: For a name of `state`, a function of (key, value) that says which of its items are kept.

        Raises:
            CheckpointError: (on all ranks) The file can't be written, or a value can't be stored; it names the key.
        """
        self._require_connected("save")
        problem: BaseException | None = None
        try:
            content = collect(state, filter)
            if self.is_global_zero:
                save_file(path, {**content, **_precision_entry(self.precision)})
        except Exception as error:
            problem = error
        failed = collectives.broadcast(None if problem is None else str(problem))
        if problem is not None:
            raise problem
        if failed is not None:
            raise CheckpointError(f"rank 0 could not save: {failed}")

    def load(
        self, path: str | os.PathLike[str], state: dict[str, Any] | None = None, strict: bool = True
    ) -> dict[str, Any]:
        """Read a checkpoint into the objects of `state`, in place. Every rank reads the file.

        Args:
            path: A file that `save` wrote.
            state: As for `save`; plain values are replaced in it. None returns everything.
            strict: Whether names and model keys that are missing are errors.

        Returns:
            The entries that `state` doesn't ask for.

        Raises:
            CheckpointError: The file is missing, damaged or holds code, or doesn't fit the objects.
        """
        loaded = load_file(path)
        precision = loaded.pop(_PRECISION_KEY, None)
        if state is None:
            return loaded
        if precision is not None:
            self.precision.load_state_dict(precision)
        return restore(state, loaded, strict=strict)

    def log(self, name: str, value: Any, step: int | None = None) -> None:
        """Write one number to every logger, on rank 0."""
        self.log_dict({name: value}, step)

    def log_dict(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Write numbers to every logger, on rank 0. Values stay on the device until a logger writes them out.

        Raises:
            ConfigError: A value is neither a number nor a tensor with one element.
        """
        for name, value in metrics.items():
            if isinstance(value, Tensor) and value.numel() != 1:
                raise ConfigError(
                    f"log: {name!r} has the shape {tuple(value.shape)}; log a number or a one-element tensor."
                )
            if not isinstance(value, (Tensor, bool, int, float)) and not hasattr(value, "__float__"):
                raise ConfigError(f"log: {name!r} is a {type(value).__name__}; log a number or a one-element tensor.")
        if self.is_global_zero:
            values = {k: v.detach() if isinstance(v, Tensor) else v for k, v in metrics.items()}
            for logger in self._loggers:
                logger.log_metrics(values, step)

    def call(self, hook: str, *args: Any, **kwargs: Any) -> None:
        """Call the method `hook` of every callback that has it, in their order."""
        for callback in self._callbacks:
            method = getattr(callback, hook, None)
            if method is None:
                continue
            if not callable(method):
                raise ConfigError(f"call({hook!r}): {type(callback).__name__}.{hook} is not callable.")
            method(*args, **kwargs)

    # ---- checks and pieces
    # ---------------------------------------------------------------------------------------------

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

    def _check_filler(self) -> None:
        if self._weight.filler_pending:
            self._weight.filler_pending = False
            warnings.warn(
                "this rank's last evaluation batch repeats one sample, to stay in step with the other ranks; a sum "
                "or mean "
                "over it counts that sample twice. Use lite.gather_for_metrics(predictions), which leaves it out.",
                stacklevel=3,
            )

    def _set_scale(self, scale: Callable[[Tensor], Tensor] | None) -> None:
        self._scale = scale

    def _for_group(self, data: Any) -> Any:
        """NCCL can't send what lies on the CPU."""
        return move_to_device(data, self._device) if self._device.type == "cuda" and self.world_size > 1 else data

    def __getstate__(self) -> dict[str, Any]:
        if self._connected:
            raise UsageError(
                "a Lite object that has joined its processes can't be pickled; create one in each process."
            )
        return self.__dict__


_PRECISION_KEY = "lite_precision"


def _precision_entry(precision: Precision) -> dict[str, Any]:
    state = precision.state_dict()
    return {_PRECISION_KEY: state} if state else {}


def _compose_backward(lite: Lite) -> Callable[..., None]:
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
        if weight.value != 1.0:
            weight.owed = False
            loss = loss * weight.value
        plain(loss, *args, **kwargs)

    return checked_backward if lite.world_size > 1 else backward


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
