"""Behaviour 41: a run goes on exactly from any point at which it was saved."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lite.trainer import Callback, LightningModule, seed_everything
from tests.trainer.modules import trainer

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
