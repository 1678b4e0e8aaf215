"""Exchanging an object's class for a subclass made for it alone, such that copies and pickles are of the raw class.

A pickle of a disguised object loads where `lite` is not installed.
"""

from __future__ import annotations

import copy
import copyreg
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def disguise(obj: Any, body: dict[str, Any]) -> None:
    """Give `obj` a subclass of its class that looks the same and has the methods of `body`.

    Raises:
        TypeError: The class can't be subclassed, or its instances can't change their class.
    """
    raw: Any = type(obj)

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        with undisguised(self, raw):
            reduced = self.__reduce_ex__(protocol)
        if isinstance(reduced, tuple) and reduced[0] is copyreg.__newobj__ and len(reduced[1]) == 1:  # type: ignore[attr-defined]
            # The pickler compares the argument of __newobj__ with the object's present class.
            return (copyreg._reconstructor, (raw, object, None), *reduced[2:])  # type: ignore[attr-defined]
        return reduced

    def __deepcopy__(self: Any, memo: dict[int, Any]) -> Any:
        with undisguised(self, raw):
            return copy.deepcopy(self, memo)

    def __new__(cls: Any, *args: Any, **kwargs: Any) -> Any:
        # type(obj)(...) makes another object of the user's class, which has nothing to do with this one.
        if cls is disguised:
            return raw(*args, **kwargs)
        return raw.__new__(cls) if raw.__new__ is object.__new__ else raw.__new__(cls, *args, **kwargs)

    looks = {"__module__": raw.__module__, "__qualname__": raw.__qualname__, "__doc__": raw.__doc__}
    copies = {"__reduce_ex__": __reduce_ex__, "__deepcopy__": __deepcopy__, "__new__": __new__}
    disguised = _subclass(raw, {**looks, **copies, **body})
    obj.__class__ = disguised


def _subclass(raw: Any, body: dict[str, Any]) -> Any:
    """A subclass of which registries of the user's classes don't hear, where Python allows that."""
    # Not by the metaclass's own call, and with a base in front whose __init_subclass__ says nothing.
    made: Any = type.__new__(type(raw), raw.__name__, (_Unheard, raw), dict(body))
    try:
        made.__bases__ = (raw,)
    except TypeError:  # a class with typing.Generic, say, among its bases is laid out differently
        made = type.__new__(type(raw), raw.__name__, (raw,), dict(body))
    return made


class _Unheard:
    """Stands in front while a class is made, so that no `__init_subclass__` is called."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        pass


@contextmanager
def undisguised(obj: Any, raw: type) -> Iterator[None]:
    """Within the block `obj` is of its raw class."""
    disguised = type(obj)
    obj.__class__ = raw
    try:
        yield
    finally:
        obj.__class__ = disguised
