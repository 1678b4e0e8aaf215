"""Plans of tensor parallelism: which layer is split how, checked before a layer is touched."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from fnmatch import fnmatch
from typing import Any

import torch
from torch import nn

from lite.errors import ConfigError, some
from lite.sharded import is_sharded
from lite.state import plain_key
from lite.strategies.remedies import MIXED

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

# What torch's errors say of tensors that don't fit together.
_OF_SHAPES = ("shape", "size", "elements", "reduction dim", "must match", MIXED)


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
    """The layers that a plan splits, by name, with the style of each: of several keys that match it, the last one's.

    Raises:
        ConfigError: A key matches no layer; torch would only warn.
    """
    names = [name for name, _ in module.named_modules() if name]
    found: dict[str, Any] = {}
    for key, style in plan.items():
        mine = [name for name in names if _matches(plain_key(name), key)]
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
    names = list(map(plain_key, names))
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


def check_division(module: nn.Module, plan: Mapping[str, Any], size: int) -> None:
    """Refuse layers whose parts, of different widths, would be taken for equal ones where they pass as plain tensors.

    Args:
        module: The model.
        plan: Layers and styles.
        size: Over how many ranks.

    Raises:
        ConfigError: `size` doesn't divide a width that is handed on, or taken, in parts.
    """
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

    styles = matches(module, plan)
    # Between layers that hand on DTensors, and where what comes out or goes in is whole, parts may differ.
    marked = any(isinstance(style, ColwiseParallel) and not style.use_local_output for style in styles.values())
    for name, style in styles.items():
        layer = module.get_submodule(name)
        if type(style) is ColwiseParallel and style.use_local_output and _is_split(style.output_layouts):
            attribute = "out_features" if isinstance(layer, nn.Linear) else "embedding_dim"
            remedy = "ColwiseParallel(output_layouts=Replicate())"
        elif type(style) is RowwiseParallel and isinstance(layer, nn.Linear) and _is_split(style.input_layouts):
            if marked:
                continue
            attribute, remedy = "in_features", "RowwiseParallel(input_layouts=Replicate())"
        else:
            continue
        width = getattr(layer, attribute)
        if width % size:
            raise ConfigError(
                f"parallelize[{name!r}]={type(style).__name__}(): tensor_parallel={size} does not divide its "
                f"{attribute}={width}, and ranks would hand on parts of different widths as if they were equal; use a "
                f"width or a tensor_parallel that divide, {remedy}, or leave the layer out."
            )


def _is_split(layouts: Iterable[Any]) -> bool:
    return any(layout.is_shard() for layout in layouts)


def explain_forward_error(
    module: nn.Module, error: BaseException, plan: Mapping[str, Any] | None, size: int
) -> str | None:
    """What to do where a layer was given a part of what it was made for, or the whole; None where it was not that.

    Args:
        module: The model.
        error: What its forward raised.
        plan: Layers and styles, or None where a function has split them.
        size: Over how many ranks.
    """
    of_compiler = type(error).__module__.startswith(("torch._dynamo", "torch._inductor"))
    if of_compiler or isinstance(error, torch.OutOfMemoryError) or not any(word in str(error) for word in _OF_SHAPES):
        return None
    names = {id(part): name for name, part in module.named_modules()}
    where, trace = module, error.__traceback__
    while trace is not None:
        called = trace.tb_frame.f_locals.get("self")
        if isinstance(called, nn.Module) and id(called) in names:
            where = called
        trace = trace.tb_next
    name = f"{names[id(where)]!r}, a {type(where).__name__}," if where is not module else "its own forward"
    advice = f"Under tensor_parallel={size} {_what_is_split(module, plan, size)}"
    styles = matches(module, plan) if plan is not None else {}
    marked = [name for name, style in styles.items() if _hands_on_marked(style)]
    if MIXED in str(error) and where is module and marked:
        over_sequence = any(map(_splits_sequence, styles.values()))
        advice = (
            f"The outputs of {some(marked)} stay split and marked as such, DTensors (use_local_output=False), which go "
            "into a cross-entropy; what else is computed from them with plain tensors (tokens to append, say) takes "
            "logits.full_tensor(), on all ranks." + (f" If it was another tensor: {advice}" if over_sequence else "")
        )
    return f"{type(module).__name__} could not compute: {name} got what does not fit it ({error}). {advice}"


def _what_is_split(module: nn.Module, plan: Mapping[str, Any] | None, size: int) -> str:
    """Which outputs are parts, and what goes with them, for the styles that are there."""
    styles = matches(module, plan) if plan is not None else {}
    over_sequence = [name for name, style in styles.items() if _splits_sequence(style)]
    columns = [name for name in column_layers(module, plan) if name not in over_sequence]
    if over_sequence:
        features = f" The outputs of {some(columns)} have 1/{size} of their features." if columns else ""
        return (
            f"the outputs of {some(over_sequence)} are split over the sequence (SequenceParallel, or output_layouts="
            f"Shard(1)): 1/{size} of the positions on each rank. What such a tensor meets must be split alike: the "
            "residual that it is added to, the input of a SequenceParallel, which takes a plain tensor for this rank's "
            "part. So split them from the embedding, RowwiseParallel(input_layouts=Replicate(), output_layouts="
            "Shard(1)), through each block, SequenceParallel() for the norm and "
            "RowwiseParallel(output_layouts=Shard(1)) for the last layer, to the head, "
            "ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()); or leave SequenceParallel and "
            "Shard(1) out of parallelize." + features
        )
    rows = [name for name, style in styles.items() if _takes_parts(style)]
    if rows and not columns:
        return (
            f"{some(rows)} take 1/{size} of their features on each rank, and nothing before them is split. Use "
            "RowwiseParallel(input_layouts=Replicate()) for them, or ColwiseParallel() for the layer before each."
        )
    return (
        f"the outputs of {some(columns) or 'split layers'} have 1/{size} of their "
        "features on each rank. What comes after such a layer and needs all of them (a BatchNorm, a view by a constant "
        "number of heads or features) gets them by ColwiseParallel(output_layouts=Replicate()) for that layer, and "
        "RowwiseParallel(input_layouts=Replicate()) for the one that takes it on; or leave both out of parallelize, or "
        "write -1 in the view in place of that number."
    )


def _splits_sequence(style: Any) -> bool:
    """Whether it hands on a part of the positions, or of the batch, rather than of the features."""
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel

    if isinstance(style, SequenceParallel):
        return True
    known = isinstance(style, (ColwiseParallel, RowwiseParallel))
    return known and any(layout.is_shard() and layout.dim != -1 for layout in style.output_layouts)


def _hands_on_marked(style: Any) -> bool:
    """Whether its outputs are DTensors that are split over the features."""
    from torch.distributed.tensor.parallel import ColwiseParallel

    return isinstance(style, ColwiseParallel) and not style.use_local_output and _is_split(style.output_layouts)


def _takes_parts(style: Any) -> bool:
    from torch.distributed.tensor.parallel import RowwiseParallel

    return isinstance(style, RowwiseParallel) and _is_split(style.input_layouts)


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
