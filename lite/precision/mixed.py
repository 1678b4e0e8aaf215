"""Mixed precision: float32 parameters and 16-bit computation by torch.autocast; float16 with a loss scale."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from lite.errors import ConfigError, UsageError
from lite.precision.base import Precision, cast_floating
from lite.precision.scaling import LossScaling
from lite.state import parameters_of


class MixedPrecision(Precision):
    """Forward under autocast; outputs of half precision come back as float32.

    Args:
        name: "16-mixed" or "bf16-mixed".
        device_type: "cpu", "cuda" or "mps".
        scaler: A loss scaler of your own for "16-mixed", e.g. `torch.amp.GradScaler("cuda", init_scale=1024)`; None
            makes torch's default. "bf16-mixed" has float32's range and takes none.

    Raises:
        ConfigError: A scaler is given with "bf16-mixed".
    """

    changes_forward = True
    output_dtype = torch.float32

    def __init__(self, name: str, device_type: str, scaler: GradScaler | None = None) -> None:
        self.name = name
        self.device_type = device_type
        self.compute_dtype = torch.float16 if name == "16-mixed" else torch.bfloat16
        if scaler is not None and name != "16-mixed":
            raise ConfigError(
                f"scaler={scaler!r} with precision={name!r}: bfloat16 needs no loss scaling; leave it out."
            )
        self.scaler = (scaler or GradScaler(device_type)) if name == "16-mixed" else None
        self.changes_step = self.scaler is not None
        self._scaling = LossScaling(self.scaler, device_type) if self.scaler is not None else None

    def connect(self, device: torch.device) -> None:
        if self.device_type != device.type:
            raise ConfigError(
                f"MixedPrecision({self.name!r}, {self.device_type!r}) can't compute on {device}: autocast and loss "
                f"scaling would silently be off; make it with {device.type!r}, or pass precision={self.name!r} instead "
                "of a plugin."
            )

    def convert_output(self, data: Any) -> Any:
        assert self.compute_dtype is not None
        return cast_floating(data, torch.float32, (self.compute_dtype,))

    def autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device_type, dtype=self.compute_dtype)

    def share_overflow(
        self, local: Callable[[list[nn.Parameter]], list[Tensor] | None], agree: Callable[[Tensor], None]
    ) -> None:
        if self._scaling is not None:
            self._scaling.share_overflow(local, agree)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        if self._scaling is not None:
            loss = self._scaling.scale(loss)
        loss.backward(*args, **kwargs)  # type: ignore[no-untyped-call]

    def begin_backward(self) -> Tensor | None:
        return None if self._scaling is None else self._scaling.begin()

    def add_optimizer(self, optimizer: Optimizer) -> None:
        if self._scaling is not None:
            self._scaling.add(optimizer)

    def forget_optimizer(self, optimizer: Optimizer) -> None:
        if self._scaling is not None:
            self._scaling.forget(optimizer)

    def unscale(self, optimizer: Optimizer) -> None:
        if self._scaling is not None:
            self._scaling.unscale(optimizer)

    def accept(self, optimizer: Optimizer) -> None:
        if self._scaling is not None:
            self._scaling.accept(optimizer)

    def step(
        self,
        optimizer: Optimizer,
        raw_step: Callable[..., Any],
        closure: Callable[[], Any] | None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if self._scaling is None:
            return super().step(optimizer, raw_step, closure, *args, **kwargs)
        value = closure() if closure is not None else None
        try:
            self._scaling.step(optimizer, raw_step, args, kwargs)
        except AssertionError as error:
            if not any(p.requires_grad for p in parameters_of(optimizer)):
                return value  # all frozen: there is nothing to step
            raise UsageError(
                f"{type(optimizer).__name__}.step() found no gradient that lite.backward has scaled; under "
                f"precision={self.name!r} call lite.backward(loss) instead of loss.backward(), before each step."
            ) from error
        return value

    def note_run(self, optimizer: Optimizer) -> None:
        if self._scaling is not None:
            self._scaling.note_run(optimizer)

    def step_was_skipped(self, optimizer: Optimizer) -> bool:
        return self._scaling is not None and self._scaling.was_skipped(optimizer)

    def step_counts(self, optimizer: Optimizer) -> tuple[int, int | Tensor]:
        return (0, 0) if self._scaling is None else self._scaling.counts(optimizer)

    def state_dict(self) -> dict[str, Any]:
        return {} if self._scaling is None else self._scaling.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._scaling is not None and state_dict:
            self._scaling.load_state_dict(state_dict)
