"""Equal values have equal checksums and others don't, whatever holds them."""

from __future__ import annotations

import copy
import datetime
import math
from collections import OrderedDict, UserDict, deque, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from pathlib import PurePosixPath
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from lite.data.checksum import checksum

Pair = namedtuple("Pair", "a b")


@dataclass(frozen=True, slots=True)
class Sample:
    x: Any


class Plain:
    def __init__(self, x: Any) -> None:
        self.x = x
        self.itself = self


def structured(x: float) -> Any:
    return np.array([(1, x)], dtype=np.dtype([("a", "i1"), ("b", "f8")], align=True))


KINDS: dict[str, Callable[[float], Any]] = {
    "tensor": lambda x: torch.full((2, 3), x),
    "bfloat16": lambda x: torch.full((2,), x, dtype=torch.bfloat16),
    "view": lambda x: torch.full((4, 4), x).t()[1:],
    "strided": lambda x: torch.full((1, 2), x)[:, 0],
    "conj": lambda x: torch.tensor([x + 1j]).conj(),
    "sparse": lambda x: torch.tensor([[0.0, x], [1.0, 0.0]]).to_sparse(),
    "csr": lambda x: torch.sparse_csr_tensor([0, 1], [0], torch.tensor([x]), (1, 2), check_invariants=True),
    "csc": lambda x: torch.sparse_csc_tensor([0, 1], [0], torch.tensor([x]), (2, 1), check_invariants=True),
    "nested": lambda x: torch.nested.nested_tensor([torch.ones(2), torch.full((3,), x)]),
    "jagged": lambda x: torch.nested.nested_tensor([torch.ones(2), torch.full((3,), x)], layout=torch.jagged),
    "array": lambda x: np.full((2, 3), x)[:, ::2],
    "scalar": np.float32,
    "longdouble": lambda x: np.array([x], dtype=np.longdouble),
    "dates": lambda x: np.array([int(x)], dtype="datetime64[s]"),
    "words": lambda x: np.array(["a", str(x)]),
    "objects": lambda x: np.array([{"x": x}, None], dtype=object),
    "masked": lambda x: np.ma.array([1.0, 2.0], mask=[False, x == 1]),
    "structured": structured,
    "record": lambda x: structured(x)[0],
    "int": lambda x: 2**70 + int(x),
    "bool": lambda x: x == 1,
    "float": float,
    "complex": lambda x: complex(0, x),
    "str": lambda x: f"\ud800{x}",
    "bytes": lambda x: bytes([int(x)]),
    "path": lambda x: PurePosixPath("a", str(x)),
    "date": lambda x: datetime.datetime(2000, 1, int(x)),
    "decimal": lambda x: Decimal(x),
    "list": lambda x: [1, [x]],
    "tuple": lambda x: (1, (x,)),
    "namedtuple": lambda x: Pair(None, x),
    "deque": lambda x: deque([x]),
    "range": lambda x: range(int(x), 10**12),
    "dict": lambda x: {"a": {"b": x}},
    "keys": lambda x: {x: 1},
    "OrderedDict": lambda x: OrderedDict(a=x),
    "UserDict": lambda x: UserDict(a=torch.tensor([x])),
    "dataclass": lambda x: Sample(np.array([x])),
    "object": lambda x: Plain([torch.tensor([x])]),
    "namespace": lambda x: SimpleNamespace(x=Sample({"x": x})),
}


@pytest.mark.filterwarnings("ignore:.*(beta|prototype):UserWarning")  # of torch: such tensors are new
@pytest.mark.parametrize("kind", KINDS)
def test_values_of_every_kind_are_told_apart(kind: str) -> None:
    """Copies are equal, and another number in it is seen."""
    make = KINDS[kind]
    assert checksum([make(1.0)]) == checksum([make(1.0)])
    assert checksum([make(1.0)]) != checksum([make(2.0)])


def test_what_holds_a_value_and_where_counts() -> None:
    """Nesting, keys, shapes and dtypes."""
    for one, other in (
        ([1, [2]], [[1], 2]),
        ({"a": 1, "b": 2}, {"a": 2, "b": 1}),
        (torch.zeros(2, 3), torch.zeros(3, 2)),
        (torch.zeros(2), torch.zeros(2, dtype=torch.int32)),
        (np.zeros((2, 3)), np.zeros((3, 2))),
        ([], None),
        (torch.eye(2).to_sparse(), torch.eye(3)[:, :2].to_sparse()),
    ):
        assert checksum(one) != checksum(other)


def test_equal_values_have_equal_checksums_however_they_came_about() -> None:
    """One object twice or two equal ones, keys in any order, NaN, and what has no order or content to be read."""
    shared = Plain("a")
    for one, other in (
        ([shared, shared], [shared, copy.deepcopy(shared)]),
        (["ab", "ab"], ["ab", "".join(["a", "b"])]),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
        (UserDict(a=1, b=2), UserDict(b=2, a=1)),
        (math.nan, float("nan")),
        (np.array([np.nan]), np.array([np.nan])),
        ({"a", "b"}, {"c"}),
        (object(), object()),
        (lambda: 1, lambda: 2),
        (torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)),
        (torch.ones(2, device="meta"), torch.ones(2, device="meta")),
    ):
        assert checksum(one) == checksum(other)


def test_what_is_nested_without_end_is_read_as_far_as_it_goes() -> None:
    """A chain of objects, as a linked list's, and a list in itself."""
    chain: Any = None
    for _ in range(5000):
        chain = SimpleNamespace(next=chain)
    rings: list[Any] = [[], []]
    for ring in rings:
        ring.append(ring)
    assert checksum(chain)
    assert checksum(rings[0]) == checksum(rings[1])
