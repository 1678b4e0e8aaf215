"""The agreement on a last step: one process, two processes, fast and slow steps, and what the store keeps."""

from __future__ import annotations

import time

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


def run_until_stop(step_s: float, ask_at: int, lag_s: float, slow_s: float) -> tuple[int, str | None, int, float]:
    """Rank 1 asks, and steps are slow from then on; nothing else keeps the ranks together."""
    lite = Lite(accelerator="cpu")
    lite.barrier()
    asked = 0.0
    for step in range(100_000):
        time.sleep(slow_s if step > ask_at else step_s + lag_s * lite.global_rank)
        if lite.global_rank == 1 and step == ask_at:
            asked = time.monotonic()
            lite.request_stop("asked")
        if lite.should_stop():
            break
    took = time.monotonic() - asked if asked else 0.0
    assert lite.should_stop()
    lite.barrier()
    keys = [key for key in lite._store.list_keys() if "/stop" in key] if hasattr(lite._store, "list_keys") else []
    return step, lite.stop_reason, len(keys), took


@pytest.mark.parametrize(
    ("step_s", "ask_at", "lag_s", "slow_s"),
    [(0.0, 3000, 0.0, 0.0), (0.0, 2000, 0.0002, 0.0002), (0.2, 3, 0.05, 0.2), (0.0, 20_000, 0.0, 0.2)],
)
def test_all_ranks_stop_at_one_step(step_s: float, ask_at: int, lag_s: float, slow_s: float) -> None:
    """Fast steps, one rank slower than the other, steps of 0.2 s, and such after fast ones."""
    (zero, reason, keys, _), (one, other_reason, _, took) = run_distributed(
        run_until_stop, step_s, ask_at, lag_s, slow_s
    )
    assert zero == one >= ask_at
    assert reason == other_reason == "asked (rank 1)"
    assert keys <= 8
    assert took < 2  # two looks, the step under way and the next one: 0.9 s; the rest is for a busy machine


def asked_before_the_end() -> list[bool]:
    """Rank 1 asks when no step follows, twice; nobody has asked the first time."""
    lite = Lite(accelerator="cpu")
    found = [lite.should_stop(), lite.should_stop(now=True), lite.should_stop()]
    if lite.global_rank == 1:
        lite.request_stop("at the end")
    found.append(lite.should_stop(now=True))
    lite.barrier()
    return [*found, lite.stop_reason == "at the end (rank 1)"]


def test_what_is_asked_for_at_the_end_counts() -> None:
    """On all ranks, without a step to come."""
    assert run_distributed(asked_before_the_end) == [[False, False, False, True, True]] * 2


def uneven() -> str:
    lite = Lite(accelerator="cpu")
    if lite.global_rank == 0:
        lite.should_stop()
        assert lite._watch is not None
        lite._watch.close()
        return "done"
    while not lite._watch.has_left(0):  # type: ignore[union-attr]
        time.sleep(0.01)
    lite.request_stop("asked")
    while not lite.should_stop():
        time.sleep(0.01)
    return "done"


def test_a_rank_that_counts_more_steps_is_told_so() -> None:
    """Rank 0 has ended after one call; the other, which wants a stop, does not wait for it for ever."""
    with pytest.raises(AssertionError, match=r"UsageError: should_stop was called \d+ times here"):
        run_distributed(uneven)


def test_a_rank_acts_where_no_other_one_has_passed() -> None:
    """Whoever is ahead tells so, even while it is held; the word is for the boundary after that."""
    store = dist.HashStore()
    zero, one = (StopAgreement(store, name="s", rank=r, world_size=2, threaded=False) for r in (0, 1))
    assert not any(zero.step() for _ in range(3))
    assert not any(one.step() for _ in range(7))
    one.request("asked")
    one.look()
    zero.look()
    zero.look()
    assert [zero.step() for _ in range(5)] == [False] * 4 + [True]
    assert one.step()
    assert (zero.count, one.count) == (8, 8)


def test_the_clock_strikes_on_all_ranks_at_the_same_step() -> None:
    """Once, until somebody has acted on it; then it is asked again."""
    store = dist.HashStore()
    ranks = [StopAgreement(store, name="s", rank=r, world_size=2, threaded=False) for r in (0, 1)]
    for one in ranks:
        one.watch_clock(lambda: True)
    for _ in range(2):
        for one in (*ranks, ranks[0]):
            one.look()
        assert not any(one.step() for one in ranks)
        assert all(one.due for one in ranks)
        for one in ranks:
            one.due = False
    assert store.num_keys() == 0


def test_before_the_processes_run() -> None:
    """There is nobody to agree with."""
    with pytest.raises(UsageError, match=r"lite\.launch"):
        Lite(accelerator="cpu", devices=2).should_stop()
