"""Which of several failures is reported."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from lite.launchers.notes import first_failure


def failures(**exit_codes: int) -> Any:
    found = {int(rank[1:]): SimpleNamespace(exitcode=code, message="") for rank, code in exit_codes.items()}
    return SimpleNamespace(failures=found, get_first_failure=lambda: next(iter(found.items())))


def test_the_first_cause_is_reported(tmp_path: Path) -> None:
    """A killed process, else the earliest traceback; witnesses of another's failure come last."""
    assert first_failure(tmp_path, failures(r1=-15)) == "rank 1 was ended by SIGTERM"
    assert "rank 2 ended with exit code 3" in first_failure(tmp_path, failures(r2=3))
    (tmp_path / "100-0-PeerError.note").write_text("rank 0: rank 1 has failed")
    assert first_failure(tmp_path, failures(r0=1)) == "rank 0: rank 1 has failed"
    (tmp_path / "300-2-OSError.note").write_text("rank 2: reset")
    (tmp_path / "200-1-ValueError.note").write_text("rank 1: boom")
    assert first_failure(tmp_path, failures(r0=1)) == "rank 1: boom"
    assert first_failure(tmp_path, failures(r1=-15)) == "rank 1: boom"
    assert first_failure(tmp_path, failures(r3=-15, r1=1)) == "rank 1: boom"
    assert first_failure(tmp_path, failures(r3=-9)).startswith("rank 3 was ended by SIGKILL")
