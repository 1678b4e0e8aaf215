"""Whether bytes are what was written: CRC-32 of files, and of the records in a torch.save file.

torch.save writes a CRC-32 for each record of its zip, and torch.load doesn't look at them. zlib releases the
interpreter's lock, so records are checked in threads.
"""

from __future__ import annotations

import io
import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

_LOCAL_HEADER = struct.Struct("<4s22xHH")
_SIGNATURE = b"PK\x03\x04"
_SMALL_BYTES = 1 << 20


def damage_in_zip(view: memoryview) -> str | None:
    """What is wrong with the bytes of a torch.save file, or None when each record has its CRC-32."""
    if len(view) == 0:
        return "it is empty"
    if bytes(view[:2]) != _SIGNATURE[:2]:
        return "it does not begin as torch.save's files do, so it is damaged or no checkpoint"
    try:
        with zipfile.ZipFile(_Reader(view)) as archive:
            records = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError, struct.error) as error:
        return f"it is truncated or no checkpoint ({error})"
    if not records:
        return "it has no records"

    def check(record: zipfile.ZipInfo) -> str | None:
        start = record.header_offset
        if start < 0 or start + _LOCAL_HEADER.size > len(view):
            return f"its record {record.filename!r} lies outside the file"
        signature, name_bytes, extra_bytes = _LOCAL_HEADER.unpack_from(view, start)
        start += _LOCAL_HEADER.size + name_bytes + extra_bytes
        if signature != _SIGNATURE or record.compress_type != zipfile.ZIP_STORED:
            return f"its record {record.filename!r} has a damaged header"
        if start + record.file_size > len(view):
            return f"its record {record.filename!r} is cut off"
        with view[start : start + record.file_size] as part:
            if zlib.crc32(part) != record.CRC:
                return f"its record {record.filename!r} has another checksum than when it was written"
        return None

    return next((problem for problem in _in_threads(check, records) if problem), None)


class ChecksummedWriter(io.RawIOBase):
    """Hands what is written to another stream, and keeps its CRC-32 and length.

    Large parts are summed in a second thread while they are written.
    """

    def __init__(self, stream: Any) -> None:
        self.crc32 = 0
        self.num_bytes = 0
        self._stream = stream
        self._pool = ThreadPoolExecutor(1)

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.num_bytes

    def write(self, data: Any) -> int:
        with memoryview(data).cast("B") as view:
            if len(view) < _SMALL_BYTES:
                self.crc32 = zlib.crc32(view, self.crc32)
                self._stream.write(view)
            else:
                summed = self._pool.submit(zlib.crc32, view, self.crc32)
                try:
                    self._stream.write(view)
                finally:
                    self.crc32 = summed.result()
            self.num_bytes += len(view)
            return len(view)

    def close(self) -> None:
        self._pool.shutdown()
        super().close()


class _Reader(io.RawIOBase):
    """A file over bytes that are there already; what is read is copied, not the whole."""

    def __init__(self, view: memoryview) -> None:
        self._view, self._at = view, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: len(self._view)}[whence]
        if base + offset < 0:
            raise ValueError("a position before the beginning")
        self._at = base + offset
        return self._at

    def read(self, size: int = -1) -> bytes:
        end = len(self._view) if size is None or size < 0 else self._at + size
        data = bytes(self._view[self._at : end])
        self._at += len(data)
        return data


def _in_threads(check: Callable[[Any], Any], items: list[Any]) -> Iterable[Any]:
    if len(items) < 2:
        return map(check, items)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(check, items))
