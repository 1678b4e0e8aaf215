"""A module for other runtimes: TorchScript and ONNX, by torch's own exporters."""

from __future__ import annotations

import os
import warnings
from typing import Any

import torch
from torch import nn

from lite.errors import ConfigError


def inputs_of(module: Any, given: Any) -> Any:
    """The inputs that were given, or the module's `example_input_array`.

    Raises:
        ConfigError: There are none.
    """
    found = module.example_input_array if given is None else given
    if found is None:
        raise ConfigError(
            f"{type(module).__name__} has no example_input_array to trace with; set it, or pass the inputs."
        )
    return found


def to_torchscript(
    module: nn.Module,
    file_path: str | os.PathLike[str] | None = None,
    method: str = "script",
    example_inputs: Any = None,
    **kwargs: Any,
) -> Any:
    """Compile by TorchScript, which torch has deprecated; torch.export is its successor.

    Args:
        module: A LightningModule.
        file_path: Where it is written, or None.
        method: "script" or "trace".
        example_inputs: For "trace"; None takes `example_input_array`.
        **kwargs: For torch.jit.
    """
    if method not in ("script", "trace"):
        raise ConfigError(f"method={method!r} is not known; use 'script' or 'trace'.")
    mode, trainer = module.training, module.__dict__.get("_trainer")
    module.eval()
    module.__dict__.update(_is_exported=True, _trainer=None)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            if method == "trace":
                inputs = inputs_of(module, example_inputs)
                made = torch.jit.trace(module, inputs, **kwargs)  # type: ignore[no-untyped-call]
            else:
                made = torch.jit.script(module, **kwargs)
    finally:
        module.__dict__.update(_is_exported=False, _trainer=trainer)
        module.train(mode)
    if file_path is not None:
        torch.jit.save(made, os.fspath(file_path))
    return made


def to_onnx(module: nn.Module, file_path: Any = None, input_sample: Any = None, **kwargs: Any) -> Any:
    """Write as ONNX by torch.onnx.export (it needs the package onnxscript).

    Args:
        module: A LightningModule.
        file_path: Where to write.
        input_sample: The forward's input; None takes `example_input_array`.
        **kwargs: For torch.onnx.export.
    """
    sample = inputs_of(module, input_sample)
    args = sample if isinstance(sample, tuple) else (sample,)
    mode = module.training
    module.eval()
    try:
        with torch.no_grad():
            return torch.onnx.export(module, args, file_path, **kwargs)
    finally:
        module.train(mode)
