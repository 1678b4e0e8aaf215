"""Plain parts of layers' outputs that a model returns, and losses would take for the whole: told at its first forward.

Where they are all that it returns, a loss can take nothing else, and they are refused. Beside whole tensors they may be
for looking at only, and one warning says what they are.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_leaves_with_path

from lite.errors import ConfigError
from lite.sharded import is_sharded
from lite.strategies.parallel_plan import column_layers, matches
from lite.strategies.remedies import class_name


def watch_first_outputs(module: nn.Module, plan: Mapping[str, Any] | None) -> None:
    """Look at the outputs of layers that stay split until a forward of the model has not been refused for them.

    Later forwards cost nothing. What the compiler runs is not looked at.

    Args:
        module: The model, split already.
        plan: Layers and styles, or None where a function has split them.
    """
    keys = _left_split(module, plan)
    parts: dict[str, weakref.ref[Tensor]] = {}

    def note(name: str, layer: Any, inputs: Any, output: Any) -> None:
        if torch.compiler.is_compiling() or not isinstance(output, Tensor) or is_sharded(output):
            return
        if plan is not None or output.shape[-1] < layer.weight.shape[0]:
            parts[name] = weakref.ref(output)

    def check(model: nn.Module, inputs: Any, outputs: Any) -> None:
        if torch.compiler.is_compiling():
            return
        returned = {
            id(leaf): keystr(path)
            for path, leaf in tree_leaves_with_path(outputs)
            if isinstance(leaf, Tensor) and leaf.is_floating_point()
        }
        split = {name: returned[id(part())] for name, part in parts.items() if id(part()) in returned}
        if split and len(set(split.values())) == len(returned):
            name = next(iter(split))
            raise ConfigError(_refusal(model, name, keys[name]))
        if split:
            warnings.warn(_warning(model, split, keys), stacklevel=2)
        for handle in handles:
            handle.remove()

    handles = [module.get_submodule(name).register_forward_hook(partial(note, name)) for name in keys]
    if handles:  # before fully_shard's own hook, which may cast what is returned
        handles.append(module.register_forward_hook(check, prepend=True))


def _left_split(module: nn.Module, plan: Mapping[str, Any] | None) -> dict[str, str]:
    """The layers that may hand on a part as a plain tensor, by name, and what of parallelize says so."""
    if plan is None:
        return dict.fromkeys(column_layers(module, None), "parallelize")
    keys = {name: key for key, style in plan.items() for name in matches(module, {key: style})}
    found = {name: style for name, style in matches(module, plan).items() if _hands_on_parts(style)}
    return {name: f"parallelize[{keys[name]!r}]={type(style).__name__}" for name, style in found.items()}


def _hands_on_parts(style: Any) -> bool:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel

    if isinstance(style, SequenceParallel):
        return style.use_local_output
    known = isinstance(style, (ColwiseParallel, RowwiseParallel))
    return known and style.use_local_output and any(layout.is_shard() for layout in style.output_layouts)


def _refusal(model: nn.Module, name: str, key: str) -> str:
    return (
        f"{key} leaves the output of {name!r} split, and {class_name(model)} returned it as it is: a plain tensor with "
        f"this rank's part, which a loss would take for the whole. {_REMEDY}"
    )


def _warning(model: nn.Module, split: Mapping[str, str], keys: Mapping[str, str]) -> str:
    what = "; ".join(f"outputs{path} is that of {name!r} ({keys[name]})" for name, path in split.items())
    return (
        f"{class_name(model)} returns outputs of layers that stay split as they are, plain tensors with this rank's "
        f"part, and a loss of them would take the part for the whole: {what}. {_REMEDY}"
    )


_REMEDY = (
    "Use output_layouts=Replicate() for that layer; or, for a cross-entropy of logits that stay split, ColwiseParallel("
    "use_local_output=False) and ModelParallelStrategy(loss_parallel=True)."
)
