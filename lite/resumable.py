"""A run that survives: it begins from the newest whole checkpoint, saves when due, and stops at an agreed step.

It decides when; how to save, load and agree it is told by the run that it belongs to.
"""

from __future__ import annotations

import math
import re
import sys
import time
import warnings
from collections.abc import Iterator, MutableMapping
from typing import Any, Protocol

from lite import collectives
from lite.checkpoint.directory_format import INDEX
from lite.checkpoint.reading import damage, remove
from lite.errors import CheckpointError, ConfigError
from lite.guards.signals import StopSignals, exit_code
from lite.guards.stop import StopAgreement
from lite.seed import RandomState
from lite.storage import locate

KEY = "resumable"
_LEFT = re.compile(r"^\.(step-\d{8,}(?:\.ckpt)?)\.[0-9a-f]{32}\.(?:tmp|lock)$")
_NAME = re.compile(r"^step-(\d{8,})(\.ckpt)?$")


class Run(Protocol):
    """What is asked of a `Lite`."""

    @property
    def is_global_zero(self) -> bool: ...

    @property
    def is_accumulating(self) -> bool: ...

    @property
    def num_micro_batches(self) -> int: ...

    def save(self, path: str, state: Any, *, async_save: bool = ..., busy: str = ...) -> bool: ...

    def load(self, path: str, state: Any, strict: bool = ..., *, verify: bool = ...) -> dict[str, Any]: ...

    def wait_for_save(self) -> None: ...

    def print(self, *args: Any, **kwargs: Any) -> None: ...

    def requeue_job(self) -> bool: ...


class Resumable:
    """Keeps the checkpoints of one run and goes on from the newest whole one; made by `Lite.resumable`.

    Attributes:
        folder: Where the checkpoints are.
        is_open: Whether it goes on saving: until `close`.
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
        if keep_every is not None and every_steps is not None and keep_every % every_steps:
            nearest = max(1, round(keep_every / every_steps)) * every_steps
            raise ConfigError(
                f"keep_every={keep_every} is no multiple of every_steps={every_steps}: only every "
                f"{math.lcm(keep_every, every_steps)}th step would be kept; use keep_every={nearest}."
            )
        if keep_every is not None and every_steps is None and every_seconds is not None:
            warnings.warn(
                f"keep_every={keep_every} keeps checkpoints of steps that it divides, but "
                f"every_seconds={every_seconds} saves at any step, so that few or none are kept; set every_steps too.",
                stacklevel=3,
            )
        if on_error not in ("raise", "warn"):
            raise ConfigError(f"on_error={on_error!r} is not known; choose 'raise' or 'warn'.")
        if not isinstance(state, MutableMapping) or KEY in state:
            raise ConfigError(f"state={state!r:.80} must be a dict of names and objects, without the name {KEY!r}.")
        self.steps = 0
        self.epoch = 0
        self.resumed_from: str | None = None
        self._run, self._state = run, state
        self._storage, self._folder, _ = locate(folder)
        self.folder = folder.rstrip("/")
        self.is_open = True
        self.signals: StopSignals | None = None
        self._agreement = agreement
        self._every_steps, self._every_seconds = every_steps, every_seconds
        self._keep_last, self._keep_every = keep_last, keep_every
        self._async_save, self._sharded = async_save, sharded
        self._requeue, self._on_error = requeue, on_error
        self.saved_steps: int | None = None
        self._micro_batches = 0  # as a save was last due
        self._postponed = False  # to the end of an open accumulation window
        self._writing: int | None = None  # the steps of a background save of which nothing has been heard yet
        self._begun_at = 0
        self._damaged: set[str] = set()
        self._loaders = [value for value in state.values() if hasattr(value, "go_on_under")]
        self._begun: list[int] = []  # passes over each of them as the epoch began
        self._steps_within = self._steps_after = 0  # of this epoch: while a pass was under way, and with none
        self._cuts: list[int] = []  # batches that each had given out at the newest step
        self._warned_of_cut = False
        self._random_state: RandomState | None = None
        self._positions: list[tuple[Any, Any]] = []  # that were loaded, for a script that has looked at a batch
        self._saved_at = time.monotonic()
        if every_seconds is not None:
            agreement.watch_clock(lambda: time.monotonic() - self._saved_at >= every_seconds)
        self._load_newest()

    # ---- in the loop

    def epochs(self, count: int) -> Iterator[int]:
        """The epochs that are still to do, `range(count)` in a run that was not interrupted.

        After the last one the final state is saved, so that a script that is run once more has nothing left to do.

        An epoch that is cut short by `break`: let what is in `state` decide, at the top of the loop (`for batch in
        loader: if loader.batches_done > 100: break`), so that a run that goes on from the step before decides alike.

        A loader that is gone through again and again beside the epochs' own: hold its iterator (`other = iter(loader)`
        before this call), and take `other = iter(loader)` anew where it ends. What an iterator has given out before
        this call does not count.

        Args:
            count: Epochs in all.
        """
        if self._random_state is not None:  # whatever the script has drawn or looked at since it was loaded
            for loader, position in self._positions:
                if not loader.is_held(unread=True):
                    loader.load_state_dict(position)
            self._random_state.restore()
            self._random_state = None
        any_left = self.epoch < count
        while self.epoch < count:
            for loader in self._loaders:
                loader.note_epoch()
            self._begun = [loader.progress()[0] - loader.progress()[1] for loader in self._loaders]
            self._steps_within = self._steps_after = 0
            yield self.epoch
            if self._agreement.agreed is not None:
                if self._postponed:
                    self._save(self.epoch + 1, final=True)
                    self._stop()
                return
            self._look_for_a_cut()
            self.epoch += 1
        if any_left:
            self._save(self.epoch, final=True)
        self.close()

    def step(self) -> bool:
        """Count a step, save if that is due, and say whether it was the last. Call it on all ranks after each step.

        After a signal (SIGTERM, SIGUSR1) all ranks save at the same step, and SystemExit is raised with 128 plus the
        signal's number. After `lite.request_stop` they save and True is returned: leave the loop.

        Gradients are in no checkpoint. Within a window of `lite.accumulate` all that waits for the window's end; where
        you accumulate by yourself, call this after the optimizer's steps alone.
        """
        self.steps += 1
        self._count()
        self._cuts = [loader.batches_done for loader in self._loaders]
        agreement = self._agreement
        stop = agreement.step()
        periodic = self._every_steps is not None and self.steps % self._every_steps == 0
        if stop or periodic or agreement.due or self._postponed:
            # A window that got nothing since the last step was left open; nobody will close it.
            self._postponed = self._run.is_accumulating and self._run.num_micro_batches != self._micro_batches
            self._micro_batches = self._run.num_micro_batches
            if self._postponed:
                return False
            # Called once per epoch, after the loop over the loader, it is the epoch's end.
            ends = self._passes_have_ended() and not self._steps_within and self._steps_after == 1
            self._save(self.epoch + ends, final=stop)
        if stop:
            self._stop()
        return stop

    def save(self, *, epoch_done: bool | None = None) -> None:
        """Save now, and wait until it is written. Collective: call on all ranks.

        Args:
            epoch_done: Whether `epochs` goes on with the next epoch after a resume, or with the rest of this one. None
                is true where a loader in the state has been gone through in this epoch, to its end, and no step came
                after it.
        """
        if epoch_done is None:
            epoch_done = self._passes_have_ended() and not (self._steps_within and self._steps_after)
        self._save(self.epoch + epoch_done, final=True)

    def close(self) -> None:
        """Wait for the last save and put the signal handlers back that were there before."""
        self.is_open = False
        self._settle()
        self._prune()
        if self._every_seconds is not None:
            self._agreement.watch_clock(None)
        if self.signals is not None:
            self.signals.close()

    # ---- the epoch

    def _count(self) -> None:
        if self._pass_is_under_way():
            self._steps_within += 1
        else:
            self._steps_after += 1

    def _look_for_a_cut(self) -> None:
        """Warn of a break after a step: a run that goes on from that step can't know of it."""
        now = [loader.batches_done for loader in self._loaders]
        is_cut = self._pass_is_under_way() and not self._a_pass_has_ended() and now == self._cuts
        if is_cut and not self._warned_of_cut:
            self._warned_of_cut = True
            warnings.warn(
                f"epoch {self.epoch} was left by break after a step, before the loader's end: a run that is resumed "
                "from that step goes on with the rest of the epoch. Break at the top of the loop instead, by "
                "loader.batches_done or what else is in state.",
                stacklevel=3,
            )

    def _passes_have_ended(self) -> bool:
        """Whether loaders were gone through since the epoch began, all that were begun to their end."""
        return not self._pass_is_under_way() and self._a_pass_has_ended()

    def _a_pass_has_ended(self) -> bool:
        now = [(loader, *loader.progress()) for loader in self._loaders]
        return any(
            begun - is_open > before and not loader.is_beside
            for (loader, begun, is_open), before in zip(now, self._begun, strict=False)
        )

    def _pass_is_under_way(self) -> bool:
        return any(loader.progress()[1] and not loader.is_beside for loader in self._loaders)

    # ---- saving

    def _save(self, epoch: int, *, final: bool) -> None:
        self._saved_at = time.monotonic()
        self._agreement.due = False
        self._settle()
        path = self._path(self.steps)
        content = {**self._state, KEY: {"steps": self.steps, "epoch": epoch}}
        try:
            self._run.save(path, content, async_save=self._async_save and not final)
        except CheckpointError as error:
            self._go_on_without(error)
            return
        self._writing = self.steps
        if final or not self._async_save:
            self._settle()
        self._prune()

    def _settle(self) -> None:
        """Hear what became of the save before; it is waited for."""
        steps, self._writing = self._writing, None
        if steps is None:
            return
        try:
            self._run.wait_for_save()
        except CheckpointError as error:
            self._go_on_without(error)
            return
        self.saved_steps = steps
        self._damaged.discard(self._path(steps))

    def _go_on_without(self, error: CheckpointError) -> None:
        if self._on_error == "raise":
            raise error
        warnings.warn(f"the run goes on without this checkpoint: {error}", stacklevel=4)

    def _path(self, steps: int) -> str:
        return f"{self.folder}/step-{steps:08d}" + ("" if self._sharded else ".ckpt")

    def _names(self, *, whole: bool) -> list[str]:
        """The checkpoints that are there, or directories without an index, oldest first."""
        found = [(int(m[1]), name) for name in self._storage.names(self._folder) if (m := _NAME.match(name))]
        return [name for _, name in sorted(found) if self._has_index(name) == whole]

    def _has_index(self, name: str) -> bool:
        # A file gets its name when it is whole; a directory its index.
        path = self._storage.join(self._folder, name)
        return self._storage.kind(path) == "file" or INDEX in self._storage.names(path)

    def _prune(self) -> None:
        """Remove what need not be kept, once this run has a checkpoint of its own."""
        if not self._run.is_global_zero or self.saved_steps is None:
            return
        there = [name for name in self._names(whole=True) if f"{self.folder}/{name}" not in self._damaged]
        old = [name for name in there if _steps(name) <= self.saved_steps][: -self._keep_last]
        old = [name for name in old if name not in self._kept_for_good(there)]
        # Directories whose save was killed or failed; a newer one may be a save in flight.
        old += [name for name in self._names(whole=False) if _steps(name) < self.saved_steps]
        if self.saved_steps > self._begun_at:
            old += [path.rsplit("/", 1)[-1] for path in self._damaged]
            self._damaged.clear()
        try:
            for name in old:
                remove(f"{self.folder}/{name}")
        except OSError as error:  # on rank 0 alone, while the others go on
            warnings.warn(f"an old checkpoint in {self.folder} could not be removed: {error}", stacklevel=4)

    def _kept_for_good(self, names: list[str]) -> set[str]:
        """Of each so many steps the first checkpoint: one that waited for a window's end has another number."""
        every, kept, before = self._keep_every, set(), 0
        for name in names:
            if every is not None and _steps(name) // every > before // every:
                kept.add(name)
            before = _steps(name)
        return kept

    # ---- resuming

    def _load_newest(self) -> None:
        """Begin from the newest checkpoint that is whole. Collective."""
        chosen: str | None = None
        told: list[str] = []
        problem: str | None = None
        if self._run.is_global_zero:
            try:
                chosen, told = self._find_newest()
            except (OSError, CheckpointError) as error:
                problem = f"{self.folder} can't be looked through: {error}"
            if chosen is None and told and problem is None:
                problem = f"no checkpoint in {self.folder} is whole; remove them, or use another folder, to begin anew."
            cannot = self._obstacle()
            if cannot is not None and self._on_error == "warn":
                told.append(cannot)
            problem = problem or (cannot if self._on_error == "raise" else None)
        chosen, told, problem = collectives.broadcast((chosen, told, problem))
        for text in told:
            warnings.warn(text, stacklevel=5)
        if problem is not None:
            raise CheckpointError(problem)
        if chosen is None:
            return
        self._state[KEY] = None
        try:
            self._run.load(chosen, self._state, verify=False)
            progress = self._state[KEY]
        finally:
            del self._state[KEY]
        self.steps, self.epoch = progress["steps"], progress["epoch"]
        self.resumed_from, self.saved_steps, self._begun_at = chosen, self.steps, self.steps
        self._random_state = RandomState.capture(cuda=True)
        self._positions = [(loader, loader.state_dict()) for loader in self._loaders]
        self._run.print(f"resumed from {chosen}, step {self.steps}", file=sys.stderr)

    def _obstacle(self) -> str | None:
        """Why nothing can be written to the folder, which is made if it isn't there."""
        try:
            self._storage.check_writable(self._folder)
        except OSError as error:
            return f"no checkpoint can be written to {self.folder}: {error}; give resumable another folder."
        return None

    def _find_newest(self) -> tuple[str | None, list[str]]:
        """The newest whole checkpoint, and what is to be told of newer ones. What killed saves left is removed."""
        for name in self._storage.names(self._folder):
            if left := _LEFT.match(name):
                self._storage.sweep(self._folder, left[1])
        told: list[str] = []
        for name in reversed(self._names(whole=True)):
            path = f"{self.folder}/{name}"
            problem = _damage(path)
            if problem is None:
                return path, told
            self._damaged.add(path)
            told.append(f"{path} is damaged and was passed over: {problem}")
        return None, told

    def _stop(self) -> None:
        request = self._agreement.agreed
        assert request is not None
        self.close()
        collectives.barrier()  # a rank that ended while others still save would look like a failure to them
        if not request.signal:
            return
        if self._requeue:
            self._run.requeue_job()
        saved = self.saved_steps == self.steps
        what = (
            f"saved step {self.steps}" if saved else f"step {self.steps} is NOT saved, the last is {self.saved_steps}"
        )
        self._run.print(f"{request.reason}: {what}; stopped", file=sys.stderr)
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
