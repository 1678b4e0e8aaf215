"""Ranks train apart and come together every few steps: local SGD, and DiLoCo with an outer optimizer."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Optimizer

from lite import collectives
from lite.disguise import disguise
from lite.errors import CheckpointError, ConfigError, UsageError
from lite.first_rank import refuse_alone
from lite.precision.base import is_packed
from lite.strategies.base import Engine
from lite.strategies.ddp import DDPStrategy

if TYPE_CHECKING:
    from lite.strategies.footprint import Footprint

OuterOptimizer = Callable[[list[nn.Parameter]], Optimizer]


class LocalSGDStrategy(DDPStrategy):
    """Each rank trains a whole model by itself; every `sync_every` optimizer steps the ranks come together.

    Without an outer optimizer the parameters become their mean over the ranks (local SGD). With one, the mean over the
    ranks of how far each has come since the last time, theta_start - theta_rank, is taken for a gradient (of the
    parameters as they were then), and the outer optimizer steps on it (DiLoCo). Each optimizer counts its own steps,
    those that a loss scale leaves out too, and brings together what it trains; its own state stays each rank's own.
    Floating-point buffers (BatchNorm's statistics) become their mean as well. With `sync_every=1`, no outer optimizer
    and plain SGD the weights are those of DDP.

    Between two syncs the ranks' weights differ on purpose: evaluate and compare (`check_sync`) right after one,
    when `in_sync` is true. Hooks after an optimizer's step run before the sync. A checkpoint can be saved at any step.
    As seen by other strategies, the model in it is the one that the ranks last agreed on, or without an outer optimizer
    their present mean, and the optimizer state is rank 0's. It also holds each rank's own, so that as many ranks go on
    where they were, bit for bit.

    With one process it does nothing at all, unless there is an outer optimizer.

    Args:
        sync_every: Optimizer steps between two syncs: H in the papers.
        outer_optimizer: None; "diloco" for the paper's (SGD with Nesterov momentum 0.9 and learning rate 0.7); or a
            function of a list of parameters that returns an optimizer of them.
        process_group_backend: "gloo", "nccl", ...; None chooses by device.
        timeout: How long a collective may wait for the other ranks; None is torch's default.
        start_method: How `Lite.launch` starts processes: "spawn", "fork" or "forkserver".

    Source: Stich 2018, https://arxiv.org/abs/1805.09767 (local SGD, algorithm 1); Douillard et al. 2023,
        https://arxiv.org/abs/2311.08105 (DiLoCo, algorithm 1, lines 11 to 14)
    """

    name = "local_sgd"

    def __init__(
        self,
        *,
        sync_every: int = 8,
        outer_optimizer: str | OuterOptimizer | None = None,
        process_group_backend: str | None = None,
        timeout: timedelta | None = None,
        start_method: str = "spawn",
    ) -> None:
        super().__init__(process_group_backend=process_group_backend, timeout=timeout, start_method=start_method)
        if isinstance(sync_every, bool) or not isinstance(sync_every, int) or sync_every < 1:
            raise ConfigError(f"sync_every={sync_every!r} must be a whole number of at least 1: optimizer steps.")
        if isinstance(outer_optimizer, str):
            if outer_optimizer != "diloco":
                raise ConfigError(f"outer_optimizer={outer_optimizer!r} is not known; use 'diloco', or a function.")
            outer_optimizer = diloco
        if outer_optimizer is not None and (not callable(outer_optimizer) or isinstance(outer_optimizer, type)):
            raise ConfigError(
                f"outer_optimizer={outer_optimizer!r} must be a function that makes an optimizer of a list of "
                "parameters, e.g. lambda params: torch.optim.SGD(params, lr=0.7, momentum=0.9, nesterov=True)."
            )
        self.sync_every = sync_every
        self._outer = outer_optimizer
        self._rounds: list[_Round] = []
        self._modules: list[weakref.ref[nn.Module]] = []

    @property
    def in_sync(self) -> bool:
        """Whether no optimizer has stepped since the ranks came together: all have the same weights."""
        return all(part.count == 0 for part in self._rounds)

    def wrap(self, module: nn.Module, device: torch.device) -> Engine | None:
        self._modules = [ref for ref in self._modules if ref() is not None]
        self._modules.append(weakref.ref(module))
        if self._world_size > 1:
            refuse_alone("lite.setup")
            for tensor in (*module.parameters(), *module.buffers()):
                _broadcast(tensor)
        return None

    def footprint(self, module: nn.Module, world_size: int) -> Footprint | None:
        from lite.strategies.footprint import Footprint

        # Averaging sends the parameters, or their changes, in one piece, of the gradients' size.
        return Footprint(gradient_copy=world_size > 1, outer=self._outer)

    def explain(self, module: nn.Module) -> str:
        if self._world_size == 1:
            return "the module itself: one process"
        what = "parameters are averaged" if self._outer is None else "an outer optimizer steps on the mean change"
        return f"the module itself: {self._world_size} ranks train apart, and {what} every {self.sync_every} steps"

    def prepare_backward(self, loss: Tensor, *, partial: bool = False) -> Tensor:
        return loss

    def check_new_optimizer(self, optimizer: Optimizer) -> None:
        if isinstance(optimizer, LBFGS) and self._world_size > 1:
            raise ConfigError(
                "LocalSGDStrategy with LBFGS: it asks all ranks for its loss at each evaluation, and they make "
                "different numbers of them between two syncs; use another optimizer, or strategy='ddp'."
            )

    def check_optimizer(self, optimizer: Optimizer) -> None:
        """Every parameter that an optimizer holds is brought together by its own round."""

    def norms_agree(self) -> bool:
        return True  # they don't, but each rank decides for itself between two syncs

    def no_sync(self, engine: Engine | None, enabled: bool) -> AbstractContextManager[None]:
        return nullcontext()

    def join(
        self, engines: Sequence[Engine | None], optimizers: Sequence[Optimizer], **options: Any
    ) -> AbstractContextManager[None]:
        if self._world_size == 1:
            return nullcontext()
        raise UsageError("lite.join is for DDP; under LocalSGDStrategy give all ranks equally many steps.")

    # ---- rounds

    def follow_optimizer(self, optimizer: Optimizer) -> Callable[[], None] | None:
        if self._world_size == 1 and self._outer is None:
            return None
        held = [p for group in optimizer.param_groups for p in group["params"]]
        part = _Round(optimizer, held, self.sync_every, self._outer, self._modules)
        self._rounds.append(part)

        def undo() -> None:
            self._rounds.remove(part)
            part.release()

        return undo

    # ---- checkpoints

    @contextmanager
    def saving(self) -> Iterator[Any]:
        mine = [part.state_dict() for part in self._rounds]
        with ExitStack() as stack:
            for part in self._rounds:
                stack.enter_context(part.shared())
            yield mine or None

    def load_states(self, states: list[Any]) -> None:
        for part in self._rounds:
            part.begin()
        if not states or not self._rounds:
            return
        exact = len(states) == self._world_size
        mine = states[collectives.rank() if exact else 0]
        if len(mine) != len(self._rounds):
            raise CheckpointError(
                f"the checkpoint has {len(mine)} optimizers under LocalSGDStrategy and this run has "
                f"{len(self._rounds)}; set up as many, in the same order."
            )
        for part, state in zip(self._rounds, mine, strict=True):
            part.load_state_dict(state, exact=exact)


def diloco(parameters: list[nn.Parameter]) -> Optimizer:
    """The paper's outer optimizer: SGD with Nesterov momentum 0.9 and learning rate 0.7 (section 3.1)."""
    return SGD(parameters, lr=0.7, momentum=0.9, nesterov=True)


class _Round:
    """What one optimizer's parameters were when the ranks last agreed, and how many steps ago that was.

    Args:
        optimizer: The inner optimizer; its step is followed until `release`.
        held: Its parameters.
        sync_every: Steps of a round.
        outer: Makes the outer optimizer, or None.
        modules: The set-up models, whose buffers are averaged too.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        held: list[nn.Parameter],
        sync_every: int,
        outer: OuterOptimizer | None,
        modules: Iterable[weakref.ref[nn.Module]],
    ) -> None:
        self._optimizer = weakref.ref(optimizer)
        self._held = held
        self._sync_every = sync_every
        self.count = 0
        mine = {id(p) for p in held}
        self._modules = [
            ref for ref in modules if (m := ref()) is not None and any(id(p) in mine for p in m.parameters())
        ]
        self._start = [nn.Parameter(p.detach().clone()) for p in held] if outer is not None else []
        self._outer = outer(self._start) if outer is not None else None
        if self._outer is not None and not isinstance(self._outer, Optimizer):
            raise ConfigError(f"outer_optimizer returned {self._outer!r}; it must return a torch optimizer.")
        self._raw = type(optimizer)
        self._patched = optimizer.__dict__.pop("step", None)
        step = self._step(self._patched or self._raw.step.__get__(optimizer))
        disguise(optimizer, {"step": step, "state_is_local": True})

    def release(self) -> None:
        optimizer = self._optimizer()
        if optimizer is not None:
            optimizer.__class__ = self._raw
            if self._patched is not None:
                optimizer.__dict__["step"] = self._patched

    def _step(self, below: Callable[..., Any]) -> Callable[..., Any]:
        inside = False
        reference = weakref.ref(self)
        unbound: Any = getattr(below, "__func__", None)

        def step(self: Optimizer, *args: Any, **kwargs: Any) -> Any:
            nonlocal inside
            take = below if unbound is None else unbound.__get__(self)
            if inside:  # a loss scaler calls the step of the optimizer that it is given
                return take(*args, **kwargs)
            inside = True
            self._opt_called = True  # type: ignore[attr-defined]  # schedulers ask whether step was called at all
            try:
                value = take(*args, **kwargs)
            finally:
                inside = False
            part = reference()
            if part is not None:
                part.advance()
            return value

        step.hooked = step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
        return step

    @torch.no_grad()
    def advance(self) -> None:
        """One more step was asked for; at the last of a round, bring the ranks together."""
        self.count += 1
        if self.count < self._sync_every:
            return
        self.count = 0
        if self._outer is None:
            _average(self._held)
        else:
            # Delta = mean over ranks of theta(t-1) - theta_i(t); theta(t) = OuterOpt(theta(t-1), Delta)
            deltas = [start - p.to(start.dtype) for start, p in zip(self._start, self._held, strict=True)]
            _average(deltas)
            for start, delta in zip(self._start, deltas, strict=True):
                start.grad = delta
            self._outer.step()
            self._outer.zero_grad()
            _copy(self._held, self._start)
        _average(self._buffers())

    def _buffers(self) -> list[Tensor]:
        modules = [module for ref in self._modules if (module := ref()) is not None]
        return [b for module in modules for b in module.buffers() if b.is_floating_point()]

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Within it all ranks hold the same values. Collective: call on all ranks."""
        optimizer = self._optimizer()
        assert optimizer is not None
        tensors = [*(self._held if self.count else ()), *self._buffers()]
        mine = [t.detach().clone() for t in tensors]
        state = optimizer.state
        if self.count and self._outer is None:
            _average(self._held)
        elif self.count:
            _copy(self._held, self._start)
        _average(self._buffers())
        if collectives.world_size() > 1:
            firsts = collectives.broadcast([state.get(p) for p in self._held])
            if collectives.rank():
                optimizer.state = defaultdict(
                    dict, {p: first for p, first in zip(self._held, firsts, strict=True) if first is not None}
                )
        try:
            yield
        finally:
            optimizer.state = state
            _copy(tensors, mine)

    def state_dict(self) -> dict[str, Any]:
        optimizer = self._optimizer()
        assert optimizer is not None
        return {
            "count": self.count,
            "inner": optimizer.state_dict()["state"],
            "weights": [p.detach().clone() for p in self._held] if self.count else None,
            "buffers": [b.detach().clone() for b in self._buffers()],
            "outer": self._outer.state_dict() if self._outer is not None else None,
        }

    def begin(self) -> None:
        """A new round begins with the weights that were loaded."""
        self.count = 0
        _copy(self._start, self._held if self._start else ())

    def load_state_dict(self, state: dict[str, Any], *, exact: bool) -> None:
        """Take over a rank's state; the shared model and optimizer state have been loaded before."""
        optimizer = self._optimizer()
        assert optimizer is not None
        if self._outer is not None and state["outer"] is not None:
            self._outer.load_state_dict(state["outer"])
        if not exact:
            return
        self.count = state["count"]
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state["inner"]})
        if state["weights"] is not None:
            _copy(self._held, state["weights"])
        _copy(self._buffers(), state["buffers"])


@torch.no_grad()
def _copy(to: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for tensor, value in zip(to, values, strict=True):
        tensor.copy_(value)


def _average(tensors: Sequence[Tensor]) -> None:
    """Replace each by its mean over the ranks, in few messages. Collective: call on all ranks."""
    size = collectives.world_size()
    if size == 1:
        return
    kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor.detach())
    for alike in kinds.values():
        flat = torch.cat([tensor.reshape(-1) for tensor in alike])
        dist.all_reduce(flat)
        flat /= size
        for tensor, part in zip(alike, torch.split(flat, [t.numel() for t in alike]), strict=True):
            tensor.copy_(part.view_as(tensor))


def _broadcast(tensor: Tensor) -> None:
    if tensor.numel() and not is_packed(tensor):
        collectives.take_from_rank_0(tensor)
