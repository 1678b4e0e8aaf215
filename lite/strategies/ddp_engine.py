"""What stands around one model under DDP: whose gradients are averaged, by which backward, and who is told when not.

Relies on parts of torch that it doesn't document, as they are in torch 2.13: `AccumulateGrad.variable`,
`DistributedDataParallel.require_forward_param_sync`, `require_backward_grad_sync` and `_join_config`
(with what disables it), the texts of DDP's errors, and `torch._C._current_graph_task_id`.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.algorithms.join import _JoinConfig
from torch.optim import Optimizer

from lite.errors import UsageError, some
from lite.strategies import provenance
from lite.strategies.base import Engine, refuse_foreign
from lite.strategies.comm_hooks import Register
from lite.strategies.ddp_parameters import Averaged
from lite.strategies.turns import Turns

_WITHOUT_GRADIENT = re.compile(r"indices which did not receive grad for rank \d+: ((?:\d+ ?)+)")
_NO_OUTPUT = (
    "lite.backward got a loss that does not come from the output of a model that lite.setup returned, so gradients "
    "would stay different on each rank; compute it from the output of the model (or of one of its own public methods), "
    "not of a submodule or a copy of it. A loss made of gradients (torch.autograd.grad with create_graph=True) has to "
    "be added to one that is computed from the output."
)


class Engines:
    """The engines of one job: which model a parameter belongs to, and whose method is running.

    Attributes:
        running: Engines of which a method other than forward runs now, the innermost last.
        begun: Those that average gradients in the backward that runs now.
        turns: Whose forward is next, within `lite.join`.
    """

    def __init__(self) -> None:
        self.running: list[DDPEngine] = []
        self.turns: Turns | None = None
        self.begun: set[DDPEngine] = set()
        self._all: list[weakref.ref[DDPEngine]] = []

    def add(self, engine: DDPEngine) -> None:
        self._all = [ref for ref in self._all if ref() is not None]
        self._all.append(weakref.ref(engine))

    def __iter__(self) -> Iterator[DDPEngine]:
        """The engines of models that are set up."""
        return (engine for ref in self._all if (engine := ref()) is not None and not engine.closed)

    def owners(self, parameter: Tensor) -> list[DDPEngine]:
        """The engines that know the parameter."""
        return [engine for engine in self if id(parameter) in engine.names]

    def strayed(self, parameter: Tensor, states: Iterable[State]) -> bool:
        """Whether nobody averages it: it belongs to none of the models that ran in these states.

        A leaf that is no parameter and of no model is somebody's input, whose gradient is this rank's own.
        """
        owners = self.owners(parameter)
        if not owners:
            return isinstance(parameter, nn.Parameter)
        return not any(state.engine() in owners for state in states)

    def prepare_backward(self, loss: Tensor, *, partial: bool) -> Tensor:
        """Check the loss and prepare the models that it comes from; see `Strategy.prepare_backward`."""
        provenance.check_has_graph(loss)
        for outer in reversed(self.running):  # the loss was computed within a method of this model
            loss = outer.announce(loss)
        marks, leaves = provenance.origins([loss])
        states: set[State] = set().union(*(mark.states for mark in marks))
        if not states:
            raise UsageError(_NO_OUTPUT)
        for leaf in (*leaves, *(leaf for mark in marks for leaf in mark.leaves)):
            if self.strayed(leaf, states):
                raise UsageError(_stray(leaf, self.owners(leaf)))
        engines = {engine for state in states if (engine := state.check()) is not None}
        if partial and engines:
            raise UsageError(
                "lite.backward(loss, inputs=[...]) leaves out parameters that the ranks wait for, so no gradient would "
                "be averaged; leave inputs= out, or use torch.autograd.grad and average by lite.all_reduce."
            )
        for engine in engines:
            loss = engine.begin_backward(loss)
        self.begun = engines
        return loss

    def finish_backward(self) -> None:
        """The backward has ended: every model that it averages gradients of must have had all of them."""
        begun, self.begun = self.begun, set()
        for engine in begun:
            engine.finish_backward()

    def abandon_backward(self) -> None:
        """The backward has failed."""
        begun, self.begun = self.begun, set()
        for engine in begun:
            engine.abandon_backward()

    @contextmanager
    def in_turn(self, engines: Iterable[DDPEngine]) -> Iterator[None]:
        """A context in which these run one after another, each with its backward, as `Turns` says."""
        before, self.turns = self.turns, Turns({engine: type(engine._averaged.module).__name__ for engine in engines})
        try:
            yield
            self.turns.end()
        finally:
            self.turns = before

    def check_optimizer(self, optimizer: Optimizer) -> None:
        """Refuse an optimizer with parameters that no engine knows."""
        known: set[int] = set().union(*(engine.names for engine in self))
        refuse_foreign(optimizer, lambda parameter: id(parameter) in known)


@dataclass(frozen=True)
class State:
    """What was agreed when a forward ran: all of one phase are equal."""

    engine: weakref.ref[DDPEngine]
    generation: int | None  # of the engine's DDP; None where there was nothing to average
    synchronised: bool
    backwards: int

    def check(self) -> DDPEngine | None:
        """Return the engine if this backward will synchronise it; refuse one that would leave it out unnoticed."""
        engine = self.engine()
        if engine is None or engine.closed:
            raise UsageError(
                "lite.backward got a loss of a model that lite.teardown() has given back since its forward, so its "
                "gradients would stay different on each rank; call backward before teardown."
            )
        if self.generation is None:
            return None
        if self.generation != engine.generation:
            raise UsageError(
                "parameters were frozen or unfrozen between a forward and its backward; do so before the forward."
            )
        if self.synchronised != engine.synchronise:
            where = ("outside", "inside") if self.synchronised else ("inside", "outside")
            raise UsageError(
                f"the forward ran {where[0]} no_backward_sync but the backward {where[1]} it; DDP decides at the "
                "forward, so put both into the same `with lite.no_backward_sync(model, ...)` block."
            )
        if self.synchronised and self.backwards != engine.backwards:
            raise UsageError(
                "a second backward after one forward phase would not be synchronised: the gradients of this model were "
                "already averaged by an earlier lite.backward since this forward. Add the losses up and call "
                "lite.backward once, call each backward right after its own forward, or put all but the last pair into "
                "lite.no_backward_sync(model)."
            )
        return engine if self.synchronised else None


class DDPEngine(Engine):
    """DDP around one model, without a trace of it in the model's own attributes or keys.

    Buffers follow rank 0's at each forward whose backward averages gradients. A forward without gradients is the
    module's own and communicates nothing, so one rank may evaluate alone.

    Attributes:
        names: The model's parameters at setup, id to name.
        backwards: How many backwards have averaged its gradients.
        gradients_agree: Whether the last forward prepared gradients that are equal on all ranks.
        closed: The model has been given back.
    """

    def __init__(
        self,
        module: nn.Module,
        engines: Engines,
        register: Register | None,
        options: dict[str, Any],
    ) -> None:
        self._self = weakref.ref(self)
        self._engines = engines
        self._averaged = Averaged(module, register, options)
        self._static = bool(options.get("static_graph"))
        self._unused = bool(options.get("find_unused_parameters")) and not self._static
        self.names = self._averaged.names
        self.syncs_buffers = bool(options.get("broadcast_buffers", True))
        self._started = self.closed = False
        self.backwards = 0
        self.gradients_agree = not self._averaged.ignored
        engines.add(self)

    @property
    def generation(self) -> int:
        """Counts the DDPs: there is a new one when parameters are frozen or unfrozen."""
        return self._averaged.generation

    @property
    def synchronise(self) -> bool:
        """Whether forwards and backwards average gradients now: false within `no_sync`."""
        return self._averaged.synchronise

    @property
    def ddp(self) -> nn.parallel.DistributedDataParallel | None:
        """The newest one; None where nothing is trained."""
        return self._averaged.ddp

    # ---- forward and methods

    def forward(self, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # Within a backward it is activation checkpointing that runs the forward again.
        if not torch.is_grad_enabled() or torch._C._current_graph_task_id() != -1:
            return run(*args, **kwargs)
        ddp = self._averaged.current()
        inputs = list(provenance.tensors_with_grad((args, kwargs)))
        if ddp is None:
            outputs = run(*args, **kwargs)
        else:
            if not ddp._join_config.enable:  # whose ranks that have ended go by DDP's own rule
                # DDP goes by the forward before, of which a resumed run that begins within a window knows nothing.
                ddp.require_forward_param_sync = self.synchronise
            outputs = self._through(ddp, run, *args, **kwargs)
        self._tag(outputs, inputs, ddp)
        return outputs

    def method(self, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not torch.is_grad_enabled() or torch._C._current_graph_task_id() != -1:
            return run(*args, **kwargs)
        inputs = list(provenance.tensors_with_grad((args, kwargs)))
        self._engines.running.append(self)
        try:
            outputs = run(*args, **kwargs)
        finally:
            self._engines.running.pop()
        return self.announce(outputs, inputs)

    def announce(self, outputs: Any, inputs: Sequence[Tensor] = ()) -> Any:
        """Prepare for a backward through what was computed without DDP's forward; return it."""
        if next(provenance.tensors_with_grad(outputs), None) is None:
            return outputs
        ddp = self._averaged.current()
        if ddp is not None:
            outputs = self._prepare(ddp, outputs)
        self._tag(outputs, inputs, ddp)
        return outputs

    def begin_backward(self, loss: Tensor) -> Tensor:
        """The loss is about to be differentiated, and this model's gradients with it; return it."""
        self.backwards += 1
        if self._unused and self._averaged.ddp is not None:
            # DDP has looked for unused parameters in the last outputs alone; the loss knows better.
            loss = self._prepare_again(self._averaged.ddp, loss)
        if self._engines.turns is not None:
            self._engines.turns.finish(self)
        return loss

    def finish_backward(self) -> None:
        """Refuse a backward that has left parameters out: the averaging of all gradients waits for theirs."""
        ddp = self._averaged.ddp
        if ddp is None:
            return
        try:
            ddp._check_reducer_finalized()  # type: ignore[no-untyped-call]  # so in torch 2.6 to 2.13
        except RuntimeError as error:
            self._explain_unused(error)
            raise

    def abandon_backward(self) -> None:
        """The backward has failed: go on as if it had not been."""
        self._averaged.renew()

    def _prepare_again(self, ddp: nn.parallel.DistributedDataParallel, loss: Tensor) -> Tensor:
        # Within `lite.join` the other ranks have answered the forward already.
        before, ddp._join_config = ddp._join_config, _JoinConfig.construct_disabled_join_config()  # type: ignore[no-untyped-call]
        try:
            return self._prepare(ddp, loss)  # type: ignore[no-any-return]
        finally:
            ddp._join_config = before

    def _prepare(self, ddp: nn.parallel.DistributedDataParallel, outputs: Any) -> Any:
        # Broadcasting buffers now would change what the backward needs, and methods communicate nothing.
        before, ddp.require_forward_param_sync = ddp.require_forward_param_sync, False
        try:
            return self._through(ddp, _identity, outputs)
        except BaseException:
            ddp.require_forward_param_sync = before
            raise

    def _through(self, ddp: nn.parallel.DistributedDataParallel, run: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        if self._engines.turns is not None and ddp._join_config.enable:
            self._engines.turns.begin(self, synchronised=self.synchronise)
        try:
            return ddp(run, *args, **kw)
        except RuntimeError as error:
            self._explain_unused(error)
            raise

    def _tag(self, outputs: Any, inputs: Sequence[Tensor], ddp: nn.parallel.DistributedDataParallel | None) -> None:
        self._started = True
        if ddp is not None:
            self.gradients_agree = self.synchronise and not self._averaged.ignored
        generation = None if ddp is None else self.generation
        states = {State(self._self, generation, self.synchronise, self.backwards)}
        before, leaves = provenance.origins(inputs)
        for mark in before:
            states |= mark.states
            leaves.extend(mark.leaves)
        stray = {id(leaf): leaf for leaf in leaves if self._engines.strayed(leaf, states)}
        provenance.tag(outputs, provenance.Mark(frozenset(states), tuple(stray.values())), before)

    # ---- synchronisation

    def no_sync(self) -> AbstractContextManager[None]:
        if self._static and not self._started:
            raise UsageError(
                "no_backward_sync on the first step is impossible with DDPStrategy(static_graph=True); let the first "
                "step synchronise (enabled=False), or leave static_graph out."
            )
        return self._no_sync()

    @contextmanager
    def _no_sync(self) -> Iterator[None]:
        before = self.synchronise
        self._averaged.set_synchronise(False)
        try:
            yield
        finally:
            self._averaged.set_synchronise(before)

    def sync_buffers(self) -> None:
        ddp = self._averaged.ddp
        if ddp is not None and ddp.modules_buffers:
            with torch.no_grad():
                ddp._sync_module_buffers(0)  # type: ignore[no-untyped-call]  # so in torch 2.6 to 2.13

    def close(self) -> None:
        self._averaged.close()
        self.closed = True

    def _explain_unused(self, error: RuntimeError) -> None:
        if "Expected to have finished reduction in the prior iteration" not in str(error):
            return
        # Gradients of earlier backwards may still be there, so only DDP knows which ones this backward has brought.
        found = _WITHOUT_GRADIENT.search(str(error))
        reduced = self._averaged.reduced
        which = f" ({some([reduced[int(index)] for index in found[1].split()])})" if found else ""
        raise UsageError(
            f"some parameters{which} got no gradient in a backward, so its synchronisation never finished; use "
            'strategy="ddp_find_unused_parameters_true", or make every parameter take part in the loss.'
        ) from error


def _identity(outputs: Any) -> Any:
    return outputs


def _stray(leaf: Tensor, owners: list[DDPEngine]) -> str:
    if not owners:
        return (
            f"lite.backward got a loss that depends on a parameter of shape {tuple(leaf.shape)} of no model that is "
            "set up, so its gradient would stay different on each rank; make it part of a model that you pass to "
            "lite.setup, call requires_grad_(False) where it is not trained (a fixed network in the loss, say), or "
            "make it a plain tensor where each rank is meant to have its own."
        )
    return f"{_NO_OUTPUT} (It reaches the parameter {owners[0].names[id(leaf)]!r} past the model.)"
