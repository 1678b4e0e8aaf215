"""`python -m lite checkpoint`: what it prints and its exit codes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import _save_state_dict as torch_save

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


def test_verify_answers_in_one_line_whatever_lies_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """torch.save's old format, whole and cut off, a text, nothing, a folder without and with a foreign checkpoint."""
    torch.save({"w": torch.ones(3)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "cut.pt").write_bytes((tmp_path / "old.pt").read_bytes()[:60])
    (tmp_path / "text.ckpt").write_text("epoch 3\nloss 0.1\n")
    (tmp_path / "nothing.ckpt").touch()
    (tmp_path / "folder").mkdir()
    torch_save({"w": torch.ones(30)}, FileSystemWriter(tmp_path / "foreign"), no_dist=True)
    (tmp_path / "short").mkdir()
    for file in (tmp_path / "foreign").iterdir():
        whole = file.read_bytes()
        (tmp_path / "short" / file.name).write_bytes(whole[:-50] if file.suffix else whole)
    said = {
        "old.pt": "no checksums",
        "cut.pt": "no checksums",
        "text.ckpt": "no checkpoint",
        "nothing.ckpt": "it is empty",
        "folder": "no whole checkpoint",
        "short": "is truncated",
    }
    for name, words in said.items():
        assert main(["checkpoint", "verify", str(tmp_path / name)]) == 1
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 1 and lines[0].startswith(f"{tmp_path / name}: NOT WHOLE: ") and words in lines[0], lines
    assert main(["checkpoint", "verify", str(tmp_path / "foreign")]) == 0
    assert Lite(accelerator="cpu").load(tmp_path / "old.pt")["w"].tolist() == [1, 1, 1]


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


def test_diff_looks_into_all_plain_values(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Tuples in tuples, with tensors and without; NaN among them equals NaN; names that look alike stay apart."""
    lite = Lite(accelerator="cpu")
    nan = float("nan")
    same = {
        "n": nan,
        "c": complex(nan, 1),
        "l": [1, (nan, [nan])],
        "s": {nan, 1.0},
        "t": ((1, (torch.ones(2),)), (nan,)),
    }
    lite.save(tmp_path / "a.pt", {**same, "u": ((1, torch.ones(2)), 2), "v": ((1, nan), 3), "a": {"b": 1}, "a.b": 2})
    lite.save(tmp_path / "b.pt", {**same, "u": ((1, torch.zeros(2)), 2), "v": ((1, 0.0), 3), "a": {"b": 1}, "a.b": 3})
    lite.save(tmp_path / "a", lite.load(tmp_path / "a.pt"))
    for other in ("a.pt", "a"):
        assert main(["checkpoint", "diff", str(tmp_path / "a.pt"), str(tmp_path / other)]) == 0
        assert capsys.readouterr().out == "no difference\n"
    assert main(["checkpoint", "diff", str(tmp_path / "a.pt"), str(tmp_path / "b.pt")]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "u.0.1: max abs difference 1 in 2 of 2 elements",
        "v.0: (1, nan) and (1, 0.0)",
        "a.b#2: 2 and 3",
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
