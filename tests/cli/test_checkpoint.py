"""`python -m lite checkpoint`: what it prints and its exit codes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lite import Lite
from lite.cli.main import main
from tests.checkpoint.parts import equal, flip, step, training
from tests.support.processes import run_python


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two checkpoints of one run, a step apart, in both formats."""
    lite = Lite(accelerator="cpu")
    state = training(lite)
    step(lite, state)
    lite.save(tmp_path / "one.ckpt", state)
    lite.save(tmp_path / "one", state)
    step(lite, state)
    lite.save(tmp_path / "two.ckpt", {**state, "more": 1})
    return tmp_path


@pytest.mark.parametrize("name", ["one.ckpt", "one"])
def test_show_lists_what_is_in_it(folder: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    """Names, shapes, dtypes, bytes, plain values, and who wrote it."""
    assert main(["checkpoint", "show", str(folder / name)]) == 0
    out = capsys.readouterr().out
    assert "format 1" in out and "by lite 0.1.0" in out and "1 process" in out
    assert "model.body.0.weight  float32[8, 4]  128 bytes" in out
    assert "optimizer.param_groups.0.lr = 0.01" in out and "epoch = 1" in out


def test_verify_tells_whole_from_not(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the exit code, and by naming the file; all of them are looked at."""
    paths = [str(folder / name) for name in ("one.ckpt", "one", "two.ckpt")]
    assert main(["checkpoint", "verify", *paths]) == 0
    assert capsys.readouterr().out.count(": whole") == 3
    data = next((folder / "one").glob("*.distcp"))
    flip(data, data.stat().st_size // 2)
    assert main(["checkpoint", "verify", *paths, str(folder / "none.ckpt")]) == 1
    out = capsys.readouterr().out
    assert out.count(": whole") == 2 and data.name in out and "none.ckpt' does not exist" in out


def test_diff_tells_equal_from_not(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Across formats; values, largest difference, and what only one has."""
    assert main(["checkpoint", "diff", str(folder / "one.ckpt"), str(folder / "one")]) == 0
    assert capsys.readouterr().out == "no difference\n"
    assert main(["checkpoint", "diff", str(folder / "one.ckpt"), str(folder / "two.ckpt")]) == 1
    out = capsys.readouterr().out
    assert "two.ckpt: more\n" in out and "only in" in out
    assert "model.body.0.weight: max abs difference" in out and "epoch: 1 and 2" in out


def test_diff_sees_shapes_dtypes_and_not_a_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """NaN equals NaN; large integers are not rounded."""
    lite = Lite(accelerator="cpu")
    same = {"nan": torch.tensor(float("nan")), "s": torch.eye(2).to_sparse()}
    lite.save(tmp_path / "a.pt", {**same, "x": torch.ones(2), "n": torch.tensor(2**60), "d": torch.ones(1)})
    lite.save(tmp_path / "b.pt", {**same, "x": torch.ones(3), "n": torch.tensor(2**60 + 1), "d": torch.ones(1).half()})
    assert main(["checkpoint", "diff", str(tmp_path / "a.pt"), str(tmp_path / "b.pt")]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "x: float32[2] and float32[3]",
        "n: max abs difference 1 in 1 of 1 elements",
        "d: float32[1] and float16[1]",
    ]


def test_consolidate_makes_one_file_of_a_directory(folder: Path) -> None:
    """With the manifest; plain torch reads it."""
    assert main(["checkpoint", "consolidate", str(folder / "one"), str(folder / "new.ckpt")]) == 0
    lite = Lite(accelerator="cpu")
    assert equal(lite.load(folder / "new.ckpt"), lite.load(folder / "one.ckpt"))
    assert torch.load(folder / "new.ckpt", weights_only=True)["__lite__"]["world_size"] == 1


def test_it_is_a_command(folder: Path) -> None:
    """python -m lite, with an error for what can't be read, and none of Python's tracebacks."""
    done = run_python("-m", "lite", "checkpoint", "verify", folder / "one")
    assert (done.returncode, done.stdout) == (0, f"{folder / 'one'}: whole\n"), done.stderr
    done = run_python("-m", "lite", "checkpoint", "show", folder / "nothing")
    assert done.returncode == 2 and "does not exist" in done.stderr and "Traceback" not in done.stderr
