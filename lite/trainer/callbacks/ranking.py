"""Which checkpoints are better than others by their scores, and which may be removed."""

from __future__ import annotations

import math
import os
from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor

from lite.storage import is_url, locate


def as_score(value: Tensor, mode: str) -> Tensor:
    """The metric's value on the CPU, in its own precision; one that is no number loses against all others."""
    value = value.detach().cpu()
    return torch.full_like(value, lost(mode)) if torch.isnan(value) else value


def lost(mode: str) -> float:
    """What every number is better than."""
    return math.inf if mode == "min" else -math.inf


def is_better(value: Tensor, than: Tensor, mode: str) -> bool:
    """Whether one score is better than another."""
    return bool(value < than if mode == "min" else value > than)


def best_of(scores: dict[str, Tensor], mode: str) -> str:
    """The path with the best score; of equals the first."""
    choose = min if mode == "min" else max
    return choose(scores, key=lambda path: float(scores[path]))


def worst_of(scores: dict[str, Tensor], mode: str) -> str:
    """The path with the worst score; of equals the newest, so that the first that was as good stays."""
    choose = max if mode == "min" else min
    worst = choose(float(score) for score in scores.values())
    return [path for path, score in scores.items() if float(score) == worst][-1]


def may_go(path: str, folder: str, kept: Collection[str]) -> bool:
    """Whether a checkpoint that is not among the best any more may be removed: not what lies in one of the places
    `kept` (see `places_of`), nor what lies elsewhere than in `folder`."""
    if lies_in(path, kept):
        return False
    if is_url(path):
        return path.startswith(f"{folder.rstrip('/')}/")
    return Path(folder).resolve() in Path(path).resolve().parents


def lies_in(path: str, places: Collection[str]) -> bool:
    """Whether a checkpoint lies in one of those places (see `places_of`)."""
    return (path if is_url(path) else _place(path)) in places


def places_of(path: str | None) -> frozenset[str]:
    """Where a checkpoint lies: itself, and what it points to now, if it is a link."""
    if path is None or is_url(path):
        return frozenset() if path is None else frozenset([path])
    return frozenset([_place(path), os.path.realpath(path)])


def is_newer(path: str, than: str | None) -> bool:
    """Whether a file was written later than another, by the clock of where they lie."""
    return than is not None and _modified(path) > _modified(than)


def _modified(path: str) -> float:
    storage, target, _ = locate(path)
    return storage.modified(target)


def _place(path: str) -> str:
    """The file's place, where it may be a link."""
    folder, name = os.path.split(os.path.abspath(path))
    return os.path.join(os.path.realpath(folder), name)
