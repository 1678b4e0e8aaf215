"""Mixed precision: float32 parameters, 16-bit computation by torch.autocast, loss scaling where float16 needs it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.optim import Optimizer

from lite.errors import ConfigError, UsageError
from lite.precision.base import Precision, cast_floating


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
        self._unscaled: set[int] = set()
        self._stepped: dict[int, bool | Tensor] = {}  # optimizers that stepped since the last update: was it skipped?
        self._skipped: dict[int, bool | Tensor] = {}  # the same of the iteration before

    def convert_output(self, data: Any) -> Any:
        assert self.compute_dtype is not None
        return cast_floating(data, torch.float32, (self.compute_dtype,))

    def autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device_type, dtype=self.compute_dtype)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        if self.scaler is not None:
            self._update()
            loss = self.scaler.scale(loss)
        loss.backward(*args, **kwargs)  # type: ignore[no-untyped-call]

    def unscale(self, optimizer: Optimizer) -> None:
        if self.scaler is not None and id(optimizer) not in self._unscaled:
            self._update()
            self.scaler.unscale_(optimizer)
            self._unscaled.add(id(optimizer))

    def step(self, optimizer: Optimizer, raw_step: Callable[..., Any], closure: Callable[[], Any] | None) -> Any:
        if self.scaler is None:
            return super().step(optimizer, raw_step, closure)
        key = id(optimizer)
        if key in self._stepped:
            self._update()
        value = closure() if closure is not None else None
        self._stepped[key] = True
        try:
            self.scaler.step(optimizer)
        except AssertionError as error:
            del self._stepped[key]
            raise UsageError(
                f"{type(optimizer).__name__}.step() found no gradient that lite.backward has scaled; under "
                f"precision={self.name!r} call lite.backward(loss) instead of loss.backward(), before each step."
            ) from error
        return value

    def note_run(self, optimizer: Optimizer) -> None:
        found_inf = getattr(
            optimizer, "found_inf", None
        )  # set by the scaler for fused optimizers, which skip on the device
        self._stepped[id(optimizer)] = False if found_inf is None else found_inf.clone()

    def step_was_skipped(self, optimizer: Optimizer) -> bool:
        return bool(self._stepped.get(id(optimizer), self._skipped.get(id(optimizer), False)))

    def state_dict(self) -> dict[str, Any]:
        if self.scaler is None:
            return {}
        self._update()
        return self.scaler.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self.scaler is not None and state_dict:
            self.scaler.load_state_dict(state_dict)

    def _update(self) -> None:
        """Adjust the scale once for all optimizers that have stepped: the next iteration has begun."""
        if self._stepped:
            assert self.scaler is not None
            self.scaler.update()
            self._skipped, self._stepped = self._stepped, {}
            self._unscaled.clear()
