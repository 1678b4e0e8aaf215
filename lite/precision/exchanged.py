"""Precisions that put another library's layers in the place of a model's own, from `setup` to `teardown`."""

from __future__ import annotations

import weakref
from collections.abc import Callable

from torch import nn

from lite.errors import ConfigError
from lite.precision.mixed import MixedPrecision

Wanted = Callable[[nn.Module, str], bool]


class ExchangedLayers(MixedPrecision):
    """Some layers are exchanged for others that hold the same parameters under the same keys; all else is "bf16-mixed".

    Args:
        name: As the user writes it.
        device_type: "cpu" or "cuda".
        multiple: What the sizes of a linear layer have to be multiples of.
        wanted: A function of (layer, name) that says which linear layers are exchanged; None takes those whose sizes
            fit. Subclasses of nn.Linear stay as they are.
    """

    def __init__(self, name: str, device_type: str, multiple: int, wanted: Wanted | None = None) -> None:
        super().__init__("bf16-mixed", device_type)
        self.name = name
        self._multiple, self._wanted = multiple, wanted
        self._replaced: weakref.WeakKeyDictionary[nn.Module, list[tuple[nn.Module, str, nn.Module]]]
        self._replaced = weakref.WeakKeyDictionary()

    def exchange(self, module: nn.Module, chosen: set[str]) -> None:
        """Put other layers in the place of those with the chosen names."""
        raise NotImplementedError

    def convert_module(self, module: nn.Module) -> nn.Module:
        named = dict(module.named_modules(remove_duplicate=False))
        chosen = {name for name, part in named.items() if part is not module and self._is_chosen(part, name)}
        if not chosen:
            raise ConfigError(
                f"precision={self.name!r}: {type(module).__name__} has no nn.Linear in it whose sizes are multiples of "
                f"{self._multiple}, so nothing would be computed in 8 bits; use 'bf16-mixed'."
            )
        exchanged = {id(named[name]) for name in chosen}
        before = [
            (parent, key, child)
            for parent in module.modules()
            for key, child in parent._modules.items()
            if id(child) in exchanged and child is not None
        ]
        self.exchange(module, chosen)
        self._replaced[module] = before
        return module

    def release_module(self, module: nn.Module) -> None:
        for parent, key, child in self._replaced.pop(module, []):
            now = parent._modules[key]
            assert now is not None
            child._parameters.update(now._parameters)
            parent._modules[key] = child

    def _is_chosen(self, part: nn.Module, name: str) -> bool:
        if type(part) is not nn.Linear:  # a subclass, or a parametrised one, computes in a way of its own
            return False
        if self._wanted is not None:
            return self._wanted(part, name)
        return part.in_features % self._multiple == 0 and part.out_features % self._multiple == 0
