"""Ranks train apart and come together every few steps: local SGD, and DiLoCo with an outer optimizer."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Optimizer

from lite import collectives
from lite.errors import ConfigError, UsageError
from lite.first_rank import refuse_alone
from lite.precision.base import is_packed
from lite.state import parameters_of
from lite.strategies.base import Engine
from lite.strategies.ddp import DDPStrategy
from lite.strategies.rounds import OuterOptimizer, Round, make_outer
from lite.swapped import refuse_swapped

if TYPE_CHECKING:
    from lite.strategies.footprint import Footprint


class LocalSGDStrategy(DDPStrategy):
    """Each rank trains a whole model by itself; every `sync_every` optimizer steps the ranks come together.

    Without an outer optimizer the parameters become their mean over the ranks (local SGD). With one, the mean over the
    ranks of how far each has come since the last time, theta_start - theta_rank, is taken for a gradient (of the
    parameters as they were then), and the outer optimizer steps on it (DiLoCo). Each optimizer counts its own steps,
    those that a loss scale leaves out too, and brings together what it trains; its own state stays each rank's own.
    Floating-point buffers (BatchNorm's statistics) become their mean as well. With `sync_every=1`, no outer optimizer
    and plain SGD the weights are those of DDP.

    Between two syncs the ranks' weights differ on purpose: evaluate, compare (`check_sync`) and average (`lite.ema`)
    right after one, when `in_sync` is true, or end the period early by `end_period()`. The Trainer ends one before each
    validation in a fit and as training ends, `lite.teardown` before it gives models back; the next period begins there.
    Hooks after an optimizer's step run before the sync.

    A checkpoint can be saved at any step. As seen by other strategies, the model in it is the one that the ranks last
    agreed on, or without an outer optimizer their present mean, and the optimizer state is rank 0's. It also holds each
    rank's own, so that as many ranks go on where they were, bit for bit: for each optimizer that is saved together with
    all that it trains, and loaded with it.

    With one process it does nothing at all, unless there is an outer optimizer.

    Args:
        sync_every: Optimizer steps between two syncs: H in the papers.
        outer_optimizer: None; "diloco" for the paper's (SGD with Nesterov momentum 0.9 and learning rate 0.7); or a
            function of a list of parameters that returns an optimizer of all of them, whose step needs no closure.
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
        self._rounds: list[Round] = []
        self._modules: list[weakref.ref[nn.Module]] = []

    @property
    def trains_apart(self) -> bool:
        return self._world_size > 1 or self._outer is not None

    @property
    def in_sync(self) -> bool:
        """Whether no optimizer has stepped since the ranks came together: all have the same weights."""
        return all(part.count == 0 for part in self._rounds)

    def is_in_sync(self, module: nn.Module) -> bool:
        return all(part.count == 0 or not part.holds(module) for part in self._rounds)

    def wrap(self, module: nn.Module, device: torch.device) -> Engine | None:
        self._modules = [ref for ref in self._modules if ref() not in (None, module)]
        self._modules.append(weakref.ref(module))
        if self._world_size > 1:
            refuse_alone("lite.setup")
            for tensor in (*module.parameters(), *module.buffers()):
                _broadcast(tensor)
        return None

    def footprint(self, module: nn.Module, world_size: int) -> Footprint | None:
        from lite.strategies.footprint import Footprint

        outer = partial(make_outer, self._outer) if self._outer is not None else None
        # Averaging sends the parameters, or their changes, in one piece, of the gradients' size.
        return Footprint(gradient_copy=world_size > 1, outer=outer)

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
        held = parameters_of(optimizer)
        part = Round(optimizer, held, self.sync_every, self._outer, self._modules)
        self._rounds.append(part)

        def undo() -> None:
            self._rounds.remove(part)
            part.release()

        return undo

    def end_period(self) -> None:
        """Bring the ranks together now, as after the last step of a period; where they are together, do nothing.

        Collective: call on all ranks. The Trainer calls it before a validation and as training ends, and
        `lite.teardown` for what it gives back.

        Raises:
            UsageError: Averages stand in the place of weights that would be brought together (`ema.swap`).
        """
        if self.in_sync:
            return
        if self._world_size > 1 and not dist.is_initialized():
            warnings.warn(
                "LocalSGDStrategy: the ranks' weights stay as different as they are since the last sync: their "
                "processes have left their group; call lite.strategy.end_period() or lite.teardown() before it ends.",
                stacklevel=2,
            )
            return
        refuse_alone("lite.strategy.end_period")
        due = [part for part in self._rounds if part.count]
        for part in due:
            refuse_swapped("lite.strategy.end_period()", part.held)
        for part in due:
            part.finish()

    # ---- checkpoints

    @contextmanager
    def saving(self) -> Iterator[None]:
        with ExitStack() as stack:
            for part in self._rounds:
                stack.enter_context(part.shared())
            yield

    def own_state(self, state: Mapping[str, Any], content: Mapping[str, Any]) -> Any:
        mine = [kept for part in self._rounds if (kept := part.own_state(state, content)) is not None]
        return mine or None

    def loading(self, states: list[Any], state: Mapping[str, Any], loaded: Mapping[str, Any]) -> Callable[[], None]:
        exact = len(states) == self._world_size
        mine = (states[collectives.rank() if exact else 0] if states else None) or []
        found = [(part, part.find(mine, state, loaded), part.versions()) for part in self._rounds]

        def go_on() -> None:
            for part, kept, before in found:
                if kept is not None:
                    part.go_on(kept, exact=exact)
                elif part.versions().held != before.held:
                    part.begin(before)

        return go_on


def diloco(parameters: list[nn.Parameter]) -> Optimizer:
    """The paper's outer optimizer: SGD with Nesterov momentum 0.9 and learning rate 0.7 (section 3.1)."""
    return SGD(parameters, lr=0.7, momentum=0.9, nesterov=True)


def _broadcast(tensor: Tensor) -> None:
    if tensor.numel() and not is_packed(tensor):
        collectives.take_from_rank_0(tensor)
