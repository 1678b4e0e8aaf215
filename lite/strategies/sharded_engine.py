"""What stands around one model whose parameters are sharded: its calls, its buffers, its gradients, and the way back.

fully_shard's hooks stand on the module itself; here is what they leave open. Relies on `_lazy_init`, `_pre_forward`,
`_post_forward` and `_pre_backward` of the state that fully_shard keeps for a module, as they are in torch 2.13.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from functools import cached_property, partial
from itertools import zip_longest
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.utils.parametrize import ParametrizationList
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from lite import collectives
from lite.errors import LiteError, UsageError
from lite.precision.base import Precision
from lite.sharded import cut, is_sharded, whole
from lite.state import parameters_of
from lite.strategies import provenance, remedies
from lite.strategies.attached import lend_hooks
from lite.strategies.base import Engine
from lite.strategies.lost_writes import LostWrites
from lite.strategies.numbers import WholeNumbers
from lite.strategies.outside import OutsideCheck
from lite.strategies.repointing import loading_into_shards, repoint
from lite.strategies.restoring import Original
from lite.strategies.split_draws import FirstDraws
from lite.strategies.waiting import WaitingGradients


class ShardedEngine(Engine):
    """Sharded parameters under one model.

    Args:
        module: The model, sharded already.
        original: What it was before.
        precision: What methods other than forward compute in.
        buffers: Whether each forward that trains starts with rank 0's buffers.
        full_state: Whether `state_dict()` puts tensors together.
        explain: What to do about an error in a forward of the model, where that is known.
        draws: What looks whether ranks that compute the model together draw alike.
        undo: What else is to be taken back.

    Attributes:
        names: The parameters, id to name.
        waiting: The gradients of backwards within `no_sync`.
        closed: The model has been given back.
        within: A method other than forward runs on parameters that FSDP has put together for it.
    """

    through_call = True

    def __init__(
        self,
        module: nn.Module,
        original: Original,
        precision: Precision,
        *,
        buffers: bool,
        full_state: bool,
        explain: Callable[[nn.Module, RuntimeError], str | None],
        draws: FirstDraws | None = None,
        undo: Iterable[Callable[[], None]] = (),
    ) -> None:
        self._module = weakref.ref(module)
        self._original = original
        self._precision = precision
        self._explain = explain
        self._draws = draws
        self._undo = list(undo)
        current = dict(module.named_parameters(remove_duplicate=False))
        self._former = WeakIdKeyDictionary()
        for old, name in original.names.items():  # type: ignore[no-untyped-call]
            if current[name] is not old:
                self._former[old] = current[name]
        self.names = {id(p): name for name, p in current.items()}
        self._kept = list(current.values())  # so that no id is given to another one
        # In the order in which they came, which all ranks share (a WeakSet has none); each with what fully_shard keeps
        # for its parameters, from its first step on.
        self._optimizers: weakref.WeakKeyDictionary[Optimizer, list[Any]] = weakref.WeakKeyDictionary()
        self._sync = True
        self.closed = self.within = self._aside = False
        self.waiting = WaitingGradients(self._held)
        self._buffers = [
            (part, name)
            for part in module.modules()
            for name, buffer in part._buffers.items()
            if buffer is not None and name not in part._non_persistent_buffers_set and not is_sharded(buffer)
        ]
        self.syncs_buffers = buffers and bool(self._buffers)
        groups = _groups_of(module)
        held = _sharded_over_data(groups)
        self._groups = [weakref.ref(group) for group in groups]
        self._over_data = {one.sharded_param.device_mesh for one in held}
        self._mark = provenance.Mark(frozenset({weakref.ref(self)}), ())
        self._numbers = WholeNumbers(lambda: remedies.part_as_number(self.module))
        self.body = {
            "zero_grad": self.waiting.at_zero_grad_of(type(module)),
            **dict.fromkeys(("__reduce_ex__", "__deepcopy__"), _refuse_copy),
        }
        self._ran: list[str] = []  # where collectives are compared
        if collectives.are_compared():
            for name, part in module.named_modules():
                if any(True for _ in part.parameters(recurse=False)):
                    self._undo.append(part.register_forward_pre_hook(partial(self._note_run, name)).remove)
        owners = set(self._owners(self._state)) if held else set()
        self._outside = OutsideCheck(module, {name: part for name, part in module.named_modules() if part in owners})
        self._undo.append(self._outside.remove)
        for part in module.modules():
            if isinstance(part, FSDPModule) and isinstance(part, ParametrizationList):
                # It runs whenever its weight is read, which may be before the model does.
                self._undo.append(part.register_forward_pre_hook(self._read_alone, prepend=True).remove)
            handle = part.register_load_state_dict_pre_hook(_cut_for_loading)  # type: ignore[no-untyped-call]
            self._undo.append(handle.remove)
        if full_state:
            self._undo.append(module.register_state_dict_post_hook(_put_together).remove)  # type: ignore[no-untyped-call]

    @property
    def module(self) -> nn.Module:
        """The model."""
        module = self._module()
        assert module is not None
        return module

    @property
    def _state(self) -> Any:
        """What fully_shard keeps for the whole model, or None where nothing is sharded over data."""
        return self.module._get_fsdp_state() if hasattr(self.module, "_get_fsdp_state") else None  # type: ignore[operator]

    def _read_alone(self, *unused: Any) -> None:
        self._state._lazy_init()
        self._aside = self._aside or not self._outside.runs

    def _note_run(self, name: str, *unused: Any) -> None:
        self._ran.append(name)

    def _compare_runs(self) -> None:
        """Refuse ranks that ran other layers: weights of equal shapes would be put together with each other's."""
        ran, self._ran = self._ran, []
        everyones = collectives.all_gather_objects(ran)
        for rank, theirs in enumerate(everyones):
            for mine, other in zip_longest(everyones[0], theirs, fillvalue="nothing"):
                if mine != other:
                    raise UsageError(
                        f"rank {rank} ran {other!r} where rank 0 ran {mine!r}: a "
                        "sharded model must run the same layers in the same order on all ranks; draw what decides "
                        "alike on all of them, multiply by 0 instead of skipping, or use strategy='ddp'."
                    )

    # ---- forward and methods

    def forward(self, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self._watched(self._forward, run, args, kwargs)

    def method(self, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self._watched(self._method, run, args, kwargs)

    def _watched(
        self, call: Callable[..., Any], run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """A run of the model, with what is refused in all of them."""
        first, outermost = not self._outside.runs, False
        if first:
            self._pass_on_writes()
            outermost = torch._C._current_graph_task_id() == -1
            if not outermost:  # within the backward of another model
                self._take_back()
            elif self._aside:
                self._reshard()
        alone = self._before_inference(args, kwargs) if torch.is_inference_mode_enabled() else nullcontext()
        draws = self._draws
        if draws is not None and not (outermost and provenance.has_tensors((args, kwargs))):
            draws = None  # a part of a run, or what one rank may do alone
        stood = None if draws is None else draws.stand(self.module)
        try:
            with self._numbers, self._outside, alone:
                outputs = call(run, args, kwargs)
            if draws is not None and stood is not None:
                draws.check(self.module, stood)
        except BaseException as error:
            if outermost:
                self._recover()
            if isinstance(error, RuntimeError):
                self._raise_explained(error)
            raise
        if outermost:
            self._set_aside()
            if self._aside:
                self._watch_backward(outputs)
        return outputs

    def _before_inference(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> AbstractContextManager[None]:
        """Let the memory for weights that are put together be of a kind that can be trained with, too.

        FSDP makes it as they first run. What computes with what it is given runs on all ranks, and it is made before;
        what is given no tensors, and may be for one rank alone, runs under no_grad instead.
        """
        writes = self.__dict__.get("_writes")  # made with the first run
        if self._state is None or not (writes is None or writes.lacks_copies):
            return nullcontext()
        if not provenance.has_tensors((args, kwargs)):
            return _no_grad_alone()
        with _no_grad_alone():
            self._state._lazy_init()
            for group in self._live_groups():
                group.unshard()
                group.wait_for_unshard()
                group.reshard()
            self._writes.check_written()
        return nullcontext()

    def _watch_backward(self, outputs: Any) -> None:
        """Take weights back in a backward that nobody announces (torch.autograd.grad, say)."""
        reference = weakref.ref(self)

        def take_back(gradient: Tensor) -> None:
            engine = reference()
            if engine is not None:
                engine._take_back()

        for output in provenance.tensors_with_grad(outputs):
            output.register_hook(take_back)  # type: ignore[no-untyped-call]

    def _set_aside(self) -> None:
        """A run has ended: until the next run or backward the model has its shards, as the optimizer does.

        fully_shard leaves weights together that the backward begins with. Who reads, writes, freezes or clips them
        before it comes, or where it never does, would do so with copies.
        """
        for group in self._live_groups():
            if not group.is_sharded:
                self._aside = True
                for held in group.fsdp_params:
                    held._setattr_on_modules(held.sharded_param)

    def _take_back(self) -> None:
        """A backward begins, which may compute a part of the forward again."""
        self._pass_on_writes()
        if self._aside:
            self._aside = False
            for group in self._live_groups():
                if group.is_unsharded:
                    for held in group.fsdp_params:
                        held.to_unsharded()

    def _reshard(self) -> None:
        """Let go of what is still put together; the next run, or backward, puts it together anew."""
        self._aside = False
        for group in self._live_groups():
            group.reshard()

    def _held(self) -> list[Any]:
        """What fully_shard keeps for each parameter that it has sharded."""
        return _sharded_over_data(self._live_groups())

    def _live_groups(self) -> Iterator[Any]:
        return (group for reference in self._groups if (group := reference()) is not None)

    def _recover(self) -> None:
        """Leave nothing of a forward or backward that has failed: the next one is a new beginning."""
        state = self._state
        if state is not None and hasattr(state._comm_ctx, "all_gather_state"):  # as of the first run that comes so far
            with suppress(RuntimeError):  # of ranks that have lost each other, which the first error says
                self.module.reset_iter_state()  # type: ignore[operator]

    @cached_property
    def _writes(self) -> LostWrites:
        # Made with the first run: until then fully_shard has those of the meta device, where the model was made there.
        held = {self.names[id(one.sharded_param)]: one for one in self._held()}
        return LostWrites(lambda: self.module, held)

    def _pass_on_writes(self) -> None:
        if "_writes" in self.__dict__:  # it has run
            self._writes.pass_on()

    def _raise_explained(self, error: RuntimeError) -> None:
        text = None if isinstance(error, LiteError) else self._explain(self.module, error)
        if text is not None:
            raise UsageError(text) from error

    def _forward(self, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if torch._C._current_graph_task_id() != -1:  # activation checkpointing runs it again
            return run(*args, **kwargs)
        if not torch.is_grad_enabled():
            outputs = run(*args, **kwargs)
            self._writes.check_written()
            self._reshard()
            return outputs
        if self.syncs_buffers and self.module.training:
            self.sync_buffers()
        outputs = run(*args, **kwargs)
        self._writes.check_written()
        self._writes.check_assigned()
        provenance.tag(outputs, self._mark, [])
        return outputs

    def _method(self, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        state = self._state
        if torch._C._current_graph_task_id() != -1:
            return run(*args, **kwargs)
        if (
            self.syncs_buffers
            and self.module.training
            and torch.is_grad_enabled()
            and provenance.has_tensors((args, kwargs))
        ):
            self.sync_buffers()
        outputs = self._unsharded(state, run, args, kwargs) if state is not None else run(*args, **kwargs)
        self._writes.check_written()
        self._writes.check_assigned()
        if torch.is_grad_enabled():
            computed = (leaf for leaf in tree_leaves(outputs) if is_sharded(leaf) and leaf.grad_fn is not None)
            if any(leaf.device_mesh in self._over_data for leaf in computed):  # others are split logits, say
                raise UsageError(remedies.of_weights_alone(self.module))
            provenance.tag(outputs, self._mark, [])
        else:
            self._reshard()
        return outputs

    def _unsharded(self, state: Any, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a method with the model's own parameters put together: at once where it is given tensors, else when the
        first of its layers runs, so that a method that computes nothing communicates nothing."""
        entered = False

        def enter(*unused: Any) -> None:
            nonlocal entered
            if not entered:
                entered = self.within = True
                state._pre_forward(self.module, (), {})

        state._lazy_init()  # first by the whole model, whichever layer runs first
        outputs = None
        with ExitStack() as stack:
            if provenance.has_tensors((args, kwargs)):
                enter()
            else:
                for owner in self._owners(state):
                    stack.callback(owner.register_forward_pre_hook(enter, prepend=True).remove)
            if self._precision.compute_dtype is not None:
                stack.enter_context(self._precision.autocast())
            try:
                outputs = run(*args, **kwargs)
            except RuntimeError as error:
                if remedies.MIXED in str(error):
                    raise UsageError(remedies.past_hooks(self.module)) from error
                raise
            finally:
                self.within = False
                if entered:
                    outputs = state._post_forward(self.module, (), outputs)
        return outputs

    def _owners(self, state: Any) -> list[nn.Module]:
        """The layers, other than the model itself, whose parameters are put together with the model's own."""
        infos = [p._module_info for group in state._fsdp_param_groups for p in group.fsdp_params]
        owners = {id(m): m for info in infos for m in (info.module, *info.shared_modules)}
        return [m for m in owners.values() if m is not self.module]

    def sync_buffers(self) -> None:
        for part, name in self._buffers:
            buffer = part._buffers[name]
            assert buffer is not None
            collectives.take_from_rank_0(buffer)

    # ---- backward

    def begin_backward(self, loss: Tensor) -> None:
        """The loss is about to be differentiated: its backward will reach the model, whatever became of its outputs."""
        self.waiting.exist = not self._sync
        self._take_back()
        lend_hooks(self._held())
        if collectives.are_compared():
            self._compare_runs()
        state = self._state
        if state is not None:
            loss.register_hook(state._pre_backward)  # type: ignore[no-untyped-call]

    def abandon_backward(self) -> None:
        """A backward has failed: with it go the gradients that wait to be reduced, also of batches before it."""
        self._recover()
        self.waiting.exist = True  # whatever it was: those of a part of the model may
        self.waiting.drop()

    def no_sync(self) -> AbstractContextManager[None]:
        return self._no_sync() if self._state is not None else nullcontext()

    @contextmanager
    def _no_sync(self) -> Iterator[None]:
        before = self._sync
        self._set_sync(False)
        try:
            yield
        finally:
            self._set_sync(before)

    def _set_sync(self, value: bool) -> None:
        self._sync = value
        self.module.set_requires_gradient_sync(value)  # type: ignore[operator]

    # ---- optimizers and the way back

    def whole_parameters(self) -> dict[int, str]:
        """The names of the parameters by the identity of what they are when put together over the ranks."""
        held = self._held()
        wholes = ((getattr(one, "_unsharded_param", None), one.sharded_param) for one in held)
        return {id(whole): self.names[id(sharded)] for whole, sharded in wholes if whole is not None}

    def successor(self, parameter: Tensor) -> nn.Parameter | None:
        """What took the place of a parameter that the model had before it was sharded."""
        found: nn.Parameter | None = self._former.get(parameter)  # type: ignore[no-untyped-call]
        return found

    def adopt(self, optimizer: Optimizer) -> None:
        """Let the optimizer hold the sharded parameters, load into them, and follow them back."""
        repoint(optimizer, self.successor)
        if optimizer not in self._optimizers:
            self._optimizers[optimizer] = []
            self._undo.append(optimizer.register_load_state_dict_pre_hook(loading_into_shards).remove)
            self._undo.append(self.waiting.follow(optimizer))
            self._undo.append(optimizer.register_step_post_hook(self._note_step).remove)

    def _note_step(self, optimizer: Optimizer, *unused: Any) -> None:
        """Let a backward of a forward before this step fail as on one process, where it needs what has changed."""
        if "_writes" not in self.__dict__:  # it has not run
            return
        parameters = parameters_of(optimizer)
        known = self._optimizers[optimizer]
        if len(known) != len(parameters):
            held = {id(one.sharded_param): one for one in self._held()}
            self._optimizers[optimizer] = known = [held.get(id(p)) for p in parameters]
        with torch._C.DisableTorchFunctionSubclass():  # which DTensors' `grad` would go through
            moved = [one for p, one in zip(parameters, known, strict=True) if one is not None and p.grad is not None]
        self._writes.pass_on(moved)

    def close(self) -> None:
        """Give the model back with plain, whole parameters on every rank. Collective: call on all ranks."""
        if self.closed:
            return
        self.closed = True
        if not dist.is_initialized():
            warnings.warn(
                f"{remedies.class_name(self.module)} stays sharded: its processes have left their group, so its parts "
                "can't be put together any more; call lite.teardown() before the group ends.",
                stacklevel=2,
            )
            return
        for undo in self._undo:
            undo()
        successors = self._original.restore()
        for optimizer in self._optimizers:
            repoint(optimizer, lambda parameter: successors.get(id(parameter)))
        self._kept = []


@contextmanager
def _no_grad_alone() -> Iterator[None]:
    """In the place of inference_mode."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def _refuse_copy(module: nn.Module, *unused: Any) -> Any:
    raise UsageError(remedies.copied(module))


def _groups_of(module: nn.Module) -> list[Any]:
    """What fully_shard keeps for the parameters of a model that it puts together at once."""
    states = [part._get_fsdp_state() for part in module.modules() if isinstance(part, FSDPModule)]
    return [group for state in states for group in state._fsdp_param_groups]


def _sharded_over_data(groups: Iterable[Any]) -> list[Any]:
    """What it keeps for each of these parameters."""
    return [param for group in groups for param in group.fsdp_params]


def _cut_for_loading(module: nn.Module, state_dict: dict[str, Any], prefix: str, *unused: Any) -> None:
    """A hook of `load_state_dict`: this rank's part of each whole tensor that is loaded into a sharded one."""
    if isinstance(module, FSDPModule):
        module.reshard()
    for name, target in (*module._parameters.items(), *module._buffers.items()):
        key = f"{prefix}{name}"
        if target is None or key not in state_dict:
            continue
        value = state_dict[key]
        if is_sharded(target) and not is_sharded(value) and tuple(getattr(value, "shape", ())) == tuple(target.shape):
            state_dict[key] = cut(value, target)
        elif hasattr(value, "read_part"):
            # Of another shape: torch says so.
            state_dict[key] = value.read() if not is_sharded(target) else torch.empty(value.shape, device="meta")


def _put_together(module: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: Any) -> None:
    if prefix:
        return
    for key, value in state_dict.items():
        if is_sharded(value):
            state_dict[key] = whole(value).cpu()
