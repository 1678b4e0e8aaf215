"""How a run ends before its time: by a signal that all ranks agree on, or, a fit, by Ctrl-C, to be gone on with."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from lite import collectives
from lite.storage import joined
from lite.trainer.checkpoints.finding import next_hpc_checkpoint
from lite.trainer.state import TrainerStatus
from lite.trainer.view import View


class Interruption(View):
    """The side of `Trainer` that hears signals."""

    barebones: bool

    def save_checkpoint(self, path: str | os.PathLike[str], weights_only: bool = False) -> None:
        raise NotImplementedError

    @contextmanager
    def _stop_signals(self) -> Iterator[None]:
        """SIGTERM and SIGUSR1 end the run, which is the block, at a place that all ranks agree on; then the process.

        One that comes when the run has looked for the last time acts after it, as where no run is.
        """
        fit = self.fit_loop
        fit.stopped_by_signal = False
        numbers = [getattr(signal, n) for n in ("SIGTERM", "SIGUSR1") if hasattr(signal, n)]
        listens = not self.barebones and threading.current_thread() is threading.main_thread()
        ours = [n for n in numbers if listens and signal.getsignal(n) is signal.SIG_DFL]
        # A rank that hears none itself, for a handler of the user's own, has the other ranks' word to go by.
        if self.barebones or (not ours and self.world_size == 1):
            yield
            return
        poll: Callable[[], bool] = self.lite.should_stop
        fit.stop_poll = lambda: poll() and self.lite.stop_signal is not None
        received: list[int] = []
        try:
            with self.lite.stop_on_signals(*ours) if ours else nullcontext():
                for number in ours:
                    signal.signal(number, _waking(signal.getsignal(number), received, fit.epoch_loop.look_now))
                yield
        except SystemExit:
            if not fit.stopped_by_signal:
                raise
        finally:
            fit.stop_poll = None
        if fit.stopped_by_signal:
            self._exit_for_signal()
        for number in received[:1]:
            os.kill(os.getpid(), number)

    def stops_for_signal(self, *, now: bool = False) -> bool:
        """Whether the run stops here because of a signal, on all ranks alike. Call it equally often on all ranks.

        Args:
            now: Whether all ranks wait for each other here, so that none misses a signal that has come before.
        """
        if self.fit_loop.stop_poll is None or not self.lite.should_stop(now=now) or self.lite.stop_signal is None:
            return False
        self.fit_loop.stopped_by_signal = True
        return True

    def heed_signal(self, *, now: bool = False) -> bool:
        """The same where there is nothing to save: what is under way ends here.

        Raises:
            SystemExit: It does.
        """
        if self.stops_for_signal(now=now):
            self.lite.print(f"{self.lite.stop_reason}: the run is stopped, nothing is saved", file=sys.stderr)
            raise SystemExit(self._signal_code)
        return False

    @contextmanager
    def _interrupts(self) -> Iterator[None]:
        """The first Ctrl-C ends the fit when the batch is done, to be gone on with; a second one at once."""
        here = threading.current_thread() is threading.main_thread()
        if not here or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
            yield
            return

        def asked(number: int, frame: Any) -> None:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            self.fit_loop.interrupt()

        signal.signal(signal.SIGINT, asked)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _save_for_signal(self) -> None:
        path = None
        if self.is_global_zero:
            if "SLURM_JOB_ID" in os.environ:
                path = next_hpc_checkpoint(self.default_root_dir)
            else:
                path = joined(self.checkpoint_folders()[0], "interrupted.ckpt")
        path = collectives.broadcast(path)
        self.save_checkpoint(path)
        self.lite.print(f"{self.lite.stop_reason}: saved {path}, step {self.global_step}; stopped", file=sys.stderr)
        self.state.status = TrainerStatus.INTERRUPTED

    def _exit_for_signal(self) -> None:
        self.state.status = TrainerStatus.INTERRUPTED
        self.lite.requeue_job()
        self.lite.barrier()
        raise SystemExit(self._signal_code)

    @property
    def _signal_code(self) -> int:
        from lite.guards.signals import exit_code

        return exit_code(self.lite.stop_signal or 0)


def _waking(handler: Any, received: list[int], look_now: Callable[[], None]) -> Callable[[int, Any], None]:
    def handle(number: int, frame: Any) -> None:
        handler(number, frame)
        received.append(number)
        look_now()

    return handle
