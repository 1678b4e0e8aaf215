"""One model under DeepSpeed's engine: its calls, its gradients, its optimizer's step and state, and the way back.

How DeepSpeed 0.19 behaves, and what follows from it:
- `deepspeed.initialize` leaves the model and its Parameters the objects that they are. Stages 1 and 2 make their data
  views of one flat tensor; stage 3 leaves an empty tensor in `p.data`, this rank's part in `p.ds_tensor`, and puts the
  whole together in hooks around each layer.
- It lets the optimizer that it is given hold flat parts of its own. So it is given the user's optimizer seen through
  such groups (`deepspeed_wiring.view_of`), and the user's own goes on to hold the model's parameters.
- Gradients leave `p.grad` in backward. They are reduced, and added up, in what `averaged_gradients` lists in the end:
  this rank's parts, which clipping and loss scales work on. Only `engine.backward` finishes them rightly where a
  backward goes through several forwards; so `begin_backward` and `end_backward` do what it does around its own call.
- Stage 3 leaves old gradients where a parameter gets none; so its buffer is emptied at each window's begin. It takes
  two backwards for one unless it is told of a forward in between (`clear_backward_seen_flag`); so it is told of one at
  each backward.
- From stage 1 on parameters without any gradient are stepped with zeros. That is warned of.
- float32 weights are held twice in stages 1 and 2, and the second copy decides. It is renewed before each step, so that
  whatever was loaded or written into the model counts.
"""

from __future__ import annotations

import functools
import warnings
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from lite import collectives
from lite.disguise import disguise
from lite.errors import UsageError, some
from lite.strategies import provenance
from lite.strategies.base import Engine
from lite.strategies.deepspeed_state import Parts
from lite.strategies.deepspeed_wiring import Original, copy_settings, forget, gathered, initialize, view_of
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
        gradients_agree: Whether no gradient is this rank's own.
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
        self._sync = True
        self.closed = self._begun = self._runs = self._failed = False
        self._before: tuple[bool, dict[int, list[Tensor]]] = False, {}
        self.gradients_agree = True
        self._pending = self._finished = False
        self._held: dict[int, list[Tensor]] = {}
        self._seen: set[int] = set()
        self._warned = False
        self._undo: list[Callable[[], None]] = []
        self._unhook: list[Callable[[], None]] = []
        self.engine: Any = None
        self._optimizer: weakref.ref[Optimizer] | None = None
        self._view: Any = None
        self.parts: Any = None
        self._numbers: list[int] = []
        self._final: dict[Tensor, dict[str, Any]] | None = None
        self.body = {"zero_grad": self._zero_grad(type(module))}
        self._original = Original(module)
        broadcast_from_rank_0(module)
        if stage == 0:
            self.engine = initialize(module, None, config, device)
            self._original.settle()
        for number, parameter in enumerate(self._parameters):
            if parameter.requires_grad:
                hook: Any = parameter.register_post_accumulate_grad_hook(self._note(number))  # type: ignore[no-untyped-call]
                self._undo.append(hook.remove)

    def _zero_grad(self, raw: Any) -> Callable[..., None]:
        mine = self

        def zero_grad(self: nn.Module, set_to_none: bool = True) -> None:
            raw.zero_grad(self, set_to_none)
            mine.drop_gradients()

        return zero_grad

    def _note(self, number: int) -> Callable[[Tensor], None]:
        seen = self._seen

        def note(parameter: Tensor) -> None:
            seen.add(number)

        return note

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

    @property
    def _zero(self) -> Any:
        """DeepSpeed's optimizer."""
        return self.engine.optimizer

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
                self._take_buffers()
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
        self._zero.parameter_offload.get_param_coordinator().reset_step()
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

    def _take_buffers(self) -> None:
        for buffer in self.module.buffers():
            collectives.take_from_rank_0(buffer)

    # ---- backward

    def begin_backward(self) -> None:
        """A backward that reaches this model is about to begin; `note_begun` is called when it does."""
        self._forget_refused()
        if self._failed or self._begun:
            self._failed = True
            raise UsageError(
                f"a backward through {type(self.module).__name__} has failed half-way before, and DeepSpeed still has "
                "a part of its gradients; call lite.teardown() and set up again."
            )
        self._begun, self._runs = True, False
        self._before = self._finished, self._held
        if self.stage == 0:
            return
        if not self._pending:
            self._seen.clear()
        zero, engine = self._zero, self.engine
        if self.stage == 3:
            if not self._pending:
                zero.grad_partitions_flat_buffer.zero_()
        elif self._finished:
            self._held = {i: list(parts) for i, parts in zero.averaged_gradients.items() if parts is not None}
        self._finished = False
        zero.clear_backward_seen_flag()
        engine.set_gradient_accumulation_boundary(False)
        engine._running_engine_backward_count += 1
        engine._running_engine_backward = True
        engine._backward_prologue()

    def note_begun(self) -> None:
        """Gradients have begun to flow."""
        self._runs = True

    def _forget_refused(self) -> None:
        """A backward that was about to begin was refused before it did: it never was."""
        if not self._begun or self._runs:
            return
        self._begun = False
        self._finished, self._held = self._before
        if self.stage > 0:
            self._zero.exit_backward()
            self._leave_backward()

    def _leave_backward(self) -> None:
        engine = self.engine
        engine._running_engine_backward_count -= 1
        engine._running_engine_backward = engine._running_engine_backward_count > 0

    def end_backward(self) -> None:
        """It is done: reduce what it has left."""
        self._begun = False
        self._pending = True
        if self.stage == 0:
            self.gradients_agree = self._sync
            if self._sync:
                self._reduce_all()
            return
        self.engine._backward_epilogue()
        self._leave_backward()

    def _reduce_all(self) -> None:
        """Stage 0: the mean of the ranks' gradients, in place.

        DeepSpeed puts zeros where a rank has none. Where no rank has any, none is left, so that the step leaves the
        parameter alone; a rank that has all asks no device for that.
        """
        trained = [p for p in self._parameters if p.requires_grad]
        mine = [p.grad is not None for p in trained]
        anywhere: Tensor = collectives.all_reduce(torch.tensor(mine, dtype=torch.uint8, device=self._device), "max")
        self.engine.set_gradient_accumulation_boundary(True)
        self.engine.allreduce_gradients()
        if not all(mine):
            for parameter, has_one in zip(trained, anywhere.tolist(), strict=True):
                if not has_one:
                    parameter.grad = None

    def no_sync(self) -> AbstractContextManager[None]:
        return self._no_sync()

    @contextmanager
    def _no_sync(self) -> Iterator[None]:
        """From stage 1 on gradients are added up in DeepSpeed's own way, whatever is asked here."""
        before, self._sync = self._sync, False
        try:
            yield
        finally:
            self._sync = before

    # ---- gradients, from stage 1 on

    def gradients(self) -> list[Tensor]:
        """This rank's parts of the mean gradients, to read and to change; none where there was no backward."""
        self._forget_refused()
        if not self._pending:
            return []
        self._finish()
        averaged = self._zero.averaged_gradients
        return [part for i in sorted(averaged) if averaged[i] is not None for part in averaged[i]]

    def _finish(self) -> None:
        """Bring what backwards have added up to where the step takes it from. Collective in stage 1."""
        if self._finished:
            return
        self._finished = True
        zero = self._zero
        if self.stage == 1:
            self.engine.set_gradient_accumulation_boundary(True)
            self.engine.allreduce_gradients()
        elif self.stage == 2:
            zero.finalize_gradient_accumulation_boundary()
        for i, parts in self._held.items():
            torch._foreach_add_(zero.averaged_gradients[i], parts)
        self._held = {}

    def drop_gradients(self) -> None:
        """Forget them, so that the next step changes nothing."""
        self._forget_refused()
        self._held = {}
        self._finished = self._pending = False
        self.gradients_agree = True
        if self.stage == 0 or self.engine is None:
            return
        zero = self._zero
        zero.zero_grad()
        if self.stage < 3:
            for i in range(len(zero.bit16_groups)):
                zero.all_grad_tensors[i] = zero.averaged_gradients[i] = None

    # ---- the optimizer, from stage 1 on

    def adopt(self, optimizer: Optimizer) -> Callable[[], None]:
        """Give DeepSpeed the model's optimizer; it is changed in place. Collective: call on all ranks.

        Returns:
            What takes that back; the state becomes whole again where the model was given back before.

        Raises:
            UsageError: The model has one already.
        """
        if self._optimizer is not None:
            raise UsageError(
                f"{type(self.module).__name__} has an optimizer that is set up already, and DeepSpeed trains a model "
                "by one; use one optimizer with several param_groups, or strategy='ddp' or 'fsdp'."
            )
        raw: Any = type(optimizer)
        patched = optimizer.__dict__.pop("step", None)  # of a scheduler that was made before
        before = optimizer.state

        def give_back() -> None:
            optimizer.__class__ = raw
            optimizer.state = before
            if patched is not None:
                optimizer.__dict__["step"] = patched

        try:
            optimizer.state = defaultdict(dict)
            self._divide(optimizer, raw, before)
        except BaseException as error:
            give_back()
            if isinstance(error, Exception):
                self._abandon()
            raise
        reference = weakref.ref(optimizer)

        def undo() -> None:
            it = reference()
            if it is None:
                return
            it.__class__ = raw
            if patched is not None:
                it.__dict__["step"] = patched
            if self._final is not None:
                it.state.update(self._final)

        return undo

    def _divide(self, optimizer: Optimizer, raw: Any, before: Any) -> None:
        """Let DeepSpeed divide the model, and the optimizer's state from before."""
        self._view = view_of(optimizer, raw)
        # DeepSpeed gets those groups alone of which something is trained.
        trained = [any(p.requires_grad for p in group["params"]) for group in optimizer.param_groups]
        self._numbers = [number for number, it_is in enumerate(trained) if it_is]
        self._original = Original(self.module)
        self.engine = initialize(self.module, self._view, self._config, self._device)
        self._original.settle()
        groups = [group["params"] for group in optimizer.param_groups]
        self.parts = Parts(self.engine, self.stage, self._view, groups, self.names, self._is_saving)
        self._optimizer = weakref.ref(optimizer)
        disguise(optimizer, self._body(raw))
        if self.stage == 3:
            for part in self.module.modules():
                load: Any = part.register_load_state_dict_pre_hook(self.parts.cut_for_loading)  # type: ignore[no-untyped-call]
                put_together = functools.partial(
                    self.parts.put_together
                )  # torch marks the hook, which a method forbids
                state: Any = part.register_state_dict_post_hook(put_together)  # type: ignore[no-untyped-call]
                self._unhook += [load.remove, state.remove]
        self.parts.take_state(before)

    def _abandon(self) -> None:
        """Take back what a division that has failed did to the model, which stays set up without an optimizer."""
        self._original.settle()
        self._make_plain(self._whole_values())
        self._optimizer = None

    def _body(self, raw: Any) -> dict[str, Any]:
        mine = self

        def step(self: Optimizer, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
            self._opt_called = True  # type: ignore[attr-defined]  # schedulers ask whether step was called at all
            loss = None
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
            mine.step(self)
            return loss

        # Hooks run around all of it.
        hooked: Any = Optimizer.profile_hook_step(step)
        hooked.hooked = hooked._wrapped_by_lr_sched = True

        def zero_grad(self: Optimizer, set_to_none: bool = True) -> None:
            raw.zero_grad(self, set_to_none)
            mine.drop_gradients()

        def state_dict(self: Optimizer) -> Any:
            """All of the state, on the CPU. Collective: call on all ranks."""
            self.state = defaultdict(dict, mine.parts.whole_state())
            try:
                return raw.state_dict(self)
            finally:
                self.state = defaultdict(dict)

        def load_state_dict(self: Optimizer, state_dict: dict[str, Any]) -> None:
            before = self.param_groups  # torch makes new ones
            try:
                raw.load_state_dict(self, state_dict)
                mine.parts.take_state(self.state)
            except BaseException:
                self.param_groups = before
                raise
            finally:
                self.state = defaultdict(dict)

        def check_state_dict(self: Optimizer, state_dict: dict[str, Any]) -> None:
            numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
            held = [p for group in self.param_groups for p in group["params"]]
            if len(numbers) == len(held):  # torch refuses it otherwise
                state = state_dict["state"]
                mine.parts.check_state({p: state.get(n, {}) for n, p in zip(numbers, held, strict=True)})

        def add_param_group(self: Optimizer, param_group: dict[str, Any]) -> None:
            raise UsageError(
                f"{raw.__name__}.add_param_group after lite.setup: DeepSpeed has divided the optimizer's parameters by "
                "then; add it before, or call lite.teardown() and set up again."
            )

        return {
            "step": hooked,
            "zero_grad": zero_grad,
            "state_dict": state_dict,
            "load_state_dict": load_state_dict,
            "check_state_dict": check_state_dict,
            "add_param_group": add_param_group,
            "state_is_local": True,
        }

    def step(self, optimizer: Optimizer) -> None:
        """Step on this rank's parts, and give all ranks the new weights. Collective: call on all ranks."""
        self._forget_refused()
        if not self._pending:
            return  # as raw, where no parameter has a gradient
        self._finish()
        self._warn_of_unused()
        zero, engine = self._zero, self.engine
        zero.refresh_fp32_params()
        groups = [optimizer.param_groups[i] for i in self._numbers]
        copy_settings(groups, self._view.param_groups)
        engine.set_gradient_accumulation_boundary(True)
        engine.step()
        copy_settings(self._view.param_groups, groups)
        self._pending = self._finished = False
        if zero.overflow:
            warnings.warn(
                f"DeepSpeed has left out the step of {type(optimizer).__name__}: its gradients are inf or NaN. "
                "lite.clip_gradients(model, optimizer, max_norm=...) has a policy for them (nonfinite=).",
                stacklevel=4,
            )

    def _warn_of_unused(self) -> None:
        unused = [n for n, t in enumerate(self._trained) if t and n not in self._seen]
        if unused and not self._warned:
            self._warned = True
            warnings.warn(
                f"{some([self.names[id(self._parameters[n])] for n in unused])} got no gradient before this step, and "
                "DeepSpeed steps with zeros then, where torch leaves a parameter alone: weight decay and momentum go "
                "on changing it. Freeze it before lite.setup, or use strategy='ddp' or 'fsdp'.",
                stacklevel=5,
            )

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
        for undo in self._undo:
            undo()
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
        if self.engine is not None:
            self.engine.destroy()
        if self.stage == 3:
            forget(self.module)
        self._original.restore()
        for parameter in self._parameters:
            if id(parameter) in values:
                parameter.data = values[id(parameter)]
                parameter.grad = None
        self.engine = self._view = self.parts = None
