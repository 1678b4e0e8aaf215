"""Training in 8-bit floats by NVIDIA's Transformer Engine: its layers in the place of linear ones."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import nn

from lite.disguise import disguise
from lite.errors import ConfigError, MissingExtraError
from lite.precision.exchanged import ExchangedLayers, Wanted
from lite.precision.fp8 import check_multiplies_8_bits

MakeContext = Callable[[], AbstractContextManager[Any]]
_MULTIPLE = 16  # of a matrix's sizes, that the 8-bit product wants
# What its layers add to a state dict beside their parameters is a history, which is empty here.
_WITHOUT_EXTRA_STATE = {"get_extra_state": nn.Module.get_extra_state, "set_extra_state": nn.Module.set_extra_state}


class TransformerEnginePrecision(ExchangedLayers):
    """Linear layers multiply in 8-bit floats by Transformer Engine; all else computes as under "bf16-mixed".

    Parameters, gradients and optimizer state stay float32, and the layers keep their parameters and keys: they become
    `transformer_engine.pytorch.Linear` from `setup` to `teardown`. A batch's rows (of all its dimensions but the last)
    must be a multiple of 8. Each rank holds the whole model. Scales are those of the present tensors, without a
    history, so that a resumed run is exact and checkpoints have the raw model's keys. It needs a GPU with a compute
    capability of 8.9 (Ada, Hopper) or more, and the package: pip install 'transformer_engine[pytorch]'.

    Args:
        device_type: "cuda".
        recipe: A recipe of `transformer_engine.common.recipe` of your own, without a history; None is
            `Float8CurrentScaling()`.
        wanted: A function of (layer, name) that says which linear layers are converted; None takes those whose sizes
            are multiples of 16.

    Source: https://docs.nvidia.com/deeplearning/transformer-engine/user-guide/api/pytorch.html
    """

    divisible = False

    def __init__(self, device_type: str, recipe: Any = None, wanted: Wanted | None = None) -> None:
        if device_type != "cuda":
            raise ConfigError(
                f"precision='transformer-engine' on {device_type!r}: Transformer Engine computes on NVIDIA GPUs alone; "
                "'fp8' is emulated on the CPU, for tests, and the nearest that trains there is 'bf16-mixed'."
            )
        super().__init__("transformer-engine", device_type, _MULTIPLE, wanted)
        self._layers = _engine()
        self._recipe = recipe if recipe is not None else _current_scaling()
        if type(self._recipe).__name__ == "DelayedScaling":
            raise ConfigError(
                f"recipe={self._recipe!r} scales by a history of earlier batches, which no checkpoint of the raw "
                "model's keys has; use recipe.Float8CurrentScaling(), or recipe.MXFP8BlockScaling() where the GPU can."
            )

    def connect(self, device: torch.device) -> None:
        super().connect(device)
        check_multiplies_8_bits(self.name, device)

    def autocast(self) -> AbstractContextManager[Any]:
        return _Both(super().autocast, self._in_8_bits)

    def exchange(self, module: nn.Module, chosen: set[str]) -> None:
        made: dict[int, nn.Module] = {}
        for name in sorted(chosen):
            layer: Any = module.get_submodule(name)
            parent, _, key = name.rpartition(".")
            if id(layer) not in made:
                shape = (layer.in_features, layer.out_features)
                dtype = layer.weight.dtype
                new = self._layers.Linear(*shape, bias=layer.bias is not None, params_dtype=dtype, device="meta")
                new.train(layer.training)
                new._parameters.update(layer._parameters)
                for hooks, table in vars(layer).items():
                    if hooks.startswith(("_forward_", "_backward_")):
                        new.__dict__[hooks] = table
                disguise(new, _WITHOUT_EXTRA_STATE)
                made[id(layer)] = new
            module.get_submodule(parent)._modules[key] = made[id(layer)]

    def _in_8_bits(self) -> AbstractContextManager[Any]:
        layers = self._layers
        if hasattr(layers, "autocast"):  # the newer name; the older one warns where there are both
            found: AbstractContextManager[Any] = layers.autocast(enabled=True, recipe=self._recipe)
            return found
        older: AbstractContextManager[Any] = layers.fp8_autocast(enabled=True, fp8_recipe=self._recipe)
        return older


class _Both:
    """Two contexts as one, which can be entered again and again.

    Args:
        first: Makes the outer one.
        second: Makes the inner one.
    """

    def __init__(self, first: MakeContext, second: MakeContext) -> None:
        self._parts = (first, second)
        self._open: list[ExitStack] = []

    def __enter__(self) -> None:
        with ExitStack() as stack:
            for make in self._parts:
                stack.enter_context(make())
            self._open.append(stack.pop_all())

    def __exit__(self, *error: Any) -> bool | None:
        return self._open.pop().__exit__(*error)


def _engine() -> Any:
    try:
        import transformer_engine.pytorch as found  # type: ignore[import-not-found,unused-ignore]
    except ImportError as error:
        raise MissingExtraError(
            "precision='transformer-engine' needs NVIDIA's Transformer Engine; pip install "
            "'transformer_engine[pytorch]'."
        ) from error
    return found


def _current_scaling() -> Any:
    from transformer_engine.common import recipe  # type: ignore[import-not-found,unused-ignore]

    if not hasattr(recipe, "Float8CurrentScaling"):
        raise MissingExtraError(
            "precision='transformer-engine' needs Transformer Engine 2.2 or later, which can scale by the present "
            "tensors; pip install -U 'transformer_engine[pytorch]'."
        )
    return recipe.Float8CurrentScaling()
