"""Tiny models and data that tests share."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset


class MLP(nn.Module):
    """Two linear layers."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class VAE(nn.Module):
    """An encoder and a decoder, with methods besides forward and an attribute that a loop writes to."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(4, 2)
        self.decoder = nn.Linear(2, 4)
        self.saved_actions: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x))

    def encode(self, x: Tensor) -> Tensor:
        return self.encoder(x)

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(z)

    def loss(self, x: Tensor) -> Tensor:
        return (self(x) - x).pow(2).mean()

    def count(self) -> int:
        return sum(p.numel() for p in self.parameters())


def regression(n: int, dtype: torch.dtype = torch.float32) -> TensorDataset:
    """`n` samples with inputs of shape (4,) and targets of shape (3,)."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 4, generator=generator, dtype=torch.float64)
    y = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    return TensorDataset(x.to(dtype), y.to(dtype))
