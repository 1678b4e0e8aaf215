"""Starting processes for real: torchrun, lite.launch, a subclass's run, and what happens when one fails."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.processes import ROOT, run_python, run_torchrun

SCRIPT = Path(__file__).with_name("scripts.py")
PLAIN = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
MODULE = ("-m", "tests.launchers.scripts")


def test_lite_alone_joins_the_job_under_torchrun(tmp_path: Path) -> None:
    """Two ranks of one job, never two jobs of one rank; nothing is printed at the end."""
    done = run_torchrun(SCRIPT, "join", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["2 3.0", "2 3.0"]
    assert "warn" not in done.stderr.lower(), done.stderr


def test_a_contradiction_with_torchrun_ends_the_job(tmp_path: Path) -> None:
    """devices=4 under two processes."""
    done = run_torchrun(SCRIPT, "contradiction")
    assert done.returncode != 0
    assert "devices=4 but torchrun started 2 processes" in done.stderr


def test_launch_starts_the_processes_and_returns_rank_zeros_value(tmp_path: Path) -> None:
    """By a function and by a subclass's run."""
    done = run_python(*MODULE, "launch", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["(2, 3.0)", "(5, 2) (6, 1)"]
    assert (tmp_path / "1").read_text() == "2 3.0"


def test_launch_without_a_function_runs_the_script_again(tmp_path: Path) -> None:
    """As torchrun would; the first process ends with 0."""
    done = run_python(*MODULE, "again", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["2 3.0", "2 3.0"]


def test_a_crash_ends_all_processes_with_its_own_traceback() -> None:
    """Rank 0 waits in a collective; the error is rank 1's."""
    started = time.monotonic()
    done = run_python(*MODULE, "crash")
    assert done.returncode == 1
    assert "LaunchError: rank 1 failed" in done.stderr
    assert "ValueError: boom on one" in done.stderr
    assert time.monotonic() - started < 60


def test_a_killed_process_is_what_failed_first() -> None:
    """Not the rank that lost the connection to it, whose error comes second."""
    done = run_python(*MODULE, "killed")
    assert done.returncode == 1
    assert "LaunchError: rank 1 was ended by SIGKILL" in done.stderr


RERUN = """
import os, sys
from lite import Lite
os.chdir("/")
lite = Lite(accelerator="cpu", devices="auto" if "RANK" in os.environ else 2)
lite.launch()
with open(f"{sys.argv[1]}/{lite.global_rank}", "w") as file:
    file.write(f"{lite.world_size} {__debug__}")
lite.barrier()
if lite.global_rank == 1 and sys.argv[2:] == ["fail"]:
    raise ValueError("boom on one")
"""


def test_the_script_that_is_run_again_is_found_again(tmp_path: Path) -> None:
    """By a relative path after os.chdir, with python's own options; as a folder; not from standard input. A failure in
    it is told as that of a function is.
    """
    folder = tmp_path / "app"
    folder.mkdir()
    (folder / "__main__.py").write_text(RERUN)
    options = {"cwd": tmp_path, "capture_output": True, "text": True, "timeout": 180, "env": {**os.environ, **PLAIN}}
    for command, end in ((["-O", "app/__main__.py"], []), (["app"], ["fail"])):
        for rank in "01":
            (tmp_path / rank).unlink(missing_ok=True)
        done = subprocess.run([sys.executable, *command, str(tmp_path), *end], **options)  # type: ignore[call-overload]
        assert done.returncode == len(end), done.stderr
        _, _, message = done.stderr.partition("LaunchError: ")
        assert message.startswith("rank 1 failed:\n\nTraceback") == (end == ["fail"]), done.stderr
        assert ("ValueError: boom on one" in message) == (end == ["fail"])
        assert [(tmp_path / rank).read_text() for rank in "01"] == [f"2 {len(command) == 1}"] * 2
    done = subprocess.run([sys.executable, "-", str(tmp_path)], input=RERUN, **options)  # type: ignore[call-overload]
    assert done.returncode == 1
    assert "ConfigError: launch()" in done.stderr


def test_a_fork_after_threaded_work_does_not_hang() -> None:
    """As in a notebook: the forked processes compute with one thread each."""
    done = run_python(*MODULE, "fork")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "(2, 1)"


def test_a_script_without_a_main_guard_is_told_so(tmp_path: Path) -> None:
    """No chain of processes, no hang."""
    script = tmp_path / "unguarded.py"
    script.write_text(
        "from lite import Lite\ndef train(lite):\n    return 1\nLite(accelerator='cpu', devices=2).launch(train)\n"
    )
    done = run_python(str(script))
    assert done.returncode != 0
    assert "if __name__ == '__main__':" in done.stderr


@pytest.mark.parametrize(
    ("what", "number", "status"),
    [
        ("wait", signal.SIGINT, -signal.SIGINT),
        ("wait", signal.SIGTERM, 143),
        ("wait", signal.SIGUSR1, 128 + signal.SIGUSR1),
        ("wait", signal.SIGKILL, -signal.SIGKILL),
        ("wait-script", signal.SIGKILL, -signal.SIGKILL),
    ],
)
def test_no_process_survives_the_one_that_launched(
    what: str, number: signal.Signals, status: int, tmp_path: Path
) -> None:
    """A signal to the parent alone; it ends as Python does by that signal."""
    process = subprocess.Popen(
        [sys.executable, *MODULE, what, str(tmp_path)],
        cwd=ROOT,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=interruptible,
    )
    files = [tmp_path / "pid0", tmp_path / "pid1"]
    deadline = time.monotonic() + 60
    while not all(f.exists() and f.read_text() for f in files):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(number)
    assert process.wait(timeout=40) == status
    deadline = time.monotonic() + (10 if number == signal.SIGKILL else 0)
    while any(alive(int(file.read_text())) for file in files):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def interruptible() -> None:
    """A shell that runs the tests in the background lets them, and what they start, ignore SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
