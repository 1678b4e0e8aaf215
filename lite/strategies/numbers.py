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

_running: list[WholeNumbers] = []  # the newest last; threads may leave in another order than they came


class WholeNumbers:
    """A context in which only tensors that every rank holds whole have a number. No other operation is touched.

    Args:
        explain: What the error says.
    """

    def __init__(self, explain: Callable[[], str]) -> None:
        self.explain = explain

    def __enter__(self) -> None:
        if not _running:
            _handlers()[_NUMBER] = _number
        _running.append(self)

    def __exit__(self, *unused: Any) -> None:
        _running.remove(self)
        if not _running:
            _handlers().pop(_NUMBER, None)


def _number(operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    value = args[0]
    if not all(placement.is_replicate() for placement in value.placements):
        raise UsageError(_running[-1].explain())
    return operation(value.to_local())


def _handlers() -> dict[Any, Any]:
    handlers: dict[Any, Any] = DTensor._op_dispatcher._custom_op_handlers
    return handlers
