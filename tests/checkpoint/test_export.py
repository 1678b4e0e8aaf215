"""Weights as safetensors: what safetensors and Hugging Face's loaders find."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lite import CheckpointError, ConfigError, Lite, MissingExtraError
from lite.checkpoint.export import parse_size
from lite.storage import Storage
from tests.checkpoint.parts import equal
from tests.support.models import MLP
from tests.support.processes import run_distributed

safetensors = pytest.importorskip("safetensors.torch")


class Tied(nn.Module):
    """An output layer that is the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 4)
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = self.embedding.weight


def _export(path: str) -> dict[str, object]:
    lite = Lite(accelerator="cpu")
    torch.manual_seed(0)
    model = lite.setup(MLP())
    lite.export(model, path, max_shard_size=130)
    return {name: value.tolist() for name, value in model.state_dict().items()}


def test_shards_and_index_are_hugging_faces(tmp_path: Path) -> None:
    """Names, sizes and the index as transformers reads them; rank 0 writes what all ranks have."""
    expected = run_distributed(_export, str(tmp_path / "model"))[0]
    files = sorted(p.name for p in (tmp_path / "model").iterdir())
    assert files == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)] + ["model.safetensors.index.json"]
    index = json.loads((tmp_path / "model" / files[-1]).read_text())
    assert index["metadata"]["total_size"] == 4 * (8 * 4 + 8 + 3 * 8 + 3)
    found = {}
    for name, file in index["weight_map"].items():
        found[name] = safetensors.load_file(tmp_path / "model" / file)[name].tolist()
    assert found == expected


def test_a_small_model_is_one_file(tmp_path: Path) -> None:
    """In a directory or under a name of its own; keys are the raw model's, also of a compiled one."""
    lite = Lite(accelerator="cpu")
    model = MLP()
    lite.export(torch.compile(model), tmp_path / "model")
    lite.export(model, tmp_path / "own.safetensors")
    for file in (tmp_path / "model" / "model.safetensors", tmp_path / "own.safetensors"):
        assert equal(dict(sorted(safetensors.load_file(file).items())), dict(sorted(model.state_dict().items())))
    with safetensors.safe_open(tmp_path / "own.safetensors", "pt") as opened:
        assert opened.metadata() == {"format": "pt"}


def test_tied_weights_are_written_once_and_views_as_their_own(tmp_path: Path) -> None:
    """safetensors' own load_model finds both names."""
    lite = Lite(accelerator="cpu")
    model = Tied()
    lite.export(model, tmp_path / "a.safetensors")
    assert list(safetensors.load_file(tmp_path / "a.safetensors")) == ["embedding.weight"]
    other = Tied()
    safetensors.load_model(other, tmp_path / "a.safetensors")
    assert torch.equal(other.head.weight, model.embedding.weight)
    model.register_buffer("part", model.embedding.weight.detach()[2:4])
    lite.export(model, tmp_path / "a.safetensors")
    assert torch.equal(safetensors.load_file(tmp_path / "a.safetensors")["part"], model.part)


def test_exporting_again_leaves_one_models_files(tmp_path: Path) -> None:
    """Fewer or more shards than before; the user's other files stay."""
    lite = Lite(accelerator="cpu")
    (tmp_path / "config.json").write_text("{}")
    for size, count in ((130, 4), ("5GB", 1), (130, 4), (150, 3)):
        lite.export(MLP(), tmp_path, max_shard_size=size)
        assert len([p for p in tmp_path.iterdir() if p.name.startswith("model")]) == count
        assert len(list(tmp_path.iterdir())) == count + 1


def test_a_failed_export_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full when it is flushed."""
    lite = Lite(accelerator="cpu")
    lite.export(MLP(), tmp_path / "a.safetensors")
    before = (tmp_path / "a.safetensors").read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    for name in ("a.safetensors", "new"):
        with pytest.raises(CheckpointError, match="No space left"):
            lite.export(MLP(), tmp_path / name)
    monkeypatch.undo()
    assert (tmp_path / "a.safetensors").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def read(folder: Path) -> dict[str, Any] | None:
    """As transformers does: the one file, else the index's shards, else no model."""
    if (folder / "model.safetensors").exists():
        return dict(safetensors.load_file(folder / "model.safetensors"))
    if not (folder / "model.safetensors.index.json").exists():
        return None
    where = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    return {name: safetensors.load_file(folder / file)[name] for name, file in where.items()}


@pytest.mark.parametrize(("before", "after"), [(130, 150), (130, "5GB"), ("5GB", 130), (130, 130), ("5GB", "5GB")])
def test_a_reader_finds_the_old_model_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: Any, after: Any
) -> None:
    """After each step of an export over another; where the names are the same, none for a moment, but never parts."""
    lite = Lite(accelerator="cpu")
    old, new = (dict(MLP().state_dict()) for _ in range(2))
    found: list[str] = []

    def look() -> None:
        model = read(tmp_path)
        found.append("none" if model is None else "old" if equal_weights(model, old) else "new")
        assert model is None or equal_weights(model, old) or equal_weights(model, new), "a mix of both"

    def looking(real: Any) -> Any:
        def call(*args: Any) -> None:
            real(*args)
            look()

        return call

    for weights, size in ((old, before), (new, after)):
        model = MLP()
        model.load_state_dict(weights)
        lite.export(model, tmp_path, max_shard_size=size)
        for method in ("rename", "remove", "flush"):
            monkeypatch.setattr(Storage, method, looking(getattr(Storage, method)))
    assert found[0] == "old" and found[-1] == "new" and found == sorted(found, key=["old", "none", "new"].index)
    assert ("none" in found) == (before == after == 130)


def equal_weights(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return equal(dict(sorted(a.items())), dict(sorted(b.items())))


@pytest.mark.parametrize("size", [130, 150, "5GB"])
def test_a_failed_export_leaves_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: Any) -> None:
    """The disk is full at the last of the new files."""
    lite = Lite(accelerator="cpu")
    lite.export(MLP(), tmp_path, max_shard_size=130)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    real, count = Storage.flush, {130: 4, 150: 3, "5GB": 1}[size]

    def full(self: Storage, path: str) -> None:
        nonlocal count
        count -= 1
        if count == 0:
            raise OSError(28, "No space left on device")
        real(self, path)

    monkeypatch.setattr(Storage, "flush", full)
    with pytest.raises(CheckpointError, match="No space left"):
        lite.export(MLP(), tmp_path, max_shard_size=size)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_the_extra_is_asked_for_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where safetensors is not installed."""
    monkeypatch.setitem(__import__("sys").modules, "safetensors.torch", None)
    with pytest.raises(MissingExtraError, match=r"pip install lite\[safetensors\]"):
        Lite(accelerator="cpu").export(MLP(), tmp_path / "a")


def test_sizes_are_read_as_people_write_them() -> None:
    """Decimal and binary units; anything else is refused."""
    assert [parse_size(s) for s in (7, "7", "2kb", "1.5 GB", "1GiB")] == [7, 7, 2000, 1_500_000_000, 2**30]
    for wrong in ("x", "5 parsecs", 0, -1, True, "-5GB"):
        with pytest.raises(ConfigError, match="max_shard_size"):
            parse_size(wrong)
