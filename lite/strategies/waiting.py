"""Gradients of backwards within `no_sync`, which wait under FSDP to be reduced over the ranks by a later one.

fully_shard keeps them with the weights that it puts together, where neither an optimizer nor `zero_grad` sees them.
Relies on `unsharded_accumulated_grad` and `_unsharded_param` of what it keeps for a parameter, as they are in torch
2.13.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lite.errors import UsageError
from lite.state import parameters_of


class WaitingGradients:
    """Those of one model.

    Args:
        held: Returns what fully_shard keeps for each of the model's parameters.

    Attributes:
        exist: Some may be there. It is asked for at each step, and must cost nothing.
    """

    def __init__(self, held: Callable[[], Iterable[Any]]) -> None:
        self._held = held
        self.exist = False

    def _of(self, parameters: Iterable[Tensor] | None = None) -> Iterator[Any]:
        wanted = None if parameters is None else {id(p) for p in parameters}
        for held in self._held():
            copy = getattr(held, "_unsharded_param", None)  # which came with the first forward
            if copy is None or (held.unsharded_accumulated_grad is None and copy.grad is None):
                continue
            if wanted is None or id(held.sharded_param) in wanted:
                yield held

    def drop(self, parameters: Iterable[Tensor] | None = None) -> None:
        """Drop those of these parameters, or all."""
        if not self.exist:
            return
        for held in list(self._of(parameters)):
            held.unsharded_accumulated_grad = None
            held._unsharded_param.grad = None
        self.exist = any(True for _ in self._of())

    def at_zero_grad_of(self, raw: type[nn.Module]) -> Callable[..., None]:
        """The `zero_grad` of models of that class, which drops these, too."""

        def zero_grad(module: nn.Module, *args: Any, **kwargs: Any) -> None:
            self.drop()
            raw.zero_grad(module, *args, **kwargs)

        return zero_grad

    def follow(self, optimizer: Optimizer) -> Callable[[], None]:
        """Let an optimizer's `zero_grad` drop its parameters', and its step refuse to leave them out.

        Returns:
            What takes that back.
        """
        reference, checking = weakref.ref(optimizer), optimizer.register_step_pre_hook(self._check_step)
        if optimizer not in _followed:
            _followed[optimizer] = _Followed(optimizer)
        models = _followed[optimizer].models
        models.append(self)

        def undo() -> None:
            checking.remove()
            models.remove(self)
            it = reference()
            if it is not None and not models:
                _followed.pop(it).leave(it)

        return undo

    def _check_step(self, optimizer: Optimizer, *unused: Any) -> None:
        if self.exist and any(True for _ in self._of(parameters_of(optimizer))):
            raise UsageError(
                f"{type(optimizer).__name__}.step() came after a backward within lite.no_backward_sync, whose "
                "gradients are not reduced over the ranks yet, and would do without them; leave the last backward "
                "before a step outside of it, or use lite.accumulate, which knows the last one."
            )


class _Followed:
    """The `zero_grad` of an optimizer, around its own, and the models whose gradients it drops, too."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.models: list[WaitingGradients] = []
        self._before = optimizer.__dict__.get("zero_grad")
        models, before, reference = self.models, self._before, weakref.ref(optimizer)

        def zero_grad(*args: Any, **kwargs: Any) -> None:
            it = reference()
            assert it is not None
            for model in models:
                model.drop(parameters_of(it))
            if before is not None:
                before(*args, **kwargs)
            else:
                type(it).zero_grad(it, *args, **kwargs)

        self._own = optimizer.__dict__["zero_grad"] = zero_grad

    def leave(self, optimizer: Optimizer) -> None:
        """Give the optimizer its own back, unless somebody has put another one there since."""
        if optimizer.__dict__.get("zero_grad") is self._own:
            del optimizer.__dict__["zero_grad"]
            if self._before is not None:
                optimizer.__dict__["zero_grad"] = self._before


_followed: weakref.WeakKeyDictionary[Optimizer, _Followed] = weakref.WeakKeyDictionary()
