"""Behaviour 41 under SIGKILL: the kill drill with the Trainer in the place of the raw loop."""

from __future__ import annotations

import pytest

from tests.support.processes import run_python


@pytest.mark.parametrize(("num_processes", "num_rounds", "kinds"), [(1, 3, "all"), (2, 1, "all")])
def test_behaviour_41_killed_runs_equal_the_one_that_was_left_alone(
    num_processes: int, num_rounds: int, kinds: str
) -> None:
    """Bit for bit, killed in training, in validation and between."""
    size = ["--loop", "trainer", "--processes", num_processes, "--rounds", num_rounds, "--kills", "1"]
    done = run_python("-m", "benchmarks.kill_drill", *map(str, size), timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{num_rounds} of {num_rounds} rounds equal" in done.stdout, done.stdout
