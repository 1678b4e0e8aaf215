"""Finds an inf or NaN on any rank without waiting for the device at each step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lite import collectives
from lite.errors import ConfigError, NonFiniteError

_NONE = 2**62


class NanGuard:
    """Keeps what it is shown on the device, and looks at it together with the other ranks now and then.

    Made by `Lite.nan_guard`. As a context it looks once more at the end of the block.

    Args:
        every: How many calls lie between two looks.

    Attributes:
        count: Calls so far.
    """

    def __init__(self, every: int) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ConfigError(f"every={every!r} must be a whole number of at least 1: the calls between two looks.")
        self.every = every
        self.count = 0
        self._kept: list[tuple[int, str, Tensor]] = []

    def __call__(self, *tensors: Any, **named: Any) -> Any:
        """Guard tensors of this step. Call it equally often on all ranks; every `every`-th call communicates.

        Args:
            *tensors: Of any shape; numbers are fine too.
            **named: The same, with names for the error.

        Returns:
            What it was given: one value, or a tuple in the order of the arguments.

        Raises:
            NonFiniteError: (on all ranks at once) One of the last `every` calls on some rank had an inf or NaN.
        """
        step = self.count
        for tensor in tensors:
            self._keep(step, "", tensor)
        for name, tensor in named.items():
            self._keep(step, name, tensor)
        self.count += 1
        if self.count % self.every == 0:
            self.check()
        values = (*tensors, *named.values())
        return values[0] if len(values) == 1 else values

    def check(self) -> None:
        """Look now. Collective: call on all ranks.

        Raises:
            NonFiniteError: (on all ranks at once) A call since the last look on some rank had an inf or NaN.
        """
        bad = self._find()
        self._kept.clear()
        size = collectives.world_size()
        first = collectives.smallest(bad[0][0] * size + collectives.rank() if bad else _NONE)
        if first == _NONE:
            return
        step, rank = divmod(first, size)
        names = collectives.broadcast(sorted({name for s, name in bad if s == step and name}), rank)
        what = f" in {', '.join(map(repr, names))}" if names else ""
        where = f" on rank {rank}" if size > 1 else ""
        raise NonFiniteError(
            f"nan_guard found an inf or NaN{what}{where}, first at its call number {step} (counted from 0); find the "
            "cause with torch.autograd.set_detect_anomaly(True)."
        )

    def __enter__(self) -> NanGuard:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is None:
            self.check()

    def _keep(self, step: int, name: str, value: Any) -> None:
        if isinstance(value, Tensor):
            value = value.detach()
            # A copy: the loop may change the tensor, or use its memory again.
            flag = value.clone() if value.ndim == 0 else torch.isfinite(value).all()
        elif math.isfinite(value):
            return
        else:
            flag = torch.tensor(False)
        self._kept.append((step, name, flag))

    def _find(self) -> list[tuple[int, str]]:
        """The calls and names with an inf or NaN; waits for each device once."""
        bad: list[tuple[int, str]] = []
        groups: dict[tuple[torch.device, torch.dtype], list[tuple[int, str, Tensor]]] = {}
        for entry in self._kept:
            groups.setdefault((entry[2].device, entry[2].dtype), []).append(entry)
        for (_, dtype), entries in groups.items():
            stacked = torch.stack([flag for _, _, flag in entries])
            fine = stacked if dtype is torch.bool else torch.isfinite(stacked)
            bad += [(step, name) for (step, name, _), good in zip(entries, fine.tolist(), strict=True) if not good]
        return sorted(bad)
