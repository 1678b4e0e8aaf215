"""`python -m lite memory`: what training a model needs on each rank, by strategy, without building it."""

from __future__ import annotations

import argparse
import importlib
import inspect
import math
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lite.errors import ConfigError, choose, shown
from lite.memory import MemoryEstimate, memory_estimate
from lite.strategies import DDPStrategy, SingleStrategy, Strategy

_COLUMNS = ("parameters", "gradients", "optimizer", "buffers", "communication", "activations", "total")
_KINDS = ("single", "ddp", "ddp+zero1", "fsdp", "fsdp-grad", "fsdp-hybrid", "tp", "fsdp+tp", "ddp+tp")
_UNASKED = ("ddp", "ddp+zero1", "fsdp", "fsdp-grad")  # are listed without an option that names or is for them


def add_to(rooms: Any) -> None:
    """Add the command to the parser."""
    parser = rooms.add_parser("memory", help=__doc__, description=__doc__)
    parser.add_argument(
        "model", metavar="MODULE:NAME", help="a function that makes the model, or a class, e.g. net:GPT"
    )
    parser.add_argument("--world-size", type=int, default=1, metavar="N", help="number of ranks")
    parser.add_argument("--replicate-axis", type=int, metavar="N", help="replicas, for fsdp-hybrid")
    parser.add_argument("--plan", metavar="MODULE:NAME", help="a dict of layers and parallel styles, for tp")
    parser.add_argument("--tensor-parallel", type=int, metavar="N", help="ranks that split layers, for fsdp+tp, ddp+tp")
    parser.add_argument(
        "--strategy", action="append", metavar="NAME", help=f"{', '.join(_KINDS)}; what fits by default"
    )
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
    makers = _strategies(options)
    rows: dict[str, MemoryEstimate] = {}
    refused: dict[str, ConfigError] = {}
    for kind in options.strategy or _fitting(options):
        strategy = makers[choose("--strategy", kind, _KINDS)]()
        try:
            rows[kind] = memory_estimate(
                model, strategy, options.precision, optimizer, batch, world_size=options.world_size
            )
        except ConfigError as error:
            if options.strategy or kind not in _UNASKED:
                raise
            refused[kind] = error
    if not rows:
        raise next(iter(refused.values()))
    print(f"MiB on the rank that needs most, of {options.world_size}; {options.precision}")
    print(f"{'':12}" + "".join(f"{name:>15}" for name in _COLUMNS))
    for kind, estimate in rows.items():
        numbers = [getattr(estimate, name) for name in _COLUMNS]
        print(f"{kind:12}" + "".join(f"{'-' if n is None else format(n / 2**20, '.2f'):>15}" for n in numbers))
    for kind, reason in refused.items():
        print(f"{kind:12} - {reason}")
    return 0


def _strategies(options: argparse.Namespace) -> dict[str, Callable[[], Strategy]]:
    from lite.strategies import FSDPStrategy, ModelParallelStrategy

    def split(*, sharded: bool = True, size: int | None = None) -> Strategy:
        if options.plan is None:
            raise ConfigError("--strategy tp, fsdp+tp and ddp+tp need --plan MODULE:NAME, e.g. net:PLAN.")
        return ModelParallelStrategy(_find("--plan", options.plan), tensor_parallel=size, sharded=sharded)

    return {
        "single": SingleStrategy,
        "ddp": DDPStrategy,
        "ddp+zero1": lambda: DDPStrategy(zero_optimizer=True),
        "fsdp": FSDPStrategy,
        "fsdp-grad": lambda: FSDPStrategy(sharding="grad"),
        "fsdp-hybrid": lambda: FSDPStrategy(sharding="hybrid", replicate_axis=options.replicate_axis),
        "tp": split,
        "fsdp+tp": lambda: split(size=options.tensor_parallel),
        "ddp+tp": lambda: split(size=options.tensor_parallel, sharded=False),
    }


def _fitting(options: argparse.Namespace) -> list[str]:
    if options.world_size == 1:
        return ["single"]
    asked = {
        "fsdp-hybrid": options.replicate_axis,
        "tp": options.plan,
        "fsdp+tp": options.plan and options.tensor_parallel,
        "ddp+tp": options.plan and options.tensor_parallel,
    }
    return [kind for kind in _KINDS[1:] if asked.get(kind, True)]


def _model(where: str) -> nn.Module:
    make = _find("model", where)
    if isinstance(make, nn.Module):
        return make
    if not callable(make):
        raise ConfigError(f"model={where!r} is {shown(make)}; it must be a function that makes the model, or a class.")
    _check_arguments(make, where)
    with torch.device("meta"):
        model = make()
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model={where!r} made {shown(model)}; it must make a torch.nn.Module.")
    return model


def _check_arguments(make: Callable[..., Any], where: str) -> None:
    """Refuse what can't be called without arguments; an error within it is the user's own, with its traceback."""
    try:
        inspect.signature(make).bind()
    except ValueError:  # one in C that doesn't tell
        return
    except TypeError as error:
        raise ConfigError(
            f"model={where!r} is called without arguments: {error}. Write a function that makes the model, e.g. "
            f"`def make(): return {getattr(make, '__name__', 'Net')}(...)`, and name that."
        ) from None


def _find(argument: str, where: str) -> Any:
    module, _, name = where.partition(":")
    if not name or not module or module.startswith("."):
        raise ConfigError(f"{argument}={where!r} must be MODULE:NAME, e.g. net:GPT for GPT in net.py.")
    sys.path.insert(0, "")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{argument}={where!r} was not found: {error}.") from error
    finally:
        sys.path.remove("")


def _optimizers() -> list[str]:
    return [n for n, kind in vars(torch.optim).items() if isinstance(kind, type) and n != "Optimizer"] + ["none"]


def _tensor(text: str) -> torch.Tensor:
    shape, _, dtype = text.partition(":")
    kind = getattr(torch, dtype or "float32", None)
    try:
        if not isinstance(kind, torch.dtype):
            raise ValueError(f"torch has no dtype {dtype!r}")
        sizes = [int(n) for n in shape.split(",")]
        if min(sizes) < 1 or math.prod(sizes) > sys.maxsize // 16:  # of complex128
            raise ValueError("no batch has such sizes")
        return torch.empty(sizes, dtype=kind, device="meta")
    except ValueError as error:
        raise ConfigError(f"--batch {text}: {error}; write sizes and a dtype, e.g. 8,128:int64.") from error
