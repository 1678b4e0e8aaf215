"""A stage's data, made ready: who gives the loaders, what Lite does to them, how many batches count, who moves them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch.utils.data import DataLoader, IterableDataset, RandomSampler, SequentialSampler

from lite import collectives
from lite.data.loader import copied, in_order
from lite.errors import ConfigError
from lite.trainer.data.combined import CombinedLoader, has_loader
from lite.trainer.data.counting import INFINITE, length, limit_batches
from lite.trainer.datamodule import LightningDataModule
from lite.trainer.hooks import overrides
from lite.trainer.module_hooks import DataHooks

_TRANSFERS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")
Move = Callable[[Any, int], Any]


@dataclass
class StageData:
    """The loaders of one stage.

    Attributes:
        loaders: In evaluation one or several; in training one, or the CombinedLoader.
        limits: How many batches of each count; infinite where nobody knows.
        names: Of evaluation loaders that were given as a dict.
        move: Moves a batch, where loaders don't; None where they do.
        combined: Training draws from several loaders together.
        may_end_alone: A rank's training data may end before the others', and nobody knows when.
        sources: What the user gave, each with what was made of it.
    """

    loaders: list[Any] = field(default_factory=list)
    limits: list[float] = field(default_factory=list)
    names: list[str] | None = None
    move: Move | None = None
    combined: bool = False
    may_end_alone: bool = False
    sources: list[tuple[Any, Any]] = field(default_factory=list)

    @property
    def num_batches(self) -> float:
        """All batches that count."""
        return sum(self.limits)

    def agree(self) -> None:
        """Let training end on all ranks with the same batch. Collective: call on all ranks."""
        known = [length(loader) is not None for loader in self.loaders]
        everyone = collectives.all_gather_objects((self.limits, known))
        self.may_end_alone = not all(all(known) for _, known in everyone)
        limits = [limits for limits, _ in everyone]
        self.limits = [min(column) for column in zip(*limits, strict=True)]
        if any(mine != self.limits for mine in limits):
            warnings.warn(
                f"the ranks have {[int(sum(mine)) for mine in limits if sum(mine) < INFINITE]} training batches; an "
                f"epoch ends on all of them after {int(self.num_batches)}.",
                stacklevel=6,
            )


def find_loaders(name: str, given: Any, module: Any, datamodule: Any) -> Any:
    """What the user passed, or the datamodule's or module's method returns; None where there is none.

    Args:
        name: "train_dataloader", "val_dataloader", "test_dataloader" or "predict_dataloader".
        given: What was passed, or None.
        module: The module.
        datamodule: The datamodule, or None.
    """
    if given is not None:
        return given
    for owner, base in ((datamodule, LightningDataModule), (module, DataHooks)):
        if owner is not None and overrides(owner, name, base):
            return getattr(owner, name)()
    return None


def has_loaders(name: str, given: Any, module: Any, datamodule: Any) -> bool:
    """Whether `find_loaders` would find any."""
    if given is not None or (datamodule is not None and overrides(datamodule, name, LightningDataModule)):
        return True
    return overrides(module, name, DataHooks)


def find_move(lite: Any, module: Any, datamodule: Any) -> Move | None:
    """The function that moves a batch by the user's transfer hooks; None where nobody overrides one."""
    owner: Any = None
    for candidate, base in ((module, DataHooks), (datamodule, DataHooks)):
        if candidate is not None and any(overrides(candidate, name, base) for name in _TRANSFERS):
            if owner is not None:
                warnings.warn(
                    "module and datamodule both override batch transfer hooks; the datamodule's are used.", stacklevel=4
                )
            owner = candidate
    if owner is None:
        return None
    before, transfer, after = (getattr(owner, name) for name in _TRANSFERS)
    device = lite.device

    def move(batch: Any, index: int) -> Any:
        return after(transfer(before(batch, index), device, index), index)

    return move


def make_ready(lite: Any, loader: Any, *, use_distributed_sampler: Any, moves: bool) -> Any:
    """The loader as Lite splits it; other iterables, and loaders that Lite has prepared before, stay as they are.

    Lite gets a copy, so that the same loader may serve for training and validation, or twice in a list.
    """
    if not isinstance(loader, DataLoader):
        if not hasattr(loader, "__iter__"):
            remedy = "; wrap it: DataLoader(dataset, batch_size=...)" if hasattr(loader, "__getitem__") else ""
            raise ConfigError(
                f"an object of type {type(loader).__name__} was given as a loader, but can't be iterated over{remedy}."
            )
        return loader
    if hasattr(loader, "go_on_under"):  # from lite.setup_dataloaders
        return loader
    return lite.setup_dataloaders(copied(loader), use_distributed_sampler=use_distributed_sampler, move_to_device=moves)


def train_data(
    lite: Any,
    raw: Any,
    limit: int | float,
    *,
    move: Move | None,
    mode: str = "max_size_cycle",
    overfit: int | float = 0.0,
    use_distributed_sampler: Any = True,
    before: StageData | None = None,
) -> StageData:
    """Training's loader, or several drawn from together; those that `before` has too go on as they are."""
    combined = raw
    if isinstance(raw, Mapping) or (isinstance(raw, (list, tuple)) and has_loader(raw)):
        combined = CombinedLoader(raw, mode)
    several = isinstance(combined, CombinedLoader)
    if several and combined.mode == "sequential":
        raise ConfigError("training can't draw from a CombinedLoader with mode='sequential'; choose another mode.")

    sources: list[tuple[Any, Any]] = []

    def ready(raw: Any) -> Any:
        made = _made_before(raw, before, sources)
        if made is None:
            loader = without_shuffling(raw) if overfit else raw
            made = make_ready(lite, loader, use_distributed_sampler=use_distributed_sampler, moves=move is None)
        sources.append((raw, made))
        return made

    loader = combined.replaced(ready) if several else ready(combined)
    parts = loader.flattened if several else [loader]
    if move is None and lite.device.type != "cpu" and not all(isinstance(part, DataLoader) for part in parts):
        move = lambda batch, index: lite.to_device(batch)  # noqa: E731
    name = "overfit_batches" if overfit else "limit_train_batches"
    limits = [limit_batches(overfit or limit, length(loader), name)]
    return StageData([loader], limits, None, move, several, sources=sources)


def eval_data(
    lite: Any,
    raw: Any,
    limit: int | float,
    *,
    stage: str,
    move: Move | None,
    overfit: int | float = 0.0,
    use_distributed_sampler: Any = True,
    before: StageData | None = None,
) -> StageData:
    """Evaluation's loaders, one after another in any nesting, or a CombinedLoader as one; dicts' keys name them.

    Those that `before` has too go on as they are.
    """
    if isinstance(raw, CombinedLoader):
        if raw.mode == "sequential":
            raw = raw.iterables
        elif lite.world_size > 1:
            raise ConfigError(
                f"on several processes {stage} counts each sample once, so it takes loaders one after another, and got "
                f"a CombinedLoader with mode={raw.mode!r}; use mode='sequential'."
            )
    names, loaders = _flattened(raw, stage)
    for loader in loaders:
        if isinstance(loader, DataLoader) and isinstance(getattr(loader, "sampler", None), RandomSampler):
            warnings.warn(
                f"the loader for {stage} shuffles, so its batches differ from run to run; use shuffle=False.",
                stacklevel=4,
            )

    def prepare(loader: Any) -> Any:
        plain = without_shuffling(loader) if overfit else loader
        return make_ready(lite, plain, use_distributed_sampler=use_distributed_sampler, moves=move is None)

    sources: list[tuple[Any, Any]] = []
    for loader in loaders:
        ready = _made_before(loader, before, sources)
        if ready is None:
            ready = loader.replaced(prepare) if isinstance(loader, CombinedLoader) else prepare(loader)
        sources.append((loader, ready))
    made = [ready for _, ready in sources]
    if move is None and lite.device.type != "cpu" and not all(isinstance(loader, DataLoader) for loader in made):
        move = lambda batch, index: lite.to_device(batch)  # noqa: E731
    name = "overfit_batches" if overfit else f"limit_{'val' if stage == 'validate' else stage}_batches"
    limits = [limit_batches(overfit or limit, length(loader), name) for loader in made]
    return StageData(made, limits, names, move, sources=sources)


def _flattened(raw: Any, stage: str) -> tuple[list[str] | None, list[Any]]:
    """The loaders of a nesting, with the keys and numbers that lead to each, where there are keys.

    Raises:
        ConfigError: An entry is no loader, or two have one name.
    """
    found: list[tuple[tuple[str, ...], Any]] = []
    has_keys = False

    def add(part: Any, place: tuple[str, ...]) -> None:
        nonlocal has_keys
        has_keys = has_keys or isinstance(part, Mapping)
        if isinstance(part, Mapping):
            entries = [(str(key), value) for key, value in part.items()]
        elif isinstance(part, (list, tuple)) and has_loader(part):
            entries = [(str(number), value) for number, value in enumerate(part)]
        else:
            if len(place) > 1 and (isinstance(part, str) or hasattr(part, "shape") or not hasattr(part, "__iter__")):
                raise ConfigError(
                    f"the data to {stage} have a {type(part).__name__} at {'/'.join(place)!r}, where a loader belongs: "
                    "pass a loader, or dicts and lists of them in any nesting; wrap data in DataLoader(dataset, "
                    "batch_size=...)."
                )
            found.append((place, part))
            return
        for name, value in entries:
            add(value, (*place, name))

    add(raw, ())
    names = ["/".join(place) for place, _ in found]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ConfigError(f"the data to {stage} have two loaders named {twice!r}; give their keys different names.")
    return names if has_keys else None, [loader for _, loader in found]


def _made_before(raw: Any, before: StageData | None, taken: list[tuple[Any, Any]]) -> Any:
    """What was made of the same loader before, and is not taken yet; None where there is nothing."""
    for given, made in before.sources if before is not None else ():
        if given is raw and not any(made is other for _, other in taken):
            return made
    return None


def without_shuffling(loader: Any) -> Any:
    """The same loader in the dataset's order, where it is a plain one that shuffles."""
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return loader
    if isinstance(loader.sampler, SequentialSampler):
        return loader
    if loader.batch_size is None and loader.batch_sampler is not None:
        warnings.warn("overfit_batches: a custom batch sampler stays as it is, shuffling included.", stacklevel=5)
        return loader
    warnings.warn("overfit_batches trains on the same batches in each epoch: shuffling is off.", stacklevel=5)
    return in_order(loader)
