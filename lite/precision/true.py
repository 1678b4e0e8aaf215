"""One dtype for everything: parameters, inputs and computation in 64 or 16 bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lite.precision.base import Precision, cast_floating

_HALF = (torch.float16, torch.bfloat16)


class TruePrecision(Precision):
    """Converts the module and its floating-point inputs to `dtype`.

    Outputs of 16-bit modules come back as float32, so that losses and metrics are computed in full precision; outputs
    of 64-bit modules stay float64.

    Args:
        name: "64-true", "16-true" or "bf16-true".
        dtype: The dtype that the name stands for.
    """

    changes_forward = True

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        self.name = name
        self.param_dtype = dtype
        self.output_dtype = torch.float32 if dtype in _HALF else None

    def convert_module(self, module: nn.Module) -> nn.Module:
        return module.to(self.param_dtype)

    def convert_input(self, data: Any) -> Any:
        assert self.param_dtype is not None
        return cast_floating(data, self.param_dtype)

    def convert_output(self, data: Any) -> Any:
        return cast_floating(data, self.output_dtype, _HALF) if self.output_dtype is not None else data
