"""Saving and loading, from the user's loop."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from lite import collectives
from lite.checkpoint.file import load_file, save_file
from lite.errors import CheckpointError
from lite.facets.base import Facet
from lite.precision.base import Precision
from lite.state import Filter, collect, restore


class Checkpoints(Facet):
    """The side of `Lite` that keeps what was reached."""

    def save(self, path: str | os.PathLike[str], state: Mapping[str, Any], filter: Filter | None = None) -> None:
        """Write a checkpoint to one file, whole or not at all. Collective: call on all ranks; rank 0 writes.

        Args:
            path: The file; folders are made. `torch.load(path, weights_only=True)` reads it without `lite`.
            state: Names and modules, optimizers, schedulers, Stateful objects or plain values.
            filter: For a name of `state`, a function of (key, value) that says which of its items are kept.

        Raises:
            CheckpointError: (on all ranks) The file can't be written, or a value can't be stored; it names the key.
        """
        self._require_connected("save")
        problem: BaseException | None = None
        try:
            content = collect(state, filter)
            if self.is_global_zero:
                save_file(path, {**content, **_precision_entry(self.precision)})
        except Exception as error:
            problem = error
        failed = collectives.broadcast(None if problem is None else str(problem))
        if problem is not None:
            raise problem
        if failed is not None:
            raise CheckpointError(f"rank 0 could not save: {failed}")

    def load(
        self, path: str | os.PathLike[str], state: dict[str, Any] | None = None, strict: bool = True
    ) -> dict[str, Any]:
        """Read a checkpoint into the objects of `state`, in place. Every rank reads the file.

        Args:
            path: A file that `save` wrote.
            state: As for `save`; plain values are replaced in it. None returns everything.
            strict: Whether names and model keys that are missing are errors.

        Returns:
            The entries that `state` doesn't ask for.

        Raises:
            CheckpointError: The file is missing, damaged or holds code, or doesn't fit the objects.
        """
        loaded = load_file(path)
        precision = loaded.pop(_PRECISION_KEY, None)
        if state is None:
            return loaded
        if precision is not None:
            self.precision.load_state_dict(precision)
        return restore(state, loaded, strict=strict)


_PRECISION_KEY = "lite_precision"


def _precision_entry(precision: Precision) -> dict[str, Any]:
    state = precision.state_dict()
    return {_PRECISION_KEY: state} if state else {}
