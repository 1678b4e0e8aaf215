"""Laws that every launcher keeps."""

from __future__ import annotations

import os

import pytest

from lite import LaunchError
from lite.launchers import ElasticLauncher, InlineLauncher, Launcher

LAUNCHERS = {
    "inline": InlineLauncher,
    "spawn": lambda: ElasticLauncher(2, "spawn"),
    "fork": lambda: ElasticLauncher(2, "fork"),
    "forkserver": lambda: ElasticLauncher(2, "forkserver"),
}


def work(value: int, *, more: int) -> tuple[int, int, str]:
    return value, more, os.environ.get("RANK", "0")


def fail(rank: str) -> None:
    if os.environ.get("RANK", "0") == rank:
        raise ArithmeticError("on purpose")


@pytest.mark.parametrize("name", LAUNCHERS)
def test_it_returns_rank_zeros_value_and_leaves_the_environment_alone(name: str) -> None:
    """Arguments reach the function; nothing stays in os.environ."""
    before = dict(os.environ)
    launcher: Launcher = LAUNCHERS[name]()
    assert launcher.launch(work, 1, more=2) == (1, 2, "0")
    assert dict(os.environ) == before


@pytest.mark.parametrize("name", LAUNCHERS)
def test_an_error_comes_back_with_its_own_text(name: str) -> None:
    """As itself where it happened here, as a LaunchError with its traceback where it happened in another process."""
    rank = "0" if name == "inline" else "1"
    with pytest.raises((ArithmeticError, LaunchError), match="on purpose") as caught:
        LAUNCHERS[name]().launch(fail, rank)
    assert isinstance(caught.value, ArithmeticError if name == "inline" else LaunchError)
    assert name == "inline" or f"rank {rank} failed" in str(caught.value)
