"""Frozen layers whose weights are kept in 8 or 4 bits, under adapters that train in full precision."""

from __future__ import annotations

import weakref
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lite import collectives
from lite.errors import ConfigError, MissingExtraError
from lite.precision.base import Precision


class FrozenPrecision(Precision):
    """The weights of frozen linear layers are kept in few bits, and computed with as if they were whole; all else is
    full precision.

    For adapters (LoRA) on a base that is too large: freeze the base, add trainable layers, and make the optimizer of
    what trains. Each frozen `nn.Linear` gives its weight up at `setup`, and has one again at `teardown`, rounded to
    what could be kept. Each rank holds the whole model, whose weights are rank 0's. State dicts and checkpoints have
    raw keys and whole weights; what is loaded is rounded again.

    Args:
        name: "int8-frozen" (8-bit integers, scaled for each row, by torchao; pip install lite[int8]), or "nf4-frozen"
            (4-bit normal floats, by bitsandbytes; pip install lite[nf4]).

    Source: https://arxiv.org/abs/2106.09685 (LoRA), https://arxiv.org/abs/2305.14314 (QLoRA, nf4)
    """

    divisible = False

    def __init__(self, name: str) -> None:
        self.name = name
        self._packing: Any = _Int8() if name == "int8-frozen" else _NF4()
        self._packed: weakref.WeakKeyDictionary[nn.Module, list[_Packed]] = weakref.WeakKeyDictionary()

    @torch.no_grad()
    def convert_module(self, module: nn.Module) -> nn.Module:
        found = [
            (parent, key, child)
            for parent in module.modules()
            for key, child in parent._modules.items()
            if type(child) is nn.Linear and not any(p.requires_grad for p in child.parameters())
        ]
        if not found:
            raise ConfigError(
                f"precision={self.name!r}: {type(module).__name__} has no nn.Linear in it that is frozen, so nothing "
                "would be kept in few bits; call requires_grad_(False) on its base before setup."
            )
        users: dict[int, set[int]] = {}
        for part in module.modules():
            for parameter in part._parameters.values():
                users.setdefault(id(parameter), set()).add(id(part))
        tied = [key for _, key, child in found if len(users[id(child.weight)]) > 1]
        if tied:
            raise ConfigError(
                f"precision={self.name!r}: the weight of the frozen layer {tied[0]!r} is also used by another one, "
                "which would lose it; untie them (layer.weight = nn.Parameter(layer.weight.clone())), or train it."
            )
        if any(child.weight.is_meta for _, _, child in found):
            raise ConfigError(
                f"precision={self.name!r}: the frozen layers of {type(module).__name__} are on the meta device, and "
                "are packed before they have values; make the model without empty_init='meta'."
            )
        for _, _, child in found:  # alike on all ranks: what is packed is not sent
            child.weight.copy_(collectives.broadcast(child.weight.detach()))
        self._packed[module] = [_Packed(parent, key, child, self._packing) for parent, key, child in found]
        return module

    def release_module(self, module: nn.Module) -> None:
        for packed in self._packed.pop(module, []):
            packed.release()


class _Packed:
    """One frozen layer, with its weight packed."""

    def __init__(self, parent: nn.Module, key: str, raw: nn.Linear, packing: Any) -> None:
        self._parent, self._key, self._raw, self._packing = parent, key, raw, packing
        self._dtype = raw.weight.dtype
        self._layer: nn.Module = packing.pack(raw)
        parent._modules[key] = self._layer
        # torch 2.13 marks a hook by an attribute, which a bound method can't have.
        before = self._layer.register_load_state_dict_pre_hook(partial(self._pack_loaded))
        after = self._layer.register_state_dict_post_hook(partial(self._unpack_saved))
        self._handles = [before, after]

    def _unpack_saved(self, layer: nn.Module, state_dict: dict[str, Any], prefix: str, *unused: Any) -> None:
        own = [key for key in state_dict if key.startswith(prefix) and key != f"{prefix}bias"]
        bias = state_dict.pop(f"{prefix}bias", None)
        for key in own:
            del state_dict[key]
        state_dict[f"{prefix}weight"] = self._packing.unpack(layer).to(self._dtype)
        if bias is not None:
            state_dict[f"{prefix}bias"] = bias

    def _pack_loaded(self, layer: nn.Module, state_dict: dict[str, Any], prefix: str, *unused: Any) -> None:
        value = state_dict.get(f"{prefix}weight")
        if isinstance(value, Tensor) and value.shape == (self._raw.out_features, self._raw.in_features):
            self._packing.renew(layer, value.to(self._packing.device(layer), self._dtype))
            state_dict[f"{prefix}weight"] = layer._parameters["weight"]

    def release(self) -> None:
        for handle in self._handles:
            handle.remove()
        weight = self._packing.unpack(self._layer).to(self._dtype)
        bias = self._layer._parameters["bias"]
        self._raw.weight = nn.Parameter(weight, requires_grad=False)
        self._raw._parameters["bias"] = bias
        self._parent._modules[self._key] = self._raw


class _Int8:
    """torchao's weight-only integers, in a parameter of the layer itself."""

    def __init__(self) -> None:
        try:
            import torchao.quantization as found  # type: ignore[import-not-found,unused-ignore]
        except ImportError as error:
            raise MissingExtraError("precision='int8-frozen' needs torchao; pip install 'lite[int8]'.") from error
        self._quantize, self._config = found.quantize_, found.Int8WeightOnlyConfig

    def pack(self, raw: nn.Linear) -> nn.Module:
        self._quantize(raw, self._config())
        raw.weight.requires_grad_(False)
        return raw

    def unpack(self, layer: nn.Module) -> Tensor:
        weight: Any = layer._parameters["weight"]
        whole: Tensor = weight.detach().dequantize()
        return whole

    def renew(self, layer: nn.Module, value: Tensor) -> None:
        layer._parameters["weight"] = nn.Parameter(value.clone(), requires_grad=False)
        assert isinstance(layer, nn.Linear)
        self.pack(layer)

    def device(self, layer: nn.Module) -> torch.device:
        weight = layer._parameters["weight"]
        assert weight is not None
        return weight.device


class _NF4:
    """bitsandbytes' 4-bit normal floats, in a layer of its own."""

    def __init__(self) -> None:
        try:
            import bitsandbytes  # type: ignore[import-not-found,unused-ignore]
        except ImportError as error:
            raise MissingExtraError("precision='nf4-frozen' needs bitsandbytes; pip install 'lite[nf4]'.") from error
        self._bnb: Any = bitsandbytes

    def pack(self, raw: nn.Linear) -> nn.Module:
        layer: nn.Module = self._bnb.nn.Linear4bit(
            raw.in_features, raw.out_features, bias=raw.bias is not None, quant_type="nf4", device="meta"
        )
        layer.train(raw.training)
        self.renew(layer, raw.weight.detach())
        layer._parameters["bias"] = raw.bias
        return layer

    def unpack(self, layer: nn.Module) -> Tensor:
        weight: Any = layer._parameters["weight"]
        whole: Tensor = self._bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
        return whole

    def renew(self, layer: nn.Module, value: Tensor) -> None:
        weight = self._bnb.nn.Params4bit(value, requires_grad=False, quant_type="nf4", module=layer)
        layer._parameters["weight"] = weight.to(value.device)

    def device(self, layer: nn.Module) -> torch.device:
        weight = layer._parameters["weight"]
        assert weight is not None
        return weight.device
