"""Random numbers for a sampler that draws whenever it likes.

While nobody else draws, they are the global generators' own, as without lite. As soon as somebody does (dropout, say),
the sampler has a stream of its own, alike on all ranks and in every replay; the global generators go on as if it had
drawn nothing. torch's, Python's and numpy's are looked at one by one.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from lite.seed import KINDS, RandomState, mix


class Draws:
    """What the sampler of one pass draws from, after its first batch.

    Args:
        start: Where the pass began to draw.
        state: Where its first batch ended.
    """

    def __init__(self, start: RandomState, state: RandomState) -> None:
        self._start = start
        self._state = state

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """Within the block the global generators are the sampler's."""
        here, mine = RandomState.capture(), self._state
        mine.restore()
        try:
            yield
        finally:
            self._state = RandomState.capture()
            for kind in KINDS:
                if not here.same_one(mine, kind):
                    here.restore_one(kind)

    def apart(self) -> dict[str, int]:
        """The generators that the sampler has drawn from and that stand elsewhere now, and a number for its last state.

        The next pass must not begin where they stand: it would draw what this one has drawn once more.
        """
        here = RandomState.capture()
        drawn = [kind for kind in KINDS if not self._start.same_one(self._state, kind)]
        return {kind: _digest(self._state, kind) for kind in drawn if not here.same_one(self._state, kind)}


def move_on(apart: dict[str, int]) -> None:
    """Let generators of which a pass has drawn apart go on elsewhere."""
    here = RandomState.capture()
    for kind, last in apart.items():
        seed = mix(_digest(here, kind), last)
        if kind == "torch":
            torch.default_generator.manual_seed(seed)
        elif kind == "python":
            random.seed(seed)
        else:
            np.random.seed(seed & (2**32 - 1))


def _digest(state: RandomState, kind: str) -> int:
    value = getattr(state, f"{kind}_state")
    if kind == "torch":
        return state.digest()
    return mix(*(int(n) & (2**64 - 1) for n in (value[1] if kind == "python" else (*value[1], value[2]))))
