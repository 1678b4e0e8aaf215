"""Layers whose weights are put together with the whole model's, called past the model: refused with what to do."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import nn

from lite.errors import UsageError
from lite.sharded import is_sharded
from lite.strategies import remedies


class OutsideCheck:
    """Hooks on layers, and a context for the model's own runs, in which they are lifted and the compiler sees none.

    Args:
        module: The model.
        layers: Its layers that are not sharded by themselves, by name.

    Attributes:
        runs: Runs of the model that are under way, one within another.
    """

    def __init__(self, module: nn.Module, layers: Mapping[str, nn.Module]) -> None:
        self.runs = 0
        self._hooks: list[tuple[Any, int, Any]] = []  # each table that torch keeps of them, the key and the value in it
        self._handles = []
        for name, layer in layers.items():
            check = partial(_check, remedies.outside(module, name))
            handle = layer.register_forward_pre_hook(check, with_kwargs=True)
            self._handles.append(handle)
            self._hooks.append((layer._forward_pre_hooks, handle.id, check))
            self._hooks.append((layer._forward_pre_hooks_with_kwargs, handle.id, True))

    def __enter__(self) -> None:
        self.runs += 1
        if self.runs == 1:
            for table, key, _ in self._hooks:
                table.pop(key, None)

    def __exit__(self, *unused: Any) -> None:
        self.runs -= 1
        if self.runs == 0:
            for table, key, value in self._hooks:
                table[key] = value

    def remove(self) -> None:
        """Take the hooks off for good."""
        self._hooks = []
        for handle in self._handles:
            handle.remove()


def _check(text: str, layer: nn.Module, inputs: tuple[Any, ...], by_keyword: dict[str, Any]) -> None:
    if not inputs and not by_keyword:  # computes with its weights alone: a parametrization, whenever its weight is read
        return
    if any(map(is_sharded, layer._parameters.values())) and not any(map(is_sharded, inputs)):
        raise UsageError(text)
