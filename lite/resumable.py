"""A run that survives: it begins from the newest whole checkpoint, saves when due, and stops at an agreed step.

It decides when; how to save, load and agree it is told by the run that it belongs to.
"""

from __future__ import annotations

import re
import sys
import time
import warnings
from collections.abc import Iterator, MutableMapping
from typing import Any, Protocol

from lite import collectives
from lite.checkpoint.directory_format import INDEX
from lite.checkpoint.reading import damage, remove
from lite.checkpoint.storage import locate
from lite.errors import CheckpointError, ConfigError
from lite.guards.signals import StopSignals, exit_code
from lite.guards.stop import StopAgreement
from lite.seed import RandomState

KEY = "resumable"
_NAME = re.compile(r"^step-(\d{8,})(\.ckpt)?$")


class Run(Protocol):
    """What is asked of a `Lite`."""

    @property
    def is_global_zero(self) -> bool: ...

    def save(self, path: str, state: Any, *, async_save: bool = ..., busy: str = ...) -> bool: ...

    def load(self, path: str, state: Any, strict: bool = ..., *, verify: bool = ...) -> dict[str, Any]: ...

    def wait_for_save(self) -> None: ...

    def print(self, *args: Any, **kwargs: Any) -> None: ...

    def requeue_job(self) -> bool: ...


class Resumable:
    """Keeps the checkpoints of one run and goes on from the newest whole one; made by `Lite.resumable`.

    Attributes:
        steps: Steps so far, those before the interruption included.
        epoch: The epoch that `epochs` is in.
        resumed_from: The checkpoint that this run began from, or None.
        saved_steps: The steps of the newest checkpoint, or None.
        signals: The signal handlers that `close` puts back, or None.
    """

    def __init__(
        self,
        run: Run,
        state: MutableMapping[str, Any],
        folder: str,
        *,
        agreement: StopAgreement,
        every_steps: int | None = None,
        every_seconds: float | None = None,
        keep_last: int = 2,
        keep_every: int | None = None,
        async_save: bool = False,
        sharded: bool = False,
        requeue: bool = False,
        on_error: str = "raise",
    ) -> None:
        for name, value in (("every_steps", every_steps), ("keep_every", keep_every), ("keep_last", keep_last)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ConfigError(f"{name}={value!r} must be a whole number of at least 1.")
        if every_seconds is not None and not every_seconds > 0:
            raise ConfigError(f"every_seconds={every_seconds!r} must be a number of seconds above 0.")
        if on_error not in ("raise", "warn"):
            raise ConfigError(f"on_error={on_error!r} is not known; choose 'raise' or 'warn'.")
        if not isinstance(state, MutableMapping) or KEY in state:
            raise ConfigError(f"state={state!r:.80} must be a dict of names and objects, without the name {KEY!r}.")
        self.steps = 0
        self.epoch = 0
        self.resumed_from: str | None = None
        self._run, self._state = run, state
        self._storage, self._folder, _ = locate(folder)
        self._shown = folder.rstrip("/")
        self.signals: StopSignals | None = None
        self._agreement = agreement
        self._every_steps, self._every_seconds = every_steps, every_seconds
        self._keep_last, self._keep_every = keep_last, keep_every
        self._async_save, self._sharded = async_save, sharded
        self._requeue, self._on_error = requeue, on_error
        self.saved_steps: int | None = None
        self._random_state: RandomState | None = None
        self._saved_at = time.monotonic()
        if every_seconds is not None:
            agreement.watch_clock(lambda: time.monotonic() - self._saved_at >= every_seconds)
        self._load_newest()

    # ---- in the loop

    def epochs(self, count: int) -> Iterator[int]:
        """The epochs that are still to do, `range(count)` in a run that was not interrupted.

        After the last one the final state is saved, so that a script that is run once more has nothing left to do.

        Args:
            count: Epochs in all.
        """
        if self._random_state is not None:  # whatever the script has drawn since it was loaded
            self._random_state.restore()
            self._random_state = None
        any_left = self.epoch < count
        while self.epoch < count:
            yield self.epoch
            if self._agreement.agreed is not None:
                return
            self.epoch += 1
        if any_left:
            self.save()
        self.close()

    def step(self) -> bool:
        """Count a step, save if that is due, and say whether it was the last. Call it on all ranks after each step.

        After a signal (SIGTERM, SIGUSR1) all ranks save at the same step, and SystemExit is raised with 128 plus the
        signal's number. After `lite.request_stop` they save and True is returned: leave the loop.
        """
        self.steps += 1
        agreement = self._agreement
        stop = agreement.step()
        if stop or agreement.due or (self._every_steps is not None and self.steps % self._every_steps == 0):
            self._save(final=stop)
        if stop:
            self._stop()
        return stop

    def save(self) -> None:
        """Save now, and wait until it is written. Collective: call on all ranks.

        At the end of an epoch, when the loaders in the state have given out everything, the epoch counts as done.
        """
        self._save(final=True)

    def close(self) -> None:
        """Wait for the last save and put the signal handlers back that were there before."""
        self._run.wait_for_save()
        self._prune()
        if self.signals is not None:
            self.signals.close()

    # ---- saving

    def _save(self, *, final: bool) -> None:
        path = f"{self._shown}/step-{self.steps:08d}" + ("" if self._sharded else ".ckpt")
        progress = {"steps": self.steps, "epoch": self.epoch + self._epoch_is_done()}
        self._saved_at = time.monotonic()
        self._agreement.due = False
        try:
            self._run.save(path, {**self._state, KEY: progress}, async_save=self._async_save and not final)
            if final:
                self._run.wait_for_save()
        except CheckpointError as error:
            if self._on_error == "raise":
                raise
            warnings.warn(f"the run goes on without this checkpoint: {error}", stacklevel=3)
            return
        self.saved_steps = self.steps
        self._prune()

    def _epoch_is_done(self) -> bool:
        positions = [value.state_dict() for value in self._state.values() if hasattr(value, "go_on_under")]
        return bool(positions) and not any("items" in position for position in positions)

    def _names(self, *, whole: bool) -> list[str]:
        """The checkpoints that are whole, or those that are not, oldest first."""
        found = [(int(m[1]), name) for name in self._storage.names(self._folder) if (m := _NAME.match(name))]
        return [name for _, name in sorted(found) if self._is_whole(name) == whole]

    def _is_whole(self, name: str) -> bool:
        # A file gets its name when it is; a directory its index.
        path = self._storage.join(self._folder, name)
        return self._storage.kind(path) == "file" or INDEX in self._storage.names(path)

    def _prune(self) -> None:
        """Remove what need not be kept; a background save in flight has no name yet, and replaces nothing."""
        if not self._run.is_global_zero:
            return
        there = self._names(whole=True)
        for name in there[: -self._keep_last]:
            if self._keep_every is None or _steps(name) % self._keep_every:
                remove(f"{self._shown}/{name}")
        # Directories whose save was killed or failed. A newer one may be a save in flight.
        for name in self._names(whole=False):
            if there and _steps(name) < _steps(there[-1]):
                remove(f"{self._shown}/{name}")

    # ---- resuming

    def _load_newest(self) -> None:
        """Begin from the newest checkpoint that is whole. Collective."""
        chosen, told = None, []
        if self._run.is_global_zero:
            for name in reversed(self._names(whole=True)):
                path = f"{self._shown}/{name}"
                problem = _damage(path)
                if problem is None:
                    chosen = path
                    break
                told.append(f"{path} is damaged and was passed over: {problem}")
        chosen, told = collectives.broadcast((chosen, told))
        for text in told:
            warnings.warn(text, stacklevel=5)
        if chosen is None:
            return
        self._state[KEY] = None
        try:
            self._run.load(chosen, self._state, verify=False)
            progress = self._state[KEY]
        finally:
            del self._state[KEY]
        self.steps, self.epoch = progress["steps"], progress["epoch"]
        self.resumed_from, self.saved_steps = chosen, self.steps
        self._random_state = RandomState.capture(cuda=True)
        self._run.print(f"resumed from {chosen}, step {self.steps}", file=sys.stderr)

    def _stop(self) -> None:
        request = self._agreement.agreed
        assert request is not None
        self.close()
        collectives.barrier()  # a rank that ended while others still save would look like a failure to them
        if not request.signal:
            return
        if self._requeue:
            self._run.requeue_job()
        self._run.print(f"{request.reason}: saved step {self.steps} and stopped", file=sys.stderr)
        raise SystemExit(exit_code(request.signal))


def _steps(name: str) -> int:
    match = _NAME.match(name)
    assert match is not None
    return int(match[1])


def _damage(path: str) -> str | None:
    try:
        return damage(path)
    except CheckpointError as error:
        return str(error)
