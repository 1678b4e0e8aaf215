"""What every example takes from the command line, and the record of a run that tests compare."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from torch import Tensor, nn


class Options(argparse.Namespace):
    """The command line's values, and what the two kinds of script make of the precision."""

    precision: str | None

    @property
    def settings(self) -> dict[str, Any]:
        """Arguments for Lite: only what was given, so that its environment variables count for the rest."""
        return {} if self.precision is None else {"precision": self.precision}

    def choose(self, known: dict[str, Any]) -> Any:
        """What the precision stands for in a raw script, which knows those that it spells out."""
        precision = self.precision or "32-true"
        if precision not in known:
            raise SystemExit(f"--precision {precision}: this raw script knows {', '.join(known)} alone")
        return known[precision]


def parse_arguments(description: str | None, *, epochs: int, batch_size: int) -> Options:
    """Parse the command line; `epochs` and `batch_size` are the example's defaults."""
    return make_parser(description, epochs=epochs, batch_size=batch_size).parse_args(namespace=Options())


def make_parser(description: str | None, *, epochs: int, batch_size: int) -> argparse.ArgumentParser:
    """The parser of what every example takes, for one that takes more."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    precision_help = "32-true (default), 64-true, bf16-mixed, ...; a raw script knows those that it spells out"
    parser.add_argument("--precision", help=precision_help)
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
