"""Gradients of gradients through layers that are split over ranks: refused, where torch would leave parts of them out.

Between a plain tensor and a DTensor torch's backward hands the gradient on without its graph (torch 2.13), so that what
comes of a gradient penalty through a split layer is missing from the weights' gradients without a word.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lite.errors import UsageError
from lite.strategies import provenance

_CROSSINGS = ("_FromTorchTensorBackward", "_ToTorchTensorBackward")  # the nodes that do so


def refuse_second_order(outputs: Any) -> None:
    """Let a backward with create_graph=True fail that goes on from a model's outputs through its split layers.

    Not looked at are layers that are called by themselves, and what the compiler has made one node of.
    """
    for output in provenance.tensors_with_grad(outputs):
        output.register_hook(_check)  # type: ignore[no-untyped-call]


def _check(gradient: Tensor) -> None:
    if torch.is_grad_enabled() and _crosses():  # within a backward: it makes a graph
        raise UsageError(
            "a backward with create_graph=True went through a layer that is split over the ranks, and torch leaves the "
            "second-order part of what comes of that out; compute a gradient penalty with layers that are not split "
            "(leave them out of parallelize), or use strategy='ddp' or 'fsdp'."
        )


def _crosses() -> bool:
    """Whether the backward that has come to this node will go on past one of those."""
    pending: list[Any] = [torch._C._current_autograd_node()]
    seen: set[Any] = set()
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        onward = [parent for parent, _ in node.next_functions if parent is not None and _runs(parent)]
        if onward and node.name() in _CROSSINGS:
            return True
        pending.extend(onward)
    return False


def _runs(node: Any) -> bool:
    """Whether the running backward comes to it. Leaves, of which torch can't tell, count."""
    return not node.next_functions or torch._C._will_engine_execute_node(node)
