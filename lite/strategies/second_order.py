"""Gradients of gradients through layers that are split over ranks: refused, where torch would leave parts of them out.

Between a plain tensor and a DTensor torch's backward hands the gradient on without its graph (torch 2.13), so that what
comes of a gradient penalty through a split layer is missing from the weights' gradients without a word.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lite.errors import UsageError
from lite.sharded import is_sharded

_CROSSINGS = ("_FromTorchTensorBackward", "_ToTorchTensorBackward")  # the nodes that do so


def refuse_second_order(module: nn.Module) -> None:
    """Let a backward with create_graph=True through a split layer fail, in methods and of layers called alone, too.

    What the compiler runs is not looked at.

    Args:
        module: The model, split already. The hooks that its layers get go with the others at teardown.
    """
    for part in module.modules():
        if any(map(is_sharded, part._parameters.values())):
            part.register_forward_hook(_watch)


def _watch(layer: nn.Module, inputs: Any, output: Any) -> None:
    if isinstance(output, Tensor) and output.requires_grad and not torch.compiler.is_compiling():
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
    here = torch._C._current_autograd_node()
    pending: list[Any] = [] if here is None else [here]  # None: it ends here, with the gradient that was asked for
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
