"""Train a small GPT on the text of Python's manual, character by character, and let it write some of its own.

char_lm_raw.py is a plain PyTorch loop for one device, char_lm_lite.py the same loop with Lite. Here the Trainer has it:

    torchrun --nproc-per-node=2 examples/char_lm_trainer.py
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from lite.trainer import LightningModule, Trainer, seed_everything
from torch import Tensor
from torch.utils.data import DataLoader

from char_lm_model import CharGPT, decode, encode, load_data
from run_options import parse_arguments, record


class CharLM(LightningModule):
    """The GPT with its loss and its optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.model = CharGPT()
        self.losses: list[Tensor] = []

    def forward(self, blocks: Tensor) -> Tensor:
        """The loss of each character, of shape (batch, CONTEXT)."""
        logits = self.model(blocks[:, :-1])
        return F.cross_entropy(logits.transpose(1, 2), blocks[:, 1:], reduction="none")

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (blocks,) = batch
        logits = self.model(blocks[:, :-1])
        loss = F.cross_entropy(logits.transpose(1, 2), blocks[:, 1:])
        self.losses.append(loss.detach())
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        (blocks,) = batch
        self.log("test loss", self(blocks).mean(), sync_dist=True)

    def on_train_epoch_end(self) -> None:
        self.print(f"test loss after epoch {self.current_epoch + 1}: {self.trainer.callback_metrics['test loss']:.3f}")

    def generate(self, prompt: Tensor, length: int) -> Tensor:
        return self.model.generate(prompt, length)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.generate(batch, length=160)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def main() -> None:
    args = parse_arguments(__doc__, epochs=4, batch_size=32)
    seed_everything(args.seed)

    train_set, test_set = load_data()
    train_loader = DataLoader(train_set, batch_size=args.batch_size, shuffle=True)
    test_loader = DataLoader(test_set, batch_size=args.batch_size)

    module = CharLM()
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(
        max_epochs=args.epochs,
        gradient_clip_val=1.0,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        **quiet,
        **args.settings,
    )
    (before,) = trainer.validate(module, test_loader, verbose=False)
    trainer.print(f"test loss before training: {before['test loss']:.3f}")
    trainer.fit(module, train_loader, test_loader)

    sample = trainer.predict(module, [encode("The ")])
    trainer.print(decode(sample[0]))
    record(args.losses, module.losses, module.model)


if __name__ == "__main__":
    main()
