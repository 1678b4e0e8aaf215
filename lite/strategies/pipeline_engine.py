"""What stands around one model whose layers lie on different ranks: its stages, its microbatches, and the way back.

torch.distributed.pipelining sends activations and gradients and orders the microbatches; here is what it leaves open.
"""

from __future__ import annotations

import math
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B
from torch.optim import Optimizer
from torch.utils.weak import WeakIdKeyDictionary

from lite import collectives, elsewhere
from lite.errors import UsageError
from lite.precision.base import Precision
from lite.state import parameters_of
from lite.strategies.base import Engine
from lite.strategies.running_order import PipelinePlan
from lite.strategies.stages import Stage

_SCHEDULES: dict[str, Any] = {
    "gpipe": ScheduleGPipe,
    "1f1b": Schedule1F1B,
    "interleaved_1f1b": ScheduleInterleaved1F1B,
}
_MAX_KEPT = 8
_META = ("meta", "Meta")

LossFunction = Callable[[Any, Tensor], Tensor]


def refuse_copy(it: Any, *unused: Any) -> Any:
    """What pickling and copying a model or an optimizer is whose parts lie on other ranks.

    Raises:
        UsageError: Always.
    """
    raise UsageError(
        f"this {type(it).__name__} is divided over the ranks of a pipeline, and can't be pickled or copied without "
        "what the others have; store it by lite.save or lite.export, or call lite.teardown() before."
    )


class PipelineEngine(Engine):
    """This rank's stages of one model. Making it is collective: call on all ranks.

    Args:
        module: The model, whole on every rank or on the meta device.
        stages: The layers of each stage.
        plan: How it is split, and in which order microbatches run.
        precision: What stages compute in.
        device: Where they do.

    Attributes:
        closed: The model has been given back.
    """

    def __init__(
        self,
        module: nn.Module,
        stages: Sequence[Sequence[nn.Module]],
        plan: PipelinePlan,
        precision: Precision,
        device: torch.device,
    ) -> None:
        self._module = weakref.ref(module)
        self._plan, self._device = plan, device
        self._world_size, self._rank = collectives.world_size(), collectives.rank()
        self._num_stages = len(stages)
        last = len(stages) - 1
        self._stages = {
            index: Stage(layers, precision, first=index == 0, last=index == last)
            for index, layers in enumerate(stages)
            if index % self._world_size == self._rank
        }
        self._schedules: OrderedDict[Any, tuple[Any, torch.dtype | None]] = OrderedDict()
        self._optimizers: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._undo: list[Callable[[], None]] = []
        self.closed = False
        self._former = WeakIdKeyDictionary()
        self._ties: list[tuple[nn.Parameter, Any, bool]] = []
        self._place(module, stages)
        self._held = {id(p) for p in module.parameters()}
        self.body = dict.fromkeys(("__reduce_ex__", "__deepcopy__"), refuse_copy)
        self._losses: list[Tensor] = []
        self._weigh: Callable[[Tensor], Tensor] = lambda loss: loss
        for part in module.modules():
            handle = part.register_load_state_dict_pre_hook(elsewhere.leave_aside)  # type: ignore[no-untyped-call]
            self._undo.append(handle.remove)
        self._undo.append(module.register_state_dict_post_hook(elsewhere.mark_in_state).remove)  # type: ignore[no-untyped-call]

    @property
    def module(self) -> nn.Module:
        """The model."""
        module = self._module()
        assert module is not None
        return module

    # ---- who holds what

    def _place(self, module: nn.Module, stages: Sequence[Sequence[nn.Module]]) -> None:
        """Bring rank 0's values to whoever computes with them, one layer at a time, and let go of the others'."""
        owners: dict[int, set[int]] = {}
        for index, layers in enumerate(stages):
            for tensor in (t for layer in layers for t in (*layer.parameters(), *layer.buffers())):
                owners.setdefault(id(tensor), set()).add(index % self._world_size)
        groups: dict[tuple[int, ...], Any] = {}
        stand_ins: dict[int, Tensor] = {}
        seen: set[int] = set()
        kept: list[Tensor] = []  # so that no id is given to another one
        for layer in (layer for layers in stages for layer in layers):
            for part in layer.modules():
                tables: tuple[dict[str, Any], ...] = (part._parameters, part._buffers)
                for table in tables:
                    for name, tensor in list(table.items()):
                        if tensor is None:
                            continue
                        ranks = owners.get(id(tensor))
                        if ranks is None:
                            continue  # a stand-in already
                        mine = self._rank in ranks
                        if id(tensor) not in seen:
                            seen.add(id(tensor))
                            kept.append(tensor)
                            self._share(tensor, mine)
                            if len(ranks) > 1 and isinstance(tensor, nn.Parameter):
                                self._tie(tensor, tuple(sorted(ranks)), groups)
                        if mine:
                            if tensor.is_meta:
                                table[name] = self._stand_in(tensor, stand_ins, self._device)
                        else:
                            table[name] = self._stand_in(tensor, stand_ins, torch.device("meta"))

    def _stand_in(self, tensor: Tensor, made: dict[int, Tensor], device: torch.device) -> Tensor:
        if id(tensor) not in made:
            new: Tensor = torch.empty_like(tensor, device=device)
            if isinstance(tensor, nn.Parameter):
                new = nn.Parameter(new, requires_grad=tensor.requires_grad)
                self._former[tensor] = new
            made[id(tensor)] = new
        return made[id(tensor)]

    def _share(self, tensor: Tensor, mine: bool) -> None:
        if tensor.is_meta:
            return  # it gets its values later
        here = tensor.detach().to(self._device)
        if here.numel():
            sent = here.contiguous()
            dist.broadcast(collectives.as_bytes(sent), src=0)
            here = sent
        if mine:
            tensor.data = here.view_as(tensor)

    def _tie(self, tensor: nn.Parameter, ranks: tuple[int, ...], groups: dict[tuple[int, ...], Any]) -> None:
        if ranks not in groups:
            groups[ranks] = dist.new_group(list(ranks))
        if self._rank in ranks:
            self._ties.append((tensor, groups[ranks], self._rank == ranks[0]))

    def successor(self, parameter: Tensor) -> nn.Parameter | None:
        """What took the place of a parameter that the model had before it was split."""
        found: nn.Parameter | None = self._former.get(parameter)  # type: ignore[no-untyped-call]
        return found

    def holds(self, parameter: Tensor) -> bool:
        """Whether it is one of the model's, here or on another rank."""
        return id(parameter) in self._held

    def counts_elsewhere(self, parameter: Tensor) -> bool:
        """Whether it is tied over several ranks, of which another one counts it."""
        return any(parameter is tied and not first for tied, _, first in self._ties)

    def adopt(self, optimizer: Optimizer) -> None:
        """Let the optimizer hold what took the places of its parameters, and keep the state of those here."""
        from lite.strategies.repointing import repoint

        repoint(optimizer, self.successor)
        for parameter in [p for p in optimizer.state if isinstance(p, Tensor) and p.is_meta and self.holds(p)]:
            del optimizer.state[parameter]
        if optimizer not in self._optimizers:
            self._optimizers.add(optimizer)
            self._undo.append(optimizer.register_state_dict_post_hook(elsewhere.complete_state).remove)
            self._undo.append(optimizer.register_load_state_dict_pre_hook(elsewhere.keep_own).remove)

    # ---- computing

    def forward_backward(
        self, inputs: tuple[Tensor, ...], target: Tensor, loss: LossFunction, weigh: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Add the gradients of a batch's mean loss to those that are there; return it, 0-dim, alike on all ranks.

        Collective: call on all ranks, with the same batch.

        Args:
            inputs: What the first layer takes, each with the batch as its first dimension.
            target: What the loss function takes second.
            loss: Computes a microbatch's mean loss from the last layer's output and its part of `target`.
            weigh: What is done to a loss before its backward.
        """
        count = self._plan.microbatches
        schedule, dtype = self._schedule(inputs, target, loss)
        self._losses, self._weigh = [], weigh
        with self._adding_ties():
            given = inputs if 0 in self._stages else ()
            is_last = self._num_stages - 1 in self._stages
            schedule.step(*given, target=target if is_last else None, losses=[] if is_last else None)
        # Metadata were inferred from one microbatch more, before the others, where shapes are new.
        mean = torch.stack(self._losses[-count:]).mean() if is_last else None
        source = (self._num_stages - 1) % self._world_size
        if dtype is None:
            dtype = collectives.broadcast(None if mean is None else mean.dtype, source)
            self._schedules[self._key(inputs, target)] = (schedule, dtype)
        value = mean if mean is not None else torch.empty((), dtype=dtype, device=self._device)
        dist.broadcast(value, source)
        return value

    def outputs(self, inputs: tuple[Tensor, ...]) -> Any:
        """The last layer's outputs on all ranks, without gradients. Collective: on all ranks, with the same batch."""
        count = math.gcd(len(inputs[0]), self._plan.microbatches)
        if count % max(1, count // self._world_size):  # which interleaving can't divide into rounds
            count = 1
        with torch.no_grad():
            schedule, _ = self._schedule(inputs, None, None, count)
            found = schedule.step(*(inputs if 0 in self._stages else ()))
        return collectives.broadcast(found, (self._num_stages - 1) % self._world_size, device=self._device)

    def _key(self, inputs: tuple[Tensor, ...], target: Tensor | None) -> Any:
        """What torch lays its buffers out by."""
        shapes = tuple((tuple(t.shape), t.dtype) for t in (*inputs, *([] if target is None else [target])))
        trained = hash(tuple([p.requires_grad for p in self.module.parameters()])) if target is not None else None
        return shapes, trained

    def _schedule(
        self,
        inputs: tuple[Tensor, ...],
        target: Tensor | None,
        loss: LossFunction | None,
        count: int | None = None,
    ) -> tuple[Any, torch.dtype | None]:
        key = self._key(inputs, target)
        if key in self._schedules:
            self._schedules.move_to_end(key)
            return self._schedules[key]
        parts = []
        for index, stage in self._stages.items():
            stage.probing = True
            parts.append(PipelineStage(stage, index, self._num_stages, self._device))
        kind = self._plan.schedule
        if loss is None and kind == "1f1b":  # wants a microbatch for each stage, for backwards that don't come
            kind = "gpipe"
        options: dict[str, Any] = {"scale_grads": False}  # it would divide what an earlier batch has left, too
        if loss is not None:
            options["loss_fn"] = self._weighed(loss)
        made = _SCHEDULES[kind](
            parts if kind == "interleaved_1f1b" else parts[0], count or self._plan.microbatches, **options
        )
        self._schedules[key] = (made, None)
        if len(self._schedules) > _MAX_KEPT:
            self._schedules.popitem(last=False)
        return self._schedules[key]

    def _weighed(self, loss: LossFunction) -> LossFunction:
        def weighed(output: Any, target: Tensor) -> Tensor:
            value = loss(output, target)
            self._losses.append(value.detach())
            return self._weigh(value / self._plan.microbatches)

        return weighed

    @contextmanager
    def _adding_ties(self) -> Iterator[None]:
        """Tied weights get the sum of the gradients of all ranks that hold them."""
        ties = [(parameter, group) for parameter, group, _ in self._ties if parameter.requires_grad]
        before = [parameter.grad for parameter, _ in ties]
        for parameter, _ in ties:
            parameter.grad = None
        yield
        for (parameter, group), earlier in zip(ties, before, strict=True):
            grad = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
            dist.all_reduce(grad, group=group)
            parameter.grad = grad if earlier is None else earlier + grad

    # ---- the engine's interface

    def forward(self, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        raise UsageError(
            f"{type(self.module).__name__} was called, but its layers lie on {self._world_size} ranks; call "
            "pipeline(inputs) for its outputs, or pipeline.forward_backward(inputs, target), where pipeline is what "
            "lite.setup_pipeline returned."
        )

    def method(self, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            return run(*args, **kwargs)
        except (RuntimeError, NotImplementedError) as error:
            if any(word in str(error) for word in _META):
                raise UsageError(
                    f"a method of {type(self.module).__name__} computes with layers that lie on another rank; only "
                    "pipeline(inputs) and pipeline.forward_backward(inputs, target) run them all."
                ) from error
            raise

    def no_sync(self) -> AbstractContextManager[None]:
        return nullcontext()

    def close(self) -> None:
        """Give the model back whole on every rank, with its optimizers' state. Collective: call on all ranks."""
        if self.closed:
            return
        self.closed = True
        for undo in self._undo:
            undo()
        module = self._module()
        if module is None:
            return
        if not dist.is_initialized():
            warnings.warn(
                f"{type(module).__name__} keeps this rank's layers alone: its processes have left their group, so it "
                "can't be put together any more; call lite.teardown() before the group ends.",
                stacklevel=2,
            )
            return
        from lite.strategies.repointing import repoint

        states = [
            (
                optimizer,
                elsewhere.fetch(elsewhere.complete_state(optimizer, optimizer.state_dict()), self._device, to_all=True),
            )
            for optimizer in sorted(self._optimizers, key=self._first_parameter)
        ]
        successors = self._made_whole(module)
        for optimizer, state in states:
            repoint(optimizer, lambda parameter: successors.get(id(parameter)))
            optimizer.load_state_dict(state)

    def _first_parameter(self, optimizer: Optimizer) -> int:
        """An order that all ranks have alike."""
        numbers = {id(p): n for n, p in enumerate(self.module.parameters())}
        return min(numbers.get(id(p), 0) for p in parameters_of(optimizer))

    def _made_whole(self, module: nn.Module) -> dict[int, nn.Parameter]:
        state: dict[str, Any] = dict(module.named_parameters(remove_duplicate=False))
        state.update(module.named_buffers(remove_duplicate=False))
        elsewhere.mark_in_state(module, state, "", None)
        found = elsewhere.fetch(state, self._device, to_all=True)
        successors: dict[int, nn.Parameter] = {}
        made: dict[int, Tensor] = {}
        kept = []
        for name, part in module.named_modules():
            for table in (part._parameters, part._buffers):
                for key, tensor in table.items():
                    if tensor is None or not tensor.is_meta:
                        continue
                    if id(tensor) not in made:
                        kept.append(tensor)
                        value = found[f"{name}.{key}" if name else key].to(self._device)
                        if table is part._parameters:
                            value = nn.Parameter(value, requires_grad=tensor.requires_grad)
                            successors[id(tensor)] = value
                        made[id(tensor)] = value
                    table[key] = made[id(tensor)]
        return successors
