"""Train a small GPT on the text of Python's manual, character by character, and let it write some of its own.

char_lm_raw.py is a plain PyTorch loop for one device. char_lm_lite.py is the same loop with Lite:

    torchrun --nproc-per-node=2 examples/char_lm_lite.py
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from lite import Lite
from torch.utils.data import DataLoader

from char_lm_model import CharGPT, decode, encode, load_data
from run_options import parse_arguments, record


def main() -> None:
    args = parse_arguments(__doc__, epochs=4, batch_size=32)
    lite = Lite(**args.settings)
    lite.seed_everything(args.seed)

    train_set, test_set = load_data()
    train_loader = DataLoader(train_set, batch_size=args.batch_size, shuffle=True)
    test_loader = DataLoader(test_set, batch_size=args.batch_size)
    train_loader, test_loader = lite.setup_dataloaders(train_loader, test_loader)

    model = CharGPT()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model, optimizer = lite.setup(model, optimizer)

    def test_loss() -> float:
        losses = []
        with torch.no_grad():
            for (blocks,) in test_loader:
                logits = model(blocks[:, :-1])
                loss = F.cross_entropy(logits.transpose(1, 2), blocks[:, 1:], reduction="none")
                losses.append(lite.gather_for_metrics(loss))
        return torch.cat(losses).mean().item()

    lite.print(f"test loss before training: {test_loss():.3f}")
    losses = []
    for epoch in range(args.epochs):
        for (blocks,) in train_loader:
            optimizer.zero_grad()
            logits = model(blocks[:, :-1])
            loss = F.cross_entropy(logits.transpose(1, 2), blocks[:, 1:])
            lite.backward(loss)
            lite.clip_gradients(model, optimizer, max_norm=1.0)
            optimizer.step()
            losses.append(loss.detach())
        lite.print(f"test loss after epoch {epoch + 1}: {test_loss():.3f}")

    sample = model.generate(lite.to_device(encode("The ")), length=160)
    lite.print(decode(sample))
    record(args.losses, losses, model)


if __name__ == "__main__":
    main()
