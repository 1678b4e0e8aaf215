"""Laws that every launcher keeps."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from pathlib import Path

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


def stop() -> None:
    os.environ["LITE_MADE_IN_A_PROCESS"] = "1"
    sys.exit(0)


def fail(rank: str) -> None:
    if os.environ.get("RANK", "0") == rank:
        raise ArithmeticError("on purpose")


@pytest.mark.parametrize("name", LAUNCHERS)
def test_it_returns_rank_zeros_value_and_leaves_this_process_alone(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also the second time. Variables, signal handlers and the folder of temporary files are as they were."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TORCHELASTIC_SIGNALS_TO_HANDLE", "mine")
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
    before = dict(os.environ), [signal.getsignal(number) for number in numbers]
    launcher: Launcher = LAUNCHERS[name]()
    for _ in range(2):
        assert launcher.launch(work, 1, more=2) == (1, 2, "0")
        assert (dict(os.environ), [signal.getsignal(number) for number in numbers]) == before
        assert not [path for path in tmp_path.iterdir() if not path.name.startswith("pymp-")]  # Python's fork server


def test_sys_exit_without_an_error_is_an_end_as_any() -> None:
    """As in a script: status 0, no value."""
    assert ElasticLauncher(2, "fork").launch(stop) is None


@pytest.mark.parametrize("name", LAUNCHERS)
def test_an_error_comes_back_with_its_own_text(name: str) -> None:
    """As itself where it happened here, as a LaunchError with its traceback where it happened in another process."""
    rank = "0" if name == "inline" else "1"
    with pytest.raises((ArithmeticError, LaunchError), match="on purpose") as caught:
        LAUNCHERS[name]().launch(fail, rank)
    assert isinstance(caught.value, ArithmeticError if name == "inline" else LaunchError)
    assert name == "inline" or f"rank {rank} failed" in str(caught.value)
