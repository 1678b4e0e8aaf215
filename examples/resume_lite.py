"""The small GPT of char_lm_lite.py, which goes on where it was interrupted: kill it at any moment and start it again.

    torchrun --nproc-per-node=2 --max-restarts=3 examples/resume_lite.py --folder runs/char_lm

Two lines make it so: `run = lite.resumable(...)` and `run.step()`; the loop goes over `run.epochs(...)`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from lite import Lite
from torch.utils.data import DataLoader

from char_lm_model import CharGPT, load_data
from run_options import Options, make_parser, record


def main() -> None:
    parser = make_parser(__doc__, epochs=4, batch_size=32)
    parser.add_argument("--folder", default="runs/char_lm", help="where checkpoints are kept; default runs/char_lm")
    parser.add_argument("--every-steps", type=int, default=20, help="default 20")
    args = parser.parse_args(namespace=Options())
    lite = Lite(**args.settings)
    lite.seed_everything(args.seed)

    train_set, test_set = load_data()
    train_loader = DataLoader(train_set, batch_size=args.batch_size, shuffle=True)
    test_loader = DataLoader(test_set, batch_size=args.batch_size)
    train_loader, test_loader = lite.setup_dataloaders(train_loader, test_loader)

    model = CharGPT()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model, optimizer = lite.setup(model, optimizer)

    state = {"model": model, "optimizer": optimizer, "loader": train_loader}
    run = lite.resumable(state, args.folder, every_steps=args.every_steps, async_save=True)

    for epoch in run.epochs(args.epochs):
        for (blocks,) in train_loader:
            optimizer.zero_grad()
            logits = model(blocks[:, :-1])
            loss = F.cross_entropy(logits.transpose(1, 2), blocks[:, 1:])
            lite.backward(loss)
            lite.clip_gradients(model, optimizer, max_norm=1.0)
            optimizer.step()
            run.step()

        test_losses = []
        with torch.no_grad():
            for (blocks,) in test_loader:
                logits = model(blocks[:, :-1])
                losses = F.cross_entropy(logits.transpose(1, 2), blocks[:, 1:], reduction="none")
                test_losses.append(lite.gather_for_metrics(losses))
        lite.print(f"test loss after epoch {epoch + 1}, step {run.steps}: {torch.cat(test_losses).mean():.3f}")

    record(args.losses, [], model)


if __name__ == "__main__":
    main()
