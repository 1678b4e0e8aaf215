"""Loss scaling for several optimizers that step at their own pace, around torch's GradScaler.

The scale may change only between iterations, and gradients that are not stepped yet must keep one size. So the scale is
updated once, at the first backward after a step or a clipping, and gradients that an optimizer still holds then are
brought to the new scale.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from lite.errors import UsageError
from lite.state import parameters_of


class LossScaling:
    """What has happened to each optimizer's gradients since the scale was updated last.

    Args:
        scaler: Torch's scaler, which knows the scale and looks for inf and NaN.
        device_type: Where it does so.
    """

    def __init__(self, scaler: GradScaler, device_type: str) -> None:
        self.scaler = scaler
        self._local: Callable[[list[nn.Parameter]], list[Tensor] | None] | None = None
        self._agree: Callable[[Tensor], None] | None = None
        self._device_type = device_type
        self._known: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._unscaled: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._stepped: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._accepted: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._skipped: weakref.WeakKeyDictionary[Optimizer, bool | Tensor] = weakref.WeakKeyDictionary()
        self._num_scaled = 0
        self._scaled_at_step: weakref.WeakKeyDictionary[Optimizer, int] = weakref.WeakKeyDictionary()
        self._counts: weakref.WeakKeyDictionary[Optimizer, tuple[int, int | Tensor]] = weakref.WeakKeyDictionary()

    def scale(self, loss: Tensor) -> Tensor:
        """The loss to call backward on; a new iteration begins where something was stepped or unscaled before.

        Raises:
            UsageError: No optimizer is set up, which would bring its gradients back to their true size.
        """
        if not self._known:
            raise UsageError(
                "lite.backward multiplies the loss by a loss scale, and no optimizer is set up, whose step would take "
                "that back; pass it to lite.setup(model, optimizer) or lite.setup_optimizers, or take gradients "
                "without a step by torch.autograd.grad."
            )
        self._num_scaled += 1
        self.renew()
        return self.scaler.scale(loss)

    def begin(self) -> Tensor:
        """What to multiply losses by, where `scale` is not asked for each of them; as it, it may begin an iteration."""
        self._num_scaled += 1
        self.renew()
        return self._now()

    def add(self, optimizer: Optimizer) -> None:
        """From now on keep this optimizer's gradients in mind."""
        self._known.add(optimizer)
        self._scaled_at_step[optimizer] = self._num_scaled

    def forget(self, optimizer: Optimizer) -> None:
        """Let go of an optimizer; its gradients stay as they are."""
        if optimizer in self._unscaled or optimizer in self._stepped:
            self._stepped.add(optimizer)
            self.renew()
        self._known.discard(optimizer)
        self._skipped.pop(optimizer, None)
        self._scaled_at_step.pop(optimizer, None)
        self._counts.pop(optimizer, None)

    def unscale(self, optimizer: Optimizer) -> None:
        """Bring gradients to their true size, where they aren't."""
        if optimizer in self._unscaled or optimizer in self._stepped:
            return
        grads = self._local(parameters_of(optimizer)) if self._local is not None else None
        if not grads and not _gradients(optimizer):
            return
        if grads is None:
            self.scaler.unscale_(optimizer)
        else:
            self._unscale_parts(optimizer, grads)
        self._unscaled.add(optimizer)

    def share_overflow(
        self, local: Callable[[list[nn.Parameter]], list[Tensor] | None], agree: Callable[[Tensor], None]
    ) -> None:
        """Gradients are sharded; see `Precision.share_overflow`."""
        self._local, self._agree = local, agree

    def _unscale_parts(self, optimizer: Optimizer, grads: list[Tensor]) -> None:
        # torch 2.13: the scaler refuses DTensors of several meshes, and plain gradients beside them.
        assert self._agree is not None
        groups = optimizer.param_groups
        optimizer.param_groups = [{"params": [_holder(grad) for grad in grads]}]
        try:
            self.scaler.unscale_(optimizer)
        finally:
            optimizer.param_groups = groups
        for found in self.scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"].values():
            self._agree(found)

    def accept(self, optimizer: Optimizer) -> None:
        """The optimizer's bad gradients were replaced by good ones: take its next step."""
        self._accepted.add(optimizer)

    def step(self, optimizer: Optimizer, raw_step: Callable[..., Any], args: Any, kwargs: Any) -> None:
        """Step, unless gradients are inf or NaN.

        Raises:
            AssertionError: No gradient was scaled.
        """
        if optimizer in self._stepped:  # a second step on the same gradients, which have their true size now
            if not self.was_skipped(optimizer):
                raw_step(*args, **kwargs)
            return
        if self._scaled_at_step[optimizer] == self._num_scaled and _gradients(optimizer):
            raise AssertionError("no loss was scaled since the optimizer's last step")
        self._scaled_at_step[optimizer] = self._num_scaled
        self._skipped[optimizer] = True
        if optimizer in self._accepted:
            raw_step(*args, **kwargs)
            self._skipped[optimizer] = False
        else:
            if self._agree is not None:
                self.unscale(optimizer)
            try:
                self.scaler.step(optimizer, *args, **kwargs)
            except BaseException:
                del self._skipped[optimizer]
                raise
        self._stepped.add(optimizer)
        steps, skipped = self._counts.get(optimizer, (0, 0))
        self._counts[optimizer] = (steps + 1, skipped + self._skipped[optimizer])

    def note_run(self, optimizer: Optimizer) -> None:
        """The optimizer's own step is about to run."""
        # The scaler sets found_inf for fused optimizers, which skip on the device.
        found_inf = getattr(optimizer, "found_inf", None)
        self._skipped[optimizer] = False if found_inf is None else found_inf.clone().bool()

    def was_skipped(self, optimizer: Optimizer) -> bool:
        """Whether its last step was left out."""
        return bool(self._skipped.get(optimizer, False))

    def counts(self, optimizer: Optimizer) -> tuple[int, int | Tensor]:
        """Steps so far, and how many of them were left out."""
        return self._counts.get(optimizer, (0, 0))

    def state_dict(self) -> dict[str, Any]:
        """The scaler's state with the last step's effect in it."""
        if self._stepped:
            self.renew()
        return self.scaler.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over another scaler's state; what happened before it no longer counts."""
        if self._stepped or self._unscaled:
            self.scaler.update(float(state_dict.get("scale", 1.0)))  # also forgets what the optimizers did
        self._clear()
        self.scaler.load_state_dict(state_dict)

    def renew(self) -> None:
        """Update the scale where an iteration has ended, and bring gradients that are still held to the new one."""
        if not self._stepped and not self._unscaled:
            return
        waiting = [o for o in self._known if o not in self._stepped]
        holding = [(o, grads) for o in waiting if (grads := self._held(o))]
        before = self._now() if holding else torch.ones(())
        self.scaler.update()
        for optimizer, grads in holding:
            factor = self._now() if optimizer in self._unscaled else self._now() / before
            for grad in grads:
                grad.mul_(factor.to(grad.device))
        self._clear()

    def _held(self, optimizer: Optimizer) -> list[Tensor]:
        """The gradients that wait for its step."""
        grads = _gradients(optimizer)
        if not grads and self._local is not None:
            grads = self._local(parameters_of(optimizer)) or []
        return grads

    def _now(self) -> Tensor:
        """The present scale, 0-dim, without waiting for the device."""
        scale = self.scaler.scale(torch.ones((), device=self._device_type))
        assert isinstance(scale, Tensor)
        return scale

    def _clear(self) -> None:
        self._stepped.clear()
        self._unscaled.clear()
        self._accepted.clear()


def _holder(grad: Tensor) -> Tensor:
    """Stands for a parameter, of whose gradient this rank has a part."""
    holder = grad.detach()
    holder.grad = grad
    return holder


def _gradients(optimizer: Optimizer) -> list[Tensor]:
    return [p.grad for p in parameters_of(optimizer) if p.grad is not None]
