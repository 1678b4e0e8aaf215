"""Which checkpoints are better than others by their scores, and which may be removed."""

from __future__ import annotations

import math
import os
from pathlib import Path

import torch
from torch import Tensor

from lite.storage import is_url


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


def may_go(path: str, folder: str, resumed: str | None) -> bool:
    """Whether a checkpoint that is not kept any more may be removed: never what a run was resumed from, be it by a
    link, nor what lies elsewhere than in `folder`."""
    if is_url(path):
        return path != resumed and path.startswith(f"{folder.rstrip('/')}/")
    if resumed is not None and not is_url(resumed) and _place(path) in (_place(resumed), os.path.realpath(resumed)):
        return False
    return Path(folder).resolve() in Path(path).resolve().parents


def _place(path: str) -> str:
    """The file's place, where it may be a link."""
    folder, name = os.path.split(os.path.abspath(path))
    return os.path.join(os.path.realpath(folder), name)
