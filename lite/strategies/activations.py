"""Layers whose activations are computed again in backward, and layers that are compiled, each by itself.

A layer's `forward` is replaced on the object, so classes, names and keys stay as they are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase  # BatchNorm, SyncBatchNorm and InstanceNorm
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from lite.errors import ConfigError, UsageError
from lite.strategies.blocks import choose_blocks, find_blocks

_SMALL = 1 << 16  # elements of a buffer that is copied in each forward


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
    _let_compile()
    buffers = _Buffers(layer)
    layer.forward = functools.partial(_recomputed, layer.forward, options, buffers)
    return functools.partial(layer.__dict__.pop, "forward", None)


def _recomputed(
    forward: Callable[..., Any], options: dict[str, Any], buffers: _Buffers, /, *args: Any, **kwargs: Any
) -> Any:
    """A layer's checkpointed forward: a function that torch.compile enters by itself, as it doesn't `checkpoint`."""
    if not buffers.owners:
        return checkpoint(forward, *args, **options, **kwargs)
    return checkpoint(_run, forward, _Written(buffers), *args, **options, **kwargs)


class _Buffers:
    """A layer's modules that have buffers, and which of these their forward is known to write.

    Attributes:
        owners: The modules.
        written: By whether the layer trains, the buffers that a computation has written; None before the first one.
    """

    def __init__(self, layer: nn.Module) -> None:
        self.owners = [part for part in layer.modules() if any(b is not None for b in part._buffers.values())]
        self.written: dict[bool, set[tuple[nn.Module, str]] | None] = {True: None, False: None}

    def of(self) -> Iterator[tuple[nn.Module, str, Tensor]]:
        """All of them."""
        for part in self.owners:
            yield from ((part, name, buffer) for name, buffer in part._buffers.items() if buffer is not None)

    @property
    def trains(self) -> bool:
        """Whether a part of the layer does."""
        return any(part.training for part in self.owners)


class _Written:
    """The buffers that a layer's first computation writes (statistics of norms, spectral_norm's vectors, codebooks).

    The computation in backward begins with what the first one has found in them, and leaves them as they are then.
    """

    def __init__(self, buffers: _Buffers) -> None:
        self._buffers = buffers
        self._before: list[tuple[dict[str, Any], str, Tensor]] | None = None

    def run(self) -> AbstractContextManager[None]:
        """A context for either computation."""
        return self._noted() if self._before is None else self._again(self._before)

    @contextmanager
    def _noted(self) -> Iterator[None]:
        trains = self._buffers.trains
        known = self._buffers.written[trains]

        def copy(part: nn.Module, name: str, buffer: Tensor) -> Tensor | None:
            # Masks and tables, which may be large, are copied once to find out.
            wanted = known is None or (part, name) in known or buffer.numel() <= _SMALL
            return buffer.detach().clone() if wanted else None

        everything = [(part, name, buffer, copy(part, name, buffer)) for part, name, buffer in self._buffers.of()]
        versions = [_version(buffer) for _, _, buffer, _ in everything]
        yield
        written = [
            (part, name, before)
            for (part, name, buffer, before), version in zip(everything, versions, strict=True)
            # torch 2.13: norms' own functions write without a new version.
            if _version(buffer) != version
            or part._buffers.get(name) is not buffer
            or (isinstance(part, _NormBase) and part.training)
        ]
        self._buffers.written[trains] = (known or set()) | {(part, name) for part, name, _ in written}
        late = next((f"{type(part).__name__}.{name}" for part, name, before in written if before is None), None)
        if late is not None:
            raise UsageError(
                f"activation_checkpointing: the buffer {late} was written in a forward after the first one, and what "
                "it was before, from which the layer is computed again, was not kept; write it in each forward of "
                "training, or outside of the layer, or leave that layer out of activation_checkpointing."
            )
        self._before = [(part._buffers, name, before) for part, name, before in written if before is not None]

    @contextmanager
    def _again(self, before: list[tuple[dict[str, Any], str, Tensor]]) -> Iterator[None]:
        now = [(buffers, name, buffers.get(name)) for buffers, name, _ in before]
        for buffers, name, buffer in before:
            buffers[name] = buffer.clone()
        try:
            yield
        finally:
            for buffers, name, value in now:
                buffers[name] = value


def _version(buffer: Tensor) -> int:
    return -1 if buffer.is_inference() else buffer._version


def _run(forward: Callable[..., Any], written: _Written, /, *args: Any, **kwargs: Any) -> Any:
    """Either computation of a layer with buffers."""
    with written.run() if torch.is_grad_enabled() else nullcontext():
        return forward(*args, **kwargs)


def _traced(forward: Callable[..., Any], written: _Written, /, *args: Any, **kwargs: Any) -> Any:
    """The same in a graph of torch.compile, which writes buffers once, at the end of its forward."""
    return forward(*args, **kwargs)


@functools.cache
def _let_compile() -> None:
    """Let torch.compile put `_traced` into a graph that holds the whole layer, and else leave `_run` to Python."""
    global _run
    _run = torch.compiler.disable(_run, recursive=False)  # type: ignore[no-untyped-call]
    torch.compiler.substitute_in_graph(_run, skip_signature_check=True)(_traced)


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
