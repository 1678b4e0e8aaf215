"""Layers whose activations are computed again in backward, and layers that are compiled, each by itself.

A layer's `forward` is replaced on the object, so classes, names and keys stay as they are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

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
    from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

    options: dict[str, Any] = {"use_reentrant": False}
    if selective:
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _matrix_products())
    layer.forward = functools.partial(checkpoint, layer.forward, **options)
    return functools.partial(layer.__dict__.pop, "forward", None)


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
