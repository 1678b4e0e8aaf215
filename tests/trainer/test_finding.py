"""Which checkpoint a word stands for, among those of some folders."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lite import Lite
from lite.trainer.checkpoints.finding import newest_checkpoint, next_hpc_checkpoint, sibling_versions


def _save(path: Path, age_s: int = 0) -> str:
    Lite(accelerator="cpu").save(path, {"x": 1})
    stamp = 1_700_000_000 - age_s
    os.utime(path, (stamp, stamp))
    return str(path)


def test_next_hpc_checkpoint_follows_the_highest_number(tmp_path: Path) -> None:
    """By number, not by name or number of files; other names don't count."""
    assert next_hpc_checkpoint(str(tmp_path)) == str(tmp_path / "hpc_ckpt_1.ckpt")
    for name in ("hpc_ckpt_2.ckpt", "hpc_ckpt_10.ckpt", "hpc_ckpt_11.ckpt.part", "my_hpc_ckpt_12.ckpt"):
        (tmp_path / name).touch()
    assert next_hpc_checkpoint(str(tmp_path)) == str(tmp_path / "hpc_ckpt_11.ckpt")


def test_the_newest_whole_checkpoint_is_found(tmp_path: Path) -> None:
    """Over all folders; hidden files, other suffixes and other names aside."""
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    older = _save(one / "hpc_ckpt_1.ckpt", 30)
    newest = _save(two / "last.ckpt", 20)
    _save(two / ".unfinished.ckpt", 10)
    _save(two / "weights.pt")
    folders = [str(one), str(two), str(tmp_path / "missing")]
    assert newest_checkpoint(folders) == newest
    assert newest_checkpoint(folders, named="hpc_ckpt_") == older
    assert newest_checkpoint(folders, named=".") is None


def test_a_damaged_checkpoint_is_passed_over_with_a_word(tmp_path: Path) -> None:
    """The one before it is taken."""
    older = _save(tmp_path / "a.ckpt", 30)
    cut = tmp_path / "b.ckpt"
    _save(cut)
    cut.write_bytes(cut.read_bytes()[:-100])
    with pytest.warns(UserWarning, match="b.ckpt is damaged and was passed over"):
        assert newest_checkpoint([str(tmp_path)]) == older


def test_other_versions_are_looked_into_unless_this_one_has_checkpoints(tmp_path: Path) -> None:
    """A fresh version goes on from a sibling; a chosen one with checkpoints stands alone."""
    mine, other = (tmp_path / f"version_{number}" / "checkpoints" for number in (1, 0))
    for folder in (mine, other):
        folder.mkdir(parents=True)
    (tmp_path / "version_x").mkdir()
    _save(other / "last.ckpt")
    assert sorted(set(sibling_versions(str(mine)))) == sorted([str(other), str(mine)])
    assert sibling_versions(str(other)) == [str(other)]
    assert sibling_versions(str(tmp_path)) == [str(tmp_path)]
