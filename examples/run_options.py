"""What every example takes from the command line, and the record of a run that tests compare."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from torch import Tensor, nn


def parse_arguments(description: str | None, *, epochs: int, batch_size: int) -> argparse.Namespace:
    """Parse the command line; `epochs` and `batch_size` are the example's defaults."""
    return make_parser(description, epochs=epochs, batch_size=batch_size).parse_args()


def make_parser(description: str | None, *, epochs: int, batch_size: int) -> argparse.ArgumentParser:
    """The parser of what every example takes, for one that takes more."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    precision_help = "32-true (default), 64-true, bf16-mixed, ...; a raw script knows those that it spells out"
    parser.add_argument("--precision", default="32-true", help=precision_help)
    parser.add_argument("--epochs", type=int, default=epochs, help=f"default {epochs}")
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    parser.add_argument("--batch-size", type=int, default=batch_size, help=f"of each process, default {batch_size}")
    parser.add_argument(
        "--losses",
        type=Path,
        metavar="FILE",
        help="write the loss of each step and the final weights as JSON; rank r > 0 writes its own to FILE.r",
    )
    return parser


def record(path: Path | None, losses: list[Tensor], *models: nn.Module) -> None:
    """Write a run's losses and final weights to `path`, every number exactly; nothing when `path` is None."""
    if path is None:
        return
    rank = int(os.environ.get("RANK", "0"))
    tensors = [(f"{i}.{name}", value) for i, model in enumerate(models) for name, value in model.state_dict().items()]
    arrays = {name: value.detach().double().cpu().flatten() for name, value in tensors}
    content: dict[str, Any] = {
        "losses": [float(loss) for loss in losses],
        "sha256": hashlib.sha256(b"".join(array.numpy().tobytes() for array in arrays.values())).hexdigest(),
        "weights": {name: array.tolist() for name, array in arrays.items()},
    }
    Path(f"{path}.{rank}" if rank else path).write_text(json.dumps(content))
