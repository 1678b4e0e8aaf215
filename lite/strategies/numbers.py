"""Python numbers of tensors of which this rank has a part, refused while a model runs.

DTensor's `item()`, and with it `float`, `bool`, `if` and Python's `max`, reads the local part without a word. Putting
the parts together instead would make `item()` a collective, and a method that one rank alone calls, to log norms, say,
would wait for the others for ever. Relies on the table in which DTensor's dispatcher looks up operations that are
handled elsewhere: private in torch, and checked with 2.13.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from lite.errors import UsageError

_NUMBER = torch.ops.aten._local_scalar_dense.default


class WholeNumbers:
    """A context in which only tensors that every rank holds whole have a number. No other operation is touched.

    Args:
        explain: What the error says.
    """

    def __init__(self, explain: Callable[[], str]) -> None:
        self._explain = explain
        self._before: list[Any] = []

    def __enter__(self) -> None:
        handlers = _handlers()
        self._before.append(handlers.get(_NUMBER))
        handlers[_NUMBER] = self._number

    def __exit__(self, *unused: Any) -> None:
        handlers, before = _handlers(), self._before.pop()
        if before is None:
            del handlers[_NUMBER]
        else:
            handlers[_NUMBER] = before

    def _number(self, operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        value = args[0]
        if not all(placement.is_replicate() for placement in value.placements):
            raise UsageError(self._explain())
        return operation(value.to_local())


def _handlers() -> dict[Any, Any]:
    handlers: dict[Any, Any] = DTensor._op_dispatcher._custom_op_handlers
    return handlers
