"""Tiny modules, data and Trainers that the Trainer's tests share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lite.trainer import Callback, LightningDataModule, LightningModule, Trainer

QUIET: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class Numbers(Dataset[Tensor]):
    """Rows of four numbers, float64, the same everywhere."""

    def __init__(self, count: int) -> None:
        generator = torch.Generator().manual_seed(3)
        self.rows = torch.randn(count, 4, generator=generator, dtype=torch.float64)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Tensor:
        return self.rows[index]


def numbers(count: int = 12, batch_size: int = 4, **options: Any) -> DataLoader[Tensor]:
    """A loader of `count` rows."""
    return DataLoader(Numbers(count), batch_size=batch_size, **options)


class Tiny(LightningModule):
    """Two layers in float64 that learn to give the first number; logs "loss", "val" and "test"."""

    def __init__(self, lr: float = 0.05, dropout: float = 0.0) -> None:
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(5)
        self.net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Dropout(dropout), nn.Linear(3, 1)).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def loss(self, batch: Tensor) -> Tensor:
        return (self(batch)[:, 0] - batch[:, 0]).pow(2).mean()

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> Any:
        self.log("val", self.loss(batch), sync_dist=True)

    def test_step(self, batch: Tensor, batch_idx: int) -> Any:
        self.log("test", self.loss(batch), sync_dist=True)

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self(batch)[:, 0]

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.hparams.lr)


class TinyData(LightningDataModule):
    """Loaders of the same rows for every stage."""

    def train_dataloader(self) -> Any:
        return numbers()

    def val_dataloader(self) -> Any:
        return numbers(6)

    def test_dataloader(self) -> Any:
        return numbers(6)

    def predict_dataloader(self) -> Any:
        return numbers(6)


def trainer(**options: Any) -> Trainer:
    """A Trainer that writes nothing and shows nothing, unless told so."""
    return Trainer(**{**QUIET, "accelerator": "cpu", "max_epochs": 1, "num_sanity_val_steps": 0, **options})


def weights(module: nn.Module) -> list[float]:
    """All weights, as numbers."""
    return torch.cat([p.detach().flatten() for p in module.parameters()]).tolist()


def by_hand(count: int | Numbers, batch_sizes: list[list[int]], lr: float = 0.05) -> list[float]:
    """Weights after SGD steps, each on one big batch made of the given parts."""
    module, start = Tiny(), 0
    optimizer = torch.optim.SGD(module.parameters(), lr=lr)
    rows = (count if isinstance(count, Numbers) else Numbers(count)).rows
    for parts in batch_sizes:
        batch = rows[start : start + sum(parts)]
        start += sum(parts)
        optimizer.zero_grad()
        module.loss(batch).backward()
        optimizer.step()
    return weights(module)


class Recorder(Callback):
    """Keeps the epoch metrics that it sees."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self.seen.append({k: float(v) for k, v in trainer.callback_metrics.items()})
