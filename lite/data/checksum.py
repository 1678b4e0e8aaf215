"""A checksum of nested data, by which ranks find out whether they read the same; it sends nothing itself."""

from __future__ import annotations

import dataclasses
import datetime
import zlib
from collections import deque
from collections.abc import Iterable, Mapping
from decimal import Decimal
from fractions import Fraction
from pathlib import PurePath
from types import ModuleType
from typing import Any
from uuid import UUID

import numpy as np
import torch
from torch import Tensor

from lite import collectives

# What says itself whole, and alike in every process, in words.
_IN_WORDS = (range, PurePath, datetime.date, datetime.time, datetime.timedelta, Decimal, Fraction, UUID)
_ARRAYS = (Tensor, np.ndarray, np.generic)
_TORCH_WORDS = (torch.dtype, torch.device)
_ROWS = ("crow_indices", "col_indices", "values")
_COLUMNS = ("ccol_indices", "row_indices", "values")
_SPARSE = {
    torch.sparse_coo: ("_indices", "_values"),
    **dict.fromkeys((torch.sparse_csr, torch.sparse_bsr), _ROWS),
    **dict.fromkeys((torch.sparse_csc, torch.sparse_bsc), _COLUMNS),
}
_MAX_DEPTH = 64
# Of what is being read and was, by id: the object, which keeps its id from being another's, and its checksum.
_Memo = dict[int, tuple[Any, int]]


def checksum(data: Any, *, arrays_alone: bool = False) -> int:
    """A checksum of the values in nested data; equal values have equal ones, in every process.

    It sees tensors, numpy arrays, numbers, strings, bytes, paths and dates, within mappings of any class (whose order
    doesn't count), lists, tuples, dataclasses and the attributes of other objects. Sets, which have an order of their
    own in each process, and what it can't read count by their type alone.

    Args:
        data: What is summed.
        arrays_alone: Whether numbers and words outside of tensors and arrays count by their type, too.

    Example:
        >>> checksum({"x": torch.ones(2), "name": "a"}) == checksum({"name": "a", "x": torch.ones(2)})
        True
    """
    return _sum(data, {}, 0, arrays_alone)


def _sum(value: Any, memo: _Memo, depth: int, arrays_alone: bool) -> int:
    kind = zlib.crc32(type(value).__qualname__.encode())
    content = _content(value)
    if content is not None:
        return kind if arrays_alone and not isinstance(value, _ARRAYS) else zlib.crc32(content, kind)
    if id(value) in memo:
        return memo[id(value)][1]
    parts = _parts(value) if depth < _MAX_DEPTH else None
    if parts is None:
        return kind
    memo[id(value)] = (value, kind)  # where it holds itself
    sums = [_sum(part, memo, depth + 1, arrays_alone) for part in parts]
    if isinstance(value, Mapping):
        sums.sort()
    total = zlib.crc32(b"".join(one.to_bytes(4, "little") for one in sums), kind)
    memo[id(value)] = (value, total)
    return total


def _content(value: Any) -> bytes | None:
    """What a value without parts is; None for all others."""
    if value is None:
        return b""
    if isinstance(value, Tensor):
        return _of_tensor(value)
    if isinstance(value, (np.ndarray, np.generic)):
        return _of_array(value)
    if isinstance(value, (str, bytes, bytearray)):
        return value.encode("utf-8", "surrogatepass") if isinstance(value, str) else bytes(value)
    if isinstance(value, int):
        return hex(value).encode()
    if isinstance(value, (float, complex)):
        return f"{float.hex(value.real)} {float.hex(value.imag)}".encode()
    return str(value).encode() if isinstance(value, (*_IN_WORDS, *_TORCH_WORDS)) else None


def _of_tensor(value: Tensor) -> bytes | None:
    unlike = value.is_quantized or value.is_nested or value.is_meta or hasattr(value, "__tensor_flatten__")
    if unlike or value.layout is not torch.strided:
        return None
    value = value.detach().resolve_conj().resolve_neg().cpu().contiguous()
    # As bytes: numpy doesn't have every dtype.
    content: bytes = collectives.as_bytes(value).numpy().tobytes()
    return f"{value.dtype} {list(value.shape)}".encode() + content


def _of_array(value: Any) -> bytes | None:
    array = np.asarray(value)
    if array.dtype.char in "gG":
        array = array.astype(np.complex128 if array.dtype.char == "G" else np.float64)  # not the filling between values
    # All others hold references, or fields with filling between them.
    whole = array.dtype.names is None and array.dtype.kind in "biufcmMSUV" and not isinstance(value, np.ma.MaskedArray)
    return f"{array.dtype.str} {array.shape}".encode() + array.tobytes() if whole else None


def _parts(value: Any) -> Iterable[Any] | None:
    """What it holds; None where that can't be read."""
    if isinstance(value, Tensor):
        return _parts_of_tensor(value)
    if isinstance(value, (np.ndarray, np.generic)):
        array = np.asarray(value)
        if isinstance(value, np.ma.MaskedArray):
            return array, np.ma.getmaskarray(value)
        return list(array.flat) if array.dtype.names is None else [array[name] for name in array.dtype.names]
    if isinstance(value, Mapping):
        return value.items()
    if isinstance(value, (list, tuple, deque)):
        return value
    if isinstance(value, (type, ModuleType)):
        return None
    if dataclasses.is_dataclass(value):
        return [getattr(value, field.name, None) for field in dataclasses.fields(value) if field.compare]
    attributes = getattr(value, "__dict__", None)
    return None if attributes is None else [attributes]


def _parts_of_tensor(value: Tensor) -> Iterable[Any] | None:
    shape = None if value.is_nested else value.shape
    if hasattr(value, "__tensor_flatten__"):
        return shape, *[getattr(value, name) for name in value.__tensor_flatten__()[0]]
    if value.is_nested:
        return value.unbind()
    names = _SPARSE.get(value.layout)
    return None if names is None else (shape, *[getattr(value.detach(), name)() for name in names])
