"""What keeps ranks from hanging, drifting apart or going bad unnoticed, from the user's loop."""

from __future__ import annotations

import os
from numbers import Real
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer

from lite.errors import ConfigError, UsageError
from lite.facets.base import Facet

if TYPE_CHECKING:
    from lite.guards.nonfinite import NanGuard
    from lite.guards.signals import StopSignals
    from lite.guards.stop import StopAgreement


class Guards(Facet):
    """The side of `Lite` that guards a run. What is not asked for is not even imported."""

    _optimizers: list[Optimizer]
    _agreement: StopAgreement | None = None
    _stop_name: str = ""
    _sync_calls: dict[int, int]

    def request_stop(self, reason: str, *, after_s: float = 0.0) -> None:
        """Ask for a stop, on any rank and from any thread; `should_stop` says when all ranks have agreed.

        Args:
            reason: Why; `stop_reason` gives it back, with the rank, on all ranks. The first request counts.
            after_s: Ask only in so many seconds: a time limit.

        Raises:
            ConfigError: `reason` is empty, or `after_s` is negative.
        """
        self._require_connected("request_stop")
        if not isinstance(reason, str) or not reason:
            raise ConfigError(f"reason={reason!r} must say in words why the run stops.")
        if not isinstance(after_s, Real) or not after_s >= 0:
            raise ConfigError(f"after_s={after_s!r} must be a number of seconds from now, of at least 0.")
        self._stopping().request(reason, after_s=after_s)

    def should_stop(self, *, now: bool = False) -> bool:
        """Whether the run stops after this step, decided alike on all ranks.

        Call it once per step and equally often on all ranks; a call costs one comparison, and is no collective. A
        request takes effect half a second after it was made, plus the step that is under way and the next one.

        Args:
            now: Whether what any rank has asked for before its call counts here at once, as it may at a loop's end,
                where no step follows. Collective then: call on all ranks.

        Returns:
            True at the agreed step and from then on.

        Example:
            >>> import lite
            >>> run = lite.Lite(accelerator="cpu")
            >>> run.request_stop("the loss is low enough")
            >>> run.should_stop(), run.stop_reason
            (True, 'the loss is low enough')
        """
        agreement = self._agreement
        return (agreement if agreement is not None else self._stopping()).step(now=now)

    @property
    def stop_reason(self) -> str | None:
        """Why all ranks stop, once `should_stop` has said so."""
        agreed = self._agreement.agreed if self._agreement is not None else None
        return agreed.reason if agreed is not None else None

    @property
    def stop_signal(self) -> int | None:
        """The signal behind the agreed stop, on all ranks, whichever of them got it; None where it was none.

        `lite.guards.signals.exit_code(lite.stop_signal)` is the code to end with.
        """
        agreed = self._agreement.agreed if self._agreement is not None else None
        return agreed.signal if agreed is not None and agreed.signal else None

    def stop_on_signals(self, *signals: Any) -> StopSignals:
        """Let signals to this process ask for a stop, until the result's `close()` or the end of its `with` block.

        A second signal of the kind ends the process at once. Call it on all ranks where all can be signalled: torchrun
        hands SIGTERM on to every rank, and SIGUSR1 with `--signals-to-handle=SIGTERM,SIGUSR1`.

        Args:
            *signals: Which; SIGTERM and SIGUSR1 by default.

        Raises:
            ConfigError: Something is no signal that can be handled.
            UsageError: This is not the main thread.
        """
        from lite.data.workers import DEFAULT_SIGNALS
        from lite.guards.signals import StopSignals

        self._require_connected("stop_on_signals")
        agreement = self._stopping()
        return StopSignals(signals or DEFAULT_SIGNALS, lambda reason, number: agreement.request(reason, signal=number))

    def requeue_job(self) -> bool:
        """Put this SLURM job into the queue again, on rank 0. Call it after the last checkpoint, before you exit.

        Returns:
            Whether this rank has done so; False on other ranks and outside SLURM.

        Raises:
            UsageError: SLURM refuses.
        """
        from lite.guards.signals import requeue_slurm_job

        return self.is_global_zero and requeue_slurm_job(os.environ)

    def check_sync(self, every: int = 1, *, buffers: bool | None = None) -> None:
        """Compare parameters, buffers and optimizer state of all that was set up over the ranks, bit for bit.

        Collective: call on all ranks. Sharded tensors, and models whose layers lie on
        different ranks, are left out: there, ranks hold different values on purpose.

        Args:
            every: Check at every so-manieth call only, to be called in each step.
            buffers: False leaves buffers out. None (the default) leaves out those that the strategy takes from rank 0
                at each forward (DDP does, unless told otherwise): they may differ in between, as a
                BatchNorm's statistics do.

        Raises:
            DesyncError: (on all ranks alike) A value differs; the message names the first one and the ranks.
            UsageError: Nothing is set up.
        """
        self._require_connected("check_sync")
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ConfigError(f"every={every!r} must be a whole number of at least 1: check at every so-manieth call.")
        calls = self._sync_calls[every] = self._sync_calls.get(every, 0) + 1
        if calls % every:
            return
        from lite.guards.sync import check_sync

        if not self._modules:
            raise UsageError("check_sync has nothing to compare; call lite.setup(model, optimizer) first.")
        check_sync(self._modules, self._optimizers, buffers=buffers)

    def nan_guard(self, every: int = 50) -> NanGuard:
        """Make a guard against inf and NaN: `guard(loss)` in each step, without waiting for the device.

        Every `every`-th call, and `guard.check()`, communicate: call it equally often on all ranks. An inf or NaN on
        one rank raises NonFiniteError on all of them.

        Args:
            every: Calls between two looks.

        Example:
            >>> import lite, torch
            >>> guard = lite.Lite(accelerator="cpu").nan_guard(every=2)
            >>> loss = guard(torch.tensor(1.0))
            >>> guard(loss=loss / 0)
            Traceback (most recent call last):
            ...
            lite.errors.NonFiniteError: nan_guard found an inf or NaN in 'loss', first at its call number 1 ...
        """
        from lite.guards.nonfinite import NanGuard

        self._require_connected("nan_guard")
        return NanGuard(every)

    def _guard_job(self) -> None:
        """Join the watch over the job's processes. Collective: called on all ranks."""
        self._sync_calls = {}
        if self._store is not None and self.world_size > 1:
            from lite.guards.failure import watch_failures
            from lite.launchers.notes import end_with_launcher

            end_with_launcher()
            self._watch = watch_failures(self._store)
            weight = self._weight
            self._watch.begin_anew(lambda: weight.uses)
            self._stop_name = self._watch.new_name("stop")

    def _tell_of_failure(self, error: BaseException) -> None:
        """This process ends with `error`."""
        if self._watch is not None:
            self._watch.post(error)

    def _stopping(self) -> StopAgreement:
        """The agreement on a last step, made when it is first asked for; ranks may do so at different times."""
        if self._agreement is None:
            from lite.guards.stop import StopAgreement

            self._require_connected("should_stop")
            watch = self._watch
            if watch is None:
                self._agreement = StopAgreement()
            else:
                self._agreement = StopAgreement(
                    self._store, name=self._stop_name, rank=self.global_rank, world_size=self.world_size, watch=watch
                )
                watch.report_progress(self._agreement.progress, self._agreement.counted)
        return self._agreement
