"""Which checkpoint a run goes on from, and what of it; what is kept, and when; callbacks that decide by metrics."""

from __future__ import annotations

import csv
import os
import shutil
import signal
import uuid
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lite.errors import ConfigError
from lite.loggers import CSVLogger
from lite.trainer import Callback
from lite.trainer.callbacks import BasePredictionWriter, EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lite.trainer.callbacks.ranking import may_go, places_of
from tests.trainer.modules import Tiny, TinyData, numbers, trainer, weights

SAVES: dict[str, Any] = {"enable_checkpointing": True, "limit_val_batches": 0}


class Killed(Tiny):
    """Gets SIGTERM in its second batch."""

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:
            os.kill(os.getpid(), signal.SIGTERM)


class Scores(Tiny):
    """Logs given scores, one per epoch, in double precision."""

    def __init__(self, scores: list[float]) -> None:
        super().__init__()
        self.scores = scores

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("score", torch.tensor(self.scores[self.current_epoch], dtype=torch.float64))


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.rglob("*.ckpt"))


# ---- which file


@pytest.mark.parametrize("logger", ["default", "csv"])
def test_behaviour_31_auto_goes_on_from_another_version_of_the_logger(
    logger: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The Trainer before had another one, and was killed; what is taken is told, and the run goes on writing there."""

    def make(version: Any = None) -> Any:
        chosen = True if logger == "default" else CSVLogger(tmp_path / "csv", version=version)
        return trainer(max_epochs=2, logger=chosen, default_root_dir=tmp_path, log_every_n_steps=1, **SAVES)

    first = make()
    with pytest.raises(SystemExit):
        first.fit(Killed(), numbers(), ckpt_path="auto")
    assert "ckpt_path='auto': there is no checkpoint yet; the run begins anew" in capsys.readouterr().err
    second = make()
    second.fit(Tiny(), numbers(), ckpt_path="auto")
    path = os.path.join(first.log_dir, "checkpoints", "interrupted.ckpt")
    assert second.ckpt_path == path
    assert f"ckpt_path='auto': {path}" in capsys.readouterr().err
    assert (second.global_step, second.log_dir) == (6, first.log_dir)
    assert not os.path.exists(first.log_dir.replace("version_0", "version_1"))
    whole = Tiny()
    trainer(max_epochs=2, limit_val_batches=0).fit(whole, numbers())
    assert weights(second.module) == weights(whole)
    third = make()
    third.validate(Tiny(), numbers(4), ckpt_path="auto", verbose=False)
    assert third.ckpt_path == second.checkpoint_callback.best_model_path
    branch = make()  # takes weights alone: another run
    branch.fit(Tiny(), numbers(), ckpt_path=path, restore=("model",))
    assert branch.log_dir == first.log_dir.replace("version_0", "version_2")  # a validation had the one before
    newest = branch.checkpoint_callback.best_model_path
    if logger == "csv":  # a version that was chosen, and has checkpoints, stands for itself
        chosen = make(version=0)
        with pytest.warns(UserWarning, match="nothing is left to train"):
            chosen.fit(Tiny(), numbers(), ckpt_path="auto")
        assert chosen.ckpt_path == third.ckpt_path
        with open(os.path.join(first.log_dir, "metrics.csv"), newline="") as file:
            assert [row["step"] for row in csv.DictReader(file) if row["loss"]] == ["0", "1", "2", "3", "4", "5"]
    last = make()
    last.fit_loop.max_epochs = 3
    last.fit(Tiny(), numbers(), ckpt_path="auto")
    assert (last.ckpt_path, last.log_dir) == (newest, branch.log_dir)
    last.fit_loop.max_epochs = 4  # it has written there, and stays there
    with pytest.warns(UserWarning, match="those that were kept there are left alone"):
        last.fit(Tiny(), numbers(), ckpt_path=third.ckpt_path)
    assert last.log_dir == branch.log_dir


def test_behaviour_31_a_folder_of_ones_own_is_searched_alone(tmp_path: Path) -> None:
    """Checkpoints beside a logger's files are another script's, where dirpath says where this one's are."""
    trainer(logger=CSVLogger(tmp_path), **SAVES).fit(Tiny(), numbers())
    own = trainer(logger=CSVLogger(tmp_path), callbacks=ModelCheckpoint(tmp_path / "own"), **SAVES)
    with pytest.warns(UserWarning, match="no last checkpoint yet"):
        own.fit(Tiny(), numbers(), ckpt_path="last")
    with pytest.warns(UserWarning, match="the weights stay as they are"):
        trainer(default_root_dir=tmp_path / "none").test(Tiny(), numbers(), ckpt_path="auto", verbose=False)


def test_behaviour_31_urls_are_searched_like_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ "auto", "last", SLURM's numbers; and there are no links at a URL, so "last" is written."""
    fsspec = pytest.importorskip("fsspec")
    root = f"memory://{uuid.uuid4().hex}"
    files = fsspec.filesystem("memory")

    def fitted(epochs: int, path: str | None, save_last: Any) -> Any:
        saves = ModelCheckpoint(f"{root}/own", save_last=save_last)
        run = trainer(max_epochs=epochs, callbacks=saves, default_root_dir=root, **SAVES)
        run.fit(Tiny(), numbers(), ckpt_path=path)
        return run

    assert fitted(1, "auto", True).ckpt_path is None
    for epochs, word in ((2, "auto"), (3, "last")):
        run = fitted(epochs, word, "link")
        assert run.ckpt_path == f"{root}/own/last.ckpt"
        assert run.global_step == 3 * epochs
    there = sorted(path.rsplit("/", 1)[-1] for path in files.find(f"{root}/own"))
    assert there == ["epoch=2-step=9.ckpt", "last.ckpt"]
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    (tmp_path / "scontrol").write_text("#!/bin/sh\n")
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for number in (1, 2):
        run = trainer(max_epochs=9, default_root_dir=root, limit_val_batches=0)
        with pytest.raises(SystemExit):
            run.fit(Killed(), numbers())
        assert files.exists(f"{root}/hpc_ckpt_{number}.ckpt")
        assert run.ckpt_path == (None if number == 1 else f"{root}/hpc_ckpt_1.ckpt")


@pytest.mark.filterwarnings("ignore:nothing is left to train")
@pytest.mark.parametrize("at_ends", [True, False])
def test_saves_that_come_after_the_one_a_run_goes_on_from_are_made(at_ends: bool, tmp_path: Path) -> None:
    """Of several ModelCheckpoints that save at one moment: those after the one whose file is gone on with, with what it
    had; and training goes on as if nothing had happened."""

    def run(path: Path | None = None) -> tuple[list[float], list[float], set[tuple[int, int]]]:
        settings: list[dict[str, Any]] = [{"every_n_train_steps": 2}, {"monitor": "val"}, {"every_n_train_steps": 3}]
        settings.append({"monitor": "val", "mode": "max"})
        saves = [
            ModelCheckpoint(tmp_path / str(n), "{step}", save_top_k=-1, save_on_train_epoch_end=at_ends, **one)
            for n, one in enumerate(settings)
        ]
        torch.manual_seed(1)
        module = Tiny(dropout=0.5)
        torch.randn(0 if path is None else 3)
        trainer(max_epochs=2, callbacks=saves, enable_checkpointing=True).fit(
            module, numbers(shuffle=True), numbers(), ckpt_path=path
        )
        files = {(n, int(f.stem.split("=")[1])) for n in range(4) for f in (tmp_path / str(n)).glob("step=*.ckpt")}
        scores = [float(one.best_model_score) for one in saves[1::2]]
        return weights(module), scores, files

    trained, scores, files = run()
    assert files == {*((0, s) for s in (2, 4, 6)), *((2, s) for s in (3, 6)), *((n, s) for n in (1, 3) for s in (3, 6))}
    kept = {one: (tmp_path / str(one[0]) / f"step={one[1]}.ckpt").read_bytes() for one in files}
    # By steps they save after the batch, by epochs at the epoch's end, which comes later, or with the others.
    turn = {one: (one[1], at_ends and one[0] in (1, 3), one[0]) for one in files}
    for one, content in kept.items():
        for number in range(4):
            shutil.rmtree(tmp_path / str(number), ignore_errors=True)
        path = tmp_path / str(one[0]) / f"step={one[1]}.ckpt"
        path.parent.mkdir()
        path.write_bytes(content)
        again = run(path)
        assert again[:2] == (trained, scores), one
        assert again[2] == {other for other in files if turn[other] >= turn[one]}, one


def test_a_run_whose_root_is_a_url_writes_nothing_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows and checkpoints; a resumed run goes on in its version."""
    fsspec = pytest.importorskip("fsspec")
    monkeypatch.chdir(tmp_path)
    root = f"memory://{uuid.uuid4().hex}"
    for epochs in (1, 2):
        own = {"default_root_dir": root, "logger": CSVLogger(root), "log_every_n_steps": 1}
        run = trainer(max_epochs=epochs, **own, **SAVES)
        run.fit(Tiny(), numbers(), ckpt_path="auto")
        assert run.global_step == 3 * epochs
    files = fsspec.filesystem("memory")
    folder = f"{root}/version_0"
    names = [path.rsplit("/", 1)[-1] for path in files.find(folder)]
    assert names == [
        "epoch=0-step=3.ckpt",
        "epoch=1-step=6.ckpt",
        "hyperparameters.json",
        "metrics.csv",
    ]  # the first was resumed from
    rows = files.cat_file(f"{folder}/metrics.csv").decode().splitlines()
    assert len(rows) == 7
    files.rm(root, recursive=True)
    assert not list(tmp_path.iterdir())


def test_behaviour_31_best_is_the_first_callbacks_that_has_one(tmp_path: Path) -> None:
    """And `ckpt_path` is that of the run, not of an earlier one."""
    last = ModelCheckpoint(tmp_path / "last", save_top_k=0, save_last=True)
    best = ModelCheckpoint(tmp_path / "best", monitor="val")
    run = trainer(callbacks=[last, best], enable_checkpointing=True)
    run.fit(Tiny(), datamodule=TinyData())
    run.test(verbose=False)
    assert run.ckpt_path == best.best_model_path
    run.test(Tiny(), datamodule=TinyData(), verbose=False)
    assert run.ckpt_path is None
    run.fit_loop.max_epochs = 2
    path = best.best_model_path
    run.fit(Tiny(), datamodule=TinyData(), ckpt_path=path)
    assert run.ckpt_path == path
    run.fit_loop.max_epochs = 3
    run.fit(run.module, datamodule=TinyData())
    assert run.ckpt_path is None


# ---- what is kept


def test_behaviour_28_a_resumed_callback_goes_on_with_its_best(tmp_path: Path) -> None:
    """The worst of the best and its score, the path of "last"; and the file that it was resumed from stays."""
    seen: list[Any] = []

    class Looks(Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            saves = trainer.checkpoint_callback
            worst = os.path.basename(saves.kth_best_model_path)
            seen.append((float(saves.kth_value), worst, os.path.basename(saves.last_model_path)))

    def fitted(scores: list[float], path: Any = None, mode: str = "min") -> Any:
        saves = ModelCheckpoint(tmp_path / mode, "{epoch}", "score", save_top_k=2, save_last=True, mode=mode)
        run = trainer(max_epochs=len(scores), callbacks=[saves, Looks()], enable_checkpointing=True)
        run.fit(Scores(scores), numbers(4), numbers(4), ckpt_path=path)
        return saves

    infinite = float("inf")
    fitted([3.0, 1.0])
    fitted([3.0, 1.0, 2.0], tmp_path / "min" / "last.ckpt")
    assert names(tmp_path / "min") == ["epoch=1.ckpt", "epoch=2.ckpt", "last.ckpt"]
    assert seen == [(infinite, "", ""), (3.0, "epoch=0.ckpt", "last.ckpt")]
    fitted([3.0, 1.0], mode="max")
    kept = fitted([3.0, 1.0, 5.0], tmp_path / "max" / "epoch=1.ckpt", mode="max")
    assert names(tmp_path / "max") == ["epoch=0.ckpt", "epoch=1.ckpt", "epoch=2.ckpt", "last.ckpt"]
    assert sorted(map(os.path.basename, kept.best_k_models)) == ["epoch=0.ckpt", "epoch=2.ckpt"]
    assert seen[2:] == [(-infinite, "", ""), (1.0, "epoch=1.ckpt", "last.ckpt")]


def test_behaviour_28_what_was_resumed_from_and_what_lies_elsewhere_is_never_removed(tmp_path: Path) -> None:
    """By its path, by another way to it, by a link to it; also at a URL."""
    folder, file = tmp_path / "own", tmp_path / "own" / "a.ckpt"
    folder.mkdir()
    file.write_text("")
    (folder / "last.ckpt").symlink_to("a.ckpt")
    (tmp_path / "way").symlink_to("own")
    for resumed in (file, folder / "last.ckpt", tmp_path / "way" / "a.ckpt"):
        assert not may_go(str(file), str(folder), places_of(str(resumed)))
    assert not may_go(str(folder / "last.ckpt"), str(folder), places_of(str(folder / "last.ckpt")))
    assert may_go(str(folder / "last.ckpt"), str(folder), places_of(str(file)))
    assert may_go(str(file), str(folder), places_of(str(folder / "b.ckpt"))) and may_go(str(file), str(folder), ())
    assert not may_go(str(tmp_path / "a.ckpt"), str(folder), ())
    assert not may_go("memory://x/a.ckpt", "memory://x", places_of("memory://x/a.ckpt"))
    assert may_go("memory://x/a.ckpt", "memory://x/", ()) and not may_go("memory://y/a.ckpt", "memory://x", ())


def test_behaviour_28_scores_are_compared_in_their_own_precision(tmp_path: Path) -> None:
    """Those that differ by less than single precision has."""
    saves = ModelCheckpoint(tmp_path, "{epoch}", "score")
    scores = [1.0 - 1e-9 * epoch for epoch in range(3)]
    trainer(max_epochs=3, callbacks=saves, enable_checkpointing=True).fit(Scores(scores), numbers(4), numbers(4))
    assert names(tmp_path) == ["epoch=2.ckpt"]
    assert float(saves.best_model_score) == scores[2]


def test_behaviour_28_steps_and_epochs_can_be_monitored(tmp_path: Path) -> None:
    """So that the newest few are kept; and they count from the first step, whoever looks in between."""
    saves = ModelCheckpoint(tmp_path, "{step}", "step", mode="max", save_top_k=2, every_n_train_steps=2)
    options = {"accumulate_grad_batches": 2, "enable_progress_bar": True, "callbacks": saves}
    run = trainer(max_epochs=2, **SAVES, **options)
    run.fit(Tiny(), numbers(28))
    assert names(tmp_path) == ["step=6.ckpt", "step=8.ckpt"]
    saves = ModelCheckpoint(tmp_path / "all", "{step}", save_top_k=-1, every_n_train_steps=2)
    trainer(max_epochs=2, **SAVES, **{**options, "callbacks": saves}).fit(Tiny(), numbers(28))
    assert names(tmp_path / "all") == [f"step={step}.ckpt" for step in (2, 4, 6, 8)]


def test_a_save_is_not_repeated_by_the_run_that_goes_on_from_it(tmp_path: Path) -> None:
    """While the next window of accumulation is open, the step is still the one that was saved."""
    whole = trainer(max_epochs=2, accumulate_grad_batches=2, limit_val_batches=0)
    for number, _ in enumerate(whole.steps(Tiny(), numbers(32), events=("batch",)), start=1):
        if number in (4, 5):
            whole.save_checkpoint(tmp_path / f"{number}.ckpt")
    for number in (4, 5):
        saves = ModelCheckpoint(tmp_path / str(number), "{step}", save_top_k=-1, every_n_train_steps=2)
        run = trainer(max_epochs=1, accumulate_grad_batches=2, enable_progress_bar=True, callbacks=saves, **SAVES)
        run.fit(Tiny(), numbers(32), ckpt_path=tmp_path / f"{number}.ckpt")
        assert names(tmp_path / str(number)) == ["step=4.ckpt"]


def test_a_save_within_a_window_does_not_repeat_the_one_before_it(tmp_path: Path) -> None:
    """The batch is gone on with, in a hook of which it was saved, and its step had been saved as the window began."""

    class SavesWithin(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 4:
                trainer.save_checkpoint(tmp_path / "within.ckpt")

    def fitted(path: Path | None, *more: Any) -> Any:
        saves = ModelCheckpoint(tmp_path / "own", "{step}", save_top_k=-1, every_n_train_steps=2)
        run = trainer(accumulate_grad_batches=2, callbacks=[saves, *more], enable_progress_bar=True, **SAVES)
        run.fit(Tiny(), numbers(32), ckpt_path=path)

    fitted(None, SavesWithin())
    fitted(tmp_path / "within.ckpt")
    assert names(tmp_path / "own") == ["step=2.ckpt", "step=4-v1.ckpt", "step=4.ckpt"]


# ---- what is restored


def test_behaviour_52_positions_random_states_and_sums_are_parts_of_their_own(tmp_path: Path) -> None:
    """Each can be left out alone; without the positions in the data the epoch begins anew."""

    class Seen(Tiny):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            self.seen = [*getattr(self, "seen", []), float(batch.sum())]
            self.log("mean", batch.sum(), on_step=False, on_epoch=True)
            return self.loss(batch)

    def fitted(path: Path | None, seed: int = 1, **parts: Any) -> tuple[Any, Any]:
        torch.manual_seed(seed)
        module = Seen(dropout=0.5)
        torch.manual_seed(seed)
        run = trainer(max_epochs=1, limit_val_batches=0)
        for number, _ in enumerate(run.steps(module, numbers(16, shuffle=True), ckpt_path=path, **parts)):
            if path is None and number == 1:
                run.save_checkpoint(tmp_path / "x.ckpt")
        return module, run

    whole, run = fitted(None)
    mean = float(run.callback_metrics["mean"])

    def resumed(**parts: Any) -> tuple[bool, bool, bool]:
        """Whether the batches, the epoch's mean and the weights are those of the whole run."""
        module, run = fitted(tmp_path / "x.ckpt", seed=7, **parts)
        same = module.seen == whole.seen[2:]
        return same, float(run.callback_metrics["mean"]) == mean, weights(module) == weights(whole)

    assert resumed() == (True, True, True)
    assert resumed(restore_except=("random",)) == (True, True, False)
    assert resumed(restore_except="metrics") == (True, False, True)
    for left in ("data", "lite"):
        with pytest.warns(UserWarning, match="epoch 0 was under way and begins anew"):
            module, run = fitted(tmp_path / "x.ckpt", seed=7, restore_except=(left,))
        assert len(module.seen) == 4 and sorted(module.seen) == pytest.approx(sorted(module.seen))
        assert float(run.callback_metrics["mean"]) == pytest.approx(sum(module.seen) / 4)
        assert (run.global_step, run.current_epoch) == (6, 1)
    module, run = fitted(tmp_path / "x.ckpt", seed=7, restore_except=("loops",))
    assert (len(module.seen), run.global_step) == (4, 4)
    with pytest.raises(ConfigError, match=r"'data' belongs to a place in an epoch.*add 'loops'"):
        trainer().fit(Tiny(), numbers(), ckpt_path=tmp_path / "x.ckpt", restore=("model", "data"))


def test_behaviour_52_the_next_epoch_is_whole_without_the_random_states(tmp_path: Path) -> None:
    """Saved after an epoch's last batch, whose pass is over, and after the epoch."""
    run = trainer(max_epochs=1, limit_val_batches=0)
    for number, _ in enumerate(run.steps(Tiny(), numbers(16, shuffle=True)), start=4):
        run.save_checkpoint(tmp_path / f"{number}.ckpt")
    for number in (7, 8):
        again = trainer(max_epochs=2, limit_val_batches=0)
        path = tmp_path / f"{number}.ckpt"
        again.fit(Tiny(), numbers(16, shuffle=True), ckpt_path=path, restore_except="random")
        assert again.fit_loop.progress.batches == 8


def test_behaviour_52_a_datamodules_state_is_a_part(tmp_path: Path) -> None:
    """It does not come with the callbacks'."""
    found: list[Any] = []

    class Data(TinyData):
        def state_dict(self) -> dict[str, Any]:
            return {"n": 1}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            found.append(state)

    run = trainer()
    run.fit(Tiny(), datamodule=Data())
    run.save_checkpoint(tmp_path / "x.ckpt")
    for parts in ({"restore_except": ("datamodule",)}, {"restore": ("model", "callbacks")}):
        trainer(max_epochs=2).fit(Tiny(), datamodule=Data(), ckpt_path=tmp_path / "x.ckpt", **parts)
    assert found == []
    trainer(max_epochs=2).fit(Tiny(), datamodule=Data(), ckpt_path=tmp_path / "x.ckpt", restore=("datamodule",))
    assert found == [{"n": 1}]


def test_behaviour_41_the_loss_scale_and_the_time_since_a_validation_go_on(tmp_path: Path) -> None:
    """What counts towards a larger scale, and towards the next validation."""
    path = tmp_path / "x.ckpt"

    class Single(Tiny):
        def __init__(self) -> None:
            super().__init__()
            self.net.float()
            self.validations = 0

        def loss(self, batch: Tensor) -> Tensor:
            return super().loss(batch.float()) / 1000  # so that the first scale does not overflow

        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            self.validations += 1

    options = {"precision": "16-mixed", "val_check_interval": {"hours": 1}}
    run = trainer(**options)
    run.fit(Single(), numbers(), numbers(4))
    assert run.module.validations == 0
    scale = run.scaler.state_dict()
    assert scale["_growth_tracker"] == 3
    run.fit_loop.schedule.load_state_dict({"since_s": 7200.0})
    run.save_checkpoint(path)
    again = trainer(max_epochs=2, **options)
    again.fit(Single(), numbers(), numbers(4), ckpt_path=path)
    assert again.scaler.state_dict()["_growth_tracker"] == 6
    assert again.module.validations == 1
    other = trainer(max_epochs=2, **options)
    other.fit(Single(), numbers(), numbers(4), ckpt_path=path, restore_except=("precision",))
    assert other.scaler.state_dict()["_growth_tracker"] == 3


@pytest.mark.parametrize(
    "where",
    [
        "meta",
        torch.device("meta"),
        {"cpu": "meta"},
        lambda storage, place: torch.empty(0, device="meta").untyped_storage(),
    ],
)
def test_load_from_checkpoint_puts_the_weights_where_map_location_says(where: Any, tmp_path: Path) -> None:
    """A device, or what torch.load takes; a dict is asked for the place that the file names."""
    run = trainer()
    run.fit(Tiny(), datamodule=TinyData())
    run.save_checkpoint(tmp_path / "x.ckpt")
    module = Tiny.load_from_checkpoint(tmp_path / "x.ckpt", map_location=where)
    assert {p.device.type for p in module.parameters()} == {"meta"}
    for stays in (None, {"cuda:1": "meta"}, lambda storage, place: storage):
        module = Tiny.load_from_checkpoint(tmp_path / "x.ckpt", map_location=stays)
        assert {p.device.type for p in module.parameters()} == {"cpu"}
    with pytest.raises(ConfigError, match=r"map_location=1\.5 must be a device"):
        Tiny.load_from_checkpoint(tmp_path / "x.ckpt", map_location=1.5)


def test_behaviour_34_hyperparameters_of_omegaconf(tmp_path: Path) -> None:
    """They are stored as plain values."""
    omegaconf = pytest.importorskip("omegaconf")

    class Configured(Tiny):
        def __init__(self, **settings: Any) -> None:
            super().__init__()
            self.save_hyperparameters(omegaconf.OmegaConf.create(settings))

    run = trainer()
    run.fit(Configured(lr=0.1, sizes=[1, 2]), datamodule=TinyData())
    run.save_checkpoint(tmp_path / "x.ckpt")
    stored = torch.load(tmp_path / "x.ckpt", weights_only=True)["hyper_parameters"]
    assert stored == {"lr": 0.1, "sizes": [1, 2]}
    assert Configured.load_from_checkpoint(tmp_path / "x.ckpt").hparams["sizes"] == [1, 2]


# ---- other callbacks


def test_behaviour_25_a_training_metric_is_looked_at_as_the_epoch_ends() -> None:
    """Also with validation, where one belongs to each epoch; and an epoch that is cut off counts no check."""

    class Trains(Tiny):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            self.log("rises", float(self.current_epoch), on_step=False, on_epoch=True)
            return self.loss(batch)

    stops = EarlyStopping("rises", patience=1)
    run = trainer(max_epochs=5, callbacks=stops)
    run.fit(Trains(), numbers(), numbers())
    assert (run.current_epoch, stops.stopped_epoch) == (2, 1)
    stops = EarlyStopping("val", patience=1, min_delta=9.0)
    trainer(max_epochs=2, max_steps=4, callbacks=stops).fit(Tiny(), numbers(), numbers())
    assert stops.wait_count == 0
    stops = EarlyStopping("val", patience=9, min_delta=9.0)  # several validations in an epoch: after each
    trainer(callbacks=stops, val_check_interval=1).fit(Tiny(), numbers(), numbers())
    assert stops.wait_count == 2


def test_behaviour_25_early_stopping_is_off_in_a_quick_run() -> None:
    """Also one that configure_callbacks returns, and whose metric nobody logs."""

    class Stops(Tiny):
        def configure_callbacks(self) -> Any:
            return EarlyStopping("nothing")

    run = trainer(fast_dev_run=2, callbacks=EarlyStopping("other"))
    run.fit(Stops(), numbers(), numbers())
    assert run.global_step == 2


def test_a_scheduler_without_its_optimizers_name_is_planned_and_monitored(tmp_path: Path) -> None:
    """It has the only optimizer's; and what a module steps itself is not foreseen."""

    class Halves:
        def __init__(self, optimizer: Any) -> None:
            self.changes = optimizer

        def step(self) -> None:
            self.changes.param_groups[0]["lr"] /= 2

        def state_dict(self) -> dict[str, Any]:
            return {}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            pass

    class Scheduled(Tiny):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            return [optimizer], [{"scheduler": Halves(optimizer), "interval": "step"}]

    class ByHand(Scheduled):
        def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
            scheduler.step()

    rates = [
        [e.lr[0] for e in trainer(limit_val_batches=0).plan(module, numbers()) if e.lr]
        for module in (Scheduled(), ByHand())
    ]
    assert rates == [[0.05, 0.025, 0.0125], [0.05] * 3]
    monitor = LearningRateMonitor("step")
    run = trainer(logger=CSVLogger(tmp_path), callbacks=monitor, log_every_n_steps=1, limit_val_batches=0)
    run.fit(Scheduled(), numbers())
    assert monitor.lrs == {"lr-SGD": rates[0]}


def test_what_is_no_callback_is_refused_before_anything_runs() -> None:
    """By its name, wherever it comes from; one of another package's that has all is served."""
    called: list[str] = []

    class Duck:
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            called.append("end")

    class Complete(Duck):
        state_key = "duck"

        def state_dict(self) -> dict[str, Any]:
            return {}

        def load_state_dict(self, state: dict[str, Any]) -> None: ...
        def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None: ...
        def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None: ...

    class Own(Tiny):
        def configure_callbacks(self) -> Any:
            return [Duck()]

    with pytest.raises(ConfigError, match=r"has no state_key; derive the class Duck from lite\.trainer\.Callback"):
        trainer(callbacks=Duck())
    with pytest.raises(ConfigError, match="derive the class Duck"):
        trainer(limit_val_batches=0).fit(Own(), numbers())
    trainer(callbacks=Complete(), limit_val_batches=0).fit(Tiny(), numbers())
    assert called == ["end"]


def test_behaviour_35_a_modules_own_writer_gets_predictions_that_nobody_else_wants() -> None:
    """With return_predictions=False."""
    got: list[Any] = []

    class Writer(BasePredictionWriter):
        def __init__(self) -> None:
            super().__init__("epoch")

        def write_on_epoch_end(self, trainer: Any, module: Any, predictions: Any, indices: Any) -> None:
            got.append([len(p) for p in predictions])

    class Own(Tiny):
        def configure_callbacks(self) -> Any:
            return Writer()

    run = trainer()
    assert run.predict(Own(), numbers(6), return_predictions=False) is None
    assert got == [[4, 2]]
    assert run.predict(Tiny(), numbers(6), return_predictions=False) is None
    assert run.predict_loop.predictions == []


def test_an_override_that_steps_twice_per_batch_stops_and_saves_in_time(tmp_path: Path) -> None:
    """max_steps and every_n_train_steps count its steps, not the batches."""

    class Twice(Tiny):
        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
            optimizer.step(closure=optimizer_closure)
            optimizer.step(closure=optimizer_closure)

    saves = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=4)
    run = trainer(max_steps=10, limit_val_batches=0, enable_checkpointing=None, callbacks=saves)
    run.fit(Twice(), numbers(40))
    assert (run.global_step, run.fit_loop.progress.batches) == (10, 5)
    assert {file.name for file in tmp_path.iterdir()} == {"step=4.ckpt", "step=8.ckpt"}
