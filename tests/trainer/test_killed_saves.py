"""What a kill within a save leaves behind: the run that goes on puts it in order, and nothing that it doesn't know."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lite.trainer import Callback
from lite.trainer.callbacks import ModelCheckpoint, model_checkpoint
from tests.trainer.modules import Tiny, numbers, trainer

pytestmark = pytest.mark.filterwarnings("ignore:nothing is left to train")


class KilledError(Exception):
    """In the place of SIGKILL."""


class DiesAt(Callback):
    """Ends the run within an epoch."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            raise KilledError


class EpochLast(ModelCheckpoint):
    """Its "last" has another name each time."""

    CHECKPOINT_NAME_LAST = "last-{epoch}"
    CHECKPOINT_EQUALS_CHAR = ""


def fit(
    folder: Path, *others: Any, path: Any = None, kind: Any = ModelCheckpoint, epochs: int = 3, **settings: Any
) -> Any:
    """A run of three steps an epoch that saves at each end."""
    saves = kind(folder, "{epoch}", **settings)
    run = trainer(max_epochs=epochs, callbacks=[saves, *others], enable_checkpointing=True, limit_val_batches=0)
    run.fit(Tiny(), numbers(), ckpt_path=path)
    return saves


def killed(monkeypatch: pytest.MonkeyPatch, function: str, at: int, run: Callable[[], Any]) -> None:
    """Let a run end just before that call, of that number, of a function of ModelCheckpoint's module."""
    calls, before = [0], getattr(model_checkpoint, function)

    def killing(*args: Any) -> Any:
        calls[0] += 1
        if calls[0] == at:
            raise KilledError
        return before(*args)

    with monkeypatch.context() as patch, pytest.raises(KilledError):
        patch.setattr(model_checkpoint, function, killing)
        run()


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


@pytest.mark.parametrize("save_last", [True, "link"])
@pytest.mark.parametrize("path", ["last", "epoch=0.ckpt"])
def test_last_keeps_its_name_and_is_the_newest(save_last: Any, path: str, tmp_path: Path) -> None:
    """In a run that goes on from the first file, or the "last" that points to it; each save removes the one before."""
    with pytest.raises(KilledError):
        fit(tmp_path, DiesAt(5), save_last=save_last)
    assert names(tmp_path) == ["epoch=0.ckpt", "last.ckpt"]
    saves = fit(tmp_path, path=path if path == "last" else tmp_path / path, save_last=save_last)
    assert os.path.basename(saves.last_model_path) == "last.ckpt"
    resumed = [] if (save_last, path) == (True, "last") else ["epoch=0.ckpt"]  # what was resumed from stays
    assert names(tmp_path) == [*resumed, "epoch=2.ckpt", "last.ckpt"]
    assert (tmp_path / "last.ckpt").is_symlink() == (save_last == "link")
    assert trainer().lite.load(tmp_path / "last.ckpt")["global_step"] == 9


def test_a_link_that_a_kill_came_before_is_made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """And one that is there is not made to point to itself."""
    killed(monkeypatch, "_link", 1, lambda: fit(tmp_path, save_last="link"))
    assert names(tmp_path) == ["epoch=0.ckpt"]
    for path in ("epoch=0.ckpt", "last.ckpt"):
        fit(tmp_path, path=tmp_path / path, epochs=1, save_last="link")
        assert os.readlink(tmp_path / "last.ckpt") == "epoch=0.ckpt"


@pytest.mark.parametrize("save_last", [None, True, "link"])
@pytest.mark.parametrize("monitor", [None, "step"])
def test_what_a_kill_left_beyond_save_top_k_goes(
    monitor: Any, save_last: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Once the run goes on from the file that takes its place, also where nothing is left to train."""
    settings = {"monitor": monitor, "mode": "max", "save_last": save_last}
    killed(monkeypatch, "remove", 2, lambda: fit(tmp_path, **settings))
    assert {"epoch=1.ckpt", "epoch=2.ckpt"} <= set(names(tmp_path))
    fit(tmp_path, path=tmp_path / "epoch=2.ckpt", **settings)
    assert names(tmp_path) == ["epoch=2.ckpt", *["last.ckpt"] * bool(save_last)]


@pytest.mark.parametrize("save_last", [True, "link"])
def test_a_last_of_another_name_goes_when_the_new_one_is_there(
    save_last: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Killed before the old one was removed, or before the new one was written; also a link to what is gone."""
    settings: dict[str, Any] = {"kind": EpochLast, "save_last": save_last}
    killed(monkeypatch, "remove", 2, lambda: fit(tmp_path, epochs=2, **settings))
    assert "last-epoch1.ckpt" in names(tmp_path) and "last-epoch0.ckpt" in names(tmp_path)
    fit(tmp_path, path=tmp_path / "epoch1.ckpt", epochs=2, **settings)
    assert names(tmp_path) == ["epoch1.ckpt", "last-epoch1.ckpt"]
    (tmp_path / "last-epoch1.ckpt").rename(tmp_path / "last-epoch0.ckpt")
    os.utime(tmp_path / "last-epoch0.ckpt", (1, 1), follow_symlinks=False)
    fit(tmp_path, path=tmp_path / "epoch1.ckpt", epochs=2, **settings)
    assert names(tmp_path) == ["epoch1.ckpt", "last-epoch1.ckpt"]


def test_a_file_that_was_written_later_stays(tmp_path: Path) -> None:
    """It has the name of one that was removed, and is another run's; so does a quick run leave all as it is."""
    fit(tmp_path, epochs=2)
    newer = tmp_path / "epoch=0.ckpt"
    newer.write_bytes(b"")
    fit(tmp_path, path=tmp_path / "epoch=1.ckpt", epochs=2)
    assert newer.exists()
    os.utime(newer, (1, 1))
    fit(tmp_path, path=tmp_path / "epoch=1.ckpt", epochs=2)
    assert not newer.exists()


def test_a_last_that_was_written_later_stays(tmp_path: Path) -> None:
    """It is another run's, too."""
    full(4, callbacks=[EpochLast(tmp_path, "{epoch}", save_last=True)])
    os.utime(tmp_path / "last-epoch0.ckpt", (1e10, 1e10))
    fit(tmp_path, path=tmp_path / "epoch1.ckpt", epochs=2, kind=EpochLast, save_last=True)
    assert names(tmp_path) == ["epoch1.ckpt", "last-epoch0.ckpt", "last-epoch1.ckpt"]


def test_a_save_before_the_last_that_is_due_keeps_its_name(tmp_path: Path) -> None:
    """In a run that makes up for nothing, as not all is restored."""
    settings: dict[str, Any] = {"save_last": True, "every_n_train_steps": 1}
    with pytest.raises(KilledError):
        fit(tmp_path, DiesAt(2), **settings)
    saves = ModelCheckpoint(tmp_path, "{epoch}", **settings)
    run = trainer(callbacks=saves, enable_checkpointing=True, limit_val_batches=0)
    run.fit(Tiny(), numbers(), ckpt_path=tmp_path / "epoch=0.ckpt", restore_except="random")
    assert [name for name in names(tmp_path) if "last" in name] == ["last.ckpt"]


def test_a_fit_from_the_beginning_owes_no_last(tmp_path: Path) -> None:
    """Though the fit before it did, and failed."""
    settings: dict[str, Any] = {"save_last": True, "every_n_epochs": 2}
    full(2, callbacks=[EpochLast(tmp_path, "{epoch}", **settings)])
    saves = EpochLast(tmp_path, "{epoch}", **settings)
    for other, path in ((Fails(1), tmp_path / "epoch1.ckpt"), (DiesAt(4), None)):
        run = trainer(callbacks=[saves, other], max_epochs=3, enable_checkpointing=True, limit_val_batches=0)
        with pytest.raises((OSError, KilledError)):
            run.fit(Tiny(), numbers(), ckpt_path=path)
    assert names(tmp_path) == ["epoch1.ckpt"]


def test_a_lock_that_a_killed_writer_left_goes_as_a_fit_begins(tmp_path: Path) -> None:
    """Whatever its file is called."""
    fit(tmp_path, epochs=1)
    (tmp_path / f".epoch=0.ckpt.{'0' * 32}.lock").touch()
    fit(tmp_path, path=tmp_path / "epoch=0.ckpt", epochs=1)
    assert names(tmp_path) == ["epoch=0.ckpt"]


def test_the_newest_score_is_restored(tmp_path: Path) -> None:
    """As the best one is."""
    fit(tmp_path, epochs=2, monitor="step", mode="max")
    saves = fit(tmp_path, path=tmp_path / "epoch=1.ckpt", epochs=2, monitor="step", mode="max")
    assert saves.current_score == saves.best_model_score == 6


class Fails(Callback):
    """The disk is full at the saves of those numbers."""

    def __init__(self, *at: int) -> None:
        self.at, self.count = at, 0

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        self.count += 1
        if self.count in self.at:
            raise OSError(28, "No space left on device")


class States(Callback):
    """A ModelCheckpoint's state as each epoch begins, but for the steps that it has seen."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.seen.append(state_of(trainer.checkpoint_callback))


def state_of(saves: ModelCheckpoint) -> dict[str, Any]:
    return {**saves.state_dict(), "seen_step": None}


def full(*at: int, callbacks: Any) -> Any:
    """A fit of three epochs with a disk that is full at those saves; returns its Trainer."""
    run = trainer(max_epochs=3, callbacks=[*callbacks, Fails(*at)], enable_checkpointing=True, limit_val_batches=0)
    with pytest.raises(OSError, match="No space"):
        run.fit(Tiny(), numbers())
    return run


@pytest.mark.parametrize("by_hand", [False, True])
def test_a_file_that_was_never_written_takes_no_files_place(by_hand: bool, tmp_path: Path) -> None:
    """Another callback's file, or one saved by hand, is gone on with after the best one's save failed."""
    settings: dict[str, Any] = {"monitor": "step", "mode": "max"}

    def other() -> list[Callback]:
        options: dict[str, Any] = {"every_n_epochs": 3, "save_on_exception": True}
        return [] if by_hand else [ModelCheckpoint(tmp_path / "other", "x", **options)]

    run = full(3, callbacks=[ModelCheckpoint(tmp_path, "{epoch}", **settings), *other()])
    if by_hand:
        run.save_checkpoint(tmp_path / "other" / "x.ckpt")
    assert names(tmp_path) == ["epoch=1.ckpt", "other"]
    with pytest.raises(OSError, match="No space"):
        fit(tmp_path, Fails(1), *other(), path=tmp_path / "other" / "x.ckpt", **settings)
    assert names(tmp_path) == ["epoch=1.ckpt", "other"]


@pytest.mark.parametrize("monitor", [None, "step"])
@pytest.mark.parametrize("save_last", [None, True])
def test_a_failed_save_changes_nothing(monitor: Any, save_last: Any, tmp_path: Path) -> None:
    """Of the callback's state, so that it names files that are there."""
    mode = {"monitor": monitor, "mode": "max"}
    saves, states = EpochLast(tmp_path, "{epoch}", save_last=save_last, **mode), States()
    full(5 if save_last else 3, callbacks=[saves, states])
    assert state_of(saves) == states.seen[2] and saves.best_model_path.endswith("epoch1.ckpt")
    assert names(tmp_path) == ["epoch1.ckpt", *["last-epoch1.ckpt"] * bool(save_last)]


@pytest.mark.parametrize("mode", ["max", "min"])
def test_a_failed_last_leaves_the_last_before(mode: str, tmp_path: Path) -> None:
    """Whether or not a best file was written before it; the step counts as not saved."""
    saves, states = EpochLast(tmp_path, "{epoch}", save_last=True, monitor="step", mode=mode), States()
    full(6 if mode == "max" else 4, callbacks=[saves, states])
    best = "epoch2.ckpt" if mode == "max" else "epoch0.ckpt"
    assert names(tmp_path) == [best, "last-epoch1.ckpt"]
    now, before = state_of(saves), states.seen[2]
    written = {"best_model_path", "best_model_score", "best_k_models", "kth_best_model_path", "kth_value"}
    written |= {"current_score"}
    assert {key for key in now if now[key] != before[key]} == (written if mode == "max" else set())
    assert os.path.basename(saves.best_model_path) == best


def test_without_save_last_the_last_before_stays(tmp_path: Path) -> None:
    """Where the run that goes on from a file never writes the "last" that comes after it, or has not yet."""
    full(4, callbacks=[EpochLast(tmp_path, "{epoch}", save_last=True)])
    kept = ["epoch1.ckpt", "last-epoch0.ckpt"]
    assert names(tmp_path) == kept
    with pytest.raises(OSError, match="No space"):
        fit(tmp_path, Fails(1), path=tmp_path / "epoch1.ckpt", kind=EpochLast, save_last=True)
    assert names(tmp_path) == kept
    saves = fit(tmp_path, path=tmp_path / "epoch1.ckpt", epochs=2, kind=EpochLast)
    assert names(tmp_path) == kept and os.path.basename(saves.last_model_path) == kept[1]
    assert saves.state_dict()["last_model_path"] == saves.last_model_path
    saves = fit(tmp_path, path=tmp_path / "epoch1.ckpt", kind=EpochLast)
    assert names(tmp_path) == ["epoch1.ckpt", "epoch2.ckpt", "last-epoch0.ckpt"]  # what was resumed from stays


class SavesBeside(Fails):
    """Saves elsewhere while a file is being written, of which nothing comes."""

    def __init__(self, path: Path, *at: int) -> None:
        super().__init__(*at)
        self.path = path

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        if self.count + 1 in self.at:
            self.at = (self.count + 2,)
            trainer.save_checkpoint(self.path)
        super().on_save_checkpoint(trainer, pl_module, checkpoint)


def test_a_file_takes_the_place_of_what_it_says_itself(tmp_path: Path) -> None:
    """Not of what another says that is being written, or was once, under another name."""
    with pytest.raises(OSError, match="No space"):
        fit(tmp_path, SavesBeside(tmp_path / "other.ckpt", 2))
    assert names(tmp_path) == ["epoch=0.ckpt", "other.ckpt"]
    with pytest.raises(KilledError):
        fit(tmp_path, DiesAt(7), path=tmp_path / "other.ckpt")
    assert "epoch=0.ckpt" in names(tmp_path)
