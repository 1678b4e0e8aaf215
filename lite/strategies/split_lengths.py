"""Lengths that the ranks of tensor parallelism don't divide, refused where a layer first splits them.

Parts of different lengths pass between layers as plain tensors, which torch takes for equal ones: what puts them
together then reckons with another length on each rank, and gloo ends the process (torch 2.13).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from lite.errors import UsageError
from lite.strategies.parallel_plan import matches


def watch_lengths(module: nn.Module, plan: Mapping[str, Any] | None, size: int) -> None:
    """Check the length of what is split over the sequence, at each forward, where it was whole before.

    That is at an embedding, say; what later layers put together and split again has been checked there.

    Args:
        module: The model.
        plan: Layers and styles; None, where a function has split them, checks nothing.
        size: Over how many ranks.
    """
    if plan is None:
        return
    styles = matches(module, plan)
    over_sequence: set[str] = set()  # the modules some of whose layers, in their order, have taken parts
    for name, layer in module.named_modules():
        style = styles.get(name)
        owner = name.rpartition(".")[0]
        for position, dim in _split_dims(layer, style, put_together=owner in over_sequence):
            what = f"parallelize[{name!r}]={type(style).__name__}"
            check = partial(_check, what, type(module).__name__, position, dim, size)
            layer.register_forward_pre_hook(check, prepend=True)  # before the style's own, which splits
        if _takes_parts(style):
            over_sequence.add(name if _of_module(style) else owner)


def _check(what: str, model: str, position: int, dim: int, size: int, layer: Any, inputs: tuple[Any, ...]) -> None:
    tensor = inputs[position] if position < len(inputs) else None
    if not isinstance(tensor, Tensor) or not -tensor.ndim <= dim < tensor.ndim:
        return
    if dim % tensor.ndim == tensor.ndim - 1 and not isinstance(layer, nn.Embedding):  # the features, by their number
        return
    length = tensor.shape[dim]
    if length % size:
        raise UsageError(
            f"{what} splits dimension {dim}, the sequence, over tensor_parallel={size} ranks, and {model} was given "
            f"one of length {length}, which {size} does not divide: ranks would hand on parts of different lengths as "
            f"if they were equal. Pad it to {length + -length % size} (a multiple of {size}), and leave the padding "
            "out of the loss (ignore_index=-100, say) and of what you read of the outputs."
        )


def _split_dims(layer: nn.Module, style: Any, *, put_together: bool) -> Iterator[tuple[int, int]]:
    """Which positional inputs are whole along which dimension, that the style splits them or the output along.

    Args:
        layer: The layer.
        style: Its style, or None.
        put_together: Whether what it gets was split before, and has been put together by the layers beside it.
    """
    from torch.distributed.tensor.parallel import ColwiseParallel, PrepareModuleInput, RowwiseParallel

    if isinstance(style, (ColwiseParallel, RowwiseParallel)):
        features = any(layout.is_shard() for layout in style.input_layouts)  # of a column layer, before this one
        if style.use_local_output and not _takes_parts(style) and not (features and put_together):
            # An embedding's input lacks the last dimension of its output.
            shift = int(isinstance(layer, nn.Embedding))
            layouts: Any = filter(_over_sequence, style.output_layouts)
            dims = [layout.dim for layout in layouts]
            yield from ((0, dim if dim >= 0 else dim + shift) for dim in dims)
    style = _of_module(style)
    if isinstance(style, PrepareModuleInput) and style.use_local_output:
        pairs: Any = zip(style.input_layouts or (), style.desired_input_layouts or (), strict=False)
        for position, (given, desired) in enumerate(pairs):
            if _over_sequence(desired) and not _over_sequence(given):
                yield position, desired.dim


def _of_module(style: Any) -> Any:
    """What prepares the inputs of a whole module, or None."""
    from torch.distributed.tensor.parallel import PrepareModuleInput

    style = getattr(style, "prepare_module_input", style)  # of PrepareModuleInputOutput
    return style if isinstance(style, PrepareModuleInput) else None


def _takes_parts(style: Any) -> bool:
    """Whether a layer or module with this style gets what is split over the sequence already."""
    from torch.distributed.tensor.parallel import SequenceParallel

    layouts = getattr(_of_module(style) or style, "input_layouts", None) or ()
    return isinstance(style, SequenceParallel) or any(map(_over_sequence, layouts))


def _over_sequence(layout: Any) -> bool:
    """Whether it splits another dimension than that of the features."""
    return layout is not None and layout.is_shard() and layout.dim != -1
