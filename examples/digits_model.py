"""Data and model of the digits examples: 1797 handwritten digits of 8 x 8 pixels, and a small CNN."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import Subset, TensorDataset, random_split

NUM_TEST = 360


def load_data() -> list[Subset[tuple[Tensor, ...]]]:
    """Return 1437 digits for training and 360 others for testing: images of shape (1, 8, 8) in 0..1, and labels."""
    digits = load_digits()
    images = torch.tensor(digits.images / 16, dtype=torch.float32).unsqueeze(1)
    dataset = TensorDataset(images, torch.tensor(digits.target))
    split = torch.Generator().manual_seed(0)  # the same split for every seed of the training
    return random_split(dataset, [len(dataset) - NUM_TEST, NUM_TEST], generator=split)


class DigitsCNN(nn.Module):
    """Two convolutions and two linear layers, about 38,000 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        self.classifier = nn.Sequential(nn.Flatten(), nn.Linear(32 * 4 * 4, 64), nn.ReLU(), nn.Linear(64, 10))

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images))
