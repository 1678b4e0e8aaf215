"""`python -m lite memory`: what training a model needs on each rank, by strategy, without building it."""

from __future__ import annotations

import argparse
import importlib
import sys
from typing import Any

import torch
from torch import nn

from lite.errors import ConfigError, choose
from lite.memory import KINDS, memory_estimate

_COLUMNS = ("parameters", "gradients", "optimizer", "buffers", "communication", "activations", "total")


def add_to(rooms: Any) -> None:
    """Add the command to the parser."""
    parser = rooms.add_parser("memory", help=__doc__, description=__doc__)
    parser.add_argument(
        "model", metavar="MODULE:NAME", help="a function that makes the model, or a class, e.g. net:GPT"
    )
    parser.add_argument("--world-size", type=int, default=1, metavar="N", help="number of ranks")
    parser.add_argument("--shard-size", type=int, metavar="N", help="ranks per copy of the model (fsdp-hybrid)")
    parser.add_argument("--strategy", action="append", metavar="NAME", help=f"{', '.join(KINDS)}; all by default")
    parser.add_argument("--precision", default="32-true", metavar="NAME", help="as for Lite")
    parser.add_argument(
        "--optimizer", default="AdamW", metavar="NAME", help="a class of torch.optim; none for no state"
    )
    parser.add_argument(
        "--batch", action="append", metavar="SHAPE[:DTYPE]", help="one argument of forward, e.g. 8,128:int64"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print a row per strategy."""
    model = _model(options.model)
    optimizer = None
    if options.optimizer.lower() != "none":
        optimizer = getattr(torch.optim, choose("--optimizer", options.optimizer, _optimizers()))
    batch = tuple(map(_tensor, options.batch)) if options.batch else None
    kinds = options.strategy or [
        kind
        for kind in KINDS
        if (kind == "single") == (options.world_size == 1) and (kind != "fsdp-hybrid" or options.shard_size)
    ]
    rows = {}
    for kind in kinds:
        rows[kind] = memory_estimate(
            model,
            kind,
            options.precision,
            optimizer,
            batch,
            world_size=options.world_size,
            shard_size=options.shard_size if kind == "fsdp-hybrid" else None,
        )
    print(f"MiB on the rank that needs most, of {options.world_size}; {options.precision}")
    print(f"{'':12}" + "".join(f"{name:>15}" for name in _COLUMNS))
    for kind, estimate in rows.items():
        numbers = [getattr(estimate, name) for name in _COLUMNS]
        print(f"{kind:12}" + "".join(f"{'-' if n is None else format(n / 2**20, '.2f'):>15}" for n in numbers))
    return 0


def _model(where: str) -> nn.Module:
    module, _, name = where.partition(":")
    if not name:
        raise ConfigError(f"model={where!r} must be MODULE:NAME, e.g. net:GPT for the class GPT in net.py.")
    sys.path.insert(0, "")
    try:
        make = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"model={where!r} was not found: {error}.") from error
    finally:
        sys.path.remove("")
    with torch.device("meta"):
        model = make if isinstance(make, nn.Module) else make()
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model={where!r} made a {type(model).__name__}; it must make a torch.nn.Module.")
    return model


def _optimizers() -> list[str]:
    return [n for n, kind in vars(torch.optim).items() if isinstance(kind, type) and n != "Optimizer"] + ["none"]


def _tensor(text: str) -> torch.Tensor:
    shape, _, dtype = text.partition(":")
    kind = getattr(torch, dtype or "float32", None)
    try:
        if not isinstance(kind, torch.dtype):
            raise ValueError(f"torch has no dtype {dtype!r}")
        return torch.empty([int(n) for n in shape.split(",")], dtype=kind, device="meta")
    except ValueError as error:
        raise ConfigError(f"--batch {text}: {error}; write sizes and a dtype, e.g. 8,128:int64.") from error
