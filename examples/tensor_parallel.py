"""Split the layers of a small GPT over processes: tensor, sequence and loss parallelism by one plan.

Every process holds some heads, some of the MLP's units and some characters of the embedding and the head. Between the
layers each has a part of the sequence. On one process the plan does nothing, and the numbers are the same.

    torchrun --nproc-per-node=2 examples/tensor_parallel.py
    torchrun --nproc-per-node=4 examples/tensor_parallel.py --tensor-parallel 2  # two groups, each with half the data
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from lite import Lite, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel
from torch.utils.data import DataLoader

from char_lm_model import CONTEXT, NUM_CHARACTERS, load_data
from run_options import Options, make_parser, record

PLAN = {
    "tokens": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
    "positions": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
    "blocks.*.norm1": SequenceParallel(),
    "blocks.*.q": ColwiseParallel(input_layouts=Shard(1)),
    "blocks.*.k": ColwiseParallel(input_layouts=Shard(1)),
    "blocks.*.v": ColwiseParallel(input_layouts=Shard(1)),
    "blocks.*.out": RowwiseParallel(output_layouts=Shard(1)),
    "blocks.*.norm2": SequenceParallel(),
    "blocks.*.up": ColwiseParallel(input_layouts=Shard(1)),
    "blocks.*.down": RowwiseParallel(output_layouts=Shard(1)),
    "norm": SequenceParallel(),
    "head": ColwiseParallel(input_layouts=Shard(1), use_local_output=False),  # the loss takes split logits
}


class Block(nn.Module):
    """Attention with a layer for each of queries, keys and values, so that a process gets whole heads; then an MLP."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_width = width // num_heads
        self.norm1 = nn.LayerNorm(width)
        self.q, self.k, self.v = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        # As many heads as this process has.
        q, k, v = (layer(y).unflatten(-1, (-1, self.head_width)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class SplitGPT(nn.Module):
    """A GPT over ASCII characters whose layers can be split."""

    def __init__(self, width: int = 64, num_heads: int = 4, num_layers: int = 2) -> None:
        super().__init__()
        self.tokens = nn.Embedding(NUM_CHARACTERS, width)
        self.positions = nn.Embedding(CONTEXT, width)
        self.blocks = nn.ModuleList(Block(width, num_heads) for _ in range(num_layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, NUM_CHARACTERS)

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        x = self.tokens(tokens) + self.positions(positions)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def main() -> None:
    parser = make_parser(__doc__, epochs=4, batch_size=32)
    parser.add_argument("--tensor-parallel", type=int, help="processes that split layers; default all")
    parser.add_argument("--blocks", type=int, default=3190, help="pieces of text, default all")
    args = parser.parse_args(namespace=Options())
    strategy = ModelParallelStrategy(PLAN, tensor_parallel=args.tensor_parallel, loss_parallel=True)
    lite = Lite(strategy=strategy, **args.settings)
    lite.seed_everything(args.seed)

    train_set, test_set = load_data(args.blocks)
    train_loader = DataLoader(train_set, batch_size=args.batch_size, shuffle=True)
    test_loader = DataLoader(test_set, batch_size=args.batch_size)
    train_loader, test_loader = lite.setup_dataloaders(train_loader, test_loader)

    with lite.init_module(empty_init="meta"):
        model = SplitGPT()
    model = lite.setup(model)
    optimizer = lite.setup_optimizers(torch.optim.AdamW(model.parameters(), lr=3e-3))

    losses = []
    for epoch in range(args.epochs):
        for (blocks,) in train_loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(blocks[:, :-1]).flatten(0, 1), blocks[:, 1:].flatten())
            lite.backward(loss)
            lite.clip_gradients(model, optimizer, max_norm=1.0)
            optimizer.step()
            losses.append(lite.all_reduce(loss.detach()))
        means = []
        with torch.no_grad():
            for (blocks,) in test_loader:
                loss = F.cross_entropy(model(blocks[:, :-1]).flatten(0, 1), blocks[:, 1:].flatten())
                means.append(lite.all_reduce(loss))
        lite.print(f"test loss after epoch {epoch + 1}: {torch.stack(means).mean().item():.3f}")

    lite.teardown()  # the raw model with whole weights, on every process
    record(args.losses, losses, model)


if __name__ == "__main__":
    main()
