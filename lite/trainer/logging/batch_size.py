"""How many samples a batch has, by looking at it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor


def infer_batch_size(batch: Any, warn: Callable[[str], None]) -> int:
    """The first dimension of the first tensor in a batch; 1 where there is none.

    Example:
        >>> import torch
        >>> infer_batch_size({"ids": torch.zeros(3, 2), "name": "a"}, print)
        3
    """
    if isinstance(batch, (list, tuple)) and batch and type(batch[0]) is Tensor:
        first = batch[0]
        sizes = {t.shape[0] for t in batch if type(t) is Tensor and t.ndim}
        size = first.shape[0] if first.ndim else 1
    else:
        found = list(_sizes(batch))
        sizes, size = set(found), found[0] if found else 1
    if len(sizes) > 1:
        warn(
            f"the tensors of a batch have different first dimensions ({sorted(sizes)}), and the epoch's mean is "
            f"weighed by the first, {size}; pass batch_size= to log."
        )
    return int(size)


def _sizes(data: Any) -> Iterable[int]:
    if isinstance(data, Tensor):
        yield data.shape[0] if data.ndim else 1
    elif isinstance(data, Mapping):
        for value in data.values():
            yield from _sizes(value)
    elif isinstance(data, (list, tuple)):
        for value in data:
            yield from _sizes(value)
