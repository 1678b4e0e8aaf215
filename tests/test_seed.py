"""Random states go into a file and come back; seeds for batches are well mixed."""

from __future__ import annotations

import io
import random
from typing import Any

import numpy as np
import pytest
import torch

from lite.seed import RandomState, drawing_under, is_generator, mix, seed_here


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def generators() -> list[Any]:
    """One of every kind that a sampler may keep."""
    kinds = [np.random.PCG64, np.random.MT19937, np.random.Philox, np.random.SFC64]
    numpys = [np.random.Generator(kind(1)) for kind in kinds]
    return [*numpys, np.random.RandomState(2), random.Random(3), torch.Generator().manual_seed(4)]


def draw(kept: list[Any]) -> list[Any]:
    own = [g.normal(size=3).tolist() for g in kept[:5]]
    own += [kept[5].gauss(0, 1), torch.rand(2, generator=kept[6]).tolist()]
    return [*own, torch.randn(3).tolist(), random.gauss(0, 1), np.random.normal()]


def test_every_generator_goes_on_from_where_it_was_saved() -> None:
    """Global ones and those of samplers, also half-way through a pair of normal numbers."""
    kept = generators()
    draw(kept)
    state = through_a_file(RandomState.capture(kept).state_dict())
    expected = draw(kept)
    fresh = generators()
    restored = RandomState.from_state_dict(state)
    restored.restore()
    restored.restore_generators(fresh)
    assert draw(fresh) == expected


def test_drawing_under_a_state_leaves_no_trace() -> None:
    """Also when the block fails."""
    state = RandomState.capture()
    first = torch.rand(2).tolist()
    before = RandomState.capture()
    with pytest.raises(KeyError), drawing_under(state):
        assert torch.rand(2).tolist() == first
        random.random()
        raise KeyError
    assert before.same_globals(RandomState.capture())


def test_seeds_of_neighbouring_batches_have_nothing_in_common() -> None:
    """torch's generator takes the low 32 bits alone: they differ for every batch, rank and epoch."""
    seeds = {mix(epoch, number, rank) & 0xFFFFFFFF for epoch in range(4) for number in range(500) for rank in range(4)}
    assert len(seeds) == 8000
    seed_here(mix(1, 2, 3))
    drawn = torch.rand(()).item(), random.random(), np.random.rand()
    seed_here(mix(1, 2, 3))
    assert drawn == (torch.rand(()).item(), random.random(), np.random.rand())


def test_what_is_a_generator() -> None:
    """And what is not."""
    assert all(is_generator(g) for g in generators())
    assert not any(is_generator(x) for x in (3, None, np.random, random, np.zeros(1), torch.rand))


@pytest.mark.gpu
def test_the_devices_generator_is_part_of_the_state() -> None:
    """Dropout on a GPU goes on from where it was."""
    torch.rand(1, device="cuda")
    state = through_a_file(RandomState.capture(cuda=True).state_dict())
    expected = torch.rand(5, device="cuda")
    torch.rand(7, device="cuda")
    RandomState.from_state_dict(state).restore()
    assert torch.equal(torch.rand(5, device="cuda"), expected)
