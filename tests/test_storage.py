"""Checkpoints at URLs go through fsspec; a disk that fills up harms nothing; what a path means."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lite import CheckpointError, ConfigError, Lite, MissingExtraError
from lite.storage import locate
from tests.checkpoint.parts import equal, step, training

fsspec = pytest.importorskip("fsspec")


@pytest.fixture(autouse=True)
def _empty_memory() -> Iterator[None]:
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    memory.pseudo_dirs[:] = [""]
    yield
    memory.store.clear()
    memory.pseudo_dirs[:] = [""]


@pytest.mark.parametrize("name", ["runs/a.ckpt", "runs/a", "a.ckpt", "a/"])
@pytest.mark.parametrize("async_save", [False, True])
def test_a_url_holds_what_a_path_holds(tmp_path: Path, name: str, async_save: bool) -> None:
    """Saved, overwritten, and loaded; only the checkpoint's files are there."""
    lite = Lite(accelerator="cpu")
    state = training(lite)
    lite.save(f"memory://{name}", {"n": 1}, async_save=async_save)
    step(lite, state)
    lite.save(f"memory://{name}", state, async_save=async_save)
    lite.save(tmp_path / "a.ckpt", state)
    assert equal(lite.load(f"memory://{name}"), lite.load(tmp_path / "a.ckpt"))
    files = fsspec.filesystem("memory").find("/")
    assert len(files) == (1 if name.endswith(".ckpt") else 4), files


@pytest.mark.parametrize("name", ["a.ckpt", "a"])
def test_damage_at_a_url_is_found(name: str) -> None:
    """Checksums there are compared as on a disk; what is missing is told."""
    lite = Lite(accelerator="cpu")
    lite.save(f"memory://{name}", {"w": torch.ones(50)})
    memory = fsspec.filesystem("memory")
    file = next(f for f in memory.find("/") if f.endswith((".ckpt", ".distcp")))
    data = bytearray(memory.cat_file(file))
    data[data.index(torch.ones(50).numpy().tobytes()) + 100] ^= 1
    memory.pipe_file(file, bytes(data))
    with pytest.raises(CheckpointError, match="another checksum"):
        lite.load(f"memory://{name}")
    with pytest.raises(CheckpointError, match="does not exist"):
        lite.load("memory://b.ckpt")


def test_a_url_may_hold_torchs_old_format(tmp_path: Path) -> None:
    """That of before zip archives, as on a disk."""
    torch.save({"w": torch.ones(3)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    fsspec.filesystem("memory").pipe_file("/old.pt", (tmp_path / "old.pt").read_bytes())
    lite = Lite(accelerator="cpu")
    for path in (tmp_path / "old.pt", "memory://old.pt"):
        for verify in (True, False):
            assert lite.load(path, verify=verify)["w"].tolist() == [1, 1, 1]


@pytest.mark.parametrize("name", ["a.ckpt", "a"])
@pytest.mark.parametrize("room", [0, 300, 2000])
def test_a_full_disk_leaves_the_old_checkpoint(monkeypatch: pytest.MonkeyPatch, name: str, room: int) -> None:
    """However far the write gets; the error says what is intact, and training may go on."""
    from fsspec.implementations.memory import MemoryFile

    lite = Lite(accelerator="cpu")
    lite.save(f"memory://{name}", {"w": torch.ones(500)})
    left = room

    def write(self: Any, data: bytes) -> int:
        nonlocal left
        left -= len(data)
        if left < 0:
            raise OSError(28, "No space left on device")
        return super(MemoryFile, self).write(data)

    monkeypatch.setattr(MemoryFile, "write", write, raising=False)
    with pytest.raises(CheckpointError, match=r"No space left.*unharmed"):
        lite.save(f"memory://{name}", {"w": torch.zeros(500)})
    monkeypatch.undo()
    assert lite.load(f"memory://{name}")["w"].sum() == 500
    assert len(fsspec.filesystem("memory").find("/")) == (1 if "." in name else 4)


@pytest.mark.parametrize("base", ["memory://runs", "local"])
def test_a_checkpoint_is_removed_whole(tmp_path: Path, base: str) -> None:
    """File and directory, with the folder unless something else is in it; one that isn't there is no error."""
    from lite.checkpoint.reading import remove

    base = str(tmp_path) if base == "local" else base
    lite = Lite(accelerator="cpu")
    for name in ("a.ckpt", "a"):
        lite.save(f"{base}/{name}", {"w": torch.ones(3)})
        for _ in range(2):
            remove(f"{base}/{name}")
        storage, target, _ = locate(f"{base}/{name}")
        assert storage.kind(target) is None
    lite.save(f"{base}/b", {"w": torch.ones(3)})
    storage, target, _ = locate(f"{base}/b")
    with storage.create(storage.join(target, "notes.txt")) as file:
        file.write(b"mine")
    remove(f"{base}/b")
    assert storage.names(target) == ["notes.txt"]


def test_local_paths_need_no_fsspec(tmp_path: Path) -> None:
    """And a URL without it says what to install."""
    code = (
        "import sys; sys.modules['fsspec'] = None; sys.modules['fsspec.core'] = None\n"
        "from lite import Lite, MissingExtraError\n"
        "lite = Lite(accelerator='cpu'); lite.save(sys.argv[1], {'n': 1}); assert lite.load(sys.argv[1]) == {'n': 1}\n"
        "try: lite.save('memory://a.ckpt', {})\n"
        "except MissingExtraError as error: assert 'pip install fsspec' in str(error)\n"
        "else: raise AssertionError"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.ckpt")], check=True, cwd=Path(__file__).parents[2])


def test_an_unknown_url_is_refused() -> None:
    """A scheme that fsspec doesn't know, or that needs a package; an empty path."""
    lite = Lite(accelerator="cpu")
    with pytest.raises((ConfigError, MissingExtraError), match="nosuch"):
        lite.save("nosuch://a.ckpt", {"n": 1})
    for path in ("", 3):
        with pytest.raises(ConfigError, match="is no path"):
            lite.save(path, {"n": 1})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("path", "is_folder"),
    [("a.ckpt", False), ("a", True), ("a.ckpt/", True), ("b.c/a", True), ("s/.hidden", True), ("a.b.pt", False)],
)
def test_a_suffix_makes_a_file(path: str, is_folder: bool) -> None:
    """A "/" at the end or no suffix makes a directory, also in a URL."""
    assert locate(path)[2] is is_folder
    assert locate(f"memory://{path}")[2] is is_folder
