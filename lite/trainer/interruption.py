"""How a fit ends before its time: by a signal that all ranks agree on, or by Ctrl-C, to be gone on with."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
        """SIGTERM and SIGUSR1 end the fit at a step that all ranks agree on, after a save."""
        if self.barebones or threading.current_thread() is not threading.main_thread():
            yield
            return
        handlers = [getattr(signal, n) for n in ("SIGTERM", "SIGUSR1") if hasattr(signal, n)]
        ours = [n for n in handlers if signal.getsignal(n) is signal.SIG_DFL]
        if not ours:
            yield
            return
        poll: Callable[[], bool] = self.lite.should_stop
        self.fit_loop.stop_poll = lambda: poll() and self.lite.stop_signal is not None
        try:
            with self.lite.stop_on_signals(*ours):
                for number in ours:
                    signal.signal(number, _waking(signal.getsignal(number), self.fit_loop.epoch_loop.look_now))
                yield
        finally:
            self.fit_loop.stop_poll = None

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
        from lite.guards.signals import exit_code

        self.state.status = TrainerStatus.INTERRUPTED
        self.lite.requeue_job()
        self.lite.barrier()
        raise SystemExit(exit_code(self.lite.stop_signal or 0))


def _waking(handler: Any, look_now: Callable[[], None]) -> Callable[[int, Any], None]:
    def handle(number: int, frame: Any) -> None:
        handler(number, frame)
        look_now()

    return handle
