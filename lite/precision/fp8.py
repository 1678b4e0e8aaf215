"""Training in 8-bit floats: torchao's float8 layers in the place of linear ones."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lite.errors import ConfigError, MissingExtraError
from lite.precision.mixed import MixedPrecision

_MULTIPLE = 16  # of a matrix's sizes, that the 8-bit product wants


class Float8Precision(MixedPrecision):
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

    def __init__(
        self,
        device_type: str,
        config: Any = None,
        wanted: Callable[[nn.Module, str], bool] | None = None,
    ) -> None:
        super().__init__("bf16-mixed", device_type)
        self.name = "fp8"
        self._config, self._wanted = config, wanted
        self._emulate = device_type != "cuda"
        self._replaced: weakref.WeakKeyDictionary[nn.Module, list[tuple[nn.Module, str, nn.Module]]]
        self._replaced = weakref.WeakKeyDictionary()
        _torchao()

    def connect(self, device: torch.device) -> None:
        super().connect(device)
        if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
            raise ConfigError(
                f"precision='fp8': the GPU {device} multiplies no 8-bit floats, which takes a compute capability of "
                "8.9; the nearest is 'bf16-mixed'."
            )

    def convert_module(self, module: nn.Module) -> nn.Module:
        float8 = _torchao()
        names = {id(part): name for name, part in module.named_modules()}

        def convert(part: nn.Module, name: str) -> bool:
            if not isinstance(part, nn.Linear) or part is module:
                return False
            if self._wanted is not None:
                return self._wanted(part, name)
            return part.in_features % _MULTIPLE == 0 and part.out_features % _MULTIPLE == 0

        chosen = {name for name, part in module.named_modules() if convert(part, name)}
        if not chosen:
            raise ConfigError(
                f"precision='fp8': {type(module).__name__} has no nn.Linear in it whose sizes are multiples of "
                f"{_MULTIPLE}, so nothing would be computed in 8 bits; use 'bf16-mixed'."
            )
        before = [
            (parent, key, child)
            for parent in module.modules()
            for key, child in parent._modules.items()
            if child is not None and names.get(id(child)) in chosen
        ]
        config = self._config or float8.Float8LinearConfig(emulate=self._emulate)
        float8.convert_to_float8_training(module, module_filter_fn=lambda part, name: name in chosen, config=config)
        self._replaced[module] = before
        return module

    def release_module(self, module: nn.Module) -> None:
        for parent, key, child in self._replaced.pop(module, []):
            now = parent._modules[key]
            assert now is not None
            child._parameters.update(now._parameters)
            parent._modules[key] = child


def _torchao() -> Any:
    try:
        import torchao.float8 as found  # type: ignore[import-not-found,unused-ignore]
    except ImportError as error:
        raise MissingExtraError("precision='fp8' needs torchao; pip install 'lite[fp8]'.") from error
    return found
