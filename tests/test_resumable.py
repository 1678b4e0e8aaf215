"""A run that is interrupted goes on as if nothing had happened, from two lines in the user's loop."""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lite import CheckpointError, ConfigError, Lite
from tests.support.processes import ROOT, free_port, run_distributed, run_python

EPOCHS, STEPS = 3, 4  # of each epoch


class Interrupted(Exception):
    """Stands for whatever ends a process."""


def train(
    folder: str,
    log: list[Any],
    *,
    stop_after: int | None = None,
    at_end: bool = False,
    batch_size: int = 4,
    peek: bool = False,
    **options: Any,
) -> Any:
    """A run with dropout and a shuffled loader; each step logs its number, the samples and the model's sum."""
    lite = Lite(accelerator="cpu")
    torch.manual_seed(1)
    loader = lite.setup_dataloaders(DataLoader(torch.arange(16.0), batch_size=batch_size, shuffle=True))
    model = nn.Sequential(nn.Linear(1, 4), nn.Dropout(0.5), nn.Linear(4, 1))
    optimizer = torch.optim.Adam(model.parameters())
    lite.setup(model, optimizer)
    state: dict[str, Any] = {"model": model, "optimizer": optimizer, "loader": loader}
    run = lite.resumable(state, folder, **options)
    torch.rand(2)  # what a script draws before its loop does not matter
    if peek:
        next(iter(loader))  # nor does a look at the first batch
    try:
        for epoch in run.epochs(EPOCHS):
            for batch in loader:
                optimizer.zero_grad()
                lite.backward(model(batch.unsqueeze(1)).pow(2).mean())
                optimizer.step()
                weights = round(sum(p.sum().item() for p in model.parameters()), 9)
                log.append((epoch, sorted(batch.int().tolist()), weights))
                if run.step():
                    break
                if stop_after is not None and len(log) >= stop_after:
                    raise Interrupted
            if at_end:
                run.save()
    finally:
        run.close()
    return run


def interrupted(folder: str, log: list[Any], stop_after: int, **options: Any) -> None:
    with pytest.raises(Interrupted):
        train(folder, log, stop_after=stop_after, **options)


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


OPTIONS = [{}, {"async_save": True}, {"sharded": True}, {"peek": True}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_run_goes_on_from_its_newest_checkpoint(tmp_path: Path, options: dict[str, Any]) -> None:
    """What was done since then is done again, alike; steps, epochs, samples and weights are those of one run."""
    whole: list[Any] = []
    train(str(tmp_path / "whole"), whole, every_steps=100, peek=bool(options.get("peek")))
    assert len(whole) == EPOCHS * STEPS
    for cut in (3, 4, 5, 9):
        folder = tmp_path / str(cut)
        log: list[Any] = []
        interrupted(str(folder), log, cut, every_steps=3, **options)
        del log[cut - cut % 3 :]  # since the last save
        run = train(str(folder), log, every_steps=3, **options)
        assert run.resumed_from is not None and f"step-{cut - cut % 3:08d}" in run.resumed_from
        assert log == whole
        assert run.steps == len(whole)
    again: list[Any] = []
    train(str(folder), again, every_steps=3, **options)
    assert again == []  # it had come to its end


def accumulate(folder: str, stop_after: int | None, how: str) -> list[list[float]]:
    """Windows of 3 micro-batches over epochs of 5; `run.step()` after each micro-batch, or after each window."""
    lite = Lite(accelerator="cpu")
    torch.manual_seed(1)
    loader = lite.setup_dataloaders(DataLoader(torch.arange(20.0), batch_size=4 // lite.world_size, shuffle=True))
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    lite.setup(model, optimizer)
    window = lite.accumulate(model, steps=3)
    run = lite.resumable({"model": model, "optimizer": optimizer, "loader": loader}, folder, every_steps=2, signals=())
    log, count = [], 0
    for _ in run.epochs(3):
        for batch in loader:
            with window(last=loader.batches_done == len(loader)):
                lite.backward(model(batch.unsqueeze(1)).pow(2).mean())
            count += 1
            if window.ready:
                optimizer.step()
                optimizer.zero_grad()
                log.append([*[p.item() for p in model.parameters()], run.saved_steps])
            if count == stop_after:
                if how == "kill":
                    run.close()
                    return log
                lite.request_stop("enough")
            if stop_after is not None and how != "kill":
                time.sleep(0.12 * (lite.world_size - 1))  # until all ranks have heard of it
            if (how != "windows" or window.ready) and run.step():
                run.close()
                return log
    return log


@pytest.mark.parametrize("how", ["kill", "request", "windows"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_gradients_of_a_window_are_not_lost(tmp_path: Path, how: str, world_size: int) -> None:
    """A save and a stop that are due within a window wait for its end; the last window of a resumed epoch is known."""

    def run(folder: Path, stop_after: int | None) -> list[list[float]]:
        if world_size == 1:
            return accumulate(str(folder), stop_after, how)
        first, second = run_distributed(accumulate, str(folder), stop_after, how)
        assert first == second
        return first  # type: ignore[no-any-return]

    whole = [row[:-1] for row in run(tmp_path / "whole", None)]
    assert len(whole) == 6
    for cut in (4, 7):
        folder = tmp_path / str(cut)
        done = run(folder, cut)
        rest = run(folder, None)
        assert [row[:-1] for row in rest] == whole[6 - len(rest) :], cut
        assert 0 < len(rest) < 6 and len(done) + len(rest) >= 6


def left_open(folder: str) -> list[int]:
    """A window that is never completed, held by an object in a cycle, which each rank's collector finds some time."""
    lite = Lite(accelerator="cpu")
    model = nn.Linear(1, 1)
    model, optimizer = lite.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    run = lite.resumable({"model": model}, folder, every_steps=2, signals=())
    saved = []
    warnings.filterwarnings("ignore", "lite.save came within an accumulation window")
    for _ in run.epochs(2):
        holder = [lite.accumulate(model, steps=4)]
        holder.append(holder)  # type: ignore[arg-type]
        for _ in range(3):
            with holder[0]():
                lite.backward(model(torch.ones(1, 1)).sum())
        del holder
        if lite.global_rank == 1:
            gc.collect()
        for _ in range(4):
            lite.backward(model(torch.ones(1, 1)).sum())
            optimizer.step()
            run.step()
        saved.append(run.saved_steps)
    return saved


def test_an_abandoned_window_holds_nothing_up_for_ever(tmp_path: Path) -> None:
    """And all ranks save at the same steps, whatever their garbage collectors do."""
    first, second = run_distributed(left_open, str(tmp_path))
    assert first == second == [4, 8]


def test_one_of_so_many_steps_is_kept_for_good_whatever_its_number(tmp_path: Path) -> None:
    """Saves that waited for a window's end have other numbers than were asked for."""
    lite = Lite(accelerator="cpu")
    model = lite.setup(nn.Linear(1, 1))
    window = lite.accumulate(model, steps=4)
    run = lite.resumable({"model": model}, tmp_path, every_steps=10, keep_every=10, keep_last=1, signals=())
    for _ in run.epochs(1):
        for _ in range(60):
            with window():
                lite.backward(model(torch.ones(1, 1)).sum())
            run.step()
    assert names(tmp_path) == [f"step-{step:08d}.ckpt" for step in (12, 20, 32, 40, 52, 60)]


def test_a_save_within_a_window_is_warned_of(tmp_path: Path) -> None:
    """Its gradients are in no checkpoint."""
    lite = Lite(accelerator="cpu")
    model = lite.setup(nn.Linear(1, 1))
    window = lite.accumulate(model, steps=2)
    for expected in (pytest.warns(UserWarning, match="within an accumulation window"), contextlib.nullcontext()):
        with window():
            lite.backward(model(torch.ones(1, 1)).sum())
        with expected:
            lite.save(tmp_path / "a.ckpt", {"model": model})


def test_a_window_in_the_state_is_gone_on_with(tmp_path: Path) -> None:
    """Its gradients are in the checkpoint then, and nothing is warned of."""

    def run(begin: int) -> list[float]:
        torch.manual_seed(1)
        lite = Lite(accelerator="cpu")
        model = lite.setup(nn.Linear(1, 1))
        window = lite.accumulate(model, steps=4)
        state = {"model": model, "window": window}
        if begin:
            lite.load(tmp_path / "a.ckpt", state)
        for number in range(begin, 3):
            if number == 2 and not begin:
                lite.save(tmp_path / "a.ckpt", state)
            with window(weight=number + 1, last=number == 2):
                lite.backward(model(torch.full((1, 1), float(number))).square().sum())
        return [p.grad.item() for p in model.parameters() if p.grad is not None]

    assert run(0) == run(2)


def test_old_checkpoints_go_when_newer_ones_are_whole(tmp_path: Path) -> None:
    """The last two stay, and those that are kept for good."""
    train(str(tmp_path), [], every_steps=1, keep_last=2, keep_every=5)
    assert names(tmp_path) == [f"step-{n:08d}.ckpt" for n in (5, 10, 11, 12)]


def test_directories_without_an_index_count_for_nothing(tmp_path: Path) -> None:
    """What a killed save left is neither begun from nor kept in the place of a whole one, and goes with the next."""
    for n in (1, 2, 11, 13):
        (tmp_path / f"step-{n:08d}").mkdir()
        (tmp_path / f"step-{n:08d}" / "rest").touch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run = train(str(tmp_path), [], every_steps=5, sharded=True)
    assert run.resumed_from is None
    whole = {p.name for p in tmp_path.iterdir() if (p / ".metadata").exists()}
    assert whole == {"step-00000010", "step-00000012"}


def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path) -> None:
    """With a warning that names it; the one before it serves."""
    whole: list[Any] = []
    train(str(tmp_path / "whole"), whole, every_steps=100)
    log: list[Any] = []
    interrupted(str(tmp_path / "cut"), log, 6, every_steps=2)
    newest = tmp_path / "cut" / "step-00000006.ckpt"
    newest.write_bytes(newest.read_bytes()[:-200])
    del log[4:]
    with pytest.warns(UserWarning, match=r"step-00000006\.ckpt is damaged"):
        train(str(tmp_path / "cut"), log, every_steps=2)
    assert log == whole


def test_a_save_at_the_end_of_an_epoch_counts_it_as_done(tmp_path: Path) -> None:
    """Neither trained on again nor left out."""
    whole: list[Any] = []
    train(str(tmp_path / "whole"), whole, at_end=True)
    log: list[Any] = []
    interrupted(str(tmp_path / "cut"), log, STEPS + 2, at_end=True)
    del log[STEPS:]
    train(str(tmp_path / "cut"), log, at_end=True)
    assert log == whole


def cut_short(folder: Path, at_top: bool, stop_after: int | None = None) -> list[list[float]]:
    """Epochs of 3 of their 4 batches, in one life of a run that saves after each step."""
    lite = Lite(accelerator="cpu")
    torch.manual_seed(1)
    loader = lite.setup_dataloaders(DataLoader(torch.arange(8.0), batch_size=2, shuffle=True))
    run = lite.resumable({"loader": loader}, folder, every_steps=1, signals=())
    seen = []
    for _ in run.epochs(2):
        for batch in loader:
            if at_top and loader.batches_done > 3:
                break
            seen.append(batch.tolist())
            run.step()
            if len(seen) == stop_after:
                run.close()
                return seen
            if not at_top and loader.batches_done == 3:
                break
    return seen


def test_an_epoch_that_is_cut_short_is_cut_alike_by_the_resumed_run(tmp_path: Path) -> None:
    """At the top of the loop; a break after a step is warned of, as the checkpoint of that step can't tell of it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole = cut_short(tmp_path / "whole", True)
        assert len(whole) == 6
        for stop in (2, 3, 4):
            folder = tmp_path / str(stop)
            assert cut_short(folder, True, stop) + cut_short(folder, True) == whole
    with pytest.warns(UserWarning, match=r"epoch 0 was left by break after a step.*Break at the top"):
        assert cut_short(tmp_path / "bottom", False) == whole


def test_a_folder_that_cannot_be_written_is_told_of_before_the_first_step(tmp_path: Path) -> None:
    """Or warned of, where training may go on without; and two runs on one folder are warned of."""
    (tmp_path / "file").write_text("")
    lite = Lite(accelerator="cpu")
    for folder in (tmp_path / "file", tmp_path / "file" / "under"):
        with pytest.raises(CheckpointError, match=rf"no checkpoint can be written to {folder}.*another folder"):
            lite.resumable({"n": [1]}, folder, signals=())
    with pytest.warns(UserWarning, match="no checkpoint can be written"):
        lite.resumable({"n": [1]}, folder, signals=(), on_error="warn")
    run = lite.resumable({"n": [1]}, tmp_path / "a", signals=())
    with pytest.warns(UserWarning, match="another open resumable's too"):
        lite.resumable({"n": [1]}, tmp_path / "a", signals=()).close()
    run.close()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lite.resumable({"n": [1]}, tmp_path / "a", signals=())


def seen_epochs(folder: Path, count: int, how: str = "steps", stop_after: int | None = None) -> list[int]:
    """The epoch of each batch in one life of a run; `how` says where it steps and saves."""
    lite = Lite(accelerator="cpu")
    torch.manual_seed(1)
    loader = lite.setup_dataloaders(DataLoader(torch.arange(8.0), batch_size=4, shuffle=True))
    run = lite.resumable({"loader": loader}, folder, every_steps=1 if how == "per epoch" else None, signals=())
    seen: list[int] = []

    def again() -> Any:
        return itertools.cycle(loader) if how == "cycle" else loader

    for epoch in run.epochs(count):
        if how == "save first":
            run.save()
        for _, _ in zip(range(5), again(), strict=False):
            seen.append(epoch)
            if how != "per epoch":
                run.step()
            if how == "cycle" and len(seen) == 4:
                run.save()
            if len(seen) == stop_after:
                run.close()
                return seen
        if how == "per epoch":
            run.step()
    return seen


def beside(folder: Path, when: str, stop_after: int | None = None) -> list[Any]:
    """Two epochs over one loader, and batches of another, which ends at other times; begun `when`."""
    lite = Lite(accelerator="cpu")
    torch.manual_seed(1)
    loader, other = lite.setup_dataloaders(
        DataLoader(torch.arange(20.0), batch_size=4, shuffle=True),
        DataLoader(torch.arange(9.0), batch_size=3, shuffle=True),
    )
    run = lite.resumable({"loader": loader, "other": other}, folder, every_steps=1, signals=())
    seen: list[Any] = []
    extra = looked_at = iter(other)
    if when == "looked at":
        next(extra, None)
    for epoch in run.epochs(2):
        if when == "looked at" and extra is looked_at:
            extra = iter(other)
        for batch in loader:
            try:
                also = next(extra)
            except StopIteration:
                extra = iter(other)
                also = next(extra)
            seen.append([epoch, batch.tolist(), also.tolist()])
            if when != "per epoch":
                run.step()
            if len(seen) == stop_after:
                run.close()
                return seen
        if when == "per epoch":
            run.step()
    return seen


@pytest.mark.parametrize("when", ["before", "looked at"])
def test_a_loader_beside_the_epochs_own_goes_on_too(tmp_path: Path, when: str) -> None:
    """Over the end of its passes and of epochs; what its iterator gave out before `epochs` does not count."""
    whole = beside(tmp_path / "whole", when)
    assert len(whole) == 10
    assert sorted(itertools.chain.from_iterable(row[2] for row in whole[:3])) == list(range(9))
    for stop_after in range(1, 10):
        folder = tmp_path / str(stop_after)
        assert beside(folder, when, stop_after) + beside(folder, when) == whole


def test_an_iterator_that_was_left_and_is_still_held_is_none_beside(tmp_path: Path) -> None:
    """The next epoch's pass over the loader ends that epoch."""

    def train(stop_after: int | None = None) -> list[Any]:
        lite = Lite(accelerator="cpu")
        loader = lite.setup_dataloaders(DataLoader(torch.arange(16.0), batch_size=4))
        run = lite.resumable({"loader": loader}, tmp_path, signals=())
        seen: list[Any] = []
        for epoch in run.epochs(3):
            batches = iter(loader)
            for batch in batches:
                seen.append([epoch, batch[0].item()])
                if epoch == 0 and loader.batches_done == 2:
                    break
            if epoch == stop_after:
                run.save()
                run.close()
                return seen
        return seen

    assert train(stop_after=1) == [[0, 0], [0, 4], [1, 0], [1, 4], [1, 8], [1, 12]]
    assert train() == [[2, 0], [2, 4], [2, 8], [2, 12]]


def test_a_step_after_the_loop_ends_an_epoch_whatever_goes_on_beside(tmp_path: Path) -> None:
    """With a loader in the state that is in mid-pass."""
    whole = beside(tmp_path / "whole", "per epoch")
    first = beside(tmp_path / "run", "per epoch", stop_after=7)
    assert first == whole[:7]
    assert beside(tmp_path / "run", "per epoch") == whole[5:]


def test_a_run_that_is_made_longer_goes_on_with_the_next_epoch(tmp_path: Path) -> None:
    """Whether it had come to its end or was interrupted between two calls."""
    assert seen_epochs(tmp_path, 2) == [0, 0, 1, 1]
    assert seen_epochs(tmp_path, 3) == [2, 2]
    assert seen_epochs(tmp_path, 5) == [3, 3, 4, 4]
    assert seen_epochs(tmp_path, 5) == []


def test_an_epoch_counts_as_done_only_when_its_loader_was_gone_through(tmp_path: Path) -> None:
    """Not by a save before its first batch, nor where the loop goes on over the loader's batches; a step after the loop
    ends it."""
    assert seen_epochs(tmp_path / "first", 3, "save first", stop_after=3) == [0, 0, 1]
    assert seen_epochs(tmp_path / "first", 3, "save first") == [1, 1, 2, 2]
    assert seen_epochs(tmp_path / "cycle", 2, "cycle", stop_after=4) == [0] * 4
    assert seen_epochs(tmp_path / "cycle", 2, "cycle")[-5:] == [1] * 5
    assert 0 in seen_epochs(tmp_path / "other", 2, "cycle")
    assert seen_epochs(tmp_path / "each", 3, "per epoch", stop_after=3) == [0, 0, 1]
    assert seen_epochs(tmp_path / "each", 3, "per epoch") == [1, 1, 2, 2]


def test_damaged_checkpoints_take_nobodys_place(tmp_path: Path) -> None:
    """New ones are kept however few are to be kept; the damaged ones go when the run has passed them or has its own."""
    log: list[Any] = []
    interrupted(str(tmp_path), log, 5, every_steps=1, keep_last=4)
    for n in (4, 5):
        path = tmp_path / f"step-{n:08d}.ckpt"
        path.write_bytes(path.read_bytes()[:-200])
    with pytest.warns(UserWarning, match="damaged"):
        interrupted(str(tmp_path), log, len(log) + 1, every_steps=1, keep_last=1)
    assert names(tmp_path) == ["step-00000004.ckpt"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run = train(str(tmp_path), [], every_steps=1, keep_last=1)
    assert run.resumed_from is not None and run.resumed_from.endswith("step-00000004.ckpt")


def test_a_run_without_a_whole_checkpoint_is_not_begun_anew_unasked(tmp_path: Path) -> None:
    """All are damaged: an error says so."""
    interrupted(str(tmp_path), [], 2, every_steps=1)
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:-200])
    with pytest.warns(UserWarning, match="damaged"), pytest.raises(CheckpointError, match="is whole"):
        train(str(tmp_path), [])


def test_a_failed_background_save_does_not_take_the_next_one_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its error is told, and the last save, on a signal, is made; what is said of it is true."""
    import lite.checkpoint.file

    real, calls = lite.checkpoint.file.save_file, []

    def failing(path: str, content: Any) -> None:
        calls.append(path)
        if len(calls) == 1:
            raise CheckpointError("the disk is full")
        real(path, content)

    monkeypatch.setattr("lite.checkpoint.file.save_file", failing)
    run_of = Lite(accelerator="cpu")
    run = run_of.resumable({"n": 1}, tmp_path, every_steps=2, async_save=True, on_error="warn")
    run.step()
    run.step()
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.warns(UserWarning, match="disk is full"), pytest.raises(SystemExit):
        run.step()
    assert names(tmp_path) == ["step-00000003.ckpt"]
    assert "saved step 3; stopped" in capsys.readouterr().err


def test_training_may_go_on_without_a_checkpoint_that_cannot_be_written(tmp_path: Path) -> None:
    """If the user says so; otherwise the error comes, and the last good checkpoint is intact."""
    good: list[Any] = []
    interrupted(str(tmp_path), good, 2, every_steps=1)
    (tmp_path / "step-00000003.ckpt").mkdir()  # in the way of the next one
    (tmp_path / "step-00000003.ckpt" / "x").touch()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        log: list[Any] = []
        train(str(tmp_path), log, every_steps=1, on_error="warn", keep_last=100)
    assert any("goes on without this checkpoint" in str(w.message) for w in caught)
    assert len(log) == EPOCHS * STEPS - 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for n in range(4, 13):
            (tmp_path / f"step-{n:08d}.ckpt").unlink()
        with pytest.raises(CheckpointError, match=r"step-00000003\.ckpt"):
            train(str(tmp_path), [], every_steps=1)
    assert Lite(accelerator="cpu").load(tmp_path / "step-00000002.ckpt")["resumable"]["steps"] == 2


def test_wrong_arguments_are_refused(tmp_path: Path) -> None:
    """Each by its name and value."""
    lite = Lite(accelerator="cpu")
    for options, words in (
        ({"every_steps": 0}, "every_steps=0"),
        ({"every_seconds": -1}, "every_seconds=-1"),
        ({"keep_last": True}, "keep_last=True"),
        ({"on_error": "ignore"}, "on_error='ignore'"),
        (
            {"every_steps": 4, "keep_every": 6},
            "keep_every=6 .* every_steps=4: only every 12th step .* use keep_every=8",
        ),
        ({"every_steps": 9, "every_seconds": 1, "keep_every": 2}, "keep_every=2 .* every_steps=9: .* use keep_every=9"),
    ):
        with pytest.raises(ConfigError, match=words):
            lite.resumable({}, tmp_path, signals=(), **options)
    with pytest.warns(UserWarning, match="keep_every=6 .* every_seconds=5 saves at any step") as warned:
        lite.resumable({}, tmp_path, signals=(), every_seconds=5, keep_every=6).close()
    assert warned[0].filename == __file__
    with pytest.raises(ConfigError, match="without the name 'resumable'"):
        lite.resumable({"resumable": 1}, tmp_path, signals=())
    with pytest.raises(ConfigError, match=r"folder=\{'n': 1\} is no path; the state comes first"):
        lite.resumable(tmp_path, {"n": 1}, signals=())  # type: ignore[arg-type]


def stopped(folder: str, how: str, rank: int) -> tuple[Any, int, list[str]]:
    """Stop in the second step of the run, on one rank; return the exit code, the last step, and what was saved."""
    lite = Lite(accelerator="cpu")
    before = signal.getsignal(signal.SIGTERM)
    run = lite.resumable({"n": 1}, folder, every_seconds=0.4 if how == "clock" else None)
    code: Any = None
    try:
        for step in range(2000):
            if step == 1 and lite.global_rank == rank:
                if how == "signal":
                    os.kill(os.getpid(), signal.SIGTERM)
                elif how == "request":
                    lite.request_stop("enough")
            time.sleep(0.001)
            lite.all_reduce(step)  # ranks keep in step, as gradients do
            if run.step() or (how == "clock" and run.saved_steps is not None):
                break
    except SystemExit as end:
        code = end.code
    run.close()
    assert signal.getsignal(signal.SIGTERM) is before
    return code, run.steps, sorted(os.listdir(folder))


@pytest.mark.parametrize("how", ["signal", "request", "clock"])
def test_all_ranks_save_and_stop_at_the_same_step(tmp_path: Path, how: str) -> None:
    """A signal or a request on one rank, or rank 0's clock; a signal ends the process with 128 + its number."""
    for rank in (0, 1):
        folder = tmp_path / str(rank)
        folder.mkdir()
        first, second = run_distributed(stopped, str(folder), how, rank)
        assert first == second
        code, steps, saved = first
        assert code == (143 if how == "signal" else None)
        assert saved == [f"step-{steps:08d}.ckpt"]
        assert steps < 2000
    folder = tmp_path / "alone"
    folder.mkdir()
    code, steps, saved = stopped(str(folder), how, 0)
    assert code == (143 if how == "signal" else None)
    assert saved == [f"step-{steps:08d}.ckpt"]
    assert steps == 2 or how == "clock"


def lifetime(folder: str, batch_size: int, stop_after: int | None) -> list[Any]:
    log: list[Any] = []
    with torch.random.fork_rng(), contextlib.suppress(Interrupted):
        train(folder, log, stop_after=stop_after, batch_size=batch_size, every_steps=1)
    return log


def test_another_number_of_processes_goes_on_with_the_same_samples(tmp_path: Path) -> None:
    """2 -> 1 -> 2 in mid-epoch: the global batches of the epoch are the uninterrupted run's."""
    whole = lifetime(str(tmp_path / "whole"), 4, None)
    folder = str(tmp_path / "cut")

    def samples(parts: list[list[Any]]) -> list[list[int]]:
        return [sorted(i for _, batch, _ in step for i in batch) for step in zip(*parts, strict=True)]

    seen = samples(run_distributed(lifetime, folder, 2, 1))
    seen += samples([lifetime(folder, 4, 2)])
    seen += samples(run_distributed(lifetime, folder, 2, 1))
    assert seen == [batch for _, batch, _ in whole[:4]]


@pytest.mark.parametrize(("num_processes", "num_kinds"), [(1, 4), (2, 8)])
def test_killed_runs_equal_the_one_that_was_left_alone(num_processes: int, num_kinds: int) -> None:
    """Bit for bit, whenever SIGKILL strikes, all or one: also during a save, in the background, of a directory."""
    size = ["--processes", num_processes, "--rounds", num_kinds, "--kills", "1"]
    done = run_python("-m", "benchmarks.kill_drill", *map(str, size), timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{num_kinds} of {num_kinds} rounds equal" in done.stdout and done.stdout.startswith("seed "), done.stdout


RESTARTED = """
import os, signal, sys
from benchmarks import kill_drill
from lite.resumable import Resumable

step = Resumable.step

def deadly(self):
    stop = step(self)
    if self.steps == 17 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return stop

Resumable.step = deadly
kill_drill.job(sys.argv[1], async_save=False)
"""


def test_torchrun_restarts_a_killed_rank_exactly(tmp_path: Path) -> None:
    """--max-restarts: all ranks go on from the newest checkpoint, to the same numbers."""
    from tests.support.processes import run_torchrun

    script = tmp_path / "restarted.py"
    script.write_text(RESTARTED)
    (tmp_path / "cut").mkdir()
    done = run_torchrun(script, str(tmp_path / "cut"), max_restarts=3)
    assert done.returncode == 0, done.stderr
    assert "resumed from" in done.stderr
    script.write_text(RESTARTED.replace("== 17", "== 0"))
    (tmp_path / "whole").mkdir()
    done = run_torchrun(script, str(tmp_path / "whole"))
    assert done.returncode == 0, done.stderr
    results = [json.loads((tmp_path / name / "result").read_text()) for name in ("cut", "whole")]
    assert results[0] == results[1]


ELASTIC = """
import os, sys, time
import torch
from torch.utils.data import DataLoader
from lite import Lite

lite = Lite(accelerator="cpu")
torch.manual_seed(1)
loader = DataLoader(torch.arange(400), batch_size=4 // lite.world_size, shuffle=True)
state = {"loader": lite.setup_dataloaders(loader)}
run = lite.resumable(state, sys.argv[1], every_steps=1, keep_last=3)
for epoch in run.epochs(1):
    for batch in state["loader"]:
        samples = lite.all_gather(batch, cat=True).tolist()
        if lite.is_global_zero:
            with open(sys.argv[2], "a") as log:
                log.write(f"{run.steps} {lite.world_size} {sorted(samples)}\\n")
        time.sleep(0.05)
        run.step()
"""


def test_an_elastic_job_goes_on_at_its_new_size(tmp_path: Path) -> None:
    """torchrun --nnodes=1:2: as a second agent joins, both go on from the newest checkpoint, with the same samples."""
    script = tmp_path / "elastic.py"
    script.write_text(ELASTIC)
    port = free_port()
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1:2", "--nproc-per-node=1", "--max-restarts=3"]
    command += ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=elastic"]
    command += ["--rdzv-conf=last_call_timeout=1", "--monitor-interval=0.5"]
    command += [str(script), str(tmp_path / "checkpoints"), str(tmp_path / "log")]
    # torch 2.13: without it, an agent that joins later waits for ever.
    variables = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environ = {**os.environ, **variables}
    log = tmp_path / "log"

    def agent() -> subprocess.Popen[bytes]:
        return subprocess.Popen(command, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    agents = [agent()]
    try:
        while not log.exists() or log.read_text().count("\n") < 5:
            assert agents[0].poll() is None
            time.sleep(0.1)
        agents.append(agent())
        for one in agents:
            assert one.wait(timeout=150) == 0
    finally:
        for one in agents:
            one.kill()
    rows = [line.split(" ", 2) for line in log.read_text().splitlines()]
    assert {world for _, world, _ in rows} == {"1", "2"}
    samples = {int(step): json.loads(batch) for step, _, batch in rows}
    assert sorted(samples) == list(range(100))
    assert sorted(i for batch in samples.values() for i in batch) == list(range(400))
