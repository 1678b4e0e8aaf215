"""Marks on the autograd graph that tell which set-up model a loss comes from, and in which state its forward ran.

Forward tags the graph nodes of its outputs; before a backward the loss's graph is walked from the loss to the first
tags, a few nodes for a usual loss. Nodes carry the tag (`Node.metadata`), so nothing keeps a graph alive.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

_KEY = "lite"


def tensors_with_grad(outputs: Any) -> Iterator[Tensor]:
    """The computed tensors in nested `outputs` that a backward could pass; parameters are none. Attributes count."""
    if isinstance(outputs, Tensor):
        if outputs.grad_fn is not None:
            yield outputs
        return
    for leaf in tree_leaves(outputs):
        if isinstance(leaf, Tensor):
            if leaf.grad_fn is not None:
                yield leaf
        elif hasattr(leaf, "__dict__") and not isinstance(leaf, (type, torch.nn.Module)):
            for value in vars(leaf).values():
                if isinstance(value, Tensor) and value.grad_fn is not None:
                    yield value


def tag(outputs: Any, mark: object) -> None:
    """Attach `mark` to the graph nodes of all tensors in `outputs`."""
    for tensor in tensors_with_grad(outputs):
        assert tensor.grad_fn is not None
        metadata: Any = tensor.grad_fn.metadata  # a property, though torch's stubs have it as a method
        metadata[_KEY] = mark


def marks(loss: Tensor) -> list[Any]:
    """The marks nearest to `loss` in its graph; empty when it comes from no tagged output."""
    if loss.grad_fn is None:
        return []
    found: list[Any] = []
    seen: set[Any] = set()
    pending: list[Any] = [loss.grad_fn]
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        mark = node.metadata.get(_KEY)
        if mark is not None:
            found.append(mark)
            continue
        pending.extend(parent for parent, _ in node.next_functions if parent is not None)
    return found
