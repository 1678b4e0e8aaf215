"""Some layers of a model that run after one another, in the job's precision."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from lite.precision.base import Precision


class Stage(nn.Module):
    """Each layer takes what the one before it returns. The layers stay where they are in the user's model, too.

    Args:
        layers: In the order in which they run.
        precision: What they compute in.
        first: Whether the model's inputs come in here.
        last: Whether its outputs go out here.

    Attributes:
        probing: The next forward serves to find out shapes, and leaves buffers as they are.
    """

    def __init__(self, layers: Sequence[nn.Module], precision: Precision, *, first: bool, last: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self._precision, self._first, self._last = precision, first, last
        self.probing = False

    def forward(self, *inputs: Any) -> Any:
        """Run the layers. Each gets one thing, a tuple included, as in an nn.Sequential; but the model's inputs come to
        its first layer one by one."""
        if self.probing:
            self.probing = False
            with self._on_copied_buffers():
                return self(*inputs)
        if self._first:
            inputs = tuple([self._precision.convert_input(x) for x in inputs])
        with self._precision.autocast():
            first, *others = self.layers
            x = first(*inputs) if self._first or len(inputs) == 1 else first(inputs)
            for layer in others:
                x = layer(x)
        return self._precision.convert_output(x) if self._last else x

    @contextmanager
    def _on_copied_buffers(self) -> Iterator[None]:
        held = [(part, dict(part._buffers)) for part in self.modules() if part._buffers]
        for part, buffers in held:
            part._buffers.update({k: b if b is None else b.clone() for k, b in buffers.items()})
        try:
            yield
        finally:
            for part, buffers in held:
                part._buffers.update(buffers)


def split(tensors: Sequence[Tensor], count: int) -> list[tuple[Tensor, ...]]:
    """Each part's slices of tensors that have the batch as their first dimension."""
    return list(zip(*(tensor.chunk(count) for tensor in tensors), strict=True))
