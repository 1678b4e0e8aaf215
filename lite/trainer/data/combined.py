"""`CombinedLoader`: several loaders as one, in any nesting, drawn from together or one after another."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.data import Dataset

from lite.errors import UsageError, choose

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
        self.batches_done = 0  # those before an interruption included
        self._skipped = 0

    def replaced(self, change: Callable[[Any], Any]) -> CombinedLoader:
        """The same over `change(loader)` for each loader."""
        made = CombinedLoader.__new__(CombinedLoader)
        made.mode, made.limits, made._spec = self.mode, self.limits, self._spec
        made.flattened = [change(loader) for loader in self.flattened]
        made.iterables = tree_unflatten(made.flattened, self._spec)
        made._done, made._resumed = [False] * len(made.flattened), None
        made.batches_done = made._skipped = 0
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
        self._done, self._resumed = self._resumed or [False] * len(self.flattened), None
        over = [done and self.mode == "max_size" for done in self._done]  # another pass would be the next epoch's
        iterators = [iter(()) if end else iter(one) for one, end in zip(self.flattened, over, strict=True)]
        self.batches_done, self._skipped = self._skipped, 0
        number, shortest = 0, self._shortest()
        while iterators and self.batches_done < shortest:
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
            self.batches_done += 1
            yield tree_unflatten(parts, self._spec), number, 0
            number += 1

    def _shortest(self) -> float:
        """Batches of mode "min_size" where all lengths are known: a longer loader draws none that nobody gets."""
        if self.mode != "min_size":
            return float("inf")
        try:
            return min((len(loader) for loader in self.flattened), default=0)
        except TypeError:
            return float("inf")

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

    def state_dict(self, *, undone: int = 0) -> dict[str, Any]:
        """How far it has come, with the state of every loader that has one; `undone`: 1 to give the newest batch again.

        Raises:
            UsageError: A loader can't give its newest batch again.
        """
        states = []
        for done, loader in zip(self._done, self.flattened, strict=True):
            drawn = undone and not (done and self.mode == "max_size")
            states.append(position(loader, undone=1 if drawn else 0) if hasattr(loader, "state_dict") else None)
        return {"done": list(self._done), "batches": self.batches_done - undone, "loaders": states}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next iteration go on from there."""
        self._resumed, self._skipped = list(state["done"]), state.get("batches", 0)
        for loader, saved in zip(self.flattened, state["loaders"], strict=True):
            if saved is not None:
                loader.load_state_dict(saved)

    def forget_position(self) -> None:
        """Let the next iteration begin with all loaders again."""
        self._resumed, self._skipped = None, 0

    @property
    def state_is_per_rank(self) -> bool:
        """Whether ranks have positions of their own."""
        return any(getattr(loader, "state_is_per_rank", False) for loader in self.flattened)


def position(loader: Any, *, undone: int) -> Any:
    """A loader's state, or with `undone` that of so many batches before.

    Raises:
        UsageError: It can't give them again.
    """
    if not undone:
        return loader.state_dict()
    if not hasattr(loader, "batches_done"):
        raise UsageError(f"{type(loader).__name__} tells only where it is, so its last batch can't be given again.")
    return loader.state_dict(undone=undone)


def where_to_go_on(loader: Any, under_way: bool) -> Any:
    """A loader's state: it goes on with the batch whose step is not done, where one is under way."""
    try:
        return position(loader, undone=int(under_way))
    except UsageError as error:
        if not under_way:
            raise
        warnings.warn(f"saved within a step, whose batch a resumed run leaves out: {error}", stacklevel=6)
        return loader.state_dict()


_NOTHING = object()


def has_loader(value: Any) -> bool:
    """Whether anything in dicts, lists and tuples is a loader; a list without is one itself, of ready batches.

    A loader is what can be iterated over and is no tensor, array or text, whatever its class; and a dataset, which
    is refused as one later on, rather than taken for a batch.
    """
    if isinstance(value, Mapping):
        return any(map(has_loader, value.values()))
    if isinstance(value, (list, tuple)):
        return any(map(has_loader, value))
    iterates = hasattr(value, "__iter__") and not isinstance(value, (str, bytes)) and not hasattr(value, "shape")
    return iterates or isinstance(value, Dataset)


def _is_loader(value: Any) -> bool:
    """Dicts, lists and tuples are nesting, unless they hold plain data instead of loaders."""
    return not isinstance(value, dict) and (not isinstance(value, (list, tuple)) or not has_loader(value))
