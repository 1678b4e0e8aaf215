"""The kill drill with the Trainer in the place of the raw loop: with validation, metrics and accumulation."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks import kill_drill
from lite.trainer import LightningModule, Trainer, seed_everything
from lite.trainer.callbacks import ModelCheckpoint

EPOCHS, ACCUMULATE, VALIDATE_EVERY = 2, 3, 16

KINDS = (
    "all in training",
    "one in training",
    "all in validation",
    "one in validation",
    "all between",
    "one between",
    "all during a save",
    "one during a save",
)


class Drilled(LightningModule):
    """Trains the drill's net; says in a file what runs, and keeps its losses in the checkpoint."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.net = kill_drill.Net()
        self.folder = folder
        self.losses: list[float] = []

    def loss(self, batch: Tensor) -> Tensor:
        return (self.net(batch) - batch.sum(dim=1, keepdim=True)).pow(2).mean()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("loss", loss, on_epoch=True, sync_dist=True)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val", self.loss(batch), sync_dist=True)

    def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> None:
        self.tell("training")

    def on_train_batch_end(self, outputs: Any, batch: Tensor, batch_idx: int) -> None:
        self.losses.append(self.trainer.lite.all_reduce(outputs["loss"]).item())
        Path(self.folder, f"begun-{self.global_rank}").touch()
        self.tell("between")

    def on_validation_start(self) -> None:
        self.tell("validation")

    def on_validation_end(self) -> None:
        self.losses.append(float(self.trainer.callback_metrics["val"]))
        self.tell("between")

    def tell(self, phase: str) -> None:
        if self.global_rank == 0:
            Path(self.folder, "phase.partial").write_text(phase)
            Path(self.folder, "phase.partial").rename(Path(self.folder, "phase"))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["losses"] = list(self.losses)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.losses = list(checkpoint["losses"])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3)
        total = int(self.trainer.estimated_stepping_batches) + 1
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=total)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def job(folder: str) -> None:
    """One life of the run: from its newest checkpoint to its end, or until it is killed."""
    saver = ModelCheckpoint(f"{folder}/checkpoints", every_n_train_steps=2, save_last=True)
    trainer = Trainer(
        accelerator="cpu",
        precision="16-mixed",
        max_epochs=EPOCHS,
        accumulate_grad_batches=ACCUMULATE,
        gradient_clip_val=1.0,
        val_check_interval=VALIDATE_EVERY,
        num_sanity_val_steps=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[saver],
        default_root_dir=folder,
    )
    rank, world = trainer.global_rank, trainer.world_size
    Path(folder, f"pid-{rank}").write_text(str(os.getpid()))
    seed_everything(3)
    torch.manual_seed(3 + rank)  # dropout differs between ranks
    options: dict[str, Any] = {"batch_size": kill_drill.GLOBAL_BATCH // world, "num_workers": kill_drill.NUM_WORKERS}
    loader = DataLoader(kill_drill.Augmented(), shuffle=True, drop_last=True, **options)
    held_out = torch.utils.data.Subset(kill_drill.Augmented(), range(60))
    module = Drilled(folder)
    trainer.fit(module, loader, DataLoader(held_out, **options), ckpt_path="auto")
    if trainer.is_global_zero:
        weights = b"".join(p.detach().numpy().tobytes() for p in module.parameters())
        rates = [config.scheduler.get_last_lr() for config in trainer.lr_scheduler_configs]
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        result = {"losses": module.losses, "weights": hashlib.sha256(weights).hexdigest(), "lr": [rates, metrics]}
        Path(folder, "result.partial").write_text(json.dumps(result))
        Path(folder, "result.partial").rename(Path(folder, "result"))
