"""Microseconds that a training step costs over raw PyTorch, on one process.

A tiny MLP with a batch of 4, where overhead shows most, with preloaded batches and with a DataLoader; and a small GPT,
where it should vanish. Each in 32-true and bf16-mixed. Then the MLP in epochs of ten batches, where the beginning and
the end of an epoch show, and batches of its evaluation. All contenders run in turn, an epoch at a time, in one
process, and are built anew every few rounds; "raw again" is raw against itself. "trainer" is lite's Trainer, bare;
"defaults" with progress bar, CSV logger and one log per step; "20 logs" bare with twenty. "L ..." are the same by
Lightning's.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, TensorDataset

from benchmarks.contenders import evaluate_lightning, evaluate_raw, evaluate_trainer, installed, quiet
from benchmarks.harness import arguments, compare, finish, interleave_builds


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


class SmallGPT(nn.Module):
    """Two blocks of width 64 on 32 characters; logits of the last position."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Embedding(64, 64)
        layer = nn.TransformerEncoderLayer(64, 4, 256, dropout=0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(64, 64)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(32))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.token(x), mask=self.mask, is_causal=True)[:, -1])


def gpt() -> nn.Module:
    torch.manual_seed(0)
    return SmallGPT()


def measure(
    title: str,
    make: Callable[[], nn.Module],
    dataset: TensorDataset,
    precision: str,
    *,
    batch_size: int,
    use_loader: bool,
    rounds: int,
    steps: int,
) -> list[dict[str, Any]]:
    source = DataLoader(dataset, batch_size=batch_size)
    epochs = max(1, steps // len(source)) if use_loader else 1

    def build() -> dict[str, Callable[[], Any]]:
        contenders: dict[str, Callable[[], Any]] = {}
        for name, contender in installed().items():
            loader = DataLoader(dataset, batch_size=batch_size) if use_loader else None
            train, loader = contender(make, precision, loader)
            if use_loader:
                contenders[name] = lambda train=train, loader=loader: [train(loader) for _ in range(epochs)]
            else:
                batches = list(source)
                contenders[name] = lambda train=train, batches=batches: train(
                    itertools.islice(itertools.cycle(batches), steps)
                )
        return contenders

    return compare(title, interleave_builds(build, rounds, epochs * len(source) if use_loader else steps))


def measure_evaluation(dataset: TensorDataset, rounds: int) -> list[dict[str, Any]]:
    """Batches of an evaluation, whose beginning and end are among them."""
    loader = DataLoader(ConcatDataset([dataset] * 3), batch_size=4)

    def build() -> dict[str, Callable[[], Any]]:
        contenders = {
            "raw": evaluate_raw(mlp, loader),
            "raw again": evaluate_raw(mlp, loader),
            "trainer": evaluate_trainer(mlp, loader, logs=False),
            "one log": evaluate_trainer(mlp, loader, logs=True),
        }
        if "fabric" in installed():
            contenders["L trainer"] = evaluate_lightning(mlp, loader, logs=False)
            contenders["L one log"] = evaluate_lightning(mlp, loader, logs=True)
        return contenders

    return compare("MLP, evaluation, batch 4, DataLoader", interleave_builds(build, rounds, len(loader)))


def main() -> None:
    options = arguments(__doc__, repeats=40, steps=400)
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    rows = []
    generator = torch.Generator().manual_seed(0)
    shape = {"generator": generator}
    count = 4 * options.steps  # a turn of a contender is one epoch
    points = TensorDataset(torch.randn(count, 8, **shape), torch.randint(4, (count,), **shape))
    texts = TensorDataset(torch.randint(64, (64, 32), **shape), torch.randint(64, (64,), **shape))
    with quiet():
        for precision in ("32-true", "bf16-mixed"):
            common: dict[str, Any] = {"precision": precision, "rounds": options.repeats}
            for use_loader in (False, True):
                source = "DataLoader" if use_loader else "preloaded batches"
                title = f"MLP, batch 4, {source}, {precision}"
                rows += measure(title, mlp, points, batch_size=4, use_loader=use_loader, steps=options.steps, **common)
            title = f"small GPT, batch 8, preloaded batches, {precision}"
            few: dict[str, Any] = {"steps": max(1, options.steps // 20), "rounds": options.repeats}
            rows += measure(title, gpt, texts, batch_size=8, use_loader=False, **(common | few))
        few = {"steps": max(10, options.steps // 4), "rounds": options.repeats, "precision": "32-true"}
        title = "MLP, batch 4, DataLoader, epochs of 10 batches"
        rows += measure(title, mlp, TensorDataset(*points[:40]), batch_size=4, use_loader=True, **few)
        rows += measure_evaluation(points, max(2, options.repeats))
    finish(rows, options.json)


if __name__ == "__main__":
    main()
