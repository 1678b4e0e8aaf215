"""One-file checkpoints: plain, whole, checked, and readable without lite."""

from __future__ import annotations

import gc
import os
import traceback
import zipfile
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import _save_state_dict

from lite import CheckpointError, ConfigError, Lite
from tests.checkpoint.parts import Evil, equal, flip, resume, train_and_save
from tests.support.models import MLP
from tests.support.processes import run_distributed, run_python


def test_what_two_processes_save_one_continues_and_back(tmp_path: Path) -> None:
    """The next step is the same, whoever takes it; the raw model loads its part with plain torch."""
    both, one = str(tmp_path / "two.ckpt"), str(tmp_path / "one.ckpt")
    expected = run_distributed(train_and_save, both)[0]
    assert resume(both) == expected
    assert train_and_save(one) == expected
    assert run_distributed(resume, one) == [expected, expected]
    content = torch.load(both, weights_only=True)
    MLP().load_state_dict(content["model"])
    assert content["__lite__"]["world_size"] == 2


def test_a_manifest_says_who_wrote_it_and_stays_out_of_the_state(tmp_path: Path) -> None:
    """Under a reserved name, which a user's state may not have."""
    lite = Lite(accelerator="cpu")
    lite.save(tmp_path / "a.ckpt", {"n": 1})
    manifest = torch.load(tmp_path / "a.ckpt", weights_only=True)["__lite__"]
    assert manifest.pop("time") > 0
    assert len(manifest.pop("rng")) == 1
    assert manifest == {"format": 1, "lite": "0.1.0", "torch": torch.__version__, "world_size": 1}
    assert lite.load(tmp_path / "a.ckpt") == {"n": 1}
    with pytest.raises(ConfigError, match="__lite__"):
        lite.save(tmp_path / "a.ckpt", {"__lite__": 1})


def test_a_checkpoint_of_a_later_format_is_refused(tmp_path: Path) -> None:
    """Instead of being read half."""
    torch.save({"__lite__": {"format": 99, "lite": "7.0"}}, tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match=r"a\.ckpt.*format 99, written by lite 7\.0"):
        Lite(accelerator="cpu").load(tmp_path / "a.ckpt")


def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full when the file is flushed."""
    lite = Lite(accelerator="cpu")
    path = tmp_path / "a.ckpt"
    lite.save(path, {"n": 1})

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(CheckpointError, match=r"No space left.*unharmed"):
        lite.save(path, {"n": 2})
    monkeypatch.undo()
    assert lite.load(path) == {"n": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.ckpt"]


def test_a_bit_that_flipped_is_found_and_torch_load_would_not(tmp_path: Path) -> None:
    """In the middle of a tensor; `verify=False` reads it all the same."""
    lite = Lite(accelerator="cpu")
    path = tmp_path / "a.ckpt"
    lite.save(path, {"w": torch.ones(5000)})
    at = path.read_bytes().index(torch.ones(5000).numpy().tobytes()) + 4000
    flip(path, at)
    assert not torch.equal(torch.load(path, weights_only=True)["w"], torch.ones(5000))
    with pytest.raises(CheckpointError, match=r"a\.ckpt.*record .*another checksum"):
        lite.load(path)
    assert lite.load(path, verify=False)["w"].shape == (5000,)


def test_every_flipped_bit_is_found_or_changes_nothing(tmp_path: Path) -> None:
    """All over the file: in data, headers and the list of records."""
    lite = Lite(accelerator="cpu")
    path = tmp_path / "a.ckpt"
    state = {"w": torch.arange(300.0), "n": 3}
    lite.save(path, state)
    whole = path.read_bytes()
    found = 0
    for at in range(0, len(whole), 19):
        flip(path, at)
        try:
            assert equal(lite.load(path), state), at
        except CheckpointError as error:
            assert "a.ckpt" in str(error)
            found += 1
        path.write_bytes(whole)
    assert found > 40


@pytest.mark.parametrize("kept", [0, 1, 300, -1, -100])
def test_a_truncated_file_is_refused_by_name(tmp_path: Path, kept: int) -> None:
    """Cut off anywhere, also to nothing."""
    lite = Lite(accelerator="cpu")
    path = tmp_path / "cut.ckpt"
    lite.save(path, {"m": MLP()})
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"cut\.ckpt"):
        lite.load(path)


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path) -> None:
    """With and without verification; nothing runs until the user says so, and that is logged."""
    lite = Lite(accelerator="cpu")
    path, mark = tmp_path / "evil.ckpt", tmp_path / "mark"
    for zipped in (True, False):
        torch.save({"e": Evil(mark)}, path, _use_new_zipfile_serialization=zipped)
        for verify in (True, False):
            with pytest.raises(CheckpointError, match=r"evil\.ckpt.*more than plain data.*asks for io\.open") as caught:
                lite.load(path, verify=verify)
            told = "".join(traceback.format_exception(caught.value))
            assert "Re-running" not in told and "safe_globals" not in told  # torch's advice, to run it
            assert "weights_only" not in str(caught.value)
    assert not mark.exists()


def test_loading_code_needs_the_users_word_and_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """weights_only=False reads objects that only code can rebuild, from a file and from a directory."""
    torch.save({"path": Path("x")}, tmp_path / "a.ckpt")
    _save_state_dict({"path": Path("x")}, FileSystemWriter(tmp_path / "a"), no_dist=True)
    lite = Lite(accelerator="cpu")
    for path in (tmp_path / "a.ckpt", tmp_path / "a"):
        with pytest.raises(CheckpointError):
            lite.load(path)
        caplog.clear()
        assert lite.load(path, weights_only=False) == {"path": Path("x")}
        told = [record.getMessage() for record in caplog.records if record.name == "lite"]
        assert told == [f"loading path={str(path)!r} with weights_only=False: code in it is run"]


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    """Neither to save over nor to read from, and the message says what to write instead."""
    lite = Lite(accelerator="cpu")
    (tmp_path / "a.ckpt").mkdir()
    with pytest.raises(CheckpointError, match=r"is a folder.*last\.ckpt"):
        lite.save(tmp_path / "a.ckpt", {"n": 1})
    with pytest.raises(CheckpointError, match=r"\.metadata"):
        lite.load(tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match="does not exist"):
        lite.load(tmp_path / "b.ckpt")


def test_leftovers_of_a_killed_save_go_with_the_next_one(tmp_path: Path) -> None:
    """Not those of a save that still runs, nor other files; of other names' saves a lock alone, unless it is held."""
    lite = Lite(accelerator="cpu")
    dead, other = tmp_path / f".a.ckpt.{'0' * 32}.tmp", tmp_path / f".b.ckpt.{'0' * 32}.tmp"
    early = tmp_path / f".a.ckpt.{'1' * 32}.lock"
    alone, held = tmp_path / f".b.ckpt.{'2' * 32}.lock", tmp_path / f".b.ckpt.{'3' * 32}.lock"
    for left in (dead, other, other.with_suffix(".lock"), dead.with_suffix(".lock"), early, alone):
        left.write_bytes(b"half")
    from lite.storage import Storage

    with Storage().lock(str(held)), Storage().replace(str(tmp_path / "a.ckpt")) as running:
        Path(running).write_bytes(b"half")
        # A lock belongs to an open file, so that this process's own counts as another's.
        lite.save(tmp_path / "a.ckpt", {"n": 1})
        left = {path.name for path in tmp_path.iterdir()}
        mine = {"a.ckpt", Path(running).name, Path(running).with_suffix(".lock").name}
        assert left == {*mine, other.name, other.with_suffix(".lock").name, held.name}
        torch.save({"n": 2}, running)
    assert lite.load(tmp_path / "a.ckpt") == {"n": 2}


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
@pytest.mark.parametrize("async_save", [False, True])
def test_a_failed_save_gives_its_disk_space_back(tmp_path: Path, async_save: bool) -> None:
    """At once: the next try needs it."""
    import resource

    lite = Lite(accelerator="cpu")
    lite.save(tmp_path / "a.ckpt", {"n": 1})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    gc.collect()
    gc.disable()
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        with pytest.raises(CheckpointError, match="what it held before is unharmed"):
            lite.save(tmp_path / "a.ckpt", {"w": torch.ones(300_000)}, async_save=async_save)
            lite.wait_for_save()
        held = [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        gc.enable()
    assert not [path for path in held if str(tmp_path) in path]
    assert lite.load(tmp_path / "a.ckpt") == {"n": 1}


def test_a_failed_rescue_leaves_what_is_being_handled_alone(tmp_path: Path) -> None:
    """Its frames, and its own reason."""
    lite = Lite(accelerator="cpu")
    target = tmp_path / "file" / "a.ckpt"
    (tmp_path / "file").write_text("no folder")

    def fail() -> None:
        important = {"kept": 1}
        raise OSError(f"the database is down, {len(important)}")

    with pytest.raises(CheckpointError, match="could not be written") as caught:
        try:
            fail()
        except OSError as error:
            handled = error
            lite.save(target, {"n": 1})
    assert "database" not in str(caught.value)
    frame = handled.__traceback__.tb_next.tb_frame  # type: ignore[union-attr]
    assert frame.f_locals["important"] == {"kept": 1}


def test_the_file_has_checksums_also_where_torch_was_told_to_leave_them_out(tmp_path: Path) -> None:
    """`set_crc32_options(False)` is for the user's own files."""
    if not hasattr(torch.serialization, "set_crc32_options"):
        pytest.skip("this torch always writes them")
    lite = Lite(accelerator="cpu")
    torch.serialization.set_crc32_options(False)
    try:
        lite.save(tmp_path / "a.ckpt", {"w": torch.ones(9)})
        assert not torch.serialization.get_crc32_options()
    finally:
        torch.serialization.set_crc32_options(True)
    with zipfile.ZipFile(tmp_path / "a.ckpt") as archive:
        assert archive.testzip() is None


MEMORY = """
import resource, sys, torch
from lite import Lite
lite = Lite(accelerator="cpu")
state = {f"w{i}": torch.ones(2_500_000) for i in range(20)}  # 200 MB
lite.save(sys.argv[1], {"n": torch.ones(3)})  # whatever is imported late
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
lite.save(sys.argv[1], state)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / 200e6)
"""


def test_a_save_needs_no_copy_of_the_state(tmp_path: Path) -> None:
    """Peak memory grows by less than a tenth of 200 MB."""
    done = run_python("-c", MEMORY, str(tmp_path / "a.ckpt"))
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 0.1


def _fail_on(path: str, bad: int) -> str:
    lite = Lite(accelerator="cpu")
    state = {"model": MLP(), "x": object() if lite.global_rank == bad else 1}
    with pytest.raises(CheckpointError) as caught:
        lite.save(path, state)
    for differs, words in (({f"x{lite.global_rank}": 1}, "state's names"), ({}, "path")):
        with pytest.raises(CheckpointError, match=rf"{words} must be the same on all ranks, but on rank 1 it is"):
            lite.save(path if differs else f"{lite.global_rank}{Path(path).suffix}", differs)
    assert lite.all_reduce(1, "sum") == 2  # nobody is left behind
    return str(caught.value)


@pytest.mark.parametrize("name", ["a.ckpt", "a"])
def test_a_value_that_cant_be_stored_on_one_rank_is_an_error_on_all(tmp_path: Path, name: str) -> None:
    """Whichever rank it is, in both formats; nothing is written."""
    messages = run_distributed(_fail_on, str(tmp_path / name), 1)
    assert messages[1].startswith("x is a object") and "rank 1 failed" in messages[0] and "x is a" in messages[0]
    assert not list(tmp_path.iterdir())


def _unwritable(path: str) -> str:
    lite = Lite(accelerator="cpu")
    with pytest.raises(CheckpointError) as caught:
        lite.save(path, {"model": MLP()})
    return str(caught.value)


@pytest.mark.parametrize("name", ["a.ckpt", "a"])
def test_a_folder_that_cant_be_made_is_an_error_on_all_ranks(tmp_path: Path, name: str) -> None:
    """Here because a file is in its place; nobody waits for the others."""
    (tmp_path / "file").write_text("")
    messages = run_distributed(_unwritable, str(tmp_path / "file" / name))
    assert all("unharmed" in m and "file" in m for m in messages), messages
