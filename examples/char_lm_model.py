"""Text and model of the character-level language model examples: Python's own manual, and a small GPT."""

from __future__ import annotations

from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

NUM_CHARACTERS = 128  # ASCII; any other counts as "?"
CONTEXT = 64


def load_data(num_blocks: int = 3190) -> tuple[TensorDataset, TensorDataset]:
    """Return blocks of CONTEXT + 1 characters from the texts that `help("lambda")` and its like show.

    The first nine of ten are for training. The text differs a little between Python's versions.
    """
    text = "".join(topics[name] for name in sorted(topics))[: num_blocks * (CONTEXT + 1)]
    blocks = encode(text).reshape(-1, CONTEXT + 1)
    num_train = len(blocks) * 9 // 10
    return TensorDataset(blocks[:num_train]), TensorDataset(blocks[num_train:])


def encode(text: str) -> Tensor:
    """Characters to numbers, int64, of shape (len(text),)."""
    return torch.tensor([ord(character) if character.isascii() else ord("?") for character in text])


def decode(tokens: Tensor) -> str:
    """Numbers to characters."""
    return "".join(map(chr, tokens.tolist()))


class Block(nn.Module):
    """Causal self-attention, then a small MLP, each added to its input."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        heads = self.qkv(self.norm1(x)).view(batch, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(heads[0], heads[1], heads[2], is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp(self.norm2(x))


class CharGPT(nn.Module):
    """A GPT of about 120,000 parameters over ASCII characters."""

    def __init__(self, width: int = 64, num_heads: int = 4, num_layers: int = 2) -> None:
        super().__init__()
        self.tokens = nn.Embedding(NUM_CHARACTERS, width)
        self.positions = nn.Embedding(CONTEXT, width)
        self.blocks = nn.Sequential(*(Block(width, num_heads) for _ in range(num_layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, NUM_CHARACTERS)
        nn.init.normal_(self.tokens.weight, std=0.1)
        nn.init.normal_(self.positions.weight, std=0.1)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of shape (batch, length, NUM_CHARACTERS) for what follows each token; length is at most CONTEXT."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.tokens(tokens) + self.positions(positions)
        return self.head(self.norm(self.blocks(x)))

    @torch.no_grad()
    def generate(self, prompt: Tensor, length: int) -> Tensor:
        """Continue `prompt`, of shape (n,), by `length` sampled characters."""
        tokens = prompt
        for _ in range(length):
            logits = self(tokens[None, -CONTEXT:])[0, -1]
            tokens = torch.cat([tokens, torch.multinomial(logits.float().softmax(dim=-1), 1)])
        return tokens
