"""Train the small GPT of char_lm_lite.py under any strategy: the model may be larger than one device.

The loop is the same for all of them. The model is made without memory, and `setup` makes and shards its weights:

    torchrun --nproc-per-node=2 examples/fsdp_gpt.py --strategy fsdp
    torchrun --nproc-per-node=4 examples/fsdp_gpt.py --strategy fsdp_tp
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from lite import FSDPStrategy, Lite, ModelParallelStrategy
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel
from torch.utils.data import DataLoader

from char_lm_model import Block, CharGPT, decode, encode, load_data
from run_options import Options, make_parser, record

PLAN = {
    "tokens": RowwiseParallel(input_layouts=Replicate()),
    "blocks.*.mlp.0": ColwiseParallel(),
    "blocks.*.mlp.2": RowwiseParallel(),
    "head": ColwiseParallel(output_layouts=Replicate()),
}
STRATEGIES: dict[str, Any] = {
    "single": lambda: "single",
    "ddp": lambda: "ddp",
    "fsdp": lambda: FSDPStrategy(activation_checkpointing={Block}),
    "fsdp_grad": lambda: FSDPStrategy(sharding="grad"),
    "fsdp_hybrid": lambda: FSDPStrategy(sharding="hybrid", replicate_axis=2),
    "deepspeed": lambda: "deepspeed_stage_3",
    "tp": lambda: ModelParallelStrategy(PLAN),
    "fsdp_tp": lambda: ModelParallelStrategy(PLAN, tensor_parallel=2),
    "ddp_tp": lambda: ModelParallelStrategy(PLAN, tensor_parallel=2, sharded=False),
}


def main() -> None:
    parser = make_parser(__doc__, epochs=4, batch_size=32)
    parser.add_argument("--strategy", choices=STRATEGIES, default="fsdp", help="default fsdp")
    parser.add_argument("--blocks", type=int, default=3190, help="pieces of text, default all")
    args = parser.parse_args(namespace=Options())
    lite = Lite(strategy=STRATEGIES[args.strategy](), **args.settings)
    lite.seed_everything(args.seed)

    train_set, test_set = load_data(args.blocks)
    train_loader = DataLoader(train_set, batch_size=args.batch_size, shuffle=True)
    test_loader = DataLoader(test_set, batch_size=args.batch_size)
    train_loader, test_loader = lite.setup_dataloaders(train_loader, test_loader)

    # DeepSpeed divides a model that has its values.
    with lite.init_module(empty_init=None if args.strategy == "deepspeed" else "meta"):
        model = CharGPT()
    model = lite.setup(model)
    optimizer = lite.setup_optimizers(torch.optim.AdamW(model.parameters(), lr=3e-3))

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
            losses.append(lite.all_reduce(loss.detach()))
        lite.print(f"test loss after epoch {epoch + 1}: {test_loss():.3f}")

    sample = model.generate(lite.to_device(encode("The ")), length=160)  # on all ranks: each has a part of the model
    lite.print(decode(sample))
    lite.teardown()  # the raw model with whole weights, on every rank
    record(args.losses, losses, model)


if __name__ == "__main__":
    main()
