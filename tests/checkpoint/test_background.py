"""Background saves: what is stored is the moment of the call; one at a time; no failure goes unheard."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from lite import CheckpointError, ConfigError, Lite
from lite.checkpoint.background import Background, wait_for_all
from lite.checkpoint.staging import Staging
from lite.checkpoint.tree import walk
from tests.checkpoint.parts import equal, resume, step, train_and_save, training
from tests.support.models import MLP
from tests.support.processes import run_distributed, run_python

BOTH = pytest.mark.parametrize("name", ["a.ckpt", "a"])


class Gate:
    """Holds every write up until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from lite.storage import Storage

        self.open = threading.Event()
        for method in ("replace", "create"):
            real = getattr(Storage, method)
            monkeypatch.setattr(Storage, method, lambda *a, real=real: self.open.wait(30) and real(*a))


@BOTH
def test_the_moment_of_the_call_is_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Training goes on while it is written, and changes nothing in it."""
    lite = Lite(accelerator="cpu")
    state = training(lite)
    step(lite, state)
    lite.save(tmp_path / f"sync{name}", state)
    gate = Gate(monkeypatch)
    assert lite.save(tmp_path / name, state, async_save=True)
    step(lite, state)
    gate.open.set()
    lite.wait_for_save()
    assert equal(lite.load(tmp_path / name), lite.load(tmp_path / f"sync{name}"))


@BOTH
def test_two_processes_save_in_the_background(tmp_path: Path, name: str) -> None:
    """One continues, as from any checkpoint."""
    expected = run_distributed(train_and_save, str(tmp_path / name), True)[0]
    assert resume(str(tmp_path / name)) == expected


@BOTH
def test_the_next_save_waits_or_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """As it was asked to; a skipped one leaves the copy that is being written alone."""
    lite = Lite(accelerator="cpu")
    gate = Gate(monkeypatch)
    w = torch.ones(3)
    assert lite.save(tmp_path / name, {"w": w}, async_save=True)
    w.fill_(2)
    assert not lite.save(tmp_path / name, {"w": w}, async_save=True, busy="skip")
    assert not lite.save(tmp_path / f"b{name}", {"w": w}, busy="skip")
    gate.open.set()
    assert lite.load(tmp_path / name)["w"].tolist() == [1, 1, 1]
    for number in (3, 4):
        w.fill_(number)
        assert lite.save(tmp_path / name, {"w": w}, async_save=True)
    assert lite.load(tmp_path / name)["w"].tolist() == [4, 4, 4]
    with pytest.raises(ConfigError, match="busy="):
        lite.save(tmp_path / name, {"w": w}, busy="never")


def _skip_on_one(path: str) -> list[bool]:
    lite = Lite(accelerator="cpu")
    release = threading.Event()
    answers = [lite.save(path, {"n": 1}, async_save=True)]
    lite.wait_for_save()
    if lite.global_rank == 1:
        lite._in_background().start(lambda: release.wait(30) and None)
    answers.append(lite.save(path, {"n": 2}, async_save=True, busy="skip"))
    release.set()
    lite.wait_for_save()
    answers.append(lite.save(path, {"n": 3}, async_save=True, busy="skip"))
    lite.wait_for_save()
    return answers


@BOTH
def test_ranks_skip_together(tmp_path: Path, name: str) -> None:
    """Also when one alone is busy."""
    assert run_distributed(_skip_on_one, str(tmp_path / name)) == [[True, False, True]] * 2
    assert Lite(accelerator="cpu").load(tmp_path / name) == {"n": 3}


def _failure(path: str, call: str) -> str:
    lite = Lite(accelerator="cpu")
    from lite.storage import Storage

    def full(self: Storage, path: str) -> Any:
        raise OSError(28, "No space left on device")

    real = Storage.replace
    Storage.replace = full  # type: ignore[assignment]
    try:
        lite.save(path, {"n": 1}, async_save=True)
        lite._in_background().wait()
    finally:
        Storage.replace = real  # type: ignore[method-assign]
    with pytest.raises(CheckpointError) as caught:
        if call == "save":
            lite.save(path, {"n": 2})
        elif call == "load":
            lite.load(path)
        else:
            lite.wait_for_save()
    lite.save(path, {"n": 2.5}, async_save=True)  # heard once, it is over
    lite.wait_for_save()
    if lite.is_global_zero:  # there is nothing left to wait for together
        assert lite.load(path) == {"n": 2.5}
    lite.save(path, {"n": 3})
    assert lite.load(path) == {"n": 3}
    lite.teardown()
    return str(caught.value)


@pytest.mark.parametrize("call", ["save", "load", "wait_for_save"])
def test_a_failure_is_raised_at_the_next_call_on_all_ranks(tmp_path: Path, call: str) -> None:
    """Rank 0 alone writes the file."""
    messages = run_distributed(_failure, str(tmp_path / "a.ckpt"), call)
    assert all("No space left" in m and "a.ckpt" in m for m in messages), messages


def test_teardown_raises_a_failure(tmp_path: Path) -> None:
    """After everything else has been torn down."""
    lite = Lite(accelerator="cpu")
    (tmp_path / "file").write_text("")
    lite.save(tmp_path / "file" / "a.ckpt", {"n": 1}, async_save=True)
    model = lite.setup(MLP())
    with pytest.raises(CheckpointError, match="file"):
        lite.teardown()
    lite.setup(model)


EXIT = """
import sys, time, torch
from lite import Lite
from lite.storage import Storage
lite = Lite(accelerator="cpu")
real = Storage.make_folder
def slow(self, *args):
    time.sleep(0.5)
    if sys.argv[2] == "fail":
        raise OSError(28, "No space left on device")
    real(self, *args)
Storage.make_folder = slow
lite.save(sys.argv[1], {"n": 1, "w": torch.ones(500_000)}, async_save=True)
print("the end of the script")
"""


@BOTH
@pytest.mark.parametrize("how", ["finish", "fail"])
def test_python_ends_when_the_write_has(tmp_path: Path, name: str, how: str) -> None:
    """And tells of a failure that nobody has heard of, by its exit code too. The write begins when the script ends."""
    path = tmp_path / name
    done = run_python("-c", EXIT, str(path), how)
    assert "the end of the script" in done.stdout
    if how == "finish":
        assert done.returncode == 0, done.stderr
        assert Lite(accelerator="cpu").load(path)["n"] == 1
    else:
        assert done.returncode == 1 and "No space left" in done.stderr and str(path) in done.stderr
        assert not path.exists()


def memory(staged: dict[str, Any]) -> int:
    """Bytes of the storages behind all tensors, each once."""
    storages = [t.untyped_storage() for t in walk(staged).values()]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def test_a_staged_copy_keeps_what_is_shared_and_uses_its_memory_again() -> None:
    """Tied weights and views are one storage in the copy; the second copy allocates nothing unless sizes change."""
    staging = Staging()
    base = torch.arange(6.0)
    state = {"base": base, "tied": base, "view": base[2:4], "t": base.reshape(2, 3).T, "other": [torch.ones(2)]}
    first = staging.stage(state)
    assert equal(first, state)
    pointers = {t.untyped_storage().data_ptr() for t in (first["base"], first["tied"], first["view"], first["t"])}
    assert len(pointers) == 1 and first["t"].stride() == state["t"].stride()
    assert base.untyped_storage().data_ptr() not in pointers
    assert memory(first) == 6 * 4 + 2 * 4
    base.fill_(7)
    second = staging.stage(state)
    assert {second["base"].untyped_storage().data_ptr()} == pointers
    assert equal(second, state)
    grown = {"base": torch.ones(100), "other": [torch.zeros(2)]}
    third = staging.stage(grown)
    assert equal(third, grown) and memory(third) == 100 * 4 + 2 * 4


def test_every_kind_of_tensor_is_staged() -> None:
    """Empty, 0-dim, parameters, sparse, conjugated, expanded."""
    state = {
        "empty": torch.ones(0),
        "more empty": torch.ones(0, dtype=torch.int8),
        "scalar": torch.tensor(3),
        "parameter": nn.Parameter(torch.ones(2)),
        "sparse": torch.eye(2).to_sparse(),
        "conjugate": torch.ones(2, dtype=torch.complex64).mul(1j).conj(),
        "expanded": torch.ones(1).expand(3),
    }
    staged = Staging().stage(state)
    assert isinstance(staged["parameter"], nn.Parameter)
    for name, tensor in state.items():
        assert torch.equal(staged[name].to_dense(), tensor.to_dense()), name


def _train_meanwhile(path: str) -> float:
    from lite.storage import Storage

    lite = Lite(accelerator="cpu")
    real, opened = Storage.create, threading.Event()
    Storage.create = lambda *args: opened.wait(30) and real(*args)  # type: ignore[assignment,method-assign]
    try:
        lite.save(path, {"w": torch.ones(1000)}, async_save=True)
        total = sum(lite.all_reduce(float(lite.global_rank + n), "sum") for n in range(200))
        opened.set()
        total += sum(lite.all_reduce(1.0, "sum") for n in range(200))
    finally:
        Storage.create = real  # type: ignore[method-assign]
    lite.wait_for_save()
    return total


def test_training_communicates_while_a_directory_is_written(tmp_path: Path) -> None:
    """The write agrees over a group of its own, so that neither waits for the other nor takes its messages."""
    expected = float(sum(2 * n + 1 for n in range(200)) + 400)
    assert run_distributed(_train_meanwhile, str(tmp_path / "a")) == [expected, expected]
    assert Lite(accelerator="cpu").load(tmp_path / "a")["w"].sum() == 1000


def test_a_write_that_does_not_end_is_waited_for_no_longer_than_asked() -> None:
    """By whoever must end the process; what has ended needs no waiting."""
    background, gate = Background(), threading.Event()
    background.start(lambda: gate.wait(30) and None)
    assert not wait_for_all(0.05)
    gate.set()
    assert wait_for_all(30)
    assert wait_for_all()


def _given_back(path: str) -> list[Any]:
    told: list[Any] = []
    real = dist.destroy_process_group

    def destroy(group: Any = None) -> None:
        told.append("default" if group is None else "its own")
        real(group)

    dist.destroy_process_group = destroy  # type: ignore[assignment]
    try:
        lite = Lite(accelerator="cpu")
        for number in range(3):
            assert lite.save(path, {"n": number}, async_save=True)
            if number == 0:
                lite.teardown()
        lite.wait_for_save()
        lite.strategy.close()
    finally:
        dist.destroy_process_group = real  # type: ignore[assignment]
    return told


def test_the_group_of_background_saves_goes_before_the_default_one(tmp_path: Path) -> None:
    """At teardown, after which another save makes a new one, and at the end of the job."""
    assert run_distributed(_given_back, str(tmp_path / "a")) == [["its own", "its own", "default"]] * 2


UNFINISHED = """
import sys, time, torch
from lite import Lite
from lite.storage import Storage

def train(lite, path):
    real = Storage.create
    Storage.create = lambda *args: time.sleep(0.5) or real(*args)
    lite.save(path, {"w": torch.ones(3)}, async_save=True)

if __name__ == "__main__":
    Lite(accelerator="cpu", devices=2, strategy="ddp_fork").launch(train, sys.argv[1])
"""


def test_a_launched_function_may_return_before_its_save_is_written(tmp_path: Path) -> None:
    """The process waits for it, without a warning, before it leaves the group."""
    (tmp_path / "script.py").write_text(UNFINISHED)
    done = run_python(tmp_path / "script.py", str(tmp_path / "a"))
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert Lite(accelerator="cpu").load(tmp_path / "a")["w"].tolist() == [1, 1, 1]


@pytest.mark.gpu
def test_what_is_staged_from_a_gpu_is_pinned_and_independent() -> None:
    """The copy is complete when staging returns; its buffers are used again."""
    weights = torch.arange(1000.0, device="cuda")
    staging = Staging()
    staged = staging.stage({"w": weights, "half": weights[:500]})
    weights.zero_()
    assert staged["w"].is_pinned() and staged["w"].device.type == "cpu"
    assert torch.equal(staged["w"], torch.arange(1000.0))
    assert staged["half"].untyped_storage().data_ptr() == staged["w"].untyped_storage().data_ptr()
    again = staging.stage({"w": weights, "half": weights[:500]})
    assert again["w"].data_ptr() == staged["w"].data_ptr()
