"""The agreement on a last step: one process, two processes, fast and slow steps, and what the store keeps."""

from __future__ import annotations

import time
from itertools import pairwise

import pytest
import torch.distributed as dist

from lite import ConfigError, Lite, UsageError
from lite.guards.stop import StopAgreement
from tests.support.processes import run_distributed


def test_one_process_stops_at_once() -> None:
    """At the boundary after the request, and from then on; the first reason stays."""
    lite = Lite(accelerator="cpu")
    assert [lite.should_stop() for _ in range(3)] == [False] * 3
    assert lite.stop_reason is None
    lite.request_stop("enough")
    lite.request_stop("more than enough")
    assert lite.stop_reason is None, "nothing is agreed before the boundary"
    assert [lite.should_stop(), lite.should_stop()] == [True, True]
    assert (lite.stop_reason, lite.stop_signal) == ("enough", None)
    with pytest.raises(ConfigError, match="reason=''"):
        lite.request_stop("")


def test_a_time_limit() -> None:
    """Not before it is over."""
    lite = Lite(accelerator="cpu")
    lite.request_stop("time is up", after_s=0.05)
    started = time.monotonic()
    while not lite.should_stop():
        pass
    assert 0.05 <= time.monotonic() - started < 5
    assert lite.stop_reason == "time is up"


def run_until_stop(step_s: float, ask_at: int, lag_s: float) -> tuple[int, str | None, int, int]:
    """Rank 1 asks; nothing else keeps the ranks together."""
    lite = Lite(accelerator="cpu")
    lite.barrier()
    for step in range(100_000):
        time.sleep(step_s + lag_s * lite.global_rank)
        if lite.global_rank == 1 and step == ask_at:
            lite.request_stop("asked")
        if lite.should_stop():
            break
    assert lite.should_stop()
    lite.barrier()
    keys = [key for key in lite._store.list_keys() if "/stop" in key] if hasattr(lite._store, "list_keys") else []
    assert lite._agreement is not None
    return step, lite.stop_reason, len(keys), lite._agreement._window


@pytest.mark.parametrize(("step_s", "ask_at", "lag_s"), [(0.0, 3000, 0.0), (0.0, 2000, 0.0002), (0.2, 3, 0.05)])
def test_all_ranks_stop_at_one_step(step_s: float, ask_at: int, lag_s: float) -> None:
    """Fast steps, one rank slower than the other, and steps of 0.2 s; the store keeps a handful of keys."""
    (zero, reason, keys, window), (one, other_reason, _, _) = run_distributed(run_until_stop, step_s, ask_at, lag_s)
    assert zero == one >= ask_at
    assert reason == other_reason == "asked (rank 1)"
    assert keys <= 5
    if step_s:
        assert zero <= ask_at + 4  # a window is one step here
    else:
        assert window > 1


def uneven() -> str:
    lite = Lite(accelerator="cpu")
    for _ in range(1 + 9 * lite.global_rank):
        lite.should_stop()
        if lite.global_rank == 0:
            assert lite._watch is not None
            lite._watch.close()
    return "done"


def test_a_rank_that_counts_more_steps_is_told_so() -> None:
    """Rank 0 has ended after one call; the other does not wait for it for ever."""
    with pytest.raises(AssertionError, match=r"UsageError: should_stop was called \d times here"):
        run_distributed(uneven)


def test_windows_grow_at_most_by_doubling() -> None:
    """And shrink at once."""
    store = dist.HashStore()
    zero = StopAgreement(store, name="s", rank=0, world_size=2)
    one = StopAgreement(store, name="s", rank=1, world_size=2)
    points = []
    for step in range(1, 40):
        before = zero._next
        assert not zero.step() and not one.step()
        if zero._next != before:
            points.append(step)
    gaps = [b - a for a, b in pairwise(points)]
    assert gaps[0] == 1
    assert all(b <= 2 * a for a, b in pairwise(gaps))
    assert max(gaps) >= 8


def test_before_the_processes_run() -> None:
    """There is nobody to agree with."""
    with pytest.raises(UsageError, match=r"lite\.launch"):
        Lite(accelerator="cpu", devices=2).should_stop()
