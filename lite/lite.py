"""`Lite`: the object that a raw training loop talks to. It keeps what the plan decided and hands every call on."""

from __future__ import annotations

import atexit
import os
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from lite import collectives
from lite.accelerators import Accelerator, probe_devices
from lite.data.shares import Shard
from lite.data.transfer import move_to_device
from lite.environments import Environment, detect_environment
from lite.errors import ConfigError, UsageError, check_flag
from lite.facets.pipelines import Pipelines
from lite.facets.records import check_callbacks, check_loggers
from lite.facets.resuming import Resuming
from lite.facets.steps import compose_backward, one_call_backward
from lite.first_rank import FirstRank
from lite.launchers import in_notebook
from lite.loggers import Logger
from lite.plan import AUTO, DEBUG_VARIABLE, FULL_PRECISION, ONE_NODE, Plan, check_device, given, resolve
from lite.precision.base import Precision
from lite.prepared import Prepared
from lite.seed import seed_everything
from lite.strategies import Strategy, strategy_factories

T = TypeVar("T")


class Lite(Resuming, Pipelines):
    """Takes a raw PyTorch loop to any device, number of processes and precision.

    Under torchrun, srun or mpirun creating it joins the job (collective: create it on all ranks). Without one of them
    and with several devices, `launch` (or a subclass's `run`) starts the processes.

    Args:
        accelerator: "auto", "cpu", "cuda", "gpu", "mps" or an Accelerator.
        strategy: "auto", "single", "ddp", "ddp_find_unused_parameters_true", "ddp_spawn", "ddp_fork", "ddp_notebook",
            "fsdp", "local_sgd", "pipeline", a name that an installed package registered (entry-point group
            `lite.strategies`), or a Strategy.
        devices: How many devices or which: a number, "auto" (what torchrun started, else one), -1 (all), "0,1" or
            [0, 1]. On the CPU a number of processes.
        num_nodes: Number of machines.
        precision: "32-true", "64-true", "16-mixed", "bf16-mixed", "16-true", "bf16-true", and with extras "fp8",
            "transformer-engine", "int8-frozen", "nf4-frozen"; 64, 32, 16 and "bf16" stand for the first, second, third
            and fourth of "64-true", "32-true", "16-mixed", "bf16-mixed".
        plugins: A Precision or an Environment of your own, or a list of them.
        callbacks: Objects with any of the methods `on_launch(lite)` (the processes run and have met),
            `on_after_setup(lite, model)`, `on_after_optimizer_step(strategy, optimizer)`, and others that `call` names.
        loggers: One or several Loggers that `log` writes to.

    The first five fall back to LITE_ACCELERATOR, LITE_STRATEGY, LITE_DEVICES, LITE_NUM_NODES and LITE_PRECISION: an
    argument outranks the environment, which outranks the default. LITE_DEBUG=1 compares each collective over the ranks
    before it runs, so that one that doesn't match on all of them is named instead of hanging; it is slow. DDP's own
    averaging is not compared: ranks that wait for it, or in it, for two minutes (or the strategy's timeout) end with
    where each of them is. It also compares every batch of ranks that share a model.

    Raises:
        ConfigError: A setting is wrong, unavailable, or contradicts another one or the job.

    Example:
        >>> import torch
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
        self._plan: Plan = resolve(
            arguments,
            os.environ,
            probe_devices(),
            plugins,
            strategies=strategy_factories(),
            notebook=in_notebook(),
        )
        self._callbacks, self._loggers = check_callbacks(callbacks), check_loggers(loggers)
        self._connected = False
        self._prepared = Prepared(self._plan.strategy, self._plan.precision)
        self._modules, self._weight = self._prepared.modules, self._prepared.weight
        self._optimizers = self._prepared.optimizers
        self._scale = None
        if self._plan.started:
            self._connect()
        else:
            self._check_loggers()

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
        check_device(plan, self._device)
        if os.environ.get(DEBUG_VARIABLE, "").lower() not in ("", "0", "false"):
            collectives.name_mismatches()
        self._store = plan.strategy.connect(plan.environment, self._device)
        self._first_rank = FirstRank(self._store, self.global_rank) if self._store is not None else None
        self._windows = []
        self._connected = True
        self._backward = compose_backward(self)  # type: ignore[method-assign]
        if self.world_size == 1 and type(self).backward is Lite.backward:
            self.backward = one_call_backward(self)  # type: ignore[method-assign]
        if self._store is not None:
            atexit.register(plan.strategy.close)
        self._guard_job()
        self._check_loggers()
        # At the end of the script, or of this object's life; a launched function's end comes first.
        self._writers = list(self._loggers) if self.is_global_zero else []
        self._close_loggers = weakref.finalize(self, _close_all, self._writers)
        self.call("on_launch", self)

    def _leave_job(self) -> None:
        """Say that this rank has ended by itself, which a process that a launcher started does not do at its exit."""
        if self._watch is not None:
            self._watch.close()
        self.strategy.close()

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
            model: The raw model. Its weights become rank 0's on every rank. Its optimizers may have been made before,
                also where the strategy exchanges its parameters for sharded ones.
            *optimizers: Its optimizers, and schedulers if you like.
            schedulers: Schedulers of these optimizers; they stand still when a loss scale makes the optimizer skip a
                step.
            move_to_device: False leaves the model where it is; it must be on `lite.device` then, or placed by itself.

        Returns:
            `model` alone, or a tuple `(model, *optimizers, *schedulers)`.

        Raises:
            UsageError: Something is set up already, shares parameters with a model that is, or was passed twice; or
                the processes don't run yet.
            ConfigError: Something is of a wrong type, an optimizer holds parameters of another model, or a scheduler
                paces an optimizer that is not set up. Whatever is refused stays as it was.
        """
        self._require_connected("setup")
        others = (*optimizers, *_as_tuple(schedulers))
        _check_move(move_to_device)
        self._prepared.check("setup", (model,), others)
        with self._prepared.adding(model, *others):
            self._prepared.add_module(model, self._device, move=move_to_device)
            self._prepared.add_optimizers(others, self._prepare_optimizer, self._methods("on_after_optimizer_step"))
        self.call("on_after_setup", self, model)
        return (model, *others) if others else model

    def setup_module(self, model: nn.Module, *, move_to_device: bool = True) -> nn.Module:
        """Prepare a model without optimizers; see `setup`. Collective: call on all ranks."""
        self._require_connected("setup_module")
        _check_move(move_to_device)
        self._prepared.check("setup_module", (model,), ())
        self._prepared.add_module(model, self._device, move=move_to_device)
        return model

    def setup_optimizers(self, *optimizers: Optimizer) -> Any:
        """Prepare optimizers of models that are set up already; returns the same one, or a tuple.

        Raises:
            ConfigError: None is given, one is no optimizer, or one holds parameters of no set-up model.
            UsageError: One is set up already.
        """
        self._require_connected("setup_optimizers")
        if not optimizers:
            raise ConfigError("setup_optimizers() got no optimizer; pass at least one.")
        self._prepared.check("setup_optimizers", (), optimizers)
        with self._prepared.adding(*optimizers):
            self._prepared.add_optimizers(optimizers, self._prepare_optimizer, self._methods("on_after_optimizer_step"))
        return optimizers if len(optimizers) > 1 else optimizers[0]

    @staticmethod
    def _is_same(index: int, mine: Any) -> bool:
        """Whether all ranks with that part of the data have the same object. Collective: call on all ranks."""
        everyone = collectives.all_gather_objects((index, mine))
        return all(len({value for part, value in everyone if part == one}) == 1 for one, _ in everyone)

    def setup_dataloaders(
        self,
        *loaders: DataLoader[Any],
        use_distributed_sampler: bool | str = True,
        move_to_device: bool = True,
        shard: str | None = None,
    ) -> Any:
        """Split loaders over the ranks and move their batches to the device.

        Collective: call on all ranks. Every rank gets the same number of batches: the r-th slice of each global batch,
        which is what one process with `batch_size * world_size` would draw from the user's own sampler. A last global
        batch that doesn't fill up is split as evenly as it goes, and `backward` weighs the loss accordingly.
        `gather_for_metrics` counts each sample once. Ranks that share a model (pipelines, tensor parallelism) get the
        same batches, which is checked at an epoch's first one, or at every one with LITE_DEBUG=1.

        What comes back has `state_dict` and `load_state_dict`, for `save` and `load`: how many batches the loop was
        given, and from which random states their order was drawn. The next iteration after a load goes on from there,
        exactly, with any number of workers and, at the same global batch, of processes.

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
            ConfigError: None is given, one is no DataLoader, or `shard` is given and none is of an IterableDataset.
            UsageError: One is set up already, or the processes don't run yet.
        """
        from lite.data.describe import describe_dataloader
        from lite.data.loader import release_dataloader, setup_dataloader

        self._require_connected("setup_dataloaders")
        if not loaders:
            raise ConfigError("setup_dataloaders() got no loader; pass at least one DataLoader.")
        if shard not in (None, "stride"):
            raise ConfigError(f"shard={shard!r} is not known; use None or 'stride'.")
        if shard is not None and not use_distributed_sampler:
            raise ConfigError(
                f"shard={shard!r} splits the stream over the ranks, and use_distributed_sampler=False leaves it whole "
                "on every rank; give one of them."
            )
        _check_move(move_to_device)
        self._prepared.check_loaders(loaders, shard)
        parts, index = self.strategy.data_shards(self.world_size, self.global_rank)
        ready: list[DataLoader[Any]] = []
        try:
            for loader in loaders:
                ready.append(
                    setup_dataloader(
                        loader,
                        shard=Shard(index, parts),
                        device=self._device if move_to_device else None,
                        weight=self._weight,
                        use_distributed_sampler=use_distributed_sampler,
                        iterable_shard=shard,
                        sync=collectives.broadcast,
                        same=partial(self._is_same, index) if parts < self.world_size else None,
                    )
                )
        except Exception:
            for loader in loaders[: len(ready)]:
                release_dataloader(loader)
            raise
        facts = [
            describe_dataloader(one, loader, parts, use_distributed_sampler, shard)
            for one, loader in zip(ready, loaders, strict=True)
        ]
        self._prepared.add_loaders(loaders, facts)
        return tuple(ready) if len(ready) > 1 else ready[0]

    def teardown(self) -> None:
        """Give the user's own models, optimizers and schedulers back, without a hook or patch.

        Sharded parameters and optimizer state become whole on every rank, and ranks that train apart (LocalSGDStrategy)
        come together: collective then, call on all ranks. While an error is handled, which other ranks may not have,
        those that train apart stay so, and a model within `ema.swap` gets its own weights back first.
        The loggers are flushed, and a background save is waited for; if it failed, that is raised at the end.

        Raises:
            UsageError: A model is within `ema.swap`, and no error is handled.
        """
        from lite.swapped import put_back, refuse_swapped_models

        if sys.exc_info()[0] is not None:
            put_back(self._modules)
        else:
            refuse_swapped_models("lite.teardown()", self._modules)
            if self._connected:
                self.strategy.end_period()
        self._prepared.release()
        self._windows = []
        for logger in self._loggers:
            logger.flush()
        self._finish_saves()

    def to_device(self, data: T) -> T:
        """Move a module, in place, or nested data to this rank's device; what is there already stays as it is."""
        self._require_connected("to_device")
        return data.to(self._device) if isinstance(data, nn.Module) else move_to_device(data, self._device)

    @staticmethod
    def seed_everything(seed: int, workers: bool = True) -> int:
        """Seed Python, numpy and torch alike on all ranks; see `lite.seed.seed_everything`.

        Args:
            seed: A whole number from 0 to 2**32 - 1.
            workers: Always so: loader workers draw from this seed, those of different ranks different numbers. False is
                ignored, with a warning.
        """
        if not workers:
            warnings.warn(
                "seed_everything(workers=False) is ignored: torch seeds loader workers from the main process's seed; "
                "leave workers out, and seed them in a worker_init_fn of your own if you want other numbers.",
                stacklevel=2,
            )
        return seed_everything(seed)

    @contextmanager
    def init_module(self, *, empty_init: str | None = None) -> Iterator[None]:
        """Create modules on the device and in the precision's dtype at once.

        Args:
            empty_init: "meta" creates them without memory. `setup` then makes the values that they would have had, one
                tensor after the other, and keeps of each the part that this rank holds: so a model that is larger than
                a device can be made. The block draws as many random numbers as it would without, one tensor at a time.
                Make optimizers after `setup`, and hand them to `setup_optimizers`.

        Raises:
            ConfigError: `empty_init` is something else.
        """
        self._require_connected("init_module")
        if empty_init not in (None, "meta"):
            raise ConfigError(f"empty_init={empty_init!r} is not known; use 'meta', or leave it out.")
        if empty_init is None:
            with self._device, self.precision.init_context(self._device):
                yield
            return
        from lite.recording import Recording

        recording = Recording(self._device)
        with torch.device("meta"), self.precision.init_context(self._device), recording:
            yield
        recording.draw()

    def init_tensor(self) -> AbstractContextManager[None]:
        """Create tensors on the device and in the precision's dtype."""
        return self.init_module()

    def __getstate__(self) -> dict[str, Any]:
        if self._connected:
            raise UsageError(
                "a Lite object that has joined its processes can't be pickled; create one in each process."
            )
        return self.__dict__


def _run_in_process(lite: Lite, fn: Callable[..., T], args: tuple[Any, ...], kwargs: dict[str, Any]) -> T:
    """What a started process does: join as itself, run, and leave; a forked one runs nothing at its exit."""
    lite._plan = lite._plan.joined(detect_environment(os.environ))
    lite._connect()
    try:
        value = fn(lite, *args, **kwargs)
        lite._finish_saves()  # over the group that is about to go
    except BaseException as error:
        if isinstance(error, SystemExit) and error.code in (None, 0):
            lite._leave_job()
        else:
            # The group is left alone: the other ranks learn of the failure by this process's end.
            lite._tell_of_failure(error)
        raise
    finally:
        lite._close_loggers()
    lite._leave_job()
    return value


def _close_all(loggers: Sequence[Logger]) -> None:
    for logger in loggers:
        logger.close()


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


def _check_move(move_to_device: Any) -> None:
    check_flag("move_to_device", move_to_device, "the device itself is chosen by Lite(accelerator=..., devices=...)")


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return () if value is None else tuple(value) if isinstance(value, (list, tuple)) else (value,)
