"""What of a state is stored, and how it comes back: plain values, traps of optimizers, reports of what did not fit."""

from __future__ import annotations

import argparse
import collections
import copy
import datetime
import enum
import sys
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

from lite import CheckpointError, Lite
from lite.state import sanitise
from tests.checkpoint.parts import step, training, weights
from tests.support.models import MLP


class Colour(enum.Enum):
    RED = "red"


class Level(enum.IntEnum):
    HIGH = 2


class Point(NamedTuple):
    x: Any
    y: int


@dataclass
class Config:
    lr: float
    where: Path


@dataclass(frozen=True)
class Fixed:
    lr: float


@dataclass
class Best:
    loss: float = 1.0
    seen: int = field(default=0, init=False)


class Name(str):
    """A user's subclass of strings."""


class Tagged(torch.Tensor):
    """A user's subclass of tensors."""


PLAIN = {
    "numpy scalar": (np.float64(1.5), 1.5),
    "numpy bool": (np.bool_(True), True),
    "path": (Path("x"), "x"),
    "enum": (Colour.RED, "red"),
    "int enum": (Level.HIGH, 2),
    "dataclass": (Config(0.1, Path("y")), {"lr": 0.1, "where": "y"}),
    "frozen": (Fixed(0.5), {"lr": 0.5}),
    "set": ({1, 2}, {1, 2}),
    "named tuple": (Point(Path("z"), 1), ("z", 1)),
    "ordered": (collections.OrderedDict(a=1), collections.OrderedDict(a=1)),
    "default": (collections.defaultdict(list, a=[1]), {"a": [1]}),
    "counter": (collections.Counter("aa"), collections.Counter("aa")),
    "deque": (collections.deque([1, 2], maxlen=2), [1, 2]),
    "namespace": (argparse.Namespace(lr=0.1), {"lr": 0.1}),
    "simple namespace": (types.SimpleNamespace(a=Colour.RED), {"a": "red"}),
    "date": (datetime.datetime(2024, 1, 2, 3), "2024-01-02T03:00:00"),
    "seconds": (datetime.timedelta(minutes=1), 60.0),
    "int keys": ({np.int64(1): "a"}, {1: "a"}),
    "str subclass": (Name("n"), "n"),
    "bytes": (b"ab", b"ab"),
    "complex": (1 + 2j, 1 + 2j),
}


@pytest.mark.parametrize("suffix", [".ckpt", ""])
def test_everything_plain_is_stored_as_plain_values(tmp_path: Path, suffix: str) -> None:
    """`weights_only=True` reads it, in both formats, as exactly these types."""
    lite = Lite(accelerator="cpu")
    lite.save(tmp_path / f"a{suffix}", {name: value for name, (value, _) in PLAIN.items()})
    content = lite.load(tmp_path / f"a{suffix}")
    for name, (_, expected) in PLAIN.items():
        assert content[name] == expected and type(content[name]) is type(expected), name


def test_plain_values_come_back_as_what_they_were(tmp_path: Path) -> None:
    """Where the script says what that is; what can be changed in place is, for those who hold it by another name."""
    values = {name: value for name, (value, _) in PLAIN.items()}
    weight = nn.Parameter(torch.ones(2))
    values["best"] = Best()
    values["best"].seen = 7
    values["expanded"] = torch.ones(1).expand(3)
    values.update(array=np.arange(3), weight=weight, history=[torch.zeros(2), 1], nested={"a": [1, {"b": weight}]})
    lite = Lite(accelerator="cpu")
    expected = copy.deepcopy(values)
    lite.save(tmp_path / "a.ckpt", values)
    with torch.no_grad():
        weight.zero_()
    values["array"][:] = 7
    values["history"][0] += 1
    values["nested"]["a"][0] = 9
    values["default"]["b"].append(1)
    values["deque"].append(5)
    values["set"].add(3)
    values["best"].seen = 0
    held = dict(values)
    lite.load(tmp_path / "a.ckpt", values)
    kept = {"best", "dataclass", "array", "weight", "history", "nested"}
    kept |= {"default", "deque", "set", "namespace", "ordered", "counter"}
    assert {name for name in kept if values[name] is not held[name]} == set()
    for name, value in expected.items():
        assert type(values[name]) is type(value), name
        assert name in ("array", "weight", "history", "nested", "expanded") or values[name] == value, name
    assert values["array"].tolist() == [0, 1, 2] and weight.tolist() == [1, 1] and weight.requires_grad
    assert values["nested"]["a"][1]["b"] is weight and values["nested"]["a"][0] == 1
    assert values["history"][0].tolist() == [0, 0] and values["deque"].maxlen == 2
    lite.save(tmp_path / "b.ckpt", {"weight": torch.ones(3)})
    with pytest.raises(CheckpointError, match=r"weight is a Parameter of shape \(2,\).* has shape \(3,\)"):
        lite.load(tmp_path / "b.ckpt", {"weight": weight})


def test_arrays_and_tensors_are_stored_as_tensors(tmp_path: Path) -> None:
    """numpy arrays of either byte order, 0-dim ones, a user's subclass of tensors, torch's own types."""
    lite = Lite(accelerator="cpu")
    state = {
        "a": np.arange(3),
        "b": np.arange(3, dtype=">i4")[::-1],
        "c": np.array(1.5),
        "d": torch.ones(2).as_subclass(Tagged),
        "e": [torch.float16, torch.device("cpu"), torch.Size([1]), nn.Parameter(torch.ones(1))],
        "f": torch.eye(2).to_sparse(),
    }
    lite.save(tmp_path / "a.ckpt", state)
    content = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert [content[k].tolist() for k in "abcd"] == [[0, 1, 2], [2, 1, 0], 1.5, [1, 1]]
    assert type(content["d"]) is torch.Tensor
    assert content["e"] == state["e"]
    assert torch.equal(content["f"].to_dense(), torch.eye(2))


def test_omegaconf_becomes_a_dict(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its values resolved; told by the module that is imported already, not by importing it."""

    class DictConfig:
        pass

    class OmegaConf:
        @staticmethod
        def is_config(value: object) -> bool:
            return isinstance(value, DictConfig)

        @staticmethod
        def to_container(value: object, resolve: bool) -> dict[str, Any]:
            assert resolve
            return {"lr": 0.1}

    monkeypatch.setitem(sys.modules, "omegaconf", types.SimpleNamespace(OmegaConf=OmegaConf))  # type: ignore[arg-type]
    assert sanitise({"cfg": DictConfig()}, "state") == {"cfg": {"lr": 0.1}}


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        (object(), "plain values"),
        (lambda: 0, "plain values"),
        (MLP(), "a name of its own"),
        (torch.Generator(), "get_state"),
        (torch.empty(2, device="meta"), "meta device"),
        (np.array(["a"], dtype=object), "plain values"),
    ],
    ids=["object", "function", "module", "generator", "meta", "objects"],
)
def test_what_cant_be_stored_is_refused_by_its_key(tmp_path: Path, value: object, hint: str) -> None:
    """At save, not at load; nothing is written."""
    with pytest.raises(CheckpointError, match=rf"config\.deep\[0\] is a.*{hint}"):
        Lite(accelerator="cpu").save(tmp_path / "a.ckpt", {"config": {"deep": [value]}})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", [".ckpt", ""])
@pytest.mark.parametrize("async_save", [False, True])
def test_saving_before_the_first_step_changes_nothing(tmp_path: Path, suffix: str, async_save: bool) -> None:
    """The step-0 trap: torch's get_optimizer_state_dict takes a step of Adam that it leaves behind."""
    ends = []
    for save in (False, True):
        lite = Lite(accelerator="cpu")
        state = training(lite)
        if save:
            lite.save(tmp_path / f"a{suffix}", state, async_save=async_save)
            assert not state["optimizer"].state
        for _ in range(3):
            step(lite, state)
        lite.wait_for_save()
        ends.append(weights(state))
    assert ends[0] == ends[1]
    lite = Lite(accelerator="cpu")
    state = training(lite, seed=1)
    step(lite, state)
    lite.load(tmp_path / f"a{suffix}", state)
    for _ in range(3):
        step(lite, state)
    assert weights(state) == ends[0]


@pytest.mark.parametrize("suffix", [".ckpt", ""])
def test_the_users_dicts_are_left_as_they_were(tmp_path: Path, suffix: str) -> None:
    """The state passed to save, and dicts in it; a loaded dict is not changed by the module that takes it."""
    lite = Lite(accelerator="cpu")
    model = torch.compile(MLP())
    config = {"a": {"path": Path("x"), "n": np.int64(3)}}
    state = {"model": model, "config": config}
    before = copy.deepcopy(config)
    lite.save(tmp_path / f"a{suffix}", state)
    assert config == before and type(config["a"]["n"]) is np.int64
    assert list(state) == ["model", "config"] and state["model"] is model
    loaded = lite.load(tmp_path / f"a{suffix}")
    keys = list(loaded["model"])
    assert not any("_orig_mod" in key for key in keys)
    from lite.state import restore_object

    restore_object(model, loaded["model"], "model", strict=True)
    assert list(loaded["model"]) == keys


@pytest.mark.parametrize("suffix", [".ckpt", ""])
def test_compiled_models_keep_the_raw_models_keys(tmp_path: Path, suffix: str) -> None:
    """Compiled as a whole and in part; either loads into the raw model, and back."""
    lite = Lite(accelerator="cpu")
    part = MLP()
    part.body = torch.compile(part.body)  # type: ignore[assignment]
    for model in (torch.compile(MLP()), part):
        lite.save(tmp_path / f"a{suffix}", {"model": model})
        raw = MLP()
        lite.load(tmp_path / f"a{suffix}", {"model": raw})
        assert list(lite.load(tmp_path / f"a{suffix}")["model"]) == list(raw.state_dict())
        lite.load(tmp_path / f"a{suffix}", {"model": model})


@pytest.mark.parametrize("suffix", [".ckpt", ""])
def test_what_does_not_fit_is_named(tmp_path: Path, suffix: str) -> None:
    """A missing name, wrong keys, wrong shapes, another kind of object, a filter, the rest that nobody asked for."""
    lite = Lite(accelerator="cpu")
    path = tmp_path / f"a{suffix}"
    lite.save(path, {"model": MLP(), "epoch": 3}, filter={"model": lambda key, value: "body.0" in key})
    with pytest.raises(CheckpointError, match=r"'optimizer'.*'model', 'epoch'"):
        lite.load(path, {"optimizer": 0})
    with pytest.raises(CheckpointError, match=r"body\.2\.weight"):
        lite.load(path, {"model": MLP()})
    with pytest.raises(CheckpointError, match=r"0\.weight.*"):
        lite.load(path, {"model": nn.Sequential(nn.Linear(3, 3))})
    wide = MLP()
    wide.body[0] = nn.Linear(5, 8)
    with pytest.raises(CheckpointError, match=r"size mismatch for body\.0\.weight"):
        lite.load(path, {"model": wide}, strict=False)
    with pytest.raises(CheckpointError, match="'epoch' is a int and no state dict of MLP"):
        lite.load(path, {"epoch": MLP()})
    with pytest.raises(CheckpointError, match="'model' does not fit SGD"):
        lite.load(path, {"model": torch.optim.SGD(MLP().parameters(), lr=0.1)})


OPTIMIZERS: dict[str, Any] = {
    "Adadelta": {}, "Adafactor": {}, "Adagrad": {}, "Adam": {"amsgrad": True}, "AdamW": {}, "Adamax": {}, "ASGD": {},
    "LBFGS": {}, "NAdam": {}, "RAdam": {}, "RMSprop": {"momentum": 0.9, "centered": True}, "Rprop": {},
    "SGD": {"momentum": 0.9},
}  # fmt: skip


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_moments_of_another_shape_are_refused(tmp_path: Path, kind: str) -> None:
    """By the optimizer's name, the parameter's position and both shapes, also with strict=False; the right ones fit."""
    lite = Lite(accelerator="cpu")

    def make(width: int, *, swapped: bool = False) -> Any:
        sizes = [(3,), (2, width)]
        parameters = [nn.Parameter(torch.ones(size)) for size in (reversed(sizes) if swapped else sizes)]
        optimizer = getattr(torch.optim, kind)(parameters, lr=0.1, **OPTIMIZERS[kind])
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        return optimizer

    optimizer = make(4)
    optimizer.step(lambda: torch.tensor(1.0)) if kind == "LBFGS" else optimizer.step()
    lite.save(tmp_path / "a.ckpt", {"opt": optimizer})
    lite.load(tmp_path / "a.ckpt", {"opt": make(4)})
    if kind == "LBFGS":  # its vectors are of all parameters together
        return
    with pytest.raises(CheckpointError, match=r"'opt' does not fit .*parameter 0 .*\[3\].* here has \[2, 4\]"):
        lite.load(tmp_path / "a.ckpt", {"opt": make(4, swapped=True)})
    stored = r"\[1, 4\]" if kind == "Adafactor" else r"\[2, 4\]"  # which keeps rows and columns alone
    with pytest.raises(CheckpointError, match=rf"'opt' does not fit .*parameter 1 .*{stored}.* here has \[2, 5\]"):
        lite.load(tmp_path / "a.ckpt", {"opt": make(5)}, strict=False)
    if kind == "Adam":
        other = make(5)
        other.__class__ = LowRank
        lite.load(tmp_path / "a.ckpt", {"opt": other})


class LowRank(torch.optim.Adam):
    """An optimizer whose moments have shapes of its own."""

    def step(self, closure: Any = None) -> Any:
        raise NotImplementedError


def test_a_loose_load_reports_what_did_not_fit(tmp_path: Path) -> None:
    """strict=False warns, and keeps the names of what was missing and unexpected."""
    lite = Lite(accelerator="cpu")
    path = tmp_path / "a.ckpt"
    lite.save(path, {"model": nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3)), "epoch": 3})
    state = {"model": nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)), "other": 1}
    with pytest.warns(UserWarning, match=r"a\.ckpt.*missing: other, model\.2\.weight.*unexpected: model\.1\.weight"):
        assert lite.load(path, state, strict=False) == {"epoch": 3}
    assert lite.load_report.missing == ("other", "model.2.weight", "model.2.bias")
    assert lite.load_report.unexpected == ("model.1.weight", "model.1.bias")
    assert state["other"] == 1
    lite.load(path, {"epoch": 0}, strict=False)
    assert str(lite.load_report) == "everything fitted"


def test_a_plain_state_dict_loads_into_a_module_or_an_optimizer(tmp_path: Path) -> None:
    """As torch.save wrote it, raw or set up; a checkpoint of several objects is told apart."""
    lite = Lite(accelerator="cpu")
    source = MLP()
    torch.save(source.state_dict(), tmp_path / "model.pt")
    model, optimizer = lite.setup(target := MLP(), torch.optim.SGD(target.parameters(), lr=0.1))
    lite.load_raw(tmp_path / "model.pt", model)
    assert torch.equal(model.body[0].weight, source.body[0].weight)
    torch.save(torch.optim.SGD(source.parameters(), lr=0.5).state_dict(), tmp_path / "optimizer.pt")
    lite.load_raw(tmp_path / "optimizer.pt", optimizer)
    assert optimizer.param_groups[0]["lr"] == 0.5
    torch.save({"other": torch.ones(1)}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="other"):
        lite.load_raw(tmp_path / "other.pt", model)
    with pytest.warns(UserWarning, match="unexpected: MLP.other"):
        lite.load_raw(tmp_path / "other.pt", model, strict=False)
    lite.save(tmp_path / "all.ckpt", {"model": model})
    with pytest.raises(CheckpointError, match=r"lite\.load\(path"):
        lite.load_raw(tmp_path / "all.ckpt", model)


class Versioned(nn.Module):
    """A module that multiplies the weights of its first version by ten."""

    _version = 2

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

    def _load_from_state_dict(self, state: Any, prefix: str, metadata: Any, *args: Any) -> None:
        if metadata.get("version", 1) < 2:
            state[f"{prefix}weight"] = state[f"{prefix}weight"] * 10
        super()._load_from_state_dict(state, prefix, metadata, *args)


@pytest.mark.parametrize("name", ["a.ckpt", "a"])
@pytest.mark.parametrize("background", [False, True])
def test_modules_find_the_version_that_they_were_saved_in(tmp_path: Path, name: str, background: bool) -> None:
    """Compiled or not, with lite or with plain torch: nothing of the present version is taken for old."""
    lite = Lite(accelerator="cpu")
    plain, compiled = nn.Sequential(Versioned()), nn.Sequential(torch.compile(Versioned()))
    for saved in (plain, compiled):
        lite.save(tmp_path / name, {"m": saved}, async_save=background)
        for target in (plain, compiled):
            lite.load(tmp_path / name, {"m": target})
            assert [p.tolist() for p in target.parameters()] == [[1.0, 1.0]]
        plain.load_state_dict(lite.load(tmp_path / name)["m"])
        assert [p.tolist() for p in plain.parameters()] == [[1.0, 1.0]]
    if name.endswith(".ckpt"):
        plain.load_state_dict(torch.load(tmp_path / name, weights_only=True)["m"])
        assert [p.tolist() for p in plain.parameters()] == [[1.0, 1.0]]


@pytest.mark.parametrize("name", ["a.ckpt", "a"])
def test_schedulers_that_count_milestones_go_on(tmp_path: Path, name: str) -> None:
    """Their Counter stays one."""
    lite = Lite(accelerator="cpu")

    def make() -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
        optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
        kinds = torch.optim.lr_scheduler
        parts = [kinds.ConstantLR(optimizer), kinds.MultiStepLR(optimizer, [2, 3])]
        return optimizer, kinds.SequentialLR(optimizer, parts, [3])

    def rates(optimizer: torch.optim.Optimizer, scheduler: torch.optim.lr_scheduler.LRScheduler) -> list[float]:
        found = []
        for _ in range(6):
            optimizer.step()
            scheduler.step()
            found.append(optimizer.param_groups[0]["lr"])
        return found

    optimizer, scheduler = make()
    optimizer.step()
    scheduler.step()
    lite.save(tmp_path / name, {"o": optimizer, "s": scheduler})
    expected = rates(optimizer, scheduler)
    optimizer, scheduler = make()
    lite.load(tmp_path / name, {"o": optimizer, "s": scheduler})
    assert rates(optimizer, scheduler) == expected
