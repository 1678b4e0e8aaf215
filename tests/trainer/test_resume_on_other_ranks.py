"""Behaviour 41 on another number of processes: what was logged before the interruption counts as it would have."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

from lite import ModelParallelStrategy
from lite.errors import CheckpointError
from lite.trainer import Callback
from lite.trainer.callbacks import EarlyStopping, ModelCheckpoint
from tests.support.processes import run_distributed
from tests.trainer.modules import Tiny, numbers, trainer, weights

torchmetrics = pytest.importorskip("torchmetrics")
HOOKS = ("on_train_batch_end", "on_validation_batch_end", "on_validation_epoch_end")


def total(values: Tensor) -> Tensor:
    return values.sum()


class Kinds(torchmetrics.Metric):
    """A state of each kind that torchmetrics has."""

    def __init__(self) -> None:
        super().__init__()
        zero = torch.zeros((), dtype=torch.float64)
        self.add_state("sum", zero, "sum")
        self.add_state("most", zero - 9, "max")
        self.add_state("least", zero + 9, "min")
        self.add_state("mean", zero, "mean")
        self.add_state("rows", [], "cat")
        self.add_state("parts", [], None)
        self.add_state("own", zero, lambda parts: parts.sum(0))

    def update(self, rows: Tensor) -> None:
        self.sum, self.own = self.sum + rows.sum(), self.own + rows.sum()
        self.most, self.least = self.most.maximum(rows.max()), self.least.minimum(rows.min())
        self.mean = self.mean + (len(rows) / len(rows) - self.mean) / self._update_count
        self.rows.append(rows)
        self.parts.append(rows)

    def compute(self) -> Tensor:
        rows = torch.as_tensor(torch.cat(self.rows) if isinstance(self.rows, list) else self.rows)
        spread = rows.double().std() + 2 * torch.cat(self.parts).std()
        return self.sum + 3 * self.own + 5 * self.most + 7 * self.least + 11 * self.mean + spread


class Logs(Tiny):
    """Logs in every form whose value is the same on any number of processes."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1)).double()
        self.kinds, self.train_kinds = Kinds(), Kinds()

    def log_all(self, batch: Tensor, **options: Any) -> None:
        for kind in ("sum", "max", "min"):
            self.log(kind, getattr(batch, kind)(), on_epoch=True, reduce_fx=kind, sync_dist=True, **options)
        self.log("own", batch.sum(), on_epoch=True, reduce_fx=total, sync_dist=True, **options)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("loss", loss, on_step=True, on_epoch=True, sync_dist=True)
        self.train_kinds.update(batch[:, 0])
        self.log("train_kinds", self.train_kinds, on_step=False, on_epoch=True)
        self.log_all(batch, on_step=False)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val", self.loss(batch), sync_dist=True)
        self.log_all(batch)
        if dataloader_idx == 0:
            self.kinds.update(batch[:, 0])
            self.log("kinds", self.kinds)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.3)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.7, patience=0, threshold=0.9)
        return [optimizer], [{"scheduler": plateau, "monitor": "val/dataloader_idx_1"}]


class Saves(Callback):
    """Saves in each of those hooks of the second epoch."""

    def __init__(self, folder: str, hooks: tuple[str, ...] = HOOKS) -> None:
        self.folder, self.count = folder, 0
        for hook in hooks:
            setattr(self, hook, self.save)

    def save(self, trainer: Any, *args: Any) -> None:
        if trainer.current_epoch == 1:
            trainer.save_checkpoint(f"{self.folder}/{self.count}.ckpt")
            self.count += 1


class Nothing(Callback):
    """Stands in the place of `Saves`."""


def split() -> ModelParallelStrategy:
    """Two ranks that compute one model of the same samples."""
    return ModelParallelStrategy({"net.0": ColwiseParallel(), "net.2": RowwiseParallel()})


def fit(folder: str, batch_size: int, number: int | None = None, strategy: Any = "ddp") -> Any:
    """Saving everywhere, or from the file with that number: everything that follows from what was logged."""
    stops = EarlyStopping("val/dataloader_idx_1", patience=50)
    best = ModelCheckpoint(Path(folder) / "best", "{epoch}-{step}", monitor="val/dataloader_idx_0", save_top_k=1)
    saves = Saves(folder) if number is None else Nothing()
    options = {"max_epochs": 2, "val_check_interval": 0.5, "enable_checkpointing": True}
    strategy = split() if strategy == "tp" else strategy
    run, module = trainer(callbacks=[saves, stops, best], strategy=strategy, **options), Logs()
    path = None if number is None else f"{folder}/{number}.ckpt"
    # Of the last batch one rank has nothing, and the other a row.
    loaders = numbers(13, batch_size, shuffle=True), [numbers(9, batch_size), numbers(6, batch_size)]
    with warnings.catch_warnings():  # nothing in a file has the function, so after the last batch it is not known
        warnings.filterwarnings("ignore", ".*'own'.* has a reduce_fx of its own")
        run.fit(module, *loaders, ckpt_path=path)
    metrics = {name: float(value) for name, value in run.callback_metrics.items() if name != "loss_step"}
    lr = run.optimizers[0].param_groups[0]["lr"]
    found = [lr, stops.wait_count, float(stops.best_score), float(best.best_model_score)]
    return saves.count if number is None else 0, {**metrics, "found": found, "weights": weights(module)}


def go_on(folder: str, batch_size: int, count: int, strategy: str = "ddp", every: int = 1) -> list[dict[str, Any]]:
    return [fit(folder, batch_size, number, strategy)[1] for number in range(0, count, every)]


def check(whole: dict[str, Any], resumed: list[dict[str, Any]]) -> None:
    for number, again in enumerate(resumed):
        assert {name for name in whole if "own" not in name} <= again.keys(), number
        for name, value in again.items():
            # Sums are added up in another order.
            assert value == pytest.approx(whole[name], rel=1e-12), (number, name)


@pytest.mark.parametrize("before", [1, 2])
def test_a_run_goes_on_with_another_number_of_processes(before: int, tmp_path: Path) -> None:
    """Metrics, the scheduler, early stopping and the best score are the uninterrupted run's; nothing is warned of."""
    folder = str(tmp_path)
    if before == 1:
        count, whole = fit(folder, 4)
        resumed = run_distributed(go_on, folder, 2, count)
    else:
        (count, whole), _ = run_distributed(fit, folder, 2)
        resumed = [go_on(folder, 4, count)]
    assert count > 15
    for rank in resumed:
        check(whole, rank)


def test_ranks_with_the_same_samples_count_once(tmp_path: Path) -> None:
    """Under tensor parallelism, in a whole run and in one that goes on from or with other ranks."""
    folders = [str(tmp_path / name) for name in ("one", "tp", "ddp")]
    count, whole = fit(folders[0], 4)
    for split_count, split_whole in run_distributed(fit, folders[1], 4, None, "tp"):
        check(whole, [split_whole])
        assert split_count == count
    run_distributed(fit, folders[2], 2)
    check(whole, go_on(folders[1], 4, count, every=4))
    for folder in folders:
        for resumed in run_distributed(go_on, folder, 4, count, "tp", 5):
            check(whole, resumed)


class OwnParts(torchmetrics.Metric):
    """A state that torchmetrics leaves in the ranks' parts, and one that stays each rank's own."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.add_state("parts", torch.zeros(()), None)

    def update(self, value: float) -> None:
        self.parts = self.parts + value

    def compute(self) -> Tensor:
        return self.parts.sum()


class Unsynchronised(Tiny):
    """Logs what is each rank's own: of batch i of rank r in a validation of 4 batches 10 * r + i."""

    def __init__(self) -> None:
        super().__init__()
        self.parts, self.alone = OwnParts(), OwnParts(sync_on_compute=False)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        value = 10.0 * self.global_rank + batch_idx
        self.parts.update(value), self.alone.update(value)
        self.log("parts", self.parts), self.log("alone", self.alone)
        self.log("mean", value), self.log("max", value, reduce_fx=torch.max), self.log("sum", value, reduce_fx=sum)
        self.log("list", value, reduce_fx=total), self.log("first", value, reduce_fx=sum, rank_zero_only=True)
        self.log("both", value, reduce_fx=sum, sync_dist=True)


class SavesOnce(Callback):
    """Saves after the second batch of validation."""

    def __init__(self, path: str) -> None:
        self.path = path

    def on_validation_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:
            trainer.save_checkpoint(self.path)


def validate_within(path: str, batch_size: int, saves: bool) -> tuple[dict[str, float], list[str]]:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        run = trainer(strategy="ddp", callbacks=[SavesOnce(path) if saves else Nothing()])
        loaders = numbers(4, batch_size), numbers(16, batch_size)
        run.fit(Unsynchronised(), *loaders, ckpt_path=None if saves else path)
    found = {name: float(value) for name, value in run.callback_metrics.items() if name != "loss"}
    return found, [str(one.message) for one in told if "saved by" in str(one.message)]


def test_what_is_a_ranks_own_goes_on_as_a_share_and_it_is_told(tmp_path: Path) -> None:
    """Shares keep means and sums over the ranks; what can't be kept is named."""
    path = str(tmp_path / "x.ckpt")
    validate_within(path, 4, True)  # 0, 1 and then 2, 3 on rank 0 and 12, 13 on rank 1
    (first, told), (second, _) = run_distributed(validate_within, path, 2, False)
    shared = {"mean": 1.5, "max": 3.0, "sum": 5.5, "list": 5.0, "both": 31.0, "parts": 31.0}
    assert first == pytest.approx({**shared, "alone": 6.0, "first": 6.0})
    assert second == pytest.approx({**shared, "mean": 6.5, "max": 13.0, "sum": 25.5, "list": 26.0, "alone": 25.0})
    assert len(told) == 1
    assert "saved by 1 processes, and this job has 2: 'mean', 'max', 'sum', 'list' is logged without" in told[0]
    assert "'first' is logged with rank_zero_only=True" in told[0] and "'alone' has sync_on_compute=False" in told[0]

    run_distributed(validate_within, path, 2, True)  # 0, 1 on rank 0 and 10, 11 on rank 1, and then 2, 3
    found, told = validate_within(path, 4, False)
    everything = {"mean": 4.0, "max": 11.0, "sum": 27.0, "list": 27.0, "both": 27.0}
    assert found == {**everything, "parts": 6.0, "alone": 6.0, "first": 6.0}
    assert len(told) == 1
    assert "without sync_dist" not in told[0] and "'first' is logged with rank_zero_only=True" in told[0]
    assert "'parts.parts', 'alone.parts' has no dist_reduce_fx" in told[0]


class SavesAt(Callback):
    """Saves after the second batch of that stage."""

    def __init__(self, path: str, stage: str) -> None:
        def save(trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int, *args: Any) -> None:
            if batch_idx == 1:
                trainer.save_checkpoint(path)

        setattr(self, f"on_{stage}_batch_end", save)


def unsplit(path: str, stage: str, saves: bool, **parts: Any) -> list[str]:
    run = trainer(use_distributed_sampler=False, callbacks=[SavesAt(path, stage)] if saves else [], strategy="ddp")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        run.fit(Tiny(), numbers(12), numbers(12), ckpt_path=None if saves else path, **parts)
    return [str(one.message) for one in told]


@pytest.mark.parametrize(("stage", "named"), [("train", "training"), ("validation", "validation")])
def test_positions_that_were_each_ranks_own_are_refused(stage: str, named: str, tmp_path: Path) -> None:
    """As by `lite.load`, with the way out."""
    path = str(tmp_path / "x.ckpt")
    run_distributed(unsplit, path, stage, True)
    with pytest.raises(CheckpointError, match=rf"by 2 processes within {named} data.*has 1: .*restore_except"):
        unsplit(path, stage, False)
    assert any("begins anew" in one for one in unsplit(path, stage, False, restore_except=("data",)))


class Declared(Tiny):
    """Two optimizers, of which the second one accumulates."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(4, 1).double()

    def one_step(self, batch: Tensor) -> Tensor:
        return self.loss(batch)

    def other_step(self, batch: Tensor) -> Tensor:
        return (self.other(batch)[:, 0] - batch[:, 0]).pow(2).mean()

    def configure_optimizers(self) -> Any:
        one, other = (torch.optim.SGD(part.parameters(), lr=0.3) for part in (self.net, self.other))
        return [
            {"optimizer": one, "step": "one_step"},
            {"optimizer": other, "step": "other_step", "accumulate_grad_batches": 3},
        ]


class SavesInWindows(Callback):
    def __init__(self, folder: str) -> None:
        self.folder, self.count = folder, 0

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        trainer.save_checkpoint(f"{self.folder}/{self.count}.ckpt")
        self.count += 1


def accumulate(folder: str, batch_size: int, kind: type[Tiny], saved: tuple[int | None, ...]) -> list[list[float]]:
    found = []
    for number in saved:
        module = kind()
        options = {"accumulate_grad_batches": 2} if kind is Tiny else {}
        callback = SavesInWindows(folder) if number is None else Nothing()
        run = trainer(callbacks=[callback], strategy="ddp", max_epochs=2, limit_val_batches=0, **options)
        run.fit(module, numbers(14, batch_size), ckpt_path=None if number is None else f"{folder}/{number}.ckpt")
        found.append(weights(module))
    return found


@pytest.mark.parametrize("kind", [Tiny, Declared])
@pytest.mark.parametrize("before", [1, 2])
def test_a_window_goes_on_with_another_number_of_processes(before: int, kind: type[Tiny], tmp_path: Path) -> None:
    """Also one that is weighed, since a ragged batch ends it."""
    folder, later = str(tmp_path), tuple(range(7))
    if before == 1:
        whole = accumulate(folder, 4, kind, (None,))
        resumed = [x for rank in run_distributed(accumulate, folder, 2, kind, later) for x in rank]
    else:
        whole = run_distributed(accumulate, folder, 2, kind, (None,))[0]
        resumed = accumulate(folder, 4, kind, later)
    for again in resumed:
        assert again == pytest.approx(whole[0], rel=0, abs=1e-13)
