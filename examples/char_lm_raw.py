"""Train a small GPT on the text of Python's manual, character by character, and let it write some of its own.

char_lm_raw.py is a plain PyTorch loop for one device. char_lm_lite.py is the same loop with Lite:

    torchrun --nproc-per-node=2 examples/char_lm_lite.py
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from char_lm_model import CharGPT, decode, encode, load_data
from run_options import parse_arguments, record


def main() -> None:
    args = parse_arguments(__doc__, epochs=4, batch_size=32)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = args.choose({"32-true": torch.float32, "64-true": torch.float64, "bf16-mixed": torch.float32})
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16-mixed")
    torch.manual_seed(args.seed)

    train_set, test_set = load_data()
    train_loader = DataLoader(train_set, batch_size=args.batch_size, shuffle=True)
    test_loader = DataLoader(test_set, batch_size=args.batch_size)

    model = CharGPT()
    model.to(device, dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    def test_loss() -> float:
        losses = []
        with torch.no_grad():
            for (blocks,) in test_loader:
                blocks = blocks.to(device)
                with autocast:
                    logits = model(blocks[:, :-1])
                    loss = F.cross_entropy(logits.transpose(1, 2), blocks[:, 1:], reduction="none")
                losses.append(loss)
        return torch.cat(losses).mean().item()

    print(f"test loss before training: {test_loss():.3f}")
    losses = []
    for epoch in range(args.epochs):
        for (blocks,) in train_loader:
            blocks = blocks.to(device)
            optimizer.zero_grad()
            with autocast:
                logits = model(blocks[:, :-1])
                loss = F.cross_entropy(logits.transpose(1, 2), blocks[:, 1:])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)
            optimizer.step()
            losses.append(loss.detach())
        print(f"test loss after epoch {epoch + 1}: {test_loss():.3f}")

    with autocast:
        sample = model.generate(encode("The ").to(device), length=160)
    print(decode(sample))
    record(args.losses, losses, model)


if __name__ == "__main__":
    main()
