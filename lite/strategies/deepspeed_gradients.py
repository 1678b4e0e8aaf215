"""The gradients of one model under DeepSpeed, from backward to step.

How DeepSpeed 0.19 behaves, and what follows from it:
- From stage 1 on gradients leave `p.grad` in backward. They are reduced, and added up, in what `averaged_gradients`
  lists in the end: this rank's parts, which clipping and loss scales work on. Only `engine.backward` finishes them
  rightly where a backward goes through several forwards; so `begin_backward` and `end_backward` do what it does around
  its own call.
- Stage 3 leaves old gradients where a parameter gets none; so its buffer is emptied at each window's begin. It takes
  two backwards for one unless it is told of a forward in between (`clear_backward_seen_flag`); so it is told of one at
  each backward.
- From stage 1 on parameters without any gradient are stepped with zeros. That is warned of.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lite import collectives
from lite.errors import UsageError, some


class Gradients:
    """Of one model.

    Args:
        module: The model.
        stage: ZeRO's.
        device: The model's.

    Attributes:
        agree: Whether none is this rank's own.
    """

    def __init__(self, module: nn.Module, stage: int, device: torch.device) -> None:
        self._module = weakref.ref(module)
        self._stage = stage
        self._device = device
        self._engine: Any = None
        self._names = [name for name, _ in module.named_parameters()]
        self._parameters = list(module.parameters())
        self._trained = [n for n, p in enumerate(self._parameters) if p.requires_grad]
        self._hooks = [self._notice(number) for number in self._trained]
        self._sync = True
        self._begun = self._runs = self._failed = False
        self._before: tuple[bool, dict[int, list[Tensor]]] = False, {}
        self.agree = True
        self._pending = self._finished = False
        self._held: dict[int, list[Tensor]] = {}
        self._seen: set[int] = set()  # the parameters that got one
        self._warned = False

    def _notice(self, number: int) -> Any:
        def note(parameter: Tensor) -> None:
            self._seen.add(number)

        return self._parameters[number].register_post_accumulate_grad_hook(note)  # type: ignore[no-untyped-call]

    def connect(self, engine: Any) -> None:
        """DeepSpeed's engine has been made; None: it is gone."""
        self._engine = engine

    def close(self) -> None:
        """Let go of the parameters."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._parameters = [], []

    @property
    def _zero(self) -> Any:
        """DeepSpeed's optimizer."""
        return self._engine.optimizer

    # ---- backward

    def begin_backward(self) -> None:
        """A backward that reaches the model is about to begin; `note_begun` is called when it does."""
        self._forget_refused()
        if self._failed or self._begun:
            self._failed = True
            raise UsageError(
                f"a backward through {type(self._module()).__name__} has failed half-way before, and DeepSpeed still "
                "has a part of its gradients; call lite.teardown() and set up again."
            )
        self._begun, self._runs = True, False
        self._before = self._finished, self._held
        if self._stage == 0:
            return
        if not self._pending:
            self._seen.clear()
        zero, engine = self._zero, self._engine
        if self._stage == 3:
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
        if self._stage > 0:
            self._zero.exit_backward()
            self._leave_backward()

    def _leave_backward(self) -> None:
        engine = self._engine
        engine._running_engine_backward_count -= 1
        engine._running_engine_backward = engine._running_engine_backward_count > 0

    def end_backward(self) -> None:
        """It is done: reduce what it has left."""
        self._begun = False
        self._pending = True
        if self._stage == 0:
            self.agree = self._sync
            if self._sync:
                self._reduce_all()
            return
        self._engine._backward_epilogue()
        self._leave_backward()

    def _reduce_all(self) -> None:
        """Stage 0: the mean of the ranks' gradients, in place.

        DeepSpeed puts zeros where a rank has none. Where no rank has any, none is left, so that the step leaves the
        parameter alone; a rank that has all asks no device for that.
        """
        trained = [p for p in self._parameters if p.requires_grad]
        mine = [p.grad is not None for p in trained]
        anywhere: Tensor = collectives.all_reduce(torch.tensor(mine, dtype=torch.uint8, device=self._device), "max")
        self._engine.set_gradient_accumulation_boundary(True)
        self._engine.allreduce_gradients()
        if not all(mine):
            for parameter, has_one in zip(trained, anywhere.tolist(), strict=True):
                if not has_one:
                    parameter.grad = None

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Stage 0: leave them each rank's own. From stage 1 on they are added up in DeepSpeed's own way anyway."""
        before, self._sync = self._sync, False
        try:
            yield
        finally:
            self._sync = before

    # ---- between backward and step

    def parts(self) -> list[Tensor]:
        """From stage 1 on: this rank's parts of the mean gradients, to read and to change; none without a backward."""
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
        if self._stage == 1:
            self._engine.set_gradient_accumulation_boundary(True)
            self._engine.allreduce_gradients()
        elif self._stage == 2:
            zero.finalize_gradient_accumulation_boundary()
        for i, parts in self._held.items():
            torch._foreach_add_(zero.averaged_gradients[i], parts)
        self._held = {}

    def drop(self) -> None:
        """Forget them, so that the next step changes nothing."""
        self._forget_refused()
        self._held = {}
        self._finished = self._pending = False
        self.agree = True
        if self._stage == 0 or self._engine is None:
            return
        zero = self._zero
        zero.zero_grad()
        if self._stage < 3:
            for i in range(len(zero.bit16_groups)):
                zero.all_grad_tensors[i] = zero.averaged_gradients[i] = None

    # ---- the step, from stage 1 on

    def take_step(self, step: Callable[[], None]) -> bool:
        """Use them up by DeepSpeed's step. Collective: call on all ranks.

        Returns:
            Whether there were any; without, nothing is done, as raw, where no parameter has a gradient.
        """
        self._forget_refused()
        if not self._pending:
            return False
        self._finish()
        self._warn_of_unused()
        step()
        self._pending = self._finished = False
        return True

    def _warn_of_unused(self) -> None:
        unused = [self._names[n] for n in self._trained if n not in self._seen]
        if unused and not self._warned:
            self._warned = True
            warnings.warn(
                f"{some(unused)} got no gradient before this step, and "
                "DeepSpeed steps with zeros then, where torch leaves a parameter alone: weight decay and momentum go "
                "on changing it. Freeze it before lite.setup, or use strategy='ddp' or 'fsdp'.",
                stacklevel=6,
            )
