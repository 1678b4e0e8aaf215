"""Loggers write what they are given, on rank 0 alone."""

from __future__ import annotations

import csv
import gc
from pathlib import Path

import pytest
import torch

from lite import ConfigError, Lite
from lite.loggers import CSVLogger
from tests.support.processes import run_distributed, run_python


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_new_columns_keep_what_was_written(tmp_path: Path) -> None:
    """A column that appears later; tensors; a version of its own for each run."""
    logger = CSVLogger(tmp_path, "run", flush_every=2)
    lite = Lite(accelerator="cpu", loggers=logger)
    for step in range(3):
        lite.log("loss", torch.tensor(1.0 + step, requires_grad=True), step)
    lite.log_dict({"loss": 9, "accuracy": 0.5}, step=3)
    lite.log("loss", 10.0)
    logger.close()
    written = rows(logger.path)
    assert [row["loss"] for row in written] == ["1.0", "2.0", "3.0", "9", "10.0"]
    assert [row["accuracy"] for row in written] == ["", "", "", "0.5", ""]
    assert logger.path == tmp_path / "run" / "version_0" / "metrics.csv"
    second = CSVLogger(tmp_path, "run")
    Lite(accelerator="cpu", loggers=second).log_hyperparameters({"lr": 0.1, "where": Path("x")})
    assert '"lr": 0.1' in (second.log_dir / "hyperparameters.json").read_text()
    assert second.version == "version_1"
    again = CSVLogger(tmp_path, "run", version=0)
    again.log_metrics({"loss": 11.0}, 4)
    again.flush()
    assert [row["loss"] for row in rows(logger.path)][-2:] == ["10.0", "11.0"]


def log_on_two(path: str) -> str:
    import os

    under_a_file = CSVLogger(f"{__file__}/runs") if os.environ["RANK"] == "0" else None
    with pytest.raises(ConfigError) as caught:
        Lite(accelerator="cpu", loggers=under_a_file)
    logger = CSVLogger(path)
    lite = Lite(accelerator="cpu", loggers=logger)
    lite.log("rank", lite.global_rank, 0)
    lite.teardown()
    return str(caught.value)


def test_only_rank_zero_writes(tmp_path: Path) -> None:
    """One folder, one row; where it can't, all ranks are told."""
    told = run_distributed(log_on_two, str(tmp_path))
    assert told[0] == told[1]
    assert f"the folder '{__file__}/runs' can't be made" in told[0]
    assert [p.name for p in tmp_path.iterdir()] == ["version_0"]
    assert [row["rank"] for row in rows(tmp_path / "version_0" / "metrics.csv")] == ["0"]


def test_a_folder_that_cannot_be_written_is_refused_at_once(tmp_path: Path) -> None:
    """Before processes start, too, and without a trace where it can."""
    for devices in (1, 2):
        for logger in (CSVLogger("/proc/nope"), CSVLogger("/proc", version=3)):
            with pytest.raises(ConfigError, match=r"root_dir='/proc.*': the folder '/proc.*' can't be made"):
                Lite(accelerator="cpu", devices=devices, loggers=logger)
        Lite(accelerator="cpu", devices=devices, loggers=CSVLogger(tmp_path / "runs"))
        assert not list(tmp_path.iterdir())


def test_a_run_may_lie_at_a_url() -> None:
    """As in a folder: versions, columns that appear later, rows over several writes; nothing on this machine."""
    fsspec = pytest.importorskip("fsspec")
    files = fsspec.filesystem("memory")
    here = set(Path.cwd().iterdir())
    for version in range(2):
        logger = CSVLogger("memory://runs-of-csv", "run", flush_every=1)
        lite = Lite(accelerator="cpu", loggers=logger)
        for step in range(2):
            lite.log("loss", torch.tensor(1.0 + step), step)
        lite.log_dict({"loss": 3, "accuracy": 0.5}, step=2)
        lite.log_hyperparameters({"lr": 0.1})
        lite.teardown()
        assert logger.path == f"memory://runs-of-csv/run/version_{version}/metrics.csv"
        text = files.cat_file(f"/runs-of-csv/run/version_{version}/metrics.csv").decode()
        assert text.splitlines() == ["step,loss,accuracy", "0,1.0,", "1,2.0,", "2,3,0.5"]
        assert '"lr": 0.1' in files.cat_file(f"/runs-of-csv/run/version_{version}/hyperparameters.json").decode()
    files.rm("/runs-of-csv", recursive=True)
    assert set(Path.cwd().iterdir()) == here
    with pytest.raises(ConfigError, match="path='nope://runs' is no URL that fsspec knows"):
        Lite(accelerator="cpu", loggers=CSVLogger("nope://runs"))


def test_tensorboard_files_are_written(tmp_path: Path) -> None:
    """Where the extra is installed; a new Lite may go on with the same logger."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from lite.loggers import TensorBoardLogger

    with pytest.raises(ConfigError, match="log_dir='/proc/nope': the folder '/proc/nope' can't be made"):
        Lite(accelerator="cpu", loggers=TensorBoardLogger("/proc/nope"))
    lite = Lite(accelerator="cpu", loggers=TensorBoardLogger(tmp_path))
    lite.log_hyperparameters({"lr": 0.1, "where": tmp_path})
    lite.log("loss", torch.tensor(1.5), 7)
    del lite
    gc.collect()  # its end writes what is open
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(7, 1.5)]


def test_a_value_is_logged_as_it_was(tmp_path: Path) -> None:
    """The loop goes on adding to the tensor that it logged."""
    logger = CSVLogger(tmp_path)
    lite = Lite(accelerator="cpu", loggers=logger)
    total = torch.zeros(())
    for step in range(3):
        total += 1
        lite.log("total", total, step)
    lite.teardown()
    assert [row["total"] for row in rows(logger.path)] == ["1.0", "2.0", "3.0"]


SCRIPT = """
import sys
from lite import Lite
from lite.loggers import CSVLogger

def train(lite):
    for step in range(3):
        lite.log("loss", 1.0, step)
    if lite.local_rank == 0 and sys.argv[-1] == "stop":
        sys.exit(0)

if __name__ == "__main__":
    folder, strategy, devices, _ = sys.argv[1:]
    Lite(accelerator="cpu", strategy=strategy, devices=int(devices), loggers=CSVLogger(folder)).launch(train)
"""


def test_loggers_may_be_given_later(tmp_path: Path) -> None:
    """Rows go to those that there are; what others hold is written out, and what can't write is refused."""
    first, second = CSVLogger(tmp_path, "first"), CSVLogger(tmp_path, "second")
    lite = Lite(accelerator="cpu", loggers=first)
    lite.log("loss", 1.0)
    lite.use_loggers(second)
    assert [row["loss"] for row in rows(first.path)] == ["1.0"]
    lite.log("loss", 2.0)
    lite.use_loggers([second, first])
    lite.log("loss", 3.0)
    with pytest.raises(ConfigError, match="'csv' is no Logger"):
        lite.use_loggers([first, "csv"])
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="file"):
        lite.use_loggers(CSVLogger(tmp_path / "file"))
    assert lite.loggers == (second, first)
    del lite
    gc.collect()
    assert [row["loss"] for row in rows(first.path)] == ["1.0", "3.0"]
    assert [row["loss"] for row in rows(second.path)] == ["2.0", "3.0"]


def test_rows_are_written_at_the_end_of_a_script(tmp_path: Path) -> None:
    """Without teardown: here, in started and in forked processes, and after sys.exit."""
    (tmp_path / "script.py").write_text(SCRIPT)
    for strategy, devices, end in (("auto", 1, "stop"), ("ddp", 2, "go"), ("ddp_fork", 2, "stop")):
        folder = tmp_path / f"{strategy}-{end}"
        done = run_python(str(tmp_path / "script.py"), str(folder), strategy, str(devices), end)
        assert done.returncode == 0, done.stderr
        assert len(rows(folder / "version_0" / "metrics.csv")) == 3, (strategy, end)
