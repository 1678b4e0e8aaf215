"""Where files lie: on this machine, or at a URL through fsspec; how one is replaced whole, and whose leftovers go.

It knows bytes and names, no format.
"""

from __future__ import annotations

import errno
import mmap
import os
import re
import stat
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import PurePath
from typing import Any, BinaryIO

from lite.errors import ConfigError, MissingExtraError

_DAY_S = 24 * 3600
_LARGE_BYTES = 1 << 24
_TEMPORARY = re.compile(r"^\.(.+)\.[0-9a-f]{32}\.(tmp|lock)$")


class Storage:
    """The local file system; base of the others. Paths are strings with "/" (or the system's separator).

    What a method promises of disks, locks and moments holds here; `UrlStorage` does what its file system can.
    """

    def kind(self, path: str) -> str | None:
        """ "file", "folder", or None where nothing is."""
        # One look: another process may be making it just now.
        try:
            return "folder" if stat.S_ISDIR(os.stat(path).st_mode) else "file"
        except OSError:
            return None

    def is_link(self, path: str) -> bool:
        """Whether it is a link, to whatever or nothing."""
        return os.path.islink(path)

    def names(self, folder: str) -> list[str]:
        """What is in the folder, sorted; nothing where there is none."""
        return sorted(os.listdir(folder)) if os.path.isdir(folder) else []

    def join(self, folder: str, name: str) -> str:
        return os.path.join(folder, name)

    def split(self, path: str) -> tuple[str, str]:
        folder, name = os.path.split(path)
        return folder or ".", name

    def make_folder(self, folder: str) -> None:
        os.makedirs(folder, exist_ok=True)

    def check_writable(self, folder: str) -> None:
        """Make the folder, and a file in it that is removed again.

        Raises:
            OSError: That can't be done.
        """
        self.make_folder(folder)
        probe = self.join(folder, f".probe.{uuid.uuid4().hex}.tmp")
        try:
            with self.create(probe):
                pass
        finally:
            self.remove(probe)

    def remove(self, path: str) -> None:
        """Remove a file, if it is there."""
        with suppress(FileNotFoundError), _freed_later(path):
            os.unlink(path)

    def remove_empty_folder(self, folder: str) -> None:
        """Remove the folder if nothing is in it."""
        with suppress(OSError):
            os.rmdir(folder)

    def size(self, path: str) -> int | None:
        """Bytes in the file; None where there is none."""
        try:
            return os.stat(path).st_size
        except OSError:
            return None

    def modified(self, path: str) -> float:
        """When it was written, in seconds since 1970; 0 where that is unknown."""
        try:
            return os.stat(path).st_mtime
        except OSError:
            return 0.0

    def read(self, path: str) -> bytes:
        with open(path, "rb") as file:
            return file.read()

    def write(self, path: str, text: str) -> None:
        """A small file of text, whole at every moment, in a folder that is made; on the disk when the system likes."""
        self.make_folder(self.split(path)[0])
        beside = f"{path}.tmp"
        with open(beside, "w", encoding="utf-8", newline="") as file:
            file.write(text)
        os.replace(beside, path)

    def append(self, path: str, text: str) -> None:
        """Text at the end of a file that is there."""
        with open(path, "a", encoding="utf-8", newline="") as file:
            file.write(text)

    @contextmanager
    def view(self, path: str) -> Iterator[memoryview]:
        """The file's bytes without copying them; the file must stay as it is within the block."""
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                yield memoryview(b"")
                return
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped, memoryview(mapped) as view:
                yield view

    @contextmanager
    def open(self, path: str) -> Iterator[BinaryIO]:
        """The file, to read from and seek in."""
        with open(path, "rb") as file:
            yield file

    @contextmanager
    def create(self, path: str) -> Iterator[BinaryIO]:
        """A new file to write to; what was written is on the disk after the block."""
        with open(path, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())

    def flush(self, path: str) -> None:
        """Put a file's bytes on the disk."""
        # Not by the lock's descriptor: safetensors 0.8 puts another file under the name that it is given.
        with open(path, "r+b") as file:
            os.fsync(file.fileno())

    def rename(self, old: str, new: str) -> None:
        """Give a file or folder another name beside it, over a file of that name, at once and durably."""
        with _freed_later(new):
            os.replace(old, new)
        self.sync(self.split(new)[0])

    def sync(self, folder: str) -> None:
        """Make new names in the folder durable, where the system can."""
        if os.name != "posix":
            return
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    @contextmanager
    def replace(self, path: str) -> Iterator[Any]:
        """A place beside `path` to write to; after the block it is `path`, whole and durable.

        An error in the block leaves `path` as it was, and nothing beside it. One after it, as the new name itself is
        made durable, leaves the new file. What killed writers of `path` left beside it is removed first.

        Returns:
            A path where nothing is yet; of `UrlStorage` an open file.
        """
        folder, name = self.split(path)
        self.make_folder(folder)
        self.sweep(folder, name)
        beside = self.join(folder, f".{name}.{uuid.uuid4().hex}.tmp")
        # The lock is another file: a writer that empties a file which is there waits for the disk on ext4 as it closes.
        with self.lock(_lock_of(beside)):
            try:
                yield beside
                self.flush(beside)
                self.rename(beside, path)
            except BaseException:
                self.remove(beside)
                raise
            finally:
                self.remove(_lock_of(beside))

    def sweep(self, folder: str, name: str | None = None) -> None:
        """Remove what writers of `name` left that don't run any more, and of other names' writers their locks alone.

        A lock alone is what a writer leaves that is killed when its file has its name: a later one has another name,
        as those of a Trainer's checkpoints do.
        """
        names = self.names(folder)
        for other in names:
            match = _TEMPORARY.match(other)
            if match is None:
                continue
            if match[1] == name:
                self._sweep(self.join(folder, other))
            elif match[2] == "lock" and f"{other.removesuffix('.lock')}.tmp" not in names:
                self._remove_abandoned(self.join(folder, other))

    def _sweep(self, path: str) -> None:
        beside = f"{path.rpartition('.')[0]}.tmp"
        lock = _lock_of(beside)
        # Written files go before their lock, so that one without is nobody's.
        if self.kind(lock) is None:
            self._remove_file(beside)
        else:
            self._remove_abandoned(lock, before=beside)

    def _remove_abandoned(self, lock: str, *, before: str | None = None) -> None:
        """Remove a lock, unless somebody holds it, and a file before it."""
        with self._abandoned(lock) as abandoned:
            if abandoned:
                if before is not None:
                    self._remove_file(before)
                self.remove(lock)

    def _remove_file(self, path: str) -> None:
        if self.kind(path) == "file":
            self.remove(path)

    @contextmanager
    def lock(self, path: str) -> Iterator[int]:
        """Create the file and hold it until the block ends or this process does; see `is_abandoned`."""
        descriptor = _create_locked(path)
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def is_abandoned(self, path: str) -> bool:
        """Whether the process that held the file by `lock` is gone; without locks, whether the file is a day old."""
        with self._abandoned(path) as abandoned:
            return abandoned

    @contextmanager
    def _abandoned(self, path: str) -> Iterator[bool]:
        """Whether it is, as `is_abandoned` says; nobody comes to hold it within the block."""
        try:
            import fcntl
        except ImportError:
            yield time.time() - os.path.getmtime(path) > _DAY_S
            return
        try:
            descriptor = os.open(path, os.O_RDWR)
        except OSError:
            yield False
            return
        try:
            yield _is_free(descriptor, fcntl) and _is_still(path, descriptor)
        finally:
            os.close(descriptor)


class UrlStorage(Storage):
    """A file system of fsspec. Renaming is as atomic as that file system makes it; none has locks, so leftovers go by
    age."""

    def __init__(self, fs: Any) -> None:
        self._fs = fs

    def is_link(self, path: str) -> bool:
        return False

    def kind(self, path: str) -> str | None:
        try:
            return "folder" if self._fs.info(path)["type"] == "directory" else "file"
        except FileNotFoundError:
            return None

    def names(self, folder: str) -> list[str]:
        if not self._fs.isdir(folder):
            return []
        self._fs.invalidate_cache(folder)
        return sorted(str(p).rstrip("/").rsplit("/", 1)[-1] for p in self._fs.ls(folder, detail=False))

    def join(self, folder: str, name: str) -> str:
        return f"{folder}/{name}"

    def split(self, path: str) -> tuple[str, str]:
        folder, _, name = path.rpartition("/")
        return folder, name

    def make_folder(self, folder: str) -> None:
        self._fs.makedirs(folder, exist_ok=True)

    def remove(self, path: str) -> None:
        with suppress(FileNotFoundError):
            self._fs.rm_file(path)

    def remove_empty_folder(self, folder: str) -> None:
        with suppress(OSError):
            self._fs.rmdir(folder)

    def size(self, path: str) -> int | None:
        self._fs.invalidate_cache(self.split(path)[0])  # another process may have written it
        try:
            return int(self._fs.size(path))
        except FileNotFoundError:
            return None

    def modified(self, path: str) -> float:
        try:
            return float(self._fs.modified(path).timestamp())
        except Exception:  # many file systems can't tell, each in its own way
            return 0.0

    def read(self, path: str) -> bytes:
        return bytes(self._fs.cat_file(path))

    def write(self, path: str, text: str) -> None:
        with self.replace(path) as file:
            file.write(text.encode())

    def append(self, path: str, text: str) -> None:
        self.write(path, self.read(path).decode() + text)  # object stores can't append

    @contextmanager
    def view(self, path: str) -> Iterator[memoryview]:
        yield memoryview(self.read(path))

    @contextmanager
    def open(self, path: str) -> Iterator[BinaryIO]:
        with self._fs.open(path, "rb") as file:
            yield file

    @contextmanager
    def create(self, path: str) -> Iterator[BinaryIO]:
        with self._fs.open(path, "wb") as file:
            yield file

    def rename(self, old: str, new: str) -> None:
        self._fs.mv(old, new)

    def sync(self, folder: str) -> None:
        """Object stores have nothing to flush."""

    @contextmanager
    def replace(self, path: str) -> Iterator[Any]:
        folder, name = self.split(path)
        self.make_folder(folder)
        self.sweep(folder, name)
        beside = self.join(folder, f".{name}.{uuid.uuid4().hex}.tmp")
        try:
            with self.create(beside) as file:
                yield file
            self.rename(beside, path)
        except BaseException:
            with suppress(Exception):
                self.remove(beside)
            raise

    def _sweep(self, path: str) -> None:
        self._remove_abandoned(path)

    @contextmanager
    def lock(self, path: str) -> Iterator[int]:
        with self.create(path):
            pass
        yield -1

    @contextmanager
    def _abandoned(self, path: str) -> Iterator[bool]:
        written = self.modified(path)
        yield written > 0 and time.time() - written > _DAY_S


def is_url(path: str | os.PathLike[str]) -> bool:
    """Whether it is a URL, such as "s3://bucket/runs"."""
    return re.match(r"^[a-z][a-z0-9+.-]+://", str(path), flags=re.IGNORECASE) is not None


def joined(folder: str, name: str) -> str:
    """A name in a folder or at a URL."""
    return f"{folder.rstrip('/')}/{name}" if is_url(folder) else os.path.join(folder, name)


def locate(path: str | os.PathLike[str]) -> tuple[Storage, str, bool]:
    """Where a path lies, its name there, and whether it names a directory: it ends in "/" or has no suffix.

    Raises:
        ConfigError: It is no path.
        MissingExtraError: It is a URL, and fsspec or what it needs for this kind of URL is not installed.
    """
    if not isinstance(path, (str, os.PathLike)) or not str(os.fspath(path)):
        raise ConfigError(f"path={path!r} is no path; give the name of a file ('last.ckpt') or a directory ('last').")
    text = str(os.fspath(path))
    is_folder = text.endswith(("/", os.sep)) or not PurePath(text.rsplit("://", 1)[-1]).suffix
    if not is_url(text):
        return Storage(), text.rstrip("/" + os.sep) or text, is_folder
    try:
        from fsspec.core import url_to_fs  # type: ignore[import-untyped]
    except ImportError as error:
        raise MissingExtraError(f"path={text!r} is a URL, which needs fsspec; pip install fsspec.") from error
    try:
        fs, inside = url_to_fs(text)
    except ImportError as error:
        raise MissingExtraError(f"path={text!r} needs another package: {error}") from error
    except ValueError as error:
        raise ConfigError(f"path={text!r} is no URL that fsspec knows: {error}") from error
    return UrlStorage(fs), str(inside).rstrip("/"), is_folder


def sweep_locks(folder: str) -> None:
    """Remove the locks that killed writers of files left in a folder, where that can be done; URLs have none."""
    if not is_url(folder):
        with suppress(OSError):
            Storage().sweep(folder)


def _lock_of(beside: str) -> str:
    return f"{beside.removesuffix('.tmp')}.lock"


@contextmanager
def _freed_later(path: str) -> Iterator[None]:
    """Within the block the file at `path` loses its name; its space is given back in a thread, without waiting.

    The system frees a file when its last descriptor is closed; for a large one that takes half as long as writing it.
    """
    descriptor = -1
    if os.name == "posix":
        with suppress(OSError):
            if os.path.getsize(path) >= _LARGE_BYTES and os.path.isfile(path):
                descriptor = os.open(path, os.O_RDONLY)
    try:
        yield
    finally:
        if descriptor >= 0:
            threading.Thread(target=os.close, args=(descriptor,), name="lite.free", daemon=True).start()


def _is_free(descriptor: int, fcntl: Any) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        # Where the file system has no locks, age must do.
        held = error.errno in (errno.EWOULDBLOCK, errno.EACCES)
        return not held and time.time() - os.fstat(descriptor).st_mtime > _DAY_S
    return True


def _is_still(path: str, descriptor: int) -> bool:
    """Whether the open file has that name now; another writer's may have taken its place."""
    with suppress(OSError):
        return os.stat(path).st_ino == os.fstat(descriptor).st_ino
    return False


def _create_locked(path: str) -> int:
    try:
        import fcntl
    except ImportError:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        # Someone who tidies up may have taken it for a leftover between the two calls.
        if _is_still(path, descriptor):
            return descriptor
        os.close(descriptor)
