"""Signals ask for a stop; handlers come and go; SLURM is asked to requeue."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from lite import ConfigError, Lite, UsageError
from lite.guards.signals import exit_code, requeue_slurm_job
from tests.support.processes import run_distributed, run_python


def test_a_signal_asks_for_a_stop() -> None:
    """And says which one it was; afterwards the handlers are those from before."""
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)
    lite = Lite(accelerator="cpu")
    with lite.stop_on_signals() as signals:
        assert not lite.should_stop()
        os.kill(os.getpid(), signal.SIGUSR1)
        assert lite.should_stop()
    assert signals.received is signal.SIGUSR1
    assert (lite.stop_signal, lite.stop_reason) == (signal.SIGUSR1, "got SIGUSR1")
    assert exit_code(signals.received) == 128 + signal.SIGUSR1
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)) == before


def test_a_second_signal_ends_the_process() -> None:
    """By the default action; but one within a second of the first is the same one, sent by two."""
    code = (
        "import os, signal, time\nfrom lite import Lite\nlite = Lite(accelerator='cpu')\n"
        "signals = lite.stop_on_signals('TERM')\n"
        "os.kill(os.getpid(), signal.SIGTERM); os.kill(os.getpid(), signal.SIGTERM)\n"
        "print('lives', flush=True); time.sleep(1.1)\nos.kill(os.getpid(), signal.SIGTERM)\nprint('still lives')\n"
    )
    done = run_python("-c", code)
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, "lives\n")


def test_only_the_main_thread_can_install() -> None:
    """And only what can be handled; nothing is left behind."""
    lite = Lite(accelerator="cpu")
    caught: list[BaseException] = []

    def install() -> None:
        try:
            lite.stop_on_signals()
        except UsageError as error:
            caught.append(error)

    thread = threading.Thread(target=install, name="mine")
    thread.start()
    thread.join()
    assert "in the thread 'mine'" in str(caught[0])
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ConfigError, match="SIGKILL can't be handled"):
        lite.stop_on_signals(signal.SIGTERM, signal.SIGKILL)
    assert signal.getsignal(signal.SIGTERM) == before
    with pytest.raises(ConfigError, match="'HUPP' is no signal"):
        lite.stop_on_signals("HUPP")


def one_is_signalled() -> tuple[int, int | None, str | None, bool]:
    lite = Lite(accelerator="cpu")
    with lite.stop_on_signals(signal.SIGUSR1) as signals:
        for step in range(10_000):
            time.sleep(0.001)
            if lite.global_rank == 1 and step == 10:
                os.kill(os.getpid(), signal.SIGUSR1)
            if lite.should_stop():
                break
    lite.barrier()
    return step, lite.stop_signal, lite.stop_reason, signals.received is not None


def test_a_signal_to_one_rank_stops_all() -> None:
    """All know which signal it was, the one that got it and the others."""
    (zero, *rest_zero, got_zero), (one, *rest_one, got_one) = run_distributed(one_is_signalled)
    assert zero == one
    assert rest_zero == rest_one == [signal.SIGUSR1, "got SIGUSR1 (rank 1)"]
    assert (got_zero, got_one) == (False, True)


def test_slurm_is_asked_to_requeue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The job, or the task of an array; a refusal is quoted; outside SLURM nothing happens."""
    fake = tmp_path / "scontrol"
    fake.write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n[ "$2" != 13 ] || {{ echo "Invalid job" >&2; exit 1; }}\n'
    )
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    lite = Lite(accelerator="cpu")
    assert not lite.requeue_job()
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    assert lite.requeue_job()
    assert requeue_slurm_job({"SLURM_JOB_ID": "14", "SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "3"})
    assert (tmp_path / "calls").read_text() == "requeue 12\nrequeue 12_3\n"
    with pytest.raises(UsageError, match="ended with 1: Invalid job"):
        requeue_slurm_job({"SLURM_JOB_ID": "13"})
