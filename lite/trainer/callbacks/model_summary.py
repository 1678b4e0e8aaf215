"""`ModelSummary`: the table of layers that a fit begins with."""

from __future__ import annotations

import math
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from lite.sharded import whole_shape
from lite.trainer.callbacks.base import Callback


class ModelSummary(Callback):
    """Prints the module's layers with their parameters on rank 0.

    Args:
        max_depth: How deep layers are listed; -1 for all, 0 for the totals alone.
    """

    def __init__(self, max_depth: int = 1) -> None:
        self.max_depth = max_depth

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.is_global_zero:
            print(summarize(pl_module, self.max_depth))


def summarize(module: nn.Module, max_depth: int = 1) -> str:
    """The table of a module's layers.

    Example:
        >>> print(summarize(nn.Sequential(nn.Linear(2, 3), nn.ReLU())))
          | name | type   | parameters | mode
        --+------+--------+------------+------
        0 | 0    | Linear | 9          | train
        1 | 1    | ReLU   | 0          | train
        9 parameters, 9 of them trained, 0.000 MB
    """
    rows = [("", "name", "type", "parameters", "mode")]
    for name, part in module.named_modules():
        depth = name.count(".") + 1
        if not name or (max_depth >= 0 and depth > max_depth):
            continue
        mode = "train" if part.training else "eval"
        rows.append((str(len(rows) - 1), name, type(part).__name__, _count(part), mode))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    lines = [" | ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "-+-".join("-" * w for w in widths))
    known = [p for p in module.parameters() if not is_lazy(p)]
    total, trained = sum(map(_numel, known)), sum(_numel(p) for p in known if p.requires_grad)
    size_mb = sum(_numel(p) * p.element_size() for p in known) / 1e6
    totals = f"{total:,} parameters, {trained:,} of them trained, {size_mb:.3f} MB"
    return "\n".join([*(lines if len(rows) > 1 and max_depth != 0 else ()), totals])


def _count(part: nn.Module) -> str:
    if any(is_lazy(p) for p in part.parameters()):
        return "?"
    return f"{sum(map(_numel, part.parameters())):,}"


def _numel(parameter: nn.Parameter) -> int:
    return math.prod(whole_shape(parameter))
