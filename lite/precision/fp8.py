"""Training in 8-bit floats: torchao's float8 layers in the place of linear ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lite.errors import ConfigError, MissingExtraError
from lite.precision.exchanged import ExchangedLayers, Wanted

_MULTIPLE = 16  # of a matrix's sizes, that the 8-bit product wants


class Float8Precision(ExchangedLayers):
    """Linear layers multiply in 8-bit floats, scaled for each tensor; all else computes as under "bf16-mixed".

    Parameters, gradients and optimizer state stay float32, and the layers keep their parameters and keys: they become
    torchao's `Float8Linear`, a subclass of `nn.Linear`, from `setup` to `teardown`. On the CPU it is emulated, for
    tests; GPUs need a compute capability of 8.9 (Ada, Hopper) or more. Needs the extra: pip install lite[fp8].

    Args:
        device_type: "cpu" or "cuda".
        config: A `torchao.float8.Float8LinearConfig` of your own, or None.
        wanted: A function of (layer, name) that says which linear layers are converted; None takes those whose sizes
            are multiples of 16.

    Source: https://docs.pytorch.org/ao/stable/, https://arxiv.org/abs/2209.05433 (FP8 formats)
    """

    def __init__(self, device_type: str, config: Any = None, wanted: Wanted | None = None) -> None:
        super().__init__("fp8", device_type, _MULTIPLE, wanted)
        self._config = config
        self._emulate = device_type != "cuda"
        _torchao()

    def connect(self, device: torch.device) -> None:
        super().connect(device)
        check_multiplies_8_bits(self.name, device)

    def exchange(self, module: nn.Module, chosen: set[str]) -> None:
        float8 = _torchao()
        config = self._config or float8.Float8LinearConfig(emulate=self._emulate)
        float8.convert_to_float8_training(module, module_filter_fn=lambda part, name: name in chosen, config=config)


def check_multiplies_8_bits(name: str, device: torch.device) -> None:
    """Refuse a GPU without 8-bit floats.

    Raises:
        ConfigError: It has none.
    """
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        raise ConfigError(
            f"precision={name!r}: the GPU {device} multiplies no 8-bit floats, which takes a compute capability of "
            "8.9; the nearest is 'bf16-mixed'."
        )


def _torchao() -> Any:
    try:
        import torchao.float8 as found  # type: ignore[import-not-found,unused-ignore]
    except ImportError as error:
        raise MissingExtraError("precision='fp8' needs torchao; pip install 'lite[fp8]'.") from error
    return found
