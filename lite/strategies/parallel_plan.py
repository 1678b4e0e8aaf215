"""Plans of tensor parallelism: which layer is split how, checked before a layer is touched."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from fnmatch import fnmatch
from typing import Any

from torch import nn

from lite.errors import ConfigError
from lite.sharded import is_sharded

# What models call the number of their attention heads.
_HEADS = (
    "num_heads",
    "num_attention_heads",
    "num_key_value_heads",
    "num_kv_heads",
    "n_heads",
    "n_head",
    "n_kv_heads",
    "nhead",
)


def check_plan(plan: Mapping[str, Any]) -> None:
    """Refuse a plan that is none, before there is a model.

    Raises:
        ConfigError: Keys are no names of modules, or values no ParallelStyle.
    """
    from torch.distributed.tensor.parallel import ParallelStyle

    if not plan:
        raise ConfigError("parallelize={} splits nothing; name layers and how they are split, or use strategy='fsdp'.")
    for key, style in plan.items():
        if not isinstance(key, str) or not isinstance(style, ParallelStyle):
            raise ConfigError(
                f"parallelize[{key!r}]={style!r} must be a torch.distributed.tensor.parallel.ParallelStyle, e.g. "
                "ColwiseParallel(), for the name of a layer."
            )


def matches(module: nn.Module, plan: Mapping[str, Any]) -> dict[str, Any]:
    """The layers that a plan splits, by name, with the style of each.

    Raises:
        ConfigError: A key matches no layer; torch would only warn.
    """
    names = [name for name, _ in module.named_modules() if name]
    found: dict[str, Any] = {}
    for key, style in plan.items():
        mine = [name for name in names if _matches(name, key)]
        if not mine:
            raise ConfigError(
                f"parallelize has the key {key!r}, which matches no layer of {type(module).__name__}{_near(key, names)}"
            )
        found.update(dict.fromkeys(mine, style))
    return found


def check_styles(module: nn.Module, plan: Mapping[str, Any]) -> None:
    """Refuse a style for a layer that it can't split, before another one is split.

    Raises:
        ConfigError: ColwiseParallel or RowwiseParallel is meant for something else than Linear and Embedding.
    """
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

    for name, style in matches(module, plan).items():
        layer = module.get_submodule(name)
        if type(style) in (ColwiseParallel, RowwiseParallel) and not isinstance(layer, (nn.Linear, nn.Embedding)):
            raise ConfigError(
                f"parallelize[{name!r}]={type(style).__name__}() is for Linear and Embedding layers, and {name!r} is a "
                f"{type(layer).__name__}; leave it out, which keeps it whole on each rank, or use SequenceParallel() "
                "for a norm or dropout between layers that are split."
            )


def _matches(name: str, key: str) -> bool:
    parts, patterns = name.split("."), key.split(".")
    return len(parts) == len(patterns) and all(map(fnmatch, parts, patterns))


def _near(key: str, names: list[str]) -> str:
    patterns = sorted({".".join("*" if part.isdigit() else part for part in name.split(".")) for name in names})
    close = difflib.get_close_matches(key, [*patterns, *names], n=1)
    there = ", ".join(patterns[:12]) + (", ..." if len(patterns) > 12 else "")
    return (f"; did you mean {close[0]!r}? " if close else ". ") + f"It has {there}."


def column_layers(module: nn.Module, plan: Mapping[str, Any] | None) -> Iterable[str]:
    """The layers whose outputs are split: by the plan, or as they are now."""
    if plan is not None:
        from torch.distributed.tensor.parallel import ColwiseParallel

        return [name for name, style in matches(module, plan).items() if isinstance(style, ColwiseParallel)]
    return [
        name
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear) and is_sharded(layer.weight) and _splits_rows(layer.weight)
    ]


def _splits_rows(weight: Any) -> bool:
    return any(placement.is_shard(0) for placement in weight.placements)


def split_dims(module: nn.Module, plan: Mapping[str, Any]) -> dict[str, int]:
    """The parameters that a plan splits, by the model's first name for each, and the dimension that is cut.

    Raises:
        ConfigError: A style is not one of torch's, for a layer that has parameters.
    """
    from torch.distributed.tensor import parallel

    kinds = (
        "SequenceParallel",
        "PrepareModuleInput",
        "PrepareModuleOutput",
        "PrepareModuleInputOutput",
    )  # torch >= 2.7
    whole = tuple(getattr(parallel, kind) for kind in kinds if hasattr(parallel, kind))
    names = {id(p): name for name, p in module.named_parameters()}
    dims: dict[str, int] = {}
    for name, style in matches(module, plan).items():
        layer = module.get_submodule(name)
        own = dict(layer.named_parameters(recurse=False))
        if not own or isinstance(style, whole):
            continue
        known = isinstance(style, (parallel.ColwiseParallel, parallel.RowwiseParallel))
        if not known or not isinstance(layer, (nn.Linear, nn.Embedding)):
            raise ConfigError(
                f"parallelize[{name!r}]={style!r}: how it splits a {type(layer).__name__} is not known; estimates are "
                "for torch's own styles around Linear and Embedding."
            )
        rows = isinstance(style, parallel.ColwiseParallel) == isinstance(layer, nn.Linear)
        dims[names[id(layer.weight)]] = 0 if rows else 1
        if own.get("bias") is not None and rows:
            dims[names[id(layer.bias)]] = 0
    return dims


def check_heads(module: nn.Module, layers: Iterable[str], size: int) -> None:
    """Refuse to cut through an attention head.

    Args:
        module: The model.
        layers: Names of layers whose outputs are split.
        size: Over how many ranks.

    Raises:
        ConfigError: The module that holds such a layer has a number of heads that `size` doesn't divide.
    """
    for name in layers:
        owner = module.get_submodule(name.rpartition(".")[0])
        for attribute in _HEADS:
            count = getattr(owner, attribute, None)
            if isinstance(count, int) and not isinstance(count, bool) and count % size:
                where = name.rpartition(".")[0] or type(module).__name__
                raise ConfigError(
                    f"tensor_parallel={size} does not divide the {count} heads of {where!r} ({attribute}={count}), "
                    f"whose layer {name!r} is split: some ranks would get a part of a head. Use a tensor_parallel that "
                    f"divides {count}, or leave that layer out of parallelize."
                )


def shared_names(module: nn.Module) -> list[list[str]]:
    """The names of each parameter that has several."""
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [group for group in names.values() if len(group) > 1]


def tie_again(module: nn.Module, groups: list[list[str]]) -> None:
    """Give parameters that were one, and have been split one by one, the same object again.

    Raises:
        ConfigError: They are split in different ways.
    """
    for group in groups:
        current = [module.get_parameter(name) for name in group]
        first: Any = current[0]
        if all(other is first for other in current):
            continue
        kinds = {(getattr(p, "device_mesh", None), tuple(getattr(p, "placements", ()))) for p in current}
        if len(kinds) > 1:
            raise ConfigError(
                f"parallelize splits {' and '.join(map(repr, group))}, which are one parameter (tied weights), in "
                "different ways; split both along the same dimension: RowwiseParallel for the embedding and "
                "ColwiseParallel for the head, or neither."
            )
        for name in group[1:]:
            path, _, attribute = name.rpartition(".")
            setattr(module.get_submodule(path), attribute, first)
