"""Every tensor moves, whatever holds it, and nothing else does."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from dataclasses import dataclass

import pytest
import torch

from lite.data.transfer import move_to_device

Pair = namedtuple("Pair", "a b")
META = torch.device("meta")


@dataclass(frozen=True)
class Sample:
    x: torch.Tensor
    name: str


class Graph:
    def __init__(self) -> None:
        self.moved: torch.device | None = None

    def to(self, device: torch.device) -> Graph:
        twin = Graph()
        twin.moved = device
        return twin


def test_nested_batches_move_and_keep_their_types() -> None:
    """dict, list, tuple, namedtuple, dataclass, OrderedDict, objects with .to; other leaves are the same objects."""
    t = torch.ones(2)
    leaf = object()
    batch = {
        "l": [t, 1],
        "t": (t, "s"),
        "n": Pair(t, None),
        "d": Sample(t, "x"),
        "o": OrderedDict(k=t),
        "g": Graph(),
        "x": leaf,
    }
    moved = move_to_device(batch, META)
    assert moved["l"][0].device == META
    assert moved["l"][1] == 1
    assert moved["t"][0].is_meta
    assert moved["t"][1] == "s"
    assert isinstance(moved["n"], Pair)
    assert moved["n"].a.is_meta
    assert isinstance(moved["d"], Sample)
    assert moved["d"].x.is_meta
    assert batch["d"].x is t
    assert type(moved["o"]) is OrderedDict
    assert moved["o"]["k"].is_meta
    assert batch["o"]["k"] is t
    assert moved["g"].moved == META
    assert moved["x"] is leaf


def test_what_is_there_already_is_returned_as_it_is() -> None:
    """No copy on the same device."""
    t = torch.ones(2)
    assert move_to_device(t, torch.device("cpu")) is t


@pytest.mark.gpu
def test_pinned_memory_moves_without_blocking() -> None:
    """On a CUDA device."""
    t = torch.ones(2).pin_memory()
    assert move_to_device({"t": t}, torch.device("cuda", 0))["t"].device == torch.device("cuda", 0)


def test_a_packed_sequence_moves_by_its_own_method() -> None:
    """It is a tuple, of which the batch sizes must stay on the CPU."""
    packed = torch.nn.utils.rnn.pack_sequence([torch.ones(3), torch.ones(2)])
    moved = move_to_device([packed], META)[0]
    assert moved.data.is_meta
    assert moved.batch_sizes.device.type == "cpu"
