"""Train a small CNN on scikit-learn's handwritten digits and count what it gets right on digits that it never saw.

digits_raw.py is a plain PyTorch loop for one device. digits_lite.py is the same loop with Lite, for any number of them:

    torchrun --nproc-per-node=2 examples/digits_lite.py
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from lite import Lite
from torch.utils.data import DataLoader

from digits_model import DigitsCNN, load_data
from run_options import parse_arguments, record


def main() -> None:
    args = parse_arguments(__doc__, epochs=12, batch_size=32)
    lite = Lite(**args.settings)
    lite.seed_everything(args.seed)

    train_set, test_set = load_data()
    train_loader = DataLoader(train_set, batch_size=args.batch_size, shuffle=True)
    test_loader = DataLoader(test_set, batch_size=args.batch_size)
    train_loader, test_loader = lite.setup_dataloaders(train_loader, test_loader)

    model = DigitsCNN()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    model, optimizer = lite.setup(model, optimizer)

    losses = []
    for epoch in range(args.epochs):
        model.train()
        for images, labels in train_loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images), labels)
            lite.backward(loss)
            optimizer.step()
            losses.append(loss.detach())

        model.eval()
        hits = []
        with torch.no_grad():
            for images, labels in test_loader:
                hits.append(lite.gather_for_metrics(model(images).argmax(dim=1) == labels))
        right = torch.cat(hits)
        lite.print(f"epoch {epoch + 1}: test accuracy {right.float().mean():.2%} ({right.sum()} of {len(right)})")

    record(args.losses, losses, model)


if __name__ == "__main__":
    main()
