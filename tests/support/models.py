"""Tiny models and data that tests share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
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


class Block(nn.Module):
    """Causal attention whose heads are counted by the width that this rank has, then an MLP."""

    def __init__(self, width: int = 8, num_heads: int = 4) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_width = width // num_heads
        self.norm1 = nn.LayerNorm(width)
        self.q, self.k, self.v = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        q, k, v = (layer(y).unflatten(-1, (-1, self.head_width)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class TinyGPT(nn.Module):
    """Two blocks over 16 tokens; `tied` shares the embedding with the head."""

    def __init__(self, dtype: torch.dtype = torch.float32, *, tied: bool = False, num_heads: int = 4) -> None:
        super().__init__()
        self.tokens = nn.Embedding(16, 8)
        self.blocks = nn.ModuleList(Block(8, num_heads) for _ in range(2))
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 16, bias=False)
        if tied:
            self.head.weight = self.tokens.weight
        self.to(dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    def loss(self, tokens: Tensor) -> Tensor:
        return next_token_loss(self(tokens[:, :-1]), tokens)

    def embed(self, tokens: Tensor) -> Tensor:
        return self.norm(self.tokens(tokens))

    def bare(self) -> Tensor:
        return self.norm(self.tokens(torch.arange(4)[None]))

    def count(self) -> int:
        return sum(p.numel() for p in self.parameters())


def next_token_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Cross entropy of logits of shape (batch, length, 16) for tokens of shape (batch, length + 1)."""
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def sentences(n: int) -> TensorDataset:
    """`n` sequences of 7 tokens."""
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randint(0, 16, (n, 7), generator=generator))
