"""Signals ask for a stop; handlers come and go; SLURM is asked to requeue."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import threading
import time
from pathlib import Path

import pytest
from torch.utils.data import Dataset

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


def test_a_second_signal_ends_a_process_that_hangs_in_native_code() -> None:
    """Where no handler of Python's runs: here it waits for a key that never comes."""
    code = (
        "import datetime, os, signal, threading, time\nimport torch.distributed as dist\nfrom lite import Lite\n"
        "signals = Lite(accelerator='cpu').stop_on_signals('TERM')\n"
        "def ask(number=signal.SIGTERM, me=os.getpid()):\n"
        "    [(time.sleep(pause), os.kill(me, number)) for pause in (0.2, 1.2)]\n"
        "threading.Thread(target=ask, daemon=True).start()\n"
        "store = dist.TCPStore('localhost', 0, is_master=True, timeout=datetime.timedelta(seconds=60))\n"
        "store.get('never')\n"
    )
    assert run_python("-c", code).returncode == 128 + signal.SIGTERM


class Slow(Dataset[int]):
    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> int:
        time.sleep(0.01)
        return index


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_live_on_when_the_whole_process_group_is_signalled(context: str) -> None:
    """As schedulers do it: the last step has its data, and the workers end with their process."""
    code = (
        "import os, signal, torch\nfrom torch.utils.data import DataLoader\nfrom lite import Lite\n"
        "from tests.guards.test_signals import Slow\n"
        "if __name__ == '__main__':\n    os.setsid()\n"
        "    lite = Lite(accelerator='cpu')\n    signals = lite.stop_on_signals()\n"
        f"    loader = DataLoader(Slow(), batch_size=4, num_workers=2, multiprocessing_context='{context}')\n"
        "    seen, asked = [], False\n"
        "    for batch in lite.setup_dataloaders(loader):\n"
        "        seen += batch.tolist()\n"
        "        if len(seen) == 12:\n"
        "            os.killpg(0, signal.SIGUSR1), os.killpg(0, signal.SIGTERM)\n"
        "        asked = lite.should_stop()\n"
        "    print(asked, seen == list(range(40)), signals.received.name)\n"
    )
    done = run_python("-c", code)
    assert (done.returncode, done.stdout) == (0, "True True SIGUSR1\n"), done.stderr


class Hanging(Slow):
    def __getitem__(self, index: int) -> int:
        if index >= 4:  # as native libraries do after a fork
            mutex, libc = ctypes.create_string_buffer(64), ctypes.CDLL(None)
            libc.pthread_mutex_lock(mutex)
            libc.pthread_mutex_lock(mutex)
        return index


def test_a_worker_that_hangs_in_native_code_is_ended_with_its_process() -> None:
    """No handler of Python's runs there; persistent workers of before the handlers were installed live on as others."""
    code = (
        "import os, signal\nfrom torch.utils.data import DataLoader\nfrom lite import Lite\n"
        "from tests.guards.test_signals import Hanging, Slow\n"
        "os.setsid()\nlite = Lite(accelerator='cpu')\n"
        "early = lite.setup_dataloaders(DataLoader(Slow(), batch_size=20, num_workers=1, persistent_workers=True))\n"
        "for _ in early: pass\n"
        "signals = lite.stop_on_signals()\n"
        "for batch in early:\n"
        "    if not lite.should_stop(): os.killpg(0, signal.SIGUSR1)\n"
        "print(len(batch), signals.received.name)\n"
        "loader = lite.setup_dataloaders(DataLoader(Hanging(), batch_size=2, num_workers=1, timeout=2))\n"
        "try:\n"
        "    for batch in loader: pass\n"
        "except RuntimeError as error: print('timed out' in str(error))\n"
    )
    done = run_python("-c", code, timeout=60)
    assert (done.returncode, done.stdout) == (0, "20 SIGUSR1\nTrue\n"), done.stderr


def test_listening_ends_without_taking_anything_from_others() -> None:
    """A signal named twice is one; whoever listens since then goes on."""
    before = signal.getsignal(signal.SIGTERM)
    signals = Lite(accelerator="cpu").stop_on_signals("TERM", signal.SIGTERM)
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    signal.set_wakeup_fd(theirs.fileno())
    signals.close()
    assert signal.set_wakeup_fd(-1) == theirs.fileno()
    assert signal.getsignal(signal.SIGTERM) is before
    ours.close()
    theirs.close()


def test_a_forked_process_can_be_ended() -> None:
    """It is not the one that was asked to listen: multiprocessing's terminate works on it, and nobody else hears it."""
    code = (
        "import multiprocessing, time\nfrom lite import Lite\n"
        "lite = Lite(accelerator='cpu')\nsignals = lite.stop_on_signals()\n"
        "child = multiprocessing.get_context('fork').Process(target=time.sleep, args=(60,))\nchild.start()\n"
        "time.sleep(0.2)\nchild.terminate()\nchild.join()\n"
        "print(child.exitcode, signals.received, lite.should_stop())\n"
    )
    done = run_python("-c", code)
    assert done.stdout == f"{-signal.SIGTERM} None False\n", done.stderr


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
