"""Layers whose activations are computed again in backward, and layers that are compiled, each by itself.

A layer's `forward` is replaced on the object, so classes, names and keys stay as they are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase  # BatchNorm, SyncBatchNorm and InstanceNorm
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from lite.errors import ConfigError
from lite.strategies.blocks import choose_blocks, find_blocks


def prepare_blocks(
    module: nn.Module,
    checkpointing: Any,
    *,
    compile_blocks: bool,
    blocks: dict[str, nn.Module] | None = None,
    dry: bool = False,
) -> list[Callable[[], None]]:
    """Let layers forget their activations, or compile them.

    Args:
        module: The model.
        checkpointing: None, a set of classes, a function of a module, or "selective".
        compile_blocks: Whether `blocks` are compiled.
        blocks: The layers to compile.
        dry: Check the arguments alone.

    Returns:
        What takes it back.

    Raises:
        ConfigError: `checkpointing` is something else, or matches nothing.
    """
    undo: list[Callable[[], None]] = []
    if checkpointing is not None:
        chosen = _chosen(module, checkpointing)
        for layer in [] if dry else chosen.values():
            undo.append(_checkpoint(layer, selective=isinstance(checkpointing, str)))
    if compile_blocks and not dry:
        for block in (blocks or {}).values():
            block.compile()
            undo.append(functools.partial(_uncompile, block))
    return undo


def _chosen(module: nn.Module, choice: Any) -> dict[str, nn.Module]:
    if isinstance(choice, str):
        if choice != "selective":
            raise ConfigError(
                f"activation_checkpointing={choice!r} is not known; use a set of module classes, a function of a "
                "module, or 'selective'."
            )
        chosen = find_blocks(module)
        if not chosen:
            raise ConfigError(
                f"activation_checkpointing='selective' found no repeated layers in {type(module).__name__}; name them "
                "by a set of classes."
            )
        return chosen
    found = choose_blocks(module, choice, "activation_checkpointing", tied=True)
    # The outermost ones: what lies within one is computed again anyway.
    return {name: part for name, part in found.items() if not any(name.startswith(f"{other}.") for other in found)}


def _checkpoint(layer: nn.Module, *, selective: bool) -> Callable[[], None]:
    options: dict[str, Any] = {"use_reentrant": False}
    if selective:
        options["context_fn"] = _keeping_products
    norms = [part for part in layer.modules() if isinstance(part, _NormBase) and part.running_mean is not None]
    layer.forward = functools.partial(_recomputed, layer.forward, options, norms)
    return functools.partial(layer.__dict__.pop, "forward", None)


def _recomputed(
    forward: Callable[..., Any], options: dict[str, Any], norms: list[_NormBase], /, *args: Any, **kwargs: Any
) -> Any:
    """A layer's checkpointed forward: a function that torch.compile enters by itself, as it doesn't `checkpoint`."""
    # A compiled graph writes the statistics once, at the end of its forward.
    if norms and not torch.compiler.is_compiling():
        contexts = functools.partial(_contexts, options.get("context_fn"), norms)
        options = {**options, "context_fn": contexts}
    return checkpoint(forward, *args, **options, **kwargs)


def _contexts(others: Callable[[], tuple[Any, Any]] | None, norms: list[_NormBase]) -> tuple[Any, Any]:
    """The contexts of the first computation and of the one in backward."""
    first, again = others() if others is not None else (nullcontext(), nullcontext())
    return first, _sparing(norms, again)


@contextmanager
def _sparing(norms: list[_NormBase], context: Any) -> Iterator[None]:
    """`context`, in which norms update copies of their statistics: the first computation has updated their own.

    Without statistics they would give the same output, but checkpoint refuses a computation that saves fewer tensors.
    """
    own = [(norm._buffers, dict(norm._buffers)) for norm in norms if norm.training]
    for buffers, values in own:
        buffers.update((name, None if value is None else value.clone()) for name, value in values.items())
    try:
        with context:
            yield
    finally:
        for buffers, values in own:
            buffers.update(values)


def _keeping_products() -> tuple[Any, Any]:
    first, again = create_selective_checkpoint_contexts(_matrix_products())  # type: ignore[no-untyped-call]
    return first, again


def _matrix_products() -> list[Any]:
    """The operations whose results are worth keeping: they cost more to compute than to hold.

    Source: https://pytorch.org/blog/activation-checkpointing-techniques/
    """
    aten = torch.ops.aten
    names: tuple[str, ...] = ("mm", "addmm", "bmm", "linear", "convolution", "_scaled_dot_product_flash_attention")
    names += ("_scaled_dot_product_efficient_attention", "_scaled_dot_product_flash_attention_for_cpu")
    return [getattr(aten, name).default for name in names if hasattr(aten, name)]


def _uncompile(block: nn.Module) -> None:
    block._compiled_call_impl = None
