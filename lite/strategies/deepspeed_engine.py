"""One model under DeepSpeed's engine: its calls, the division of its weights, and the way back.

How DeepSpeed 0.19 behaves, and what follows from it (`deepspeed_gradients` and `deepspeed_optimizer` have what concerns
them):
- `deepspeed.initialize` leaves the model and its Parameters the objects that they are. Stages 1 and 2 make their data
  views of one flat tensor; stage 3 leaves an empty tensor in `p.data`, this rank's part in `p.ds_tensor`, and puts the
  whole together in hooks around each layer.
- It wants an optimizer from stage 1 on; so the model stays as it is until its optimizer is set up.
"""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from lite import collectives
from lite.errors import UsageError, some
from lite.strategies import provenance
from lite.strategies.base import Engine
from lite.strategies.deepspeed_gradients import Gradients
from lite.strategies.deepspeed_optimizer import AdoptedOptimizer
from lite.strategies.deepspeed_state import Parts
from lite.strategies.deepspeed_wiring import NO_COPIES, Original, destroy, forget, gathered, initialize
from lite.strategies.restoring import broadcast_from_rank_0


class DeepSpeedEngine(Engine):
    """What stands around one model.

    Args:
        module: The model, on its device.
        stage: ZeRO's.
        config: DeepSpeed's, for this model.
        device: The model's.
        buffers: Whether each forward that trains starts with rank 0's buffers.
        is_saving: Whether a checkpoint is being written, for which rank 0 alone needs whole tensors.

    Attributes:
        names: The parameters, id to name.
        engine: DeepSpeed's own engine; from stage 1 on there is none before an optimizer is set up.
        parts: What puts weights and states together and apart; as `engine`, and none in stage 0.
        gradients: The model's, from backward to step.
        closed: The model has been given back.
    """

    through_call = True

    def __init__(
        self,
        module: nn.Module,
        stage: int,
        config: dict[str, Any],
        device: torch.device,
        *,
        buffers: bool,
        is_saving: Callable[[], bool],
    ) -> None:
        self._module = weakref.ref(module)
        self.stage = stage
        self._config = config
        self._device = device
        self._is_saving = is_saving
        self.names = {id(p): name for name, p in module.named_parameters()}
        self._parameters = list(module.parameters())
        self._trained = [p.requires_grad for p in self._parameters]
        self.syncs_buffers = buffers and any(True for _ in module.buffers())
        self._self = weakref.ref(self)
        self.closed = False
        self._unhook: list[Callable[[], None]] = []
        self.engine: Any = None
        self.parts: Any = None
        self._adopted: AdoptedOptimizer | None = None
        self._final: dict[Tensor, dict[str, Any]] | None = None
        self.body = {"zero_grad": self._zero_grad(type(module)), **NO_COPIES}
        self._original = Original(module)
        broadcast_from_rank_0(module)
        self.gradients = Gradients(module, stage, device)
        if stage == 0:
            self._connect(initialize(module, None, config, device))
            self._original.settle()

    def _zero_grad(self, raw: Any) -> Callable[..., None]:
        mine = self

        def zero_grad(self: nn.Module, set_to_none: bool = True) -> None:
            raw.zero_grad(self, set_to_none)
            mine.gradients.drop()

        return zero_grad

    @property
    def module(self) -> nn.Module:
        """The model."""
        module = self._module()
        assert module is not None
        return module

    @property
    def is_ready(self) -> bool:
        """Whether DeepSpeed has what it needs for a backward."""
        return self.engine is not None

    # ---- forward and methods

    def forward(self, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self._run(run, args, kwargs, whole=True)

    def method(self, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self._run(run, args, kwargs, whole=False)

    def _run(self, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], *, whole: bool) -> Any:
        if torch._C._current_graph_task_id() != -1:  # activation checkpointing runs it again
            return run(*args, **kwargs)
        inputs: list[Tensor] = []
        computes = whole or provenance.has_tensors((args, kwargs))
        if torch.is_grad_enabled() and computes:
            self._check_parameters()
            if self.syncs_buffers and self.module.training:
                self.sync_buffers()
            inputs = list(provenance.tensors_with_grad((args, kwargs)))
        with nullcontext() if whole or not computes else self._own_parameters():
            outputs = run(*args, **kwargs)
        if torch.is_grad_enabled():
            before, _ = provenance.origins(inputs)
            states = frozenset({self._self}).union(*(mark.states for mark in before))
            provenance.tag(outputs, provenance.Mark(states, ()), before)
        return outputs

    @contextmanager
    def _own_parameters(self) -> Iterator[None]:
        """Stage 3: a method that may use parameters of the model itself finds them whole, as forward does.

        Raises:
            UsageError: It would train them: DeepSpeed has no moment to put them together again in backward.
        """
        if self.stage < 3 or self.engine is None:
            yield
            return
        self.engine.optimizer.parameter_offload.get_param_coordinator().reset_step()
        if any(p is not None for p in self.module._parameters.values()) and torch.is_grad_enabled():
            raise UsageError(
                f"a method of {type(self.module).__name__} was called to train, and the model has parameters of its "
                "own, which DeepSpeed's stage 3 puts together for forward alone; move them into a layer, call the "
                "model itself, or use stage 2 or FSDPStrategy."
            )
        with self.parts.gathered(self.module):
            yield

    def _check_parameters(self) -> None:
        if [p.requires_grad for p in self._parameters] == self._trained:
            return
        changed = [
            self.names[id(p)] for p, t in zip(self._parameters, self._trained, strict=True) if p.requires_grad != t
        ]
        raise UsageError(
            f"requires_grad of {some(changed)} was changed after lite.setup, and DeepSpeed has divided what is trained "
            "by then; call lite.teardown() and set up again, or freeze before lite.setup."
        )

    def sync_buffers(self) -> None:
        for buffer in self.module.buffers():
            collectives.take_from_rank_0(buffer)

    def no_sync(self) -> AbstractContextManager[None]:
        return self.gradients.no_sync()

    # ---- the optimizer, from stage 1 on

    def adopt(self, optimizer: Optimizer) -> Callable[[], None]:
        """Give DeepSpeed the model's optimizer; it is changed in place. Collective: call on all ranks.

        Returns:
            What takes that back; the state becomes whole again where the model was given back before.

        Raises:
            UsageError: The model has one already.
        """
        if self._adopted is not None:
            raise UsageError(
                f"{type(self.module).__name__} has an optimizer that is set up already, and DeepSpeed trains a model "
                "by one; use one optimizer with several param_groups, or strategy='ddp' or 'fsdp'."
            )
        before = optimizer.state
        adopted = self._adopted = AdoptedOptimizer(optimizer, self.gradients)
        try:
            self._divide(adopted, [group["params"] for group in optimizer.param_groups], before)
        except BaseException as error:
            adopted.give_back()
            optimizer.state = before
            if isinstance(error, Exception):
                self._abandon()
            raise

        def undo() -> None:
            it = adopted.give_back()
            if it is not None and self._final is not None:
                it.state.update(self._final)

        return undo

    def _divide(self, adopted: AdoptedOptimizer, groups: list[list[Tensor]], before: Any) -> None:
        """Let DeepSpeed divide the model, and the optimizer's state from before."""
        self._original = Original(self.module)
        self._connect(initialize(self.module, adopted.view, self._config, self._device))
        self._original.settle()
        self.parts = Parts(self.engine, self.stage, adopted.view, groups, self.names, self._is_saving)
        adopted.take_over(self.engine, self.parts)
        if self.stage == 3:
            for part in self.module.modules():
                load: Any = part.register_load_state_dict_pre_hook(self.parts.cut_for_loading)  # type: ignore[no-untyped-call]
                put_together = functools.partial(
                    self.parts.put_together
                )  # torch marks the hook, which a method forbids
                state: Any = part.register_state_dict_post_hook(put_together)  # type: ignore[no-untyped-call]
                self._unhook += [load.remove, state.remove]
        self.parts.take_state(before)

    def _connect(self, engine: Any) -> None:
        self.engine = engine
        self.gradients.connect(engine)

    def _abandon(self) -> None:
        """Take back what a division that has failed did to the model, which stays set up without an optimizer."""
        self._original.settle()
        self._make_plain(self._whole_values())
        self._adopted = None

    # ---- the way back

    def close(self) -> None:
        """Give the model back with plain, whole parameters on every rank. Collective: call on all ranks."""
        if self.closed:
            return
        self.closed = True
        if not dist.is_initialized():
            warnings.warn(
                f"{type(self.module).__name__} stays divided by DeepSpeed: its processes have left their group; call "
                "lite.teardown() before the group ends.",
                stacklevel=2,
            )
            return
        if self.parts is not None:
            self._final = self.parts.whole_state()
            for trained, entries in self._final.items():
                device = self.parts.part(trained).device
                for key, value in entries.items():
                    if isinstance(value, Tensor) and value.ndim:
                        entries[key] = value.to(device)
        self.gradients.close()
        parts = self.parts
        self._make_plain(self._whole_values() if parts is not None else {})
        if parts is not None:
            parts.closed = True
        self._parameters = []

    def _whole_values(self) -> dict[int, Tensor]:
        """A copy of each parameter, by id. Collective in stage 3."""
        values: dict[int, Tensor] = {}
        for part in self.module.modules():
            held = [p for p in part._parameters.values() if p is not None]
            divided = [p for p in held if hasattr(p, "ds_id")]
            with gathered(divided) if divided else nullcontext():
                values.update({id(p): p.detach().clone() for p in held if id(p) not in values})
        return values

    def _make_plain(self, values: dict[int, Tensor]) -> None:
        """Take DeepSpeed off the model, whose parameters get these values."""
        for undo in self._unhook:
            undo()
        self._unhook = []
        adopted = self._adopted
        destroy(self.engine, adopted.view if adopted is not None else None)
        if self.stage == 3:
            forget(self.module)
        self._original.restore()
        for parameter in self._parameters:
            if id(parameter) in values:
                parameter.data = values[id(parameter)]
                parameter.grad = None
        if adopted is not None:
            adopted.close()
        self._connect(None)
        self.parts = None
