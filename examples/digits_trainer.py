"""Train a small CNN on scikit-learn's handwritten digits and count what it gets right on digits that it never saw.

digits_raw.py is a plain PyTorch loop for one device, digits_lite.py the same loop with Lite. Here the Trainer has it:

    torchrun --nproc-per-node=2 examples/digits_trainer.py
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from lite.trainer import LightningModule, Trainer, seed_everything
from torch import Tensor
from torch.utils.data import DataLoader

from digits_model import DigitsCNN, load_data
from run_options import parse_arguments, record


class Digits(LightningModule):
    """The CNN with its loss, its optimizer, and what is counted."""

    def __init__(self) -> None:
        super().__init__()
        self.model = DigitsCNN()
        self.losses: list[Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self.model(images.to(self.dtype)), labels)
        self.losses.append(loss.detach())
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        images, labels = batch
        hits = self.model(images.to(self.dtype)).argmax(dim=1) == labels
        self.log_dict({"right": hits.sum(), "all": len(hits)}, reduce_fx="sum", sync_dist=True)

    def on_validation_end(self) -> None:
        right, total = (int(self.trainer.callback_metrics[name]) for name in ("right", "all"))
        self.print(f"epoch {self.current_epoch + 1}: test accuracy {right / total:.2%} ({right} of {total})")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=3e-3)


def main() -> None:
    args = parse_arguments(__doc__, epochs=12, batch_size=32)
    seed_everything(args.seed)

    train_set, test_set = load_data()
    train_loader = DataLoader(train_set, batch_size=args.batch_size, shuffle=True)
    test_loader = DataLoader(test_set, batch_size=args.batch_size)

    module = Digits()
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(
        max_epochs=args.epochs, num_sanity_val_steps=0, enable_checkpointing=False, **quiet, **args.settings
    )
    trainer.fit(module, train_loader, test_loader)

    record(args.losses, module.losses, module.model)


if __name__ == "__main__":
    main()
