"""What the strategies that shard parameters have in common: joining, checks, gradients, optimizers, loading."""

from __future__ import annotations

import logging
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lite import collectives
from lite.environments.base import Environment
from lite.errors import ConfigError, UsageError, check_flag
from lite.first_rank import refuse_alone
from lite.precision.base import Precision, Uncast
from lite.state import parameters_of
from lite.strategies import provenance, remedies
from lite.strategies.activations import prepare_blocks
from lite.strategies.base import Engine, Strategy, refuse_foreign, refuse_sync_batch_norm
from lite.strategies.blocks import choose_blocks
from lite.strategies.norms import give_norms_their_dtype
from lite.strategies.process_group import ProcessGroup

if TYPE_CHECKING:
    from lite.strategies.sharded_engine import ShardedEngine
    from lite.strategies.split_draws import FirstDraws

_log = logging.getLogger("lite")


class ShardedStrategy(Strategy):
    """Base of FSDPStrategy and ModelParallelStrategy; it knows no way of sharding.

    Args:
        auto_wrap: What is sharded by itself, besides the model; see FSDPStrategy.
        mixed_precision: A MixedPrecisionPolicy of the user's for every block, instead of the precision's, or None.
        activation_checkpointing: Which layers compute their activations again in backward: a set of classes, a function
            of a module, or "selective" (the blocks, keeping the results of matrix products).
        compile_blocks: Whether each block is compiled by itself, by `torch.nn.Module.compile`.
        broadcast_buffers: Whether each forward that trains starts with rank 0's buffers, as under DDP.
        state_dict_type: What `model.state_dict()` holds: "sharded" (DTensors), or "full" (whole tensors on every rank,
            on the CPU; collective).
        process_group_backend: As for DDPStrategy.
        timeout: As for DDPStrategy.
        start_method: As for DDPStrategy.
    """

    distributed = True
    divides_models = True

    def __init__(
        self,
        *,
        auto_wrap: Any,
        mixed_precision: Any,
        activation_checkpointing: Any,
        compile_blocks: bool,
        broadcast_buffers: bool,
        state_dict_type: str,
        process_group_backend: str | None,
        timeout: timedelta | None,
        start_method: str,
    ) -> None:
        if state_dict_type not in ("sharded", "full"):
            raise ConfigError(f"state_dict_type={state_dict_type!r} is not known; use 'sharded' or 'full'.")
        check_flag("compile_blocks", compile_blocks)
        check_flag("broadcast_buffers", broadcast_buffers)
        self._group = ProcessGroup(process_group_backend, timeout)
        self.start_method = start_method
        self._auto_wrap = auto_wrap
        self._mixed_precision = mixed_precision
        self._activation_checkpointing = activation_checkpointing
        self._compile_blocks = compile_blocks
        self._broadcast_buffers = broadcast_buffers
        self._full_state = state_dict_type == "full"
        self._world_size = 1
        self._device = torch.device("cpu")
        self._precision = Precision()
        self._done: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()
        self._all: list[weakref.ref[ShardedEngine]] = []
        self._begun: list[ShardedEngine] = []  # those of the backward that runs

    def _engines(self) -> Iterator[ShardedEngine]:
        return (engine for ref in self._all if (engine := ref()) is not None and not engine.closed)

    # ---- for subclasses

    @property
    def shards_over_data(self) -> bool:
        """Whether blocks are prepared one by one, for parts of the data."""
        return self._world_size > 1

    def blocks(self, module: nn.Module) -> dict[str, nn.Module]:
        """The parts that are sharded by themselves, by name."""
        return choose_blocks(module, self._auto_wrap, "auto_wrap")

    def lay_out(self, device: torch.device, num_nodes: int) -> None:
        """Make meshes, now that the ranks have met. Collective."""

    def shard(self, module: nn.Module, device: torch.device, blocks: dict[str, nn.Module]) -> str:
        """Shard a module in place; say how, in a few words. Collective."""
        raise NotImplementedError

    def first_draws(self) -> FirstDraws | None:
        """What looks whether ranks that compute one model draw alike; None where each computes its own."""
        return None

    def explain_forward_error(self, module: nn.Module, error: RuntimeError) -> str | None:
        """What to do about an error in a forward, where the way of sharding is its reason."""
        return remedies.explain(module, error) if self.shards_over_data else None

    def explain_backward_error(self, error: RuntimeError) -> str | None:
        told = remedies.second_backward(error) or remedies.hook_of_split(error)
        if told is not None:
            return told
        engine = next(self._engines(), None)
        if engine is None or not self.shards_over_data:
            return None
        if remedies.MIXED in str(error):
            return f"{remedies.past_model(engine.module)} torch says: {error}"
        return remedies.second_gradient(engine.module, error)

    # ---- the strategy's interface

    def connect(self, environment: Environment, device: torch.device) -> Any:
        self._world_size, self._device = environment.world_size(), device
        self.shards = self._world_size > 1
        store = self._group.join(environment, device)
        if self._world_size > 1:
            self.lay_out(device, environment.num_nodes() or 1)
        return store

    def check_module(self, module: nn.Module) -> None:
        prepare_blocks(module, self._activation_checkpointing, compile_blocks=False, dry=True)
        if self._world_size == 1:
            return
        refuse_sync_batch_norm(module, self._device)
        self.check_parameters(module, over_data=self.shards_over_data)
        if self.shards_over_data:
            self._check_dtypes(module)

    def check_parameters(self, module: nn.Module, *, over_data: bool) -> None:
        """Refuse what several ranks can't divide, for `footprint` too; nothing is asked of this job.

        Args:
            module: The model.
            over_data: Whether blocks are sharded one by one, over parts of the data.

        Raises:
            ConfigError: It is never called, or has a parameter that can't be sharded.
        """
        name = type(module).__name__
        if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            raise ConfigError(f"{name} has no forward, and is never called; set up the module that holds it.")
        for key, parameter in module.named_parameters():
            if hasattr(parameter, "device_mesh"):
                raise ConfigError(
                    f"parameter {key!r} of this {name} is a DTensor already, and strategy={self.name!r} would shard it "
                    "again; pass the raw model to lite.setup, and leave fully_shard and parallelize_module to lite."
                )
            if parameter.ndim == 0 and over_data:
                raise ConfigError(
                    f"parameter {key!r} of this {name} is a scalar, which has no dimension to shard; make it a vector "
                    "of one element: torch.nn.Parameter(torch.ones(1))."
                )
        if not over_data:
            return
        for key, part in module.named_modules():
            lookup = isinstance(part, (nn.Embedding, nn.EmbeddingBag))
            if lookup and part.sparse and part.weight.requires_grad:
                raise ConfigError(
                    f"{key!r} of this {name} has sparse=True, and FSDP can't reduce sparse gradients; use "
                    "sparse=False, or strategy='ddp'."
                )

    def _check_dtypes(self, module: nn.Module) -> None:
        blocks = self.blocks(module)
        groups: dict[str, dict[torch.dtype, str]] = {}
        for key, parameter in module.named_parameters():
            owner = next((b for b in sorted(blocks, key=len, reverse=True) if key.startswith(f"{b}.")), "")
            if parameter.requires_grad:
                groups.setdefault(owner, {}).setdefault(parameter.dtype, key)
        for owner, dtypes in groups.items():
            if len(dtypes) > 1 and self._precision.param_dtype is None:
                keys = " and ".join(f"{key!r} ({dtype})" for dtype, key in list(dtypes.items())[:2])
                where = f"the block {owner!r}" if owner else f"{type(module).__name__} outside of its blocks"
                raise ConfigError(
                    f"{where} trains parameters of several dtypes, {keys}, and their gradients are reduced together; "
                    "convert the model to one dtype, freeze the odd ones, or wrap them by themselves with auto_wrap."
                )

    def forward_precision(self, precision: Precision) -> Precision:
        self._precision = precision
        # Autocast stays around the policy's casts: it is for what a forward computes with buffers, or in float32.
        return Uncast(precision) if self._mixed_precision is not None and self.shards_over_data else precision

    @property
    def moves_modules(self) -> bool:
        return self._world_size > 1

    def wrap(self, module: nn.Module, device: torch.device) -> Engine | None:
        undo = prepare_blocks(module, self._activation_checkpointing, compile_blocks=False)
        if self._world_size == 1:
            undo += self._compile(module)
            return BlocksEngine(undo) if undo else None
        from lite.strategies.attached import Attached
        from lite.strategies.restoring import Original
        from lite.strategies.sharded_engine import ShardedEngine

        refuse_alone("lite.setup")
        original, attached = Original(module), Attached(module)
        name = type(module).__name__
        try:
            how = self.shard(module, device, self.blocks(module) if self.shards_over_data else {})
        except BaseException as error:
            for step in undo:
                step()
            if isinstance(error, ConfigError):  # on all ranks alike
                original.settle()
                original.restore()
            raise
        original.settle()
        attached.move_to(dict(module.named_parameters(remove_duplicate=False)))
        if any(t.is_meta for t in (*module.parameters(), *module.buffers())):
            from lite.deferred import allocate

            allocate(module, device)
        # A model's last layer often returns a view. Its backward is announced by `prepare_backward` as well, so nothing
        # is lost by writing into it.
        returned = f"FSDP2-wrapped module .*{type(module).__name__}.* returned a view"
        warnings.filterwarnings("ignore", returned, UserWarning)
        casts = self._mixed_precision is not None or self._precision.compute_dtype is not None
        norms = give_norms_their_dtype(module, device) if casts and self.shards_over_data else []
        engine = ShardedEngine(
            module,
            original,
            self._precision,
            buffers=self._broadcast_buffers and self.shards_over_data,
            full_state=self._full_state,
            explain=self.explain_forward_error,
            draws=self.first_draws(),
            undo=undo + norms + self._compile(module),
        )
        self._all = [ref for ref in self._all if ref() is not None]
        self._all.append(weakref.ref(engine))
        self._done[module] = how
        if collectives.rank() == 0:
            _log.info("%s: %s", name, how)
        return engine

    def _compile(self, module: nn.Module) -> list[Callable[[], None]]:
        if not self._compile_blocks:
            return []
        return prepare_blocks(module, None, compile_blocks=True, blocks=self.blocks(module))

    def explain(self, module: nn.Module) -> str:
        return self._done.get(module) or super().explain(module)

    def prepare_backward(self, loss: Tensor, *, partial: bool = False) -> Tensor:
        provenance.check_has_graph(loss)
        marks, leaves = provenance.origins([loss])
        engines = {engine for mark in marks for ref in mark.states if (engine := ref()) is not None}
        # A loss that reaches the model may also reach its whole weights another way, by what a hook has kept, say.
        known = [engine.whole_parameters() for engine in engines] if leaves else []
        known += [engine.names for engine in self._engines()]
        strays = (leaf for leaf in leaves if isinstance(leaf, nn.Parameter))
        stray = next((leaf for leaf in strays if not any(id(leaf) in names for names in known)), None)
        if stray is not None:
            inside = next((engine for engine in self._engines() if engine.within), None)
            if inside is not None:
                raise UsageError(
                    f"lite.backward was called within a method of {type(inside.module).__name__}, and FSDP reduces "
                    "gradients when the method has returned: return the loss, and call lite.backward outside of it. In "
                    "a Trainer use automatic optimisation, with a step function for each optimizer ({'optimizer': ..., "
                    "'step': self.critic_step} in configure_optimizers), or strategy='ddp'."
                )
            for engine in self._engines():
                name = engine.whole_parameters().get(id(stray))
                if name is not None:
                    raise UsageError(remedies.past_model(engine.module, name))
            raise UsageError(
                f"lite.backward got a loss that depends on a parameter of shape {tuple(stray.shape)} of no model that "
                "is set up, so its gradient would stay different on each rank; make it part of a model that you pass "
                "to lite.setup."
            )
        if any(engine.closed for engine in engines):
            raise UsageError(
                "lite.backward got a loss of a model that lite.teardown() has given back since its forward; call "
                "backward before teardown."
            )
        self._begun = [engine for engine in self._engines() if engine in engines]  # in one order on all ranks
        for engine in self._begun:
            engine.begin_backward(loss)
        return loss

    def finish_backward(self) -> None:
        self._begun = []

    def abandon_backward(self) -> None:
        begun, self._begun = self._begun, []
        for engine in begun:
            engine.abandon_backward()

    def successor(self, parameter: Tensor) -> nn.Parameter | None:
        return next((new for engine in self._engines() if (new := engine.successor(parameter)) is not None), None)

    def adopt_optimizer(self, optimizer: Optimizer) -> None:
        held = parameters_of(optimizer)
        for engine in self._engines():
            if any(id(p) in engine.names or engine.successor(p) is not None for p in held):
                engine.adopt(optimizer)

    def check_new_optimizer(self, optimizer: Optimizer) -> None:
        from lite.strategies.repointing import check_fit

        if self._world_size > 1:
            check_fit(optimizer, self.name)

    def check_optimizer(self, optimizer: Optimizer) -> None:
        known: set[int] = set().union(*(engine.names for engine in self._engines()))
        refuse_foreign(optimizer, lambda p: id(p) in known or self.successor(p) is not None)

    def norms_agree(self) -> bool:
        return True

    def grad_norm(self, parameters: list[nn.Parameter], norm_type: float) -> Tensor:
        if self._world_size == 1:
            return super().grad_norm(parameters, norm_type)
        from lite.strategies.sharded_gradients import total_norm

        self._check_reduced()
        return total_norm(parameters, norm_type)

    def replace_gradients(self, parameters: Iterable[nn.Parameter], *, by_zeros: bool) -> None:
        parameters = list(parameters)
        for engine in self._engines():
            engine.waiting.drop(parameters)
        super().replace_gradients(parameters, by_zeros=by_zeros)

    def clip_norm(self, parameters: list[nn.Parameter], max_norm: float, total_norm: Tensor) -> None:
        if self._world_size == 1:
            super().clip_norm(parameters, max_norm, total_norm)
            return
        from lite.strategies.sharded_gradients import clip_norm

        clip_norm(parameters, max_norm, total_norm)

    def clip_value(self, parameters: Iterable[nn.Parameter], clip_value: float) -> None:
        if self._world_size == 1:
            super().clip_value(parameters, clip_value)
            return
        from lite.strategies import sharded_gradients

        sharded_gradients.clip_value(parameters, clip_value)

    def local_gradients(self, parameters: Iterable[nn.Parameter]) -> list[Tensor] | None:
        if self._world_size == 1:
            return None
        from lite.strategies.sharded_gradients import local_gradients, settle

        parameters = list(parameters)
        settle(parameters)
        return local_gradients(parameters)

    def _check_reduced(self) -> None:
        if any(engine.waiting.exist for engine in self._engines()):
            raise UsageError(
                "gradients were asked for after a backward within lite.no_backward_sync, and are not reduced over the "
                "ranks yet; clip after the last backward of the window, when `window.ready` is true."
            )

    def close(self) -> None:
        self._group.leave()


class BlocksEngine(Engine):
    """One process: the module's own forward, with its blocks checkpointed or compiled.

    Args:
        undo: What takes that back.
    """

    def __init__(self, undo: list[Callable[[], None]]) -> None:
        self._undo = undo

    def forward(self, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return run(*args, **kwargs)

    def method(self, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return run(*args, **kwargs)

    def no_sync(self) -> AbstractContextManager[None]:
        return nullcontext()

    def close(self) -> None:
        for undo in self._undo:
            undo()
