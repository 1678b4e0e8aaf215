"""Sharded checkpoints: whole, checked, the same content as a file, and torch.distributed.checkpoint's own format."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict
from torch.distributed.checkpoint.state_dict_saver import _save_state_dict

from lite import CheckpointError, Lite
from lite.checkpoint import tree
from tests.checkpoint.parts import Evil, equal, flip, resume, step, train_and_save, training
from tests.support.models import MLP
from tests.support.processes import run_distributed


def data_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.distcp"))


def test_what_two_processes_save_one_continues_and_back(tmp_path: Path) -> None:
    """The next step is the same, whoever takes it; both ranks have written a part."""
    both, one = tmp_path / "two", tmp_path / "one"
    expected = run_distributed(train_and_save, str(both))[0]
    assert len(data_files(both)) == 2 and all(f.stat().st_size > 500 for f in data_files(both))
    assert resume(str(both)) == expected
    assert train_and_save(str(one)) == expected
    assert run_distributed(resume, str(one)) == [expected, expected]


def test_a_directory_holds_exactly_what_a_file_holds(tmp_path: Path) -> None:
    """Names, nesting, types and bits, whatever the keys look like; a path with a "/" at its end is a directory too."""
    lite = Lite(accelerator="cpu")
    state = training(lite)
    step(lite, state)
    state["odd"] = {"a.b": torch.ones(1), "a": {"b": torch.zeros(1)}, 3: (torch.eye(2), [None, "x", torch.ones(0)])}
    state["types"] = [torch.tensor(True), torch.ones(2, dtype=torch.bfloat16), torch.eye(2).to_sparse().to_dense().T]
    lite.save(tmp_path / "a.ckpt", state)
    lite.save(f"{tmp_path}/b.c/", state)
    assert equal(lite.load(tmp_path / "a.ckpt"), lite.load(tmp_path / "b.c"))
    assert equal(lite.load(tmp_path / "b.c")["odd"], state["odd"])


def test_views_bring_only_what_they_show(tmp_path: Path) -> None:
    """A slice of a large tensor doesn't store all of it."""
    lite = Lite(accelerator="cpu")
    lite.save(tmp_path / "a", {"row": torch.arange(1e6).reshape(1000, 1000)[3]})
    assert sum(f.stat().st_size for f in (tmp_path / "a").iterdir()) < 50_000
    assert lite.load(tmp_path / "a")["row"][0] == 3000


def test_overwriting_leaves_one_checkpoints_files(tmp_path: Path) -> None:
    """Nothing of the old one, nothing temporary; other files in the folder stay."""
    lite = Lite(accelerator="cpu")
    (tmp_path / "notes.txt").write_text("mine")
    for number in range(3):
        lite.save(f"{tmp_path}/", {"w": torch.full((3,), float(number))})
        assert lite.load(tmp_path)["w"].tolist() == [number] * 3
    assert len(list(tmp_path.iterdir())) == 5 and (tmp_path / "notes.txt").exists()


def test_torch_reads_it_without_lite(tmp_path: Path) -> None:
    """dcp.load into a raw state dict, by the raw model's keys."""
    lite = Lite(accelerator="cpu")
    model = MLP()
    lite.save(tmp_path / "a", {"model": model, "epoch": 3})
    state = {"model": MLP().state_dict()}
    _load_state_dict(state, dcp.FileSystemReader(tmp_path / "a"), no_dist=True)
    assert equal(dict(state["model"]), dict(model.state_dict()))
    dcp_to_torch_save(tmp_path / "a", tmp_path / "a.pt")
    assert equal(torch.load(tmp_path / "a.pt")["model"], dict(model.state_dict()))


def torch_save(folder: Path, state: dict[str, Any]) -> None:
    _save_state_dict(state, dcp.FileSystemWriter(folder), no_dist=True)


def test_it_reads_and_replaces_what_torch_wrote(tmp_path: Path) -> None:
    """A directory of torch.distributed.checkpoint's own, plain values in it too; no file of it stays behind."""
    lite = Lite(accelerator="cpu")
    model = MLP()
    torch_save(tmp_path / "a", {"model": model.state_dict(), "epoch": 3})
    target = MLP()
    assert lite.load(tmp_path / "a", {"model": target}) == {"epoch": 3}
    assert equal(dict(target.state_dict()), dict(model.state_dict()))
    lite.save(tmp_path / "a", {"n": 1})
    assert lite.load(tmp_path / "a") == {"n": 1}
    assert not (tmp_path / "a" / "__0_0.distcp").exists()


@pytest.mark.parametrize("kind", ["*.distcp", ".metadata", "lite-*.pt", "lite-*.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damage_is_found_and_the_file_is_named(tmp_path: Path, kind: str, damage: str) -> None:
    """In any of the files; nothing is loaded."""
    lite = Lite(accelerator="cpu")
    lite.save(tmp_path / "a", {"model": MLP()})
    file = next((tmp_path / "a").glob(kind))
    if damage == "flip":
        flip(file, file.stat().st_size // 2 if kind != "lite-*.json" else file.read_text().index("crc32") + 10)
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-1] if kind != "lite-*.json" else b"{")
    else:
        file.unlink()
    with pytest.raises(CheckpointError) as caught:
        lite.load(tmp_path / "a")
    assert file.name in str(caught.value)


def test_every_flipped_bit_of_the_index_is_found(tmp_path: Path) -> None:
    """Or it changes nothing; never anything else than an error that names the checkpoint."""
    lite = Lite(accelerator="cpu")
    state = {"w": torch.arange(3.0)}
    lite.save(tmp_path / "a", state)
    file = tmp_path / "a" / ".metadata"
    whole = file.read_bytes()
    for at in range(0, len(whole), 5):
        flip(file, at)
        with pytest.raises(CheckpointError, match="/a"):
            lite.load(tmp_path / "a")
        file.write_bytes(whole)


def test_an_index_that_would_run_code_is_refused(tmp_path: Path) -> None:
    """`.metadata` is a pickle; it makes nothing but the index's own classes, also when checksums are not compared."""
    lite = Lite(accelerator="cpu")
    lite.save(tmp_path / "a", {"w": torch.ones(1)})
    (tmp_path / "a" / ".metadata").write_bytes(pickle.dumps(Evil(tmp_path / "mark")))
    for verify in (True, False):
        with pytest.raises(CheckpointError, match=r"\.metadata.*open"):
            lite.load(tmp_path / "a", verify=verify)
    assert not (tmp_path / "mark").exists()


def test_values_that_would_run_code_are_refused(tmp_path: Path) -> None:
    """torch's own reader would run what a directory stores beside tensors; as a value and in a tensor's place."""
    lite = Lite(accelerator="cpu")
    torch_save(tmp_path / "a", {"w": torch.ones(1), "e": Evil(tmp_path / "mark")})
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp.*'e'.*asks for io\.open") as caught:
        lite.load(tmp_path / "a")
    assert "weights_only" not in str(caught.value) and caught.value.__cause__ is None
    assert not (tmp_path / "mark").exists()


def test_an_index_cant_point_outside_of_its_folder(tmp_path: Path) -> None:
    """To another file of the machine."""
    lite = Lite(accelerator="cpu")
    torch_save(tmp_path / "a", {"w": torch.ones(1)})
    index = tmp_path / "a" / ".metadata"
    metadata = pickle.loads(index.read_bytes())
    for info in metadata.storage_data.values():
        info.relative_path = "../b"
    index.write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match="outside of its folder"):
        lite.load(tmp_path / "a")


def test_a_later_format_is_refused(tmp_path: Path) -> None:
    """Instead of being read half."""
    lite = Lite(accelerator="cpu")
    lite.save(tmp_path / "a", {"n": 1})
    file = next((tmp_path / "a").glob("*.json"))
    file.write_text(json.dumps({**json.loads(file.read_text()), "format": 99}))
    with pytest.raises(CheckpointError, match="format 99"):
        lite.load(tmp_path / "a")


def test_leftovers_of_a_killed_save_go_with_the_next_one(tmp_path: Path) -> None:
    """Of a first and of an overwriting one; not those of a save that still runs."""
    from lite.checkpoint import directory_format as names
    from lite.storage import Storage

    lite = Lite(accelerator="cpu")
    lite.save(tmp_path / "a", {"n": 1})
    dead, running = names.new_id(), names.new_id()
    for save_id in (dead, running):
        for name in (names.data_name(save_id, 1), names.plain_name(save_id), names.lock_name(save_id)):
            (tmp_path / "a" / name).write_bytes(b"half")
    with Storage().lock(str(tmp_path / "a" / names.lock_name(running))):
        lite.save(tmp_path / "a", {"n": 2})
    left = os.listdir(tmp_path / "a")
    assert not [n for n in left if dead in n] and len([n for n in left if running in n]) == 3
    lite.save(tmp_path / "a", {"n": 3})
    assert len(os.listdir(tmp_path / "a")) == 4
    assert lite.load(tmp_path / "a") == {"n": 3}


def _failing_rank(path: str, bad: int) -> str:
    lite = Lite(accelerator="cpu")
    lite.save(path, {"model": MLP(), "n": 1})
    from lite.storage import Storage

    def full(self: Storage, path: str) -> Any:
        raise OSError(28, "No space left on device")

    whole = Storage.create
    if lite.global_rank == bad:
        Storage.create = full  # type: ignore[assignment]
    try:
        with pytest.raises(CheckpointError) as caught:
            lite.save(path, {"model": MLP(), "n": 2})
    finally:
        Storage.create = whole  # type: ignore[method-assign]
    lite.barrier()
    assert lite.load(path)["n"] == 1
    return str(caught.value)


@pytest.mark.parametrize("bad", [0, 1])
def test_one_rank_that_cant_write_is_an_error_on_all(tmp_path: Path, bad: int) -> None:
    """The disk of one rank is full; torch's CheckpointException, which `except Exception` lets pass, is not seen."""
    messages = run_distributed(_failing_rank, str(tmp_path / "a"), bad)
    assert all(f"rank {bad}: [Errno 28] No space left" in m and "unharmed" in m for m in messages), messages
    assert len(os.listdir(tmp_path / "a")) == 5  # of the first save: two data files, values, manifest, index


def _apart(path: str) -> list[str]:
    lite = Lite(accelerator="cpu")
    here, own = os.getcwd(), Path(path, str(lite.global_rank))
    own.mkdir()
    os.chdir(own)  # one name, and two places
    try:
        with pytest.raises(CheckpointError) as caught:
            lite.save("a", {"model": MLP()})
    finally:
        os.chdir(here)
    messages = [str(caught.value)]
    from lite.checkpoint.staging import Staging

    def full(self: Staging, content: Any) -> Any:
        raise MemoryError("no memory for a copy")

    whole = Staging.stage
    if lite.global_rank == 1:
        Staging.stage = full  # type: ignore[method-assign]
    try:
        lite.save(f"{path}/b", {"model": MLP()}, async_save=True)
    except (CheckpointError, MemoryError) as error:
        messages.append(str(error))
    finally:
        Staging.stage = whole  # type: ignore[method-assign]
    lite.barrier()
    return messages


def test_ranks_that_dont_see_one_folder_or_cant_copy_are_an_error_on_all(tmp_path: Path) -> None:
    """Nothing is left half written, and nobody waits for the others."""
    for folder, memory in run_distributed(_apart, str(tmp_path)):
        assert "sees another folder by that name" in folder and "rank 0" in folder
        assert "no memory for a copy" in memory
    assert not list(tmp_path.rglob("*.distcp")) and not (tmp_path / "b").exists()


def test_a_directory_is_not_written_over_a_file(tmp_path: Path) -> None:
    """And not read where there is none."""
    lite = Lite(accelerator="cpu")
    (tmp_path / "a").write_text("")
    with pytest.raises(CheckpointError, match="is a file"):
        lite.save(tmp_path / "a", {"n": 1})
    (tmp_path / "b").mkdir()
    with pytest.raises(CheckpointError, match=r"no \.metadata"):
        lite.load(tmp_path / "b")


@pytest.mark.parametrize("content", [{"a": [torch.ones(1), ({},)], "b": ()}, {"x": {"y": {}}}])
def test_splitting_and_joining_change_nothing(content: dict[str, Any]) -> None:
    """Empty containers included."""
    assert equal(tree.join(*tree.split(content)), content)


def _sharded(folder: str, async_save: bool) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    lite = Lite(accelerator="cpu")
    mesh = init_device_mesh("cpu", (2,))
    whole = torch.arange(15.0).reshape(5, 3)
    state = {
        "rows": distribute_tensor(whole, mesh, [Shard(0)]),
        "columns": distribute_tensor(whole, mesh, [Shard(1)]),
        "same": distribute_tensor(whole, mesh, [Replicate()]),
    }
    lite.save(folder, state, async_save=async_save)
    lite.wait_for_save()
    lite.save(f"{folder}.ckpt", state, async_save=async_save)
    lite.wait_for_save()


@pytest.mark.parametrize("async_save", [False, True])
def test_shards_come_together_again(tmp_path: Path, async_save: bool) -> None:
    """Every rank writes its own part of a sharded tensor; one process reads the whole. A file has the whole."""
    run_distributed(_sharded, str(tmp_path / "a"), async_save)
    whole = torch.arange(15.0).reshape(5, 3)
    for path in (tmp_path / "a", tmp_path / "a.ckpt"):
        assert equal(Lite(accelerator="cpu").load(path), {"rows": whole, "columns": whole, "same": whole})
