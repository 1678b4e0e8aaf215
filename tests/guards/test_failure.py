"""One rank fails, in one way after the other: the other ends soon, and says why."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from lite import Lite
from lite.guards.failure import watch_failures
from tests.support.processes import ROOT, free_port, run_distributed, run_ranks, run_torchrun

SCRIPT = Path(__file__).with_name("scripts.py")


def run_one_and_two(what: str) -> list[subprocess.CompletedProcess[str]]:
    done = run_ranks(SCRIPT, what)
    assert all(d.returncode != 0 for d in done) or what == "early", [d.stderr for d in done]
    return done


@pytest.mark.parametrize("what", ["backward", "data", "own"])
def test_an_error_of_one_rank_is_in_the_others_error(what: str) -> None:
    """With its traceback: in backward, in the data, and for collectives that lite doesn't know."""
    zero, one = run_one_and_two(what)
    assert "PeerError" not in one.stderr
    assert "PeerError: another rank ended, so this one can't go on: rank 1 failed:" in zero.stderr
    assert zero.stderr.count("ValueError: boom") == 1
    assert "rank 0 cleans up" in zero.stdout


def test_a_rank_that_sleeps_is_woken() -> None:
    """No collective tells it: its watcher raises in the main thread, so that `finally` blocks run."""
    started = time.monotonic()
    zero, _ = run_one_and_two("asleep")
    assert time.monotonic() - started < 60, "the script sleeps for 100 s"
    assert "PeerError" in zero.stderr
    assert "ValueError: boom while rank 0 sleeps" in zero.stderr
    assert "rank 0 cleans up" in zero.stdout


def test_a_background_save_is_finished_before_the_process_is_ended(tmp_path: Path) -> None:
    """Its whole checkpoint would be lost with it."""
    zero, _ = run_ranks(SCRIPT, "save", str(tmp_path / "a.ckpt"))
    assert zero.returncode == 1 and "lite ends this process" in zero.stderr, zero.stderr
    assert "lite waits up to 300 s for a checkpoint" in zero.stderr
    assert Lite(accelerator="cpu").load(tmp_path / "a.ckpt")["w"].tolist() == [1, 1, 1]
    assert [file.name for file in tmp_path.iterdir()] == ["a.ckpt"]


def test_an_exit_code_is_a_failure_and_an_early_end_is_told_apart() -> None:
    """sys.exit(3), SystemExit(3), SIGKILL, and a script that simply ends: their own messages."""
    with ThreadPoolExecutor(2) as pool:  # each job waits half of the time
        jobs = {what: pool.submit(run_one_and_two, what) for what in ("exit", "raise", "kill", "early")}
        jobs["module"] = pool.submit(run_ranks, "-m", "tests.guards.scripts", "raise")
    for what in ("exit", "raise"):
        zero, one = jobs[what].result()
        assert one.returncode == 3
        assert "PeerError: another rank ended, so this one can't go on: rank 1 called sys.exit(3)." in zero.stderr
    zero, one = jobs["module"].result()  # where Python tells nobody of the code
    assert one.returncode == 3
    assert "PeerError: rank 1 had ended already, by raising SystemExit, while" in zero.stderr
    zero, one = jobs["kill"].result()
    assert one.returncode == -signal.SIGKILL
    assert "PeerError: another rank vanished without a word" in zero.stderr
    zero, one = jobs["early"].result()
    assert (zero.returncode, one.returncode) == (1, 0)
    assert "PeerError: rank 1 had ended already, without an error" in zero.stderr


def test_a_timeout_says_where_every_rank_is() -> None:
    """The hung rank's line of code, in the error of the one that waited; and the hung rank ends too."""
    zero, one = run_one_and_two("hang")
    assert "PeerError: a collective timed out" in zero.stderr
    assert "rank 1: alive, at" in zero.stderr
    assert "in train: time.sleep(100)" in zero.stderr
    assert "rank 0 gave up: a collective timed out" in one.stderr
    assert "rank 1 cleans up" in one.stdout


def test_a_restarted_job_knows_nothing_of_its_first_life() -> None:
    """torchrun's store outlives a restart; neither the failure, nor the stop request, nor gloo's addresses may."""
    done = run_torchrun(SCRIPT, "lives", max_restarts=1)
    assert done.returncode == 0, done.stderr
    for rank in (0, 1):
        assert f"life 1 rank {rank} stopped False reason None" in done.stdout


def test_sigterm_to_torchrun_stops_all_ranks_at_one_step() -> None:
    """It hands the signal on to every rank."""
    command = ["-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}", str(SCRIPT)]
    process = subprocess.Popen(
        [sys.executable, *command, "sigterm"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    lines = sorted(line for line in process.communicate(timeout=60)[0].splitlines() if line != "ready")
    assert len(lines) == 2
    assert len({line.split()[3] for line in lines}) == 1, lines
    assert all(line.endswith("15 <Signals.SIGTERM: 15>") for line in lines), lines


def hooks() -> tuple[bool, bool, bool]:
    earlier = Lite(accelerator="cpu")._watch
    assert earlier is not None
    earlier.close(linger=False)
    before = sys.excepthook, sys.exit, vars(sys.stderr).get("flush")
    lite = Lite(accelerator="cpu")
    assert lite._watch is not None
    changed = sys.excepthook is not before[0] and sys.exit is not before[1]
    same = Lite(accelerator="cpu")._watch is lite._watch
    thread = lite._watch._thread
    lite._watch.close()
    after = sys.excepthook, sys.exit, vars(sys.stderr).get("flush")
    return changed, same, after == before and not thread.is_alive()


def test_hooks_are_put_back() -> None:
    """One watch for all Lites of a process; when it closes, excepthook, sys.exit and stderr are as they were."""
    assert run_distributed(hooks) == [(True, True, True)] * 2


def posted() -> tuple[str, bool, bool]:
    lite = Lite(accelerator="cpu")
    watch = lite._watch
    assert watch is not None
    strangers = ["The size of tensor a must match the size of tensor b", "DataLoader timed out", "Connection reset"]
    unrelated = [watch.explain(RuntimeError(text)) for text in strangers]
    watch.post(SystemExit(0))
    if lite.global_rank == 1:
        watch.post(ValueError("first"))
    lite.barrier()
    if lite.global_rank == 0:
        watch.post(ValueError("second"))
    lite.barrier()
    error = watch.peer_failure()
    watch.close()
    again = watch_failures(lite._store)
    clean = again.peer_failure() is None
    lite.barrier()
    again.close()
    return str(error), unrelated == [None] * 3, clean


def test_the_first_failure_counts() -> None:
    """Rank 0 came second. Errors that have nothing to do with communication stay; another watch starts anew."""
    (zero, *rest_zero), (one, *rest_one) = run_distributed(posted)
    assert "rank 1 failed" in zero and "ValueError: first" in zero
    assert "second" not in zero
    assert one == "None"
    assert rest_zero == rest_one == [True, True]


def mismatched() -> str:
    lite = Lite(accelerator="cpu")
    model = torch.nn.Linear(2, 1)
    model, optimizer = lite.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    try:
        lite.backward(model(torch.ones(1, 2)).sum())
        optimizer.step()
        dist.all_reduce(torch.ones(2 + lite.global_rank))
    except RuntimeError as error:
        return f"{type(error).__name__}: {error}"
    finally:
        dist.set_debug_level(dist.DebugLevel.OFF)
    return "nothing"


def debugged() -> str:
    os.environ["LITE_DEBUG"] = "1"
    try:
        return mismatched()
    finally:
        del os.environ["LITE_DEBUG"]


def test_lite_debug_names_collectives_that_do_not_match() -> None:
    """Without it, gloo ends the process when shapes differ. Raw DDP ends it under torch's own DETAIL mode."""
    for text in run_distributed(debugged):
        assert text.startswith("RuntimeError: Detected mismatch between collectives")
        assert "TensorShape=[2]" in text and "TensorShape=[3]" in text


@pytest.mark.parametrize(("strategy", "case"), [("ddp", "next"), ("ddp", "last"), ("ddp", "late"), ("fsdp", "next")])
def test_a_save_on_rank_0_alone_is_told(tmp_path: Path, strategy: str, case: str) -> None:
    """While the other rank is in its next backward or forward, or has ended; but who is only late is waited for."""
    zero, one = run_ranks(SCRIPT, "alone", str(tmp_path), strategy, case)
    if case == "late":
        assert zero.returncode == one.returncode == 0, zero.stderr + one.stderr
        assert (tmp_path / "x.ckpt").is_file()
        return
    assert "UsageError: lite.save() was called on rank 0, but not on rank 1: rank 1 is " in zero.stderr, zero.stderr
    assert "Call it on all ranks" in zero.stderr
    assert (zero.returncode, one.returncode) == (1, int(case != "last"))
    assert list(tmp_path.iterdir()) == []
