"""Letting one rank run a block before the others, through the store that they share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from lite.errors import UsageError

_FOREVER = timedelta(days=365)
_open: list[str] = []  # the blocks that this process is in, by their scopes


class FirstRank:
    """Blocks that the first rank of a scope runs before the others.

    Args:
        store: The process group's, which all ranks see.
        rank: This process's number among all.
    """

    def __init__(self, store: Any, rank: int) -> None:
        self._store = store
        self._rank = rank

    @contextmanager
    def run(self, first: bool, scope: str, name: str) -> Iterator[None]:
        """Enter the block: at once when `first`, otherwise after the first rank has left it without an error.

        Within a block of the same scope it is this rank's turn already, and nobody waits again.

        Raises:
            UsageError: (on the ranks that wait) the first rank's block raised; they don't run it.
        """
        if scope in _open:
            yield
            return
        # Each rank counts its own blocks, in the store, which outlives this object and is shared with others: no rank
        # has to wait for another one to know the number.
        number = self._store.add(f"lite/first/{scope}/rank{self._rank}", 1)
        key = f"lite/first/{scope}/block{number}"
        if not first:
            self._wait(key, name)
        _open.append(scope)
        try:
            yield
        except BaseException as error:
            if first:
                self._store.set(key, f"{type(error).__name__}: {error}")
            raise
        else:
            if first:
                self._store.set(key, "")
        finally:
            _open.remove(scope)

    def _wait(self, key: str, name: str) -> None:
        self._store.wait([key], _FOREVER)
        problem = self._store.get(key).decode()
        if problem:
            raise UsageError(
                f"{name} failed inside rank_zero_first, so this rank didn't enter the block. It said: {problem}"
            )


def refuse_alone(call: str) -> None:
    """Refuse what all ranks must do together while one of them runs a block before the others.

    Raises:
        UsageError: This process is in such a block.
    """
    if _open:
        raise UsageError(
            f"{call} needs all ranks, but inside rank_zero_first they run one after the other, so it would wait for "
            "ever; call it after the block."
        )
