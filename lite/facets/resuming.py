"""A run that survives interruptions, from the user's loop."""

from __future__ import annotations

import os
import threading
import warnings
import weakref
from collections.abc import MutableMapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from lite.errors import ConfigError, shown
from lite.facets.checkpoints import Checkpoints
from lite.facets.guards import Guards
from lite.facets.ranks import BetweenRanks

if TYPE_CHECKING:
    from lite.resumable import Resumable


class Resuming(BetweenRanks, Checkpoints, Guards):
    """The side of `Lite` that goes on where a run was interrupted."""

    _trainings: ClassVar[weakref.WeakSet[Resumable]] = weakref.WeakSet()

    def resumable(
        self,
        state: MutableMapping[str, Any],
        folder: str | os.PathLike[str],
        *,
        every_steps: int | None = None,
        every_seconds: float | None = None,
        keep_last: int = 2,
        keep_every: int | None = None,
        async_save: bool = False,
        sharded: bool = False,
        signals: Sequence[Any] | None = None,
        requeue: bool = False,
        on_error: str = "raise",
    ) -> Resumable:
        """Begin from the newest whole checkpoint in `folder`, if there is one, and keep on saving there.

        Collective: call on all ranks, after everything in `state` is set up and before the loop. Then loop over
        `run.epochs(n)` and call `run.step()` after each step. What comes out equals the run without an interruption bit
        for bit, where the same number of processes goes on, and everything that changes is in `state`: model,
        optimizer, schedulers, the loader from `setup_dataloaders`, lists of losses. Random states and the loss scale
        are always in it. With another number of processes the epoch goes on with the same samples in the same order.

        SIGTERM and SIGUSR1 let all ranks save at the same step and end with the exit code 128 plus the signal's number;
        a second signal of the kind ends the process at once. `request_stop` lets them save and `run.step()` return
        True.

        Args:
            state: As for `save` and `load`.
            folder: Where the checkpoints are, named by their steps; all machines must see the same. URLs too.
            every_steps: Save after every so many steps.
            every_seconds: Save when so many seconds have passed, by rank 0's clock.
            keep_last: How many to keep; an older one is removed when the next one is whole.
            keep_every: Keep those of every so-manieth step for good: a multiple of `every_steps`.
            async_save: Write in the background, while training goes on.
            sharded: Write directories, of which every rank writes its part, instead of files.
            signals: What lets the run save and end; () for none. None is SIGTERM and SIGUSR1, where this is the main
                thread.
            requeue: After such a signal, put a SLURM job into the queue again.
            on_error: "warn" lets training go on when a checkpoint can't be written (the disk is full, say).

        Raises:
            ConfigError: An argument is wrong.
            CheckpointError: The newest whole checkpoint doesn't fit `state`. Damaged ones are passed over, with a
                warning.

        Example:
            >>> import lite, tempfile, torch
            >>> run = lite.Lite(accelerator="cpu")
            >>> model = torch.nn.Linear(2, 1)
            >>> model, optimizer = run.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
            >>> state = {"model": model, "optimizer": optimizer}
            >>> training = run.resumable(state, tempfile.mkdtemp(), every_steps=10)
            >>> for epoch in training.epochs(2):
            ...     for x in torch.ones(5, 4, 2):
            ...         run.backward(model(x).mean())
            ...         optimizer.step()
            ...         stop = training.step()
            >>> training.steps
            10
        """
        from lite.data.workers import DEFAULT_SIGNALS
        from lite.resumable import Resumable

        self._require_connected("resumable")
        if not isinstance(folder, (str, os.PathLike)) or not os.fspath(folder):
            raise ConfigError(
                f"folder={shown(folder)} is no path; the state comes first: lite.resumable({{'model': model}}, 'run')."
            )
        if signals is None:
            signals = DEFAULT_SIGNALS if threading.current_thread() is threading.main_thread() else ()
        agreement = self._stopping()
        training = Resumable(
            self,
            state,
            os.fspath(folder),
            agreement=agreement,
            every_steps=every_steps,
            every_seconds=every_seconds,
            keep_last=keep_last,
            keep_every=keep_every,
            async_save=async_save,
            sharded=sharded,
            requeue=requeue,
            on_error=on_error,
        )
        for other in self._trainings:
            if other.is_open and other.folder == training.folder:
                warnings.warn(
                    f"folder={os.fspath(folder)!r} is another open resumable's too, and each removes the other's "
                    "checkpoints; give each its own, or close() the first.",
                    stacklevel=2,
                )
        self._trainings.add(training)
        if signals:
            training.signals = self.stop_on_signals(*signals)
        return training
