"""Behaviour 41: a run goes on exactly from any point at which it was saved."""

from __future__ import annotations

import random
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lite.loggers import CSVLogger
from lite.trainer import Callback, LightningModule, seed_everything
from lite.trainer.callbacks import Checkpoint, EarlyStopping, ModelCheckpoint
from lite.trainer.loggers import Logger
from tests.support.processes import run_distributed
from tests.trainer.modules import Numbers, Tiny, numbers, trainer, weights

pytestmark = pytest.mark.filterwarnings("ignore:nothing is left to train")


class Augmented(Dataset[Tensor]):
    """Samples that depend on torch's and Python's generators."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> Tensor:
        return torch.full((4,), index / 10) + torch.randn(4) * 0.1 + random.random()


class Noisy(LightningModule):
    """Dropout, a scheduler, epoch means of training and validation."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.3), nn.Linear(4, 1))
        self.epochs: list[Any] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.net(batch).pow(2).mean()
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val", self.net(batch).mean() + torch.rand(()))

    def on_validation_end(self) -> None:
        self.epochs.append((self.current_epoch, self.global_step, float(self.trainer.callback_metrics.get("val", 0))))

    def on_train_epoch_end(self) -> None:
        self.epochs.append({k: float(v) for k, v in self.trainer.callback_metrics.items()})

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=0.01)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.9), "interval": "step"}]


class SavesWithin(Callback):
    """Saves after the n-th validation batch."""

    def __init__(self, number: int, path: Path) -> None:
        self.left, self.path = number, path

    def on_validation_batch_end(self, trainer: Any, *args: Any) -> None:
        self.left -= not trainer.sanity_checking
        if self.left == 0 and not trainer.sanity_checking:
            trainer.save_checkpoint(self.path)


def run(
    path: Path, options: dict[str, Any], *, save_at: int = 0, save_within: int = 0, resume: bool = False
) -> tuple[list[float], list[Any], list[Tensor]]:
    """Losses, what the epochs saw, and the weights of two epochs; saved at an event, or gone on with."""
    seed_everything(1)
    module, losses = Noisy(), []
    if resume:
        torch.randn(7)  # a new process has drawn other numbers
    callbacks = [SavesWithin(save_within, path)] if save_within else []
    run = trainer(max_epochs=2, callbacks=callbacks, **options)
    loaders = DataLoader(Augmented(), batch_size=2, shuffle=True), DataLoader(Augmented(), batch_size=4)
    for number, event in enumerate(run.steps(module, *loaders, ckpt_path=path if resume else None), start=1):
        if event.kind == "batch":
            losses.append(float(event.outputs.detach()))
        if number == save_at:
            run.save_checkpoint(path)
    return losses, module.epochs, [p.detach().clone() for p in module.parameters()]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"accumulate_grad_batches": 3},
        {"val_check_interval": 2, "limit_train_batches": 4},
        {"check_val_every_n_epoch": None, "val_check_interval": 3, "num_sanity_val_steps": 1},
    ],
    ids=str,
)
def test_behaviour_41_a_resumed_run_equals_the_uninterrupted_one(options: dict[str, Any], tmp_path: Path) -> None:
    """Saved after each batch, at each epoch's end and within validation: losses, metrics and weights, bit for bit."""
    path = tmp_path / "x.ckpt"
    losses, epochs, weights = run(path, options)
    points = [{"save_at": n} for n in range(1, len(losses) + 3)]
    for point in [*points, *({"save_within": n} for n in (1, 2, 3, 5))]:
        run(path, options, **point)
        again = run(path, options, resume=True)
        assert again[0] == losses[len(losses) - len(again[0]) :], point
        # A validation of the sanity check is not repeated, and what is left is what the whole run saw.
        assert again[1] == epochs[len(epochs) - len(again[1]) :], point
        assert all(torch.equal(a, b) for a, b in zip(again[2], weights, strict=True)), point


def test_behaviour_41_training_gone_on_with_after_max_steps_continues_its_epoch(tmp_path: Path) -> None:
    """Stopped in the middle by max_steps, and resumed with more."""
    path = tmp_path / "x.ckpt"
    losses, _, _ = run(path, {})
    seed_everything(1)
    module, first = Noisy(), trainer(max_epochs=2, max_steps=3)
    loaders = DataLoader(Augmented(), batch_size=2, shuffle=True), DataLoader(Augmented(), batch_size=4)
    first.fit(module, *loaders)
    first.save_checkpoint(path)
    again = run(path, {}, resume=True)
    # A validation was due at the stop only in the run that was stopped, so random numbers may differ from there on.
    assert len(again[0]) == len(losses) - 3


class SavesAnywhere(Callback):
    """Saves in hooks after which something is still to come, and keeps how much there was of what a run leaves."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder, self.seen, self.points = folder, 0, []

    def save(self, trainer: Any, module: Any, *args: Any) -> None:
        if trainer.sanity_checking:
            return
        self.seen += 1
        if self.folder is not None:
            self.points.append((self.seen, len(module.losses), len(module.epochs), len(trainer.logger.rows)))
            trainer.save_checkpoint(self.folder / f"{self.seen}.ckpt")

    def on_train_end(self, trainer: Any, module: Any) -> None:
        loader = trainer.val_dataloaders
        self.passes = loader and loader.progress()  # workers draw their random numbers by how many there were

    on_train_epoch_start = on_train_batch_end = on_train_epoch_end = save
    on_validation_start = on_validation_batch_end = on_validation_epoch_end = on_validation_end = save

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seen = state_dict["seen"]


class Rows(Logger):
    """Keeps what it is given but the time; on rank 0."""

    def __init__(self) -> None:
        self.rows: list[Any] = []

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.rows.append((step, {name: value for name, value in metrics.items() if name != "seconds"}))


class Kept(Noisy):
    """Keeps its losses; logs values of single validation batches, too."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.losses.append(float(loss.detach()))
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self.log("drawn", torch.rand(()), on_step=True)


class Endless(IterableDataset[Tensor]):
    """Five samples, of which nobody knows that they are five."""

    def __iter__(self) -> Any:
        return (torch.full((4,), index / 10) + torch.randn(4) * 0.1 for index in range(5))


def fit_and_look(folder: Path, options: dict[str, Any], saves: SavesAnywhere, path: Path | None) -> tuple[Any, ...]:
    """Losses, what the epochs saw, and how everything stood in the end."""
    settings = dict(options)
    patience, unknown = settings.pop("patience", 9), settings.pop("unknown_length", False)
    seed_everything(1)
    module, stopping = Kept(), EarlyStopping("val", patience=patience, min_delta=9.0)
    keeping = ModelCheckpoint(folder / "kept", "{epoch}-{step}", "val", save_top_k=-1, save_on_train_epoch_end=False)
    callbacks = [saves, stopping, keeping]
    always = {"max_epochs": 2, "enable_checkpointing": True, "callbacks": callbacks, "logger": Rows()}
    run = trainer(**{**always, "log_every_n_steps": 2, **settings})
    data: Any = Endless() if unknown else Augmented()
    loader = DataLoader(data, batch_size=2, shuffle=None if unknown else True)
    run.fit(module, loader, DataLoader(Augmented(), batch_size=4), ckpt_path=path)
    counts = [saves.seen, run.global_step, run.current_epoch, stopping.wait_count, stopping.stopped_epoch]
    best = [keeping.best_model_score, len(keeping.best_k_models), saves.passes]
    metrics = {name: float(value) for name, value in run.callback_metrics.items()}
    end = [*counts, *best, metrics, [p.tolist() for p in module.parameters()]]
    return module.losses, module.epochs, run.logger.rows, end


def differing(root: str, options: dict[str, Any]) -> list[int]:
    """The numbers of the saves from which a resumed run differs from the one that went on; -1 where there are few."""
    folder = Path(root)
    with warnings.catch_warnings():
        told = "Endless has no state_dict|nothing is left to train|log.*without sync_dist|differs between the ranks"
        warnings.filterwarnings("ignore", f".*({told})")
        saves = SavesAnywhere(folder)
        losses, epochs, rows, end = fit_and_look(folder, options, saves, None)
        found = [] if saves.seen == len(saves.points) > 8 else [-1]
        for number, done, epochs_done, rows_done in saves.points:
            again = fit_and_look(folder, options, SavesAnywhere(), folder / f"{number}.ckpt")
            if again != (losses[done:], epochs[epochs_done:], rows[rows_done:], end):
                found.append(number)
    return found


@pytest.mark.parametrize(
    "options",
    [
        {"val_check_interval": 2, "num_sanity_val_steps": 1},
        {"val_check_interval": 0.5, "accumulate_grad_batches": 4},
        {"val_check_interval": 2, "max_steps": 7},
        {"val_check_interval": 2, "patience": 1},
        {"unknown_length": True},
    ],
    ids=str,
)
def test_behaviour_41_a_save_within_a_hook_is_gone_on_with_where_it_was(
    options: dict[str, Any], tmp_path: Path
) -> None:
    """What was due after it comes after the resume too: validation, other callbacks' hooks, the stop, the saves."""
    assert differing(str(tmp_path), options) == []


def test_behaviour_41_saves_within_hooks_on_two_processes(tmp_path: Path) -> None:
    """The same, where ranks draw other numbers and agree on the stop."""
    options = {"max_epochs": 1, "val_check_interval": 1, "limit_train_batches": 3, "limit_val_batches": 1}
    options |= {"patience": 1, "strategy": "ddp"}
    assert run_distributed(differing, str(tmp_path), options) == [[], []]


def test_behaviour_41_a_save_at_the_end_of_a_cut_off_epoch_goes_on_within_it(tmp_path: Path) -> None:
    """Its hooks had begun, for a run that was over; with more steps to do they come again when the epoch ends."""
    saves, loader = SavesAnywhere(tmp_path), DataLoader(Augmented(), batch_size=2)
    trainer(max_steps=2, limit_val_batches=0, callbacks=[saves], logger=Rows()).fit(Kept(), loader)
    again = Kept()
    run = trainer(limit_val_batches=0, callbacks=[SavesAnywhere()])
    run.fit(again, loader, ckpt_path=tmp_path / f"{saves.seen}.ckpt")
    assert (len(again.losses), len(again.epochs)) == (3, 1)


class SeveralLoaders(Tiny):
    """Logs for each validation loader its number and the epoch, under one name."""

    def validation_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val", 100.0 * dataloader_idx + self.current_epoch)


@pytest.mark.parametrize("names", [None, ("easy", "hard")])
def test_behaviour_41_metrics_of_several_loaders_keep_their_names(names: Any, tmp_path: Path) -> None:
    """Saved before any validation, and after one: what callbacks see is what the whole run saw, under its names."""
    loaders: Any = [numbers(4), numbers(4)] if names is None else {name: numbers(4) for name in names}
    whole = trainer(max_epochs=2)
    for number, _ in enumerate(whole.steps(SeveralLoaders(), numbers(), loaders, events=("batch",))):
        whole.save_checkpoint(tmp_path / f"{number}.ckpt")
    found = {key: float(value) for key, value in whole.callback_metrics.items()}
    first, second = [f"{name}/val" for name in names] if names else [f"val/dataloader_idx_{n}" for n in (0, 1)]
    assert (found[first], found[second], "val" in found) == (1.0, 101.0, False)
    for number in range(6):
        again = trainer(max_epochs=2)
        for _ in range(2):  # the second time by a Trainer that has logged the same before
            again.fit(SeveralLoaders(), numbers(), loaders, ckpt_path=tmp_path / f"{number}.ckpt")
            assert {key: float(value) for key, value in again.callback_metrics.items()} == found, number


class Fails(Tiny):
    """Notes its batches; fails in the step with that number, or saves before the optimizer steps in it."""

    def __init__(self, fails_in: int = -1, saves_in: int = -1, path: Path | None = None) -> None:
        super().__init__()
        self.fails_in, self.saves_in, self.path = fails_in, saves_in, path
        self.batches: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.global_step == self.fails_in:
            raise RuntimeError("out of memory")
        parts = list(batch.values()) if isinstance(batch, dict) else [batch]
        self.batches.append([None if part is None else part.tolist() for part in parts])
        return torch.stack([self.loss(part) for part in parts if part is not None]).sum()

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        if self.global_step == self.saves_in:
            self.trainer.save_checkpoint(self.path)


def shuffled(count: int) -> DataLoader[Tensor]:
    return DataLoader(Numbers(count), batch_size=2, shuffle=True, generator=torch.Generator().manual_seed(count))


@pytest.mark.parametrize("combined", [None, "max_size_cycle", "max_size"])
@pytest.mark.parametrize("step", [0, 2, 3, 5])
def test_a_batch_whose_step_failed_is_given_again(combined: str | None, step: int, tmp_path: Path) -> None:
    """As is one in whose step the run is saved; of several loaders each part, also where a short one begins anew."""

    def run(module: Fails, path: Path | None = None) -> Fails:
        loaders: Any = shuffled(8) if combined is None else {"long": shuffled(8), "short": shuffled(4)}
        options: dict[str, Any] = {} if combined is None else {"multiple_trainloader_mode": combined}
        saves = ModelCheckpoint(tmp_path, "failed", save_top_k=0, save_on_exception=True)
        options |= {"callbacks": saves, "enable_checkpointing": True, "limit_val_batches": 0}
        trainer(max_epochs=2, **options).fit(module, loaders, ckpt_path=path)
        return module

    whole = run(Fails(saves_in=step, path=tmp_path / "within.ckpt"))
    with pytest.raises(RuntimeError, match="out of memory"):
        run(Fails(fails_in=step))
    for name in ("failed", "within"):
        again = run(Fails(), tmp_path / f"{name}.ckpt")
        assert again.batches == whole.batches[step:]
        assert weights(again) == weights(whole)


class DiesInStep(Tiny):
    """Logs and sums up what it is given; dies at that moment of the step with that number, once."""

    def __init__(self, moment: str = "", step: int = -1) -> None:
        super().__init__()
        self.moment, self.step, self.began = moment, step, -1

    def _die(self, moment: str) -> None:
        if (moment, self.began) == (self.moment, self.step):
            raise RuntimeError("died")

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.began += 1
        self._die("before log")
        self.log("rows", float(len(batch)), on_step=False, on_epoch=True, reduce_fx="sum")
        self.log("mean", float(batch_idx), on_step=False, on_epoch=True)
        self._die("forward")
        return self.loss(batch)

    def on_after_backward(self) -> None:
        self._die("backward")


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("moment", ["before log", "forward", "backward"])
def test_what_a_failed_step_has_logged_counts_once(moment: str, accumulate: int, tmp_path: Path) -> None:
    """Its batch is given again; where its gradients have entered a window of others, that begins anew, as told."""

    def fit(module: DiesInStep, path: Path | None = None) -> dict[str, float]:
        saves = ModelCheckpoint(tmp_path, "died", save_top_k=0, save_on_exception=True)
        options = {"callbacks": saves, "enable_checkpointing": True, "limit_val_batches": 0}
        run = trainer(accumulate_grad_batches=accumulate, **options)
        run.fit(module, numbers(24), ckpt_path=path)
        return {name: float(value) for name, value in run.callback_metrics.items()}

    whole, died, again = DiesInStep(), DiesInStep(moment, 4), DiesInStep()
    expected = fit(whole)
    mixed = moment == "backward" and accumulate > 1
    with warnings.catch_warnings(record=True) as told, pytest.raises(RuntimeError, match="died"):
        warnings.simplefilter("always")
        fit(died)
    assert any("begins the window anew" in str(one.message) for one in told) == mixed
    assert fit(again, tmp_path / "died.ckpt") == expected
    assert (weights(again) == weights(whole)) == (not mixed)


class SavesInStep(Tiny):
    """Saves as that hook begins for the second batch; by hand it steps two optimizers."""

    def __init__(self, moment: str = "", path: Path | None = None, *, by_hand: bool = False) -> None:
        super().__init__()
        self.moment, self.path, self.automatic_optimization = moment, path, not by_hand

    def save(self, moment: str) -> None:
        if self.path is not None and moment == self.moment and self.trainer.fit_loop.progress.batch == 1:
            self.trainer.save_checkpoint(self.path)

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        self.log("largest", batch.max(), reduce_fx=torch.max, on_step=False, on_epoch=True)
        if self.automatic_optimization:
            return self.loss(batch)
        for number, optimizer in enumerate(self.optimizers()):
            self.save(f"step {number}")
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()
        return None

    def on_before_backward(self, loss: Tensor) -> None:
        self.save("backward")

    def configure_optimizers(self) -> Any:
        layers = [self.net[0], self.net[3]]
        one = super().configure_optimizers()
        return one if self.automatic_optimization else [torch.optim.SGD(n.parameters(), lr=0.1) for n in layers]


@pytest.mark.parametrize(("moment", "told"), [("backward", ""), ("step 0", ""), ("step 1", "has stepped already")])
def test_a_save_within_a_step_is_exact_or_tells_what_is_repeated(moment: str, told: str, tmp_path: Path) -> None:
    """In a window before the batch has entered it, and between the steps of two optimizers."""
    by_hand, path = moment.startswith("step"), tmp_path / "x.ckpt"
    options = {} if by_hand else {"accumulate_grad_batches": 3}
    whole, again = SavesInStep(moment, path, by_hand=by_hand), SavesInStep(by_hand=by_hand)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(limit_val_batches=0, **options).fit(whole, numbers())
    messages = [str(one.message) for one in caught if "saved" in str(one.message) or "lite.save" in str(one.message)]
    assert len(messages) == bool(told)
    assert all(told in message for message in messages)
    run = trainer(limit_val_batches=0, **options)
    run.fit(again, numbers(), ckpt_path=path)
    assert (weights(again) == weights(whole)) == (not told)
    assert float(run.callback_metrics["largest"]) == float(Numbers(12).rows.max())


def saving(folder: Path) -> list[ModelCheckpoint]:
    """After each step, and at epochs' ends with "last"."""
    by_epoch = ModelCheckpoint(folder / "epochs", "{epoch}", save_last=True, save_top_k=-1)
    return [ModelCheckpoint(folder / "steps", "{step}", every_n_train_steps=1, save_top_k=-1), by_epoch]


def test_a_run_that_max_steps_ended_at_an_epochs_end_ends_that_epoch(tmp_path: Path) -> None:
    """Resumed from the file that was saved before the epoch's end hooks."""
    ends: list[int] = []

    class Ends(Callback):
        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            ends.append(trainer.current_epoch)

    def fit(path: Path | None = None) -> tuple[int, list[str]]:
        run = trainer(
            max_steps=3,
            max_epochs=-1,
            callbacks=[Ends(), *saving(tmp_path)],
            enable_checkpointing=True,
            limit_val_batches=0,
        )
        run.fit(Tiny(), numbers(), ckpt_path=path)
        return run.current_epoch, sorted(file.name for file in (tmp_path / "epochs").iterdir())

    whole = fit()
    assert (whole, ends) == ((1, ["epoch=0.ckpt", "last.ckpt"]), [0])
    for file in (tmp_path / "epochs").iterdir():
        file.unlink()
    assert (fit(tmp_path / "steps" / "step=3.ckpt"), ends) == (whole, [0, 0])


def test_saves_that_are_made_up_for_are_whole_and_train_no_further(tmp_path: Path) -> None:
    """A run that max_steps ended between two saves; and one gone on with from the file that was made up for."""
    settings: dict[str, Any] = {"save_top_k": -1, "every_n_train_steps": 1, "monitor": "loss"}

    def fit(max_steps: int, path: Path | None = None) -> tuple[int, list[float]]:
        saves = [ModelCheckpoint(tmp_path / mode, "{step}", mode=mode, **settings) for mode in ("min", "max")]
        torch.manual_seed(1)
        module = Tiny(dropout=0.5)
        torch.randn(0 if path is None else 3)
        options = {"callbacks": saves, "enable_checkpointing": True, "limit_val_batches": 0}
        run = trainer(max_steps=max_steps, max_epochs=2, **options)
        run.fit(module, numbers(shuffle=True), ckpt_path=path)
        return run.global_step, weights(module)

    whole = fit(5)
    fit(2)
    late = tmp_path / "max" / "step=2.ckpt"
    late.unlink()
    assert fit(2, tmp_path / "min" / "step=2.ckpt")[0] == 2
    assert fit(5, late) == whole


class OfTheEpoch(Tiny):
    """Its data are those of the epoch in which they are asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[int] = []

    def train_dataloader(self) -> Any:
        self.asked.append(self.trainer.current_epoch)
        return DataLoader(Numbers(8).rows + self.trainer.current_epoch, batch_size=2, shuffle=True)


@pytest.mark.parametrize("every", [1, 2])
def test_a_resumed_run_asks_for_the_loaders_that_were_in_use(every: int, tmp_path: Path) -> None:
    """By the epoch in which they were asked for."""

    def fit(path: Path | None = None) -> tuple[list[float], list[int]]:
        saves = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
        options = {"reload_dataloaders_every_n_epochs": every, "limit_val_batches": 0, "enable_checkpointing": True}
        seed_everything(1)
        module = OfTheEpoch()
        trainer(max_epochs=4, callbacks=saves, **options).fit(module, ckpt_path=path)
        return weights(module), module.asked

    whole, asked = fit()
    assert asked == list(range(0, 4, every))
    for step in (3, 4, 6, 8, 11):
        again, asked = fit(tmp_path / f"step={step}.ckpt")
        assert again == whole
        assert asked[0] == (step - 1) // 4 // every * every


def test_what_is_made_up_for_at_a_cut_off_end_knows_that_epochs_metrics(tmp_path: Path) -> None:
    """max_steps ends the second epoch within; its metrics so far decide, and are what a resumed run shows."""

    def fit(path: Path | None = None, max_steps: int = 5) -> tuple[dict[str, float], float, list[str], list[Any]]:
        best = ModelCheckpoint(tmp_path / "best", "{step}", monitor="loss_epoch", save_on_train_epoch_end=True)
        options = {"callbacks": [ModelCheckpoint(tmp_path / "newest", "{step}"), best], "enable_checkpointing": True}
        seed_everything(1)
        module, run = Noisy(), trainer(max_epochs=3, max_steps=max_steps, limit_val_batches=0, **options)
        run.fit(module, DataLoader(Augmented(), batch_size=3), ckpt_path=path)
        assert best.best_model_score is not None
        files = sorted(str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*.ckpt"))
        seen = {name: float(value) for name, value in run.callback_metrics.items()}
        return seen, float(best.best_model_score), files, module.epochs

    *whole, _ = fit()
    assert whole[2] == ["best/step=5.ckpt", "newest/step=5.ckpt"]
    (tmp_path / "best/step=5.ckpt").unlink()
    for path in ("newest/step=5.ckpt", "best/step=5.ckpt"):  # the second one is made by the run that goes on
        *again, _ = fit(tmp_path / path)
        assert again == whole
    *_, longer = fit(tmp_path / "best/step=5.ckpt", 8)
    shutil.rmtree(tmp_path)
    assert longer == fit(None, 8)[-1][-len(longer) :]


def test_last_is_written_by_the_run_that_goes_on(tmp_path: Path) -> None:
    """Where a kill came between a file and its "last"; and that run has the rows before the file."""
    options: dict[str, Any] = {"enable_checkpointing": True, "limit_val_batches": 0, "log_every_n_steps": 1}
    run = trainer(callbacks=saving(tmp_path), logger=CSVLogger(tmp_path), **options)
    for event in run.steps(Tiny(), numbers()):
        if event.kind == "batch" and event.batch_idx == 1:
            rows = (tmp_path / "version_0" / "metrics.csv").read_text().splitlines()
            assert len(rows) == 3  # written with the checkpoint of that step
    (tmp_path / "epochs" / "last.ckpt").unlink()
    with pytest.warns(UserWarning, match="nothing is left to train"):
        trainer(callbacks=saving(tmp_path), **options).fit(
            Tiny(), numbers(), ckpt_path=tmp_path / "epochs/epoch=0.ckpt"
        )
    assert (tmp_path / "epochs" / "last.ckpt").exists()


class Worse(Tiny):
    """Its metric gets worse from the second epoch on."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.log("score", float(self.current_epoch), on_step=False, on_epoch=True)
        return self.loss(batch)


def test_early_stopping_stops_a_run_that_goes_on_from_its_last_file(tmp_path: Path) -> None:
    """As it had decided; with more patience training goes on."""

    def fit(patience: int, path: Path | None = None, **parts: Any) -> int:
        stops = EarlyStopping("score", patience=patience)
        options = {"callbacks": [stops, *saving(tmp_path)], "enable_checkpointing": True, "limit_val_batches": 0}
        run = trainer(max_epochs=5, **options)
        run.fit(Worse(), numbers(), ckpt_path=path, **parts)
        return run.current_epoch

    assert fit(2) == 3
    last = tmp_path / "epochs" / "epoch=2.ckpt"
    assert fit(2, last) == 3


class Counts(Checkpoint):
    """A saving callback of one's own, which keeps no state."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def after_batch(self, trainer: Any, *, validated: bool) -> None:
        self.calls.append("batch")

    def after_epoch(self, trainer: Any) -> None:
        self.calls.append("epoch")


def test_saving_callbacks_without_a_state_all_have_their_turn() -> None:
    """Though they have one key."""
    one, two = Counts(), Counts()
    trainer(callbacks=[one, two], enable_checkpointing=True, limit_val_batches=0).fit(Tiny(), numbers(4))
    assert one.calls == two.calls == ["batch", "epoch"]


def test_a_resume_after_a_failed_fit_of_the_same_trainer_is_within_no_batch(tmp_path: Path) -> None:
    """The other callback's file, which is made up for, has the open window of accumulation."""
    options: dict[str, Any] = {"save_top_k": -1, "every_n_train_steps": 1, "monitor": "loss"}
    saves = [ModelCheckpoint(tmp_path / mode, "{step}", mode=mode, **options) for mode in ("min", "max")]
    run = trainer(callbacks=saves, enable_checkpointing=True, limit_val_batches=0)
    run.fit(Tiny(), numbers())
    with pytest.raises(RuntimeError, match="died"):
        run.fit_loop.max_epochs = 2
        run.fit(DiesInStep("forward", 0), numbers())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run.fit(Tiny(), numbers(), ckpt_path=tmp_path / "min" / "step=2.ckpt")
    assert run.global_step == 6


class DiesInValidation(Tiny):
    """Keeps the rows that it validates; dies at that moment of the third batch, after a save."""

    def __init__(self, moment: str = "", path: Path | None = None) -> None:
        super().__init__()
        self.moment, self.path = moment, path
        self.rows: list[int] = []

    def _die(self, moment: str, batch_idx: int) -> None:
        if self.path is not None and (moment, batch_idx) == (self.moment, 2) and not self.trainer.sanity_checking:
            self.trainer.save_checkpoint(self.path)
            raise RuntimeError("died")

    def on_validation_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._die("start", batch_idx)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.rows.append(batch_idx)
        self._die("before log", batch_idx)
        self.log("val", float(batch_idx))
        self.log("count", 1.0, reduce_fx="sum")
        self._die("after log", batch_idx)

    def on_validation_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._die("end", batch_idx)


@pytest.mark.parametrize("moment", ["start", "before log", "after log", "end"])
def test_a_save_within_a_validation_batch_leaves_no_batch_out(moment: str, tmp_path: Path) -> None:
    """Nor is one counted twice."""
    path = tmp_path / "x.ckpt"
    with pytest.raises(RuntimeError, match="died"):
        trainer().fit(DiesInValidation(moment, path), numbers(8), numbers(16))
    again, run = DiesInValidation(), trainer()
    run.fit(again, numbers(8), numbers(16), ckpt_path=path)
    assert again.rows == ([3] if moment == "end" else [2, 3])
    assert {name: float(value) for name, value in run.callback_metrics.items() if name != "loss"} == {
        "val": 1.5,
        "count": 4.0,
    }


def test_a_save_after_an_evaluation_has_the_optimizers(tmp_path: Path) -> None:
    """As one straight after the fit: another fit goes on from it."""
    run, module = trainer(), Tiny()
    run.fit(module, numbers(), numbers())
    run.test(module, numbers(), verbose=False)
    run.save_checkpoint(tmp_path / "x.ckpt")
    again = trainer(max_epochs=2)
    again.fit(Tiny(), numbers(), numbers(), ckpt_path=tmp_path / "x.ckpt")
    assert again.global_step == 6


@pytest.mark.parametrize("precision", ["64-true", "bf16-true"])
def test_weights_come_back_in_the_precision_that_they_were_saved_in(precision: str, tmp_path: Path) -> None:
    """Also those of a module that has 32 bits until it is set up: in a resume, and for a test."""

    def fit(epochs: int, path: Path | None = None) -> Any:
        seed_everything(0)
        module = Noisy()
        run = trainer(max_epochs=epochs, precision=precision, limit_val_batches=0)
        run.fit(module, DataLoader(Augmented(), batch_size=4), ckpt_path=path)
        return module, run

    whole, _ = fit(2)
    _, run = fit(1)
    run.save_checkpoint(tmp_path / "x.ckpt")
    resumed, _ = fit(2, tmp_path / "x.ckpt")
    for mine, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(mine, other)
    loaded = Noisy()
    trainer(precision=precision).validate(loaded, DataLoader(Augmented(), batch_size=4), ckpt_path=tmp_path / "x.ckpt")
    saved = torch.load(tmp_path / "x.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(p, saved[name]) for name, p in loaded.named_parameters())


class Normalised(Tiny):
    """Evaluates with the statistics of its batches."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4).double()
        self.seen: list[Any] = []

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.norm(x))  # type: ignore[no-any-return]

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.seen.append(self.norm.running_mean.tolist())


def validated() -> list[Any]:
    module = Normalised()
    trainer(strategy="ddp", max_epochs=1).fit(module, numbers(16), numbers(8))
    return module.seen


def test_all_ranks_validate_the_model_that_is_saved() -> None:
    """Statistics of a BatchNorm are rank 0's."""
    first, second = run_distributed(validated)
    assert first == second != []
