"""`CombinedLoader`: several loaders as one, in any nesting, drawn from together or one after another."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch.utils._pytree import tree_flatten, tree_unflatten

from lite.errors import choose

MODES = ("min_size", "max_size_cycle", "max_size", "sequential")


class CombinedLoader:
    """Iterates over several loaders.

    Args:
        iterables: A nesting of dicts, lists and tuples with loaders in it.
        mode: "min_size" ends with the shortest loader; "max_size_cycle" begins shorter ones anew until the longest has
            ended; "max_size" gives None for those that have ended; "sequential" takes one after another.

    Iteration gives `(batch, batch_idx, dataloader_idx)`; the batch has the nesting of `iterables`, but for
    "sequential", where it is one loader's.

    Example:
        >>> [batch for batch, _, _ in CombinedLoader({"a": [1, 2, 3], "b": (range(2))}, "max_size_cycle")]
        [{'a': 1, 'b': 0}, {'a': 2, 'b': 1}, {'a': 3, 'b': 0}]
    """

    def __init__(self, iterables: Any, mode: str = "min_size") -> None:
        self.mode = choose("CombinedLoader's mode", mode, MODES)
        self.iterables = iterables
        self.flattened, self._spec = tree_flatten(iterables, is_leaf=_is_loader)
        self.limits: list[float] | None = None
        self._done: list[bool] = [False] * len(self.flattened)
        self._resumed: list[bool] | None = None

    def replaced(self, change: Callable[[Any], Any]) -> CombinedLoader:
        """The same over `change(loader)` for each loader."""
        made = CombinedLoader.__new__(CombinedLoader)
        made.mode, made.limits, made._spec = self.mode, self.limits, self._spec
        made.flattened = [change(loader) for loader in self.flattened]
        made.iterables = tree_unflatten(made.flattened, self._spec)
        made._done, made._resumed = [False] * len(made.flattened), None
        return made

    def __iter__(self) -> Iterator[tuple[Any, int, int]]:
        return self._one_after_another() if self.mode == "sequential" else self._together()

    def _one_after_another(self) -> Iterator[tuple[Any, int, int]]:
        for index, loader in enumerate(self.flattened):
            limit = self.limits[index] if self.limits is not None else float("inf")
            for number, batch in enumerate(loader):
                if number >= limit:
                    break
                yield batch, number, index

    def _together(self) -> Iterator[tuple[Any, int, int]]:
        iterators = [iter(loader) for loader in self.flattened]
        self._done, self._resumed = self._resumed or [False] * len(iterators), None
        number = 0
        while iterators:
            parts: list[Any] = []
            for i, iterator in enumerate(iterators):
                try:
                    if self.mode == "max_size" and self._done[i]:
                        parts.append(None)
                        continue
                    parts.append(next(iterator))
                except StopIteration:
                    if self.mode == "min_size":
                        return
                    self._done[i] = True
                    if all(self._done):
                        return
                    if self.mode == "max_size":
                        parts.append(None)
                        continue
                    iterators[i] = iter(self.flattened[i])
                    first = next(iterators[i], _NOTHING)
                    if first is _NOTHING:  # an empty loader can't be begun anew
                        return
                    parts.append(first)
            yield tree_unflatten(parts, self._spec), number, 0
            number += 1

    def __len__(self) -> int:
        """Batches.

        Raises:
            TypeError: A loader has no length.
        """
        lengths = [len(loader) for loader in self.flattened]
        if self.limits is not None:
            lengths = [int(min(n, limit)) for n, limit in zip(lengths, self.limits, strict=True)]
        if not lengths:
            return 0
        return sum(lengths) if self.mode == "sequential" else min(lengths) if self.mode == "min_size" else max(lengths)

    def state_dict(self) -> dict[str, Any]:
        """How far it has come, with the state of every loader that has one."""
        states = [loader.state_dict() if hasattr(loader, "state_dict") else None for loader in self.flattened]
        return {"done": list(self._done), "loaders": states}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next iteration go on from there."""
        self._resumed = list(state["done"])
        for loader, saved in zip(self.flattened, state["loaders"], strict=True):
            if saved is not None:
                loader.load_state_dict(saved)

    def forget_position(self) -> None:
        """Let the next iteration begin with all loaders again."""
        self._resumed = None

    @property
    def state_is_per_rank(self) -> bool:
        """Whether ranks have positions of their own."""
        return any(getattr(loader, "state_is_per_rank", False) for loader in self.flattened)


_NOTHING = object()


def _is_loader(value: Any) -> bool:
    """Dicts, lists and tuples are nesting, unless they hold plain data instead of loaders."""
    if isinstance(value, dict):
        return False
    if isinstance(value, (list, tuple)):
        return not any(_may_be_loader(part) for part in value)
    return True


def _may_be_loader(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(_may_be_loader(part) for part in value)
    return hasattr(value, "__iter__") and not isinstance(value, (str, bytes)) and not hasattr(value, "shape")
