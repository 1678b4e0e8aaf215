"""Finds an inf or NaN on any rank without waiting for the device at each step."""

from __future__ import annotations

import cmath
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
            *tensors: Of any shape and dtype; numbers are fine too.
            **named: The same, with names for the error.

        Returns:
            What it was given: one value, or a tuple in the order of the arguments.

        Raises:
            ConfigError: Something is neither a tensor nor a number; it is named.
            NonFiniteError: (on all ranks at once) One of the last `every` calls on some rank had an inf or NaN.
        """
        step = self.count
        flags = [("", _flag(tensor, f"argument {i}")) for i, tensor in enumerate(tensors)]
        flags += [(name, _flag(tensor, name)) for name, tensor in named.items()]
        self._kept += [(step, name, flag) for name, flag in flags if flag is not None]
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


def _flag(value: Any, what: str) -> Tensor | None:
    """What to look at later: a 0-dim tensor that is finite, or true, if `value` is fine; None for a number that is."""
    if isinstance(value, Tensor):
        value = value.detach()
        # A copy: the loop may change the tensor, or use its memory again.
        return value.clone() if value.ndim == 0 else torch.isfinite(value).all()
    if isinstance(value, int):
        return None
    try:
        fine = cmath.isfinite(value)
    except TypeError:
        raise ConfigError(
            f"nan_guard got {what}={value!r:.80}, a {type(value).__name__}; give it tensors or numbers, those in a "
            "list or dict one by one: guard(*values), guard(**values)."
        ) from None
    return None if fine else torch.tensor(False)
